"""The manifest: index, contract and trust boundary of an artifact. `schemas/README.md` is its specification."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from . import consistency, sized
from .digest import digest_of_value
from .structure import (
    FULL,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    PLACE,
    SCHEMA_MAJOR,
    SCHEMA_MINOR,
    SCHEMA_VERSION,
    SIGNATURE_NAME,
    ArtifactPath,
    Baseline,
    Budget,
    BudgetProgram,
    Candidate,
    Conditions,
    Cost,
    Count,
    Digest,
    DType,
    Engine,
    Feature,
    FileEntry,
    Golden,
    Guidance,
    Latents,
    Measurement,
    Model,
    Name,
    OnnxPath,
    Policy,
    Quality,
    Sampler,
    ServedSize,
    Shapes,
    Size,
    Stage,
    Statistic,
    Structure,
    TensorInfo,
    Tokenizer,
)

__all__ = [
    "FULL",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "PLACE",
    "SCHEMA_MAJOR",
    "SCHEMA_MINOR",
    "SCHEMA_VERSION",
    "SIGNATURE_NAME",
    "ArtifactPath",
    "Baseline",
    "Budget",
    "BudgetProgram",
    "Candidate",
    "Conditions",
    "Cost",
    "Count",
    "DType",
    "Digest",
    "Engine",
    "Feature",
    "FileEntry",
    "Golden",
    "Guidance",
    "Latents",
    "Manifest",
    "Measurement",
    "Model",
    "Name",
    "OnnxPath",
    "Policy",
    "Quality",
    "Sampler",
    "ServedSize",
    "Shapes",
    "Size",
    "Stage",
    "Statistic",
    "Structure",
    "TensorInfo",
    "Tokenizer",
    "core_digest",
]


class Manifest(Structure):
    """See `schemas/README.md`. `digest` is that of everything but itself, `measurements` and `attachments`."""

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        consistency.check(self)
        sized.check_shapes(self)
        return self


def core_digest(manifest: dict[str, Any]) -> str:
    """Digest of a manifest's JSON value without `digest`, `measurements` and `attachments`."""
    outside = ("digest", "measurements", "attachments")
    return digest_of_value({key: value for key, value in manifest.items() if key not in outside})
