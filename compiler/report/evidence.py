"""What the report is drawn from beside the manifest: kept in `report/evidence.json`, so that it can be drawn again.

`otc report` needs it once latencies were measured. Like the report it is an attachment: no part of the artifact's
digest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field, ValidationError, model_validator

from otcache.schemas.errors import ArtifactError
from otcache.schemas.program import Frozen

from ..workspace.progress import Pass, PassingReporter, Reporter
from .sheets import cell_of

NAME = "evidence.json"
MAX_BYTES = 32 << 20
WORST = 3
"""Held-out prompts that the report names at each budget."""


class BudgetEvidence(Frozen):
    """What one budget's program came to on each of the n held-out prompts."""

    budget: int = Field(ge=1)
    psnr_db: tuple[float, ...] = Field(min_length=1)
    ssim: tuple[float, ...]
    worst: tuple[int, ...]
    """Indices of the prompts with the lowest PSNR, the lowest first."""
    positions: tuple[int, ...]
    """Computed steps of the full timeline, then T, the end."""
    errors: tuple[tuple[float, ...], ...]
    """At each of `positions`: ‖x − x_full‖ / ‖x_full‖ of the latents, one a prompt."""

    @model_validator(mode="after")
    def _consistent(self) -> BudgetEvidence:
        count = len(self.psnr_db)
        if len(self.ssim) != count or any(len(row) != count for row in self.errors):
            raise ValueError(f"budget {self.budget}: expected {count} values of everything")
        if len(self.errors) != len(self.positions) or any(not 0 <= index < count for index in self.worst):
            raise ValueError(f"budget {self.budget}: errors or worst prompts do not fit")
        return self


class PassEvidence(Frozen):
    """A pass of the compile that wrote the report. Measurements of its host."""

    name: str
    seconds: float = Field(ge=0)
    evaluations: int = Field(default=0, ge=0)
    """Model evaluations of one sample."""
    reused: int = Field(default=0, ge=0)
    """Those that an earlier compile had made."""


class PeerEvidence(Frozen):
    """The peer that came closest to the full run at a budget, whose pictures are shown beside ours."""

    budget: int = Field(ge=1)
    name: str
    psnr_db: tuple[float, ...]
    """Of the prompts that are shown."""


class Bench(Frozen):
    """Latency of the artifact on the host that compiled it."""

    command: str
    """What measures it again."""
    missing: str | None = None
    """Why it was not measured; the rest is then empty."""
    host: str = ""
    backend: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    latency_s: dict[str, float] = Field(default_factory=dict)
    """Median seconds of one picture, by budget."""
    requests: int = Field(default=0, ge=0)
    """Of each budget, that were timed."""


class Evidence(Frozen):
    """Everything that the report shows and the manifest does not hold."""

    prompts: dict[int, str]
    """Of the held-out prompts that the report names, by index."""
    seeds: dict[int, int]
    shown: int = Field(ge=1)
    """The first ones, whose pictures are in `pictures.png`."""
    cell: tuple[int, int]
    """Width and height of a picture on the sheets."""
    timesteps: tuple[float, ...] = Field(min_length=1)
    """(T,) of the full sampler."""
    sigmas: tuple[float, ...] | None = None
    """(T+1,) noise levels, if the scheduler has them."""
    budgets: tuple[BudgetEvidence, ...]
    passes: tuple[PassEvidence, ...] = ()
    peers: tuple[PeerEvidence, ...] = ()
    """Of every budget one, or none of all."""
    targets: tuple[str, ...] = ()
    """Qualities that were asked for."""
    bench: Bench | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Evidence:
        named = {index for entry in self.budgets for index in entry.worst} | set(range(self.shown))
        if self.peers and [each.budget for each in self.peers] != [each.budget for each in self.budgets]:
            raise ValueError("peers are not those of the budgets")
        if any(len(each.psnr_db) != self.shown for each in self.peers):
            raise ValueError("peers do not fit the prompts that are shown")
        if not named <= self.prompts.keys() or not named <= self.seeds.keys():
            raise ValueError("prompts or seeds are missing")
        if self.sigmas is not None and len(self.sigmas) != len(self.timesteps) + 1:
            raise ValueError(f"{len(self.sigmas)} sigmas of {len(self.timesteps)} timesteps: expected one more")
        return self

    @property
    def seconds(self) -> dict[str, PassEvidence]:
        """Passes by name; those of one name added up."""
        found: dict[str, PassEvidence] = {}
        for each in self.passes:
            before = found.get(each.name, PassEvidence(name=each.name, seconds=0.0))
            found[each.name] = PassEvidence(
                name=each.name,
                seconds=before.seconds + each.seconds,
                evaluations=before.evaluations + each.evaluations,
                reused=before.reused + each.reused,
            )
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """Pictures, uint8 (n, height, width, 3): the same prompts and seeds at every budget and in the full run."""

    full: np.ndarray
    budgets: dict[int, np.ndarray]
    """Of each budget, the same prompts as `full`."""
    worst: dict[int, tuple[np.ndarray, np.ndarray]]
    """Of each budget, its worst prompts: the full run's pictures, and its own."""
    peers: dict[int, np.ndarray] = field(default_factory=dict)
    """Of each budget, the best peer's pictures of the same prompts as `full`; empty where none were made."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PeerPictures:
    """The best peer at a budget, on the prompts that are shown."""

    name: str
    psnr_db: np.ndarray
    pictures: np.ndarray
    """uint8 (shown, height, width, 3)."""


def gather(
    kept: Mapping[int, Mapping[str, np.ndarray]],
    references: Mapping[int, np.ndarray] | np.ndarray,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    timesteps: Sequence[float],
    sigmas: Sequence[float] | None,
    passes: Sequence[PassEvidence] = (),
    peers: Mapping[int, PeerPictures] | None = None,
    targets: Sequence[str] = (),
) -> tuple[Evidence, Shown]:
    """Gather what the report is drawn from.

    Args:
        kept: what is kept of each budget's roll-out on n held-out prompts, by name: `psnr_db` and `ssim` (n,),
            `positions` (p,), `errors` (p, n), `worst` (indices), `pictures` and `worst_pictures` (uint8).
        references: pictures of the full runs, uint8 (height, width, 3), by prompt: those that are shown, and each
            budget's worst.
        prompts: the held-out ones, n.
        seeds: of their noise, n.
        timesteps: of the full sampler, (T,).
        sigmas: its noise levels, (T + 1,), if the scheduler has them.
        passes: of the compile, in order.
        peers: the best one at each budget, where there are any.
        targets: qualities that were asked for.

    Returns:
        What is kept beside the report, and the pictures that it shows.
    """
    entries = {
        budget: BudgetEvidence(
            budget=budget,
            psnr_db=tuple(_round(arrays["psnr_db"])),
            ssim=tuple(_round(arrays["ssim"])),
            worst=tuple(arrays["worst"].tolist()),
            positions=tuple(arrays["positions"].tolist()),
            errors=tuple(tuple(_round(row)) for row in arrays["errors"]),
        )
        for budget, arrays in sorted(kept.items())
    }
    shown = len(next(iter(kept.values()))["pictures"])
    named = sorted({*range(shown), *(index for entry in entries.values() for index in entry.worst)})
    evidence = Evidence(
        prompts={index: prompts[index] for index in named},
        seeds={index: seeds[index] for index in named},
        shown=shown,
        cell=cell_of(*references[0].shape[:2]),
        timesteps=tuple(_round(timesteps)),
        sigmas=None if sigmas is None else tuple(_round(sigmas)),
        budgets=tuple(entries.values()),
        passes=tuple(passes),
        peers=tuple(
            PeerEvidence(budget=budget, name=peer.name, psnr_db=tuple(_round(peer.psnr_db)))
            for budget, peer in sorted((peers or {}).items())
        ),
        targets=tuple(targets),
    )
    pictures = Shown(
        full=_stack(references, range(shown)),
        budgets={budget: arrays["pictures"] for budget, arrays in kept.items()},
        worst={
            budget: (_stack(references, arrays["worst"].tolist()), arrays["worst_pictures"])
            for budget, arrays in kept.items()
        },
        peers={budget: peer.pictures for budget, peer in (peers or {}).items()},
    )
    return evidence, pictures


def _stack(references: Mapping[int, np.ndarray] | np.ndarray, rows: Iterable[int]) -> np.ndarray:
    return np.stack([references[row] for row in rows])


def _round(values: ArrayLike) -> list[float]:
    """Six significant digits: what a report can use, in few bytes.

    >>> _round([2 / 3, 12345678.0])
    [0.666667, 12345700.0]
    """
    return [float(f"{value:.6g}") for value in np.asarray(values, dtype=np.float64)]


def write_evidence(folder: Path, evidence: Evidence) -> None:
    (folder / NAME).write_text(evidence.model_dump_json() + "\n", encoding="utf-8")


def read_evidence(folder: Path) -> Evidence:
    """What `write_evidence` wrote. Raises ArtifactError."""
    path = folder / NAME
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ArtifactError(f"{path}: expected at most {MAX_BYTES} bytes: compile the artifact again")
        return Evidence.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror}): the artifact was compiled by an older version or lacks its "
            "report: compile it again"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path} is damaged at {where or 'its start'}: {first['msg']}: compile it again") from error


class Recorder(PassingReporter):
    """Passes everything on, and keeps how long each pass took."""

    def __init__(self, inner: Reporter) -> None:
        super().__init__(inner)
        self.passes: list[PassEvidence] = []

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        with super().on(name, description) as current:
            yield current
            counts = [int(current.facts.get(fact, 0)) for fact in ("evaluations", "evaluations_reused")]
            seconds = round(current.seconds, 3)
            self.passes.append(PassEvidence(name=name, seconds=seconds, evaluations=counts[0], reused=counts[1]))
