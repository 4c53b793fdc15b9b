"""Paths, digests and the published JSON schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from otcache.schemas.digest import canonical_json, digest_of_bytes, digest_of_value
from otcache.schemas.manifest import FileEntry, Latents, Manifest, core_digest

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize("path", ["manifest.json", "engines/onnx/block_0.onnx", "a+b-c_d.e"])
def test_plain_relative_paths_are_accepted(path):
    assert FileEntry(path=path, size_bytes=1, digest=DIGEST).path == path


@pytest.mark.parametrize(
    "path",
    ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".hidden", "a/.b", "a\\b", "C:x", "a\nb", "a" * 256, "é"],
)
def test_other_paths_are_refused(path):
    with pytest.raises(ValidationError, match="no plain relative path"):
        FileEntry(path=path, size_bytes=1, digest=DIGEST)


@pytest.mark.parametrize("digest", ["", "0" * 64, "sha256:" + "0" * 63, "sha256:" + "G" * 64, DIGEST + "\n"])
def test_other_digests_are_refused(digest):
    with pytest.raises(ValidationError):
        FileEntry(path="a", size_bytes=1, digest=digest)


def test_digests_do_not_depend_on_the_order_of_keys():
    assert digest_of_value({"a": 1, "b": [0.1]}) == digest_of_value({"b": [0.1], "a": 1})
    assert canonical_json({"b": 1.5, "a": "ü"}) == '{"a":"ü","b":1.5}'.encode()
    assert digest_of_bytes(b"").startswith("sha256:e3b0c442")


def test_measurements_and_reports_are_outside_the_digest():
    core = {"model": "x", "digest": DIGEST, "measurements": [1], "attachments": []}
    assert core_digest(core) == core_digest({"model": "x"}) != core_digest({"model": "y"})


def test_latents_must_be_a_rearrangement():
    shape = {"noise_shape": [4, 8, 8], "split": [4, 4, 2, 4, 2], "permutation": [1, 3, 0, 2, 4], "shape": [16, 16]}
    Latents.model_validate({**shape, "initial_scale": 1.0})
    with pytest.raises(ValidationError, match="expected the same"):
        Latents.model_validate({**shape, "shape": [16, 15], "initial_scale": 1.0})
    with pytest.raises(ValidationError, match="an order of 5 axes"):
        Latents.model_validate({**shape, "permutation": [0, 0, 1, 2, 3], "initial_scale": 1.0})


def test_published_schema_is_that_of_the_models():
    published = Path(__file__).parents[2] / "schemas" / "manifest.schema.json"
    assert json.loads(published.read_text()) == Manifest.model_json_schema(), (
        "run: python -m otcache.schemas.publish schemas/manifest.schema.json"
    )
