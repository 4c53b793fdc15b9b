"""Conditioning from files: what safetensors writes is read back, and what is broken is refused with a reason."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.cli import main as cli
from otcache.runtime.serving.conditioning import MAX_BYTES, read_conditioning
from otcache.schemas.errors import RequestError


@pytest.fixture
def sampler(artifact_folder):
    with Sampler.load(artifact_folder) as loaded:
        yield loaded


def written(path, tensors):
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def test_what_safetensors_writes_is_read(sampler, tmp_path):
    made = sampler.encode(["a red ring", "a blue star"])
    path = written(tmp_path / "c.safetensors", {**made, "unused": np.arange(3)})
    found = read_conditioning(path, sampler.manifest)
    assert set(found) == set(made)
    for name, value in made.items():
        np.testing.assert_array_equal(found[name], value)


def test_bfloat16_is_widened(sampler, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.randn(2, 1, 12).bfloat16()
    save_file({"text": values}, tmp_path / "c.safetensors")
    found = read_conditioning(tmp_path / "c.safetensors", sampler.manifest)["text"]
    np.testing.assert_array_equal(found, values.float().numpy())


def test_run_with_conditioning_is_run_with_the_prompt(sampler, artifact_folder, tmp_path):
    path = written(tmp_path / "c.safetensors", sampler.encode(["a red ring"]))
    for name, source in (("a.png", ("--prompt", "a red ring")), ("b.png", ("--conditioning", str(path)))):
        line = ["run", str(artifact_folder), "--budget", "2", "--seed", "4", *source, "-o", str(tmp_path / name)]
        result = CliRunner().invoke(cli.main, line)
        assert result.exit_code == 0, result.output
    np.testing.assert_array_equal(*(np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")))


@pytest.mark.parametrize(
    "source",
    [
        (),
        ("--prompt", "a", "--conditioning", "c"),
        ("--conditioning", "c", "-n", "2"),
        ("--conditioning", "c", "--negative-prompt", "b"),
    ],
)
def test_one_source_of_conditioning(artifact_folder, source):
    result = CliRunner().invoke(cli.main, ["run", str(artifact_folder), "--budget", "2", *source])
    assert result.exit_code == 2 and "--conditioning" in result.stderr


def entry(**changes):
    return {"text": {"dtype": "F32", "shape": [2, 1, 12], "data_offsets": [0, 96], **changes}}


@pytest.mark.parametrize(
    ("header", "size", "found"),
    [
        (entry(), 95, "safetensors"),
        (entry(), 97, "safetensors"),
        (entry(dtype="F9"), 96, "safetensors"),
        (entry(dtype=["F32"]), 96, "safetensors"),
        (entry(dtype="U64", shape=[1, 1, 12]), 96, "text of type U64: expected one of F64, F32, F16, BF16"),
        (entry(shape=[2, 1, -12]), 96, "safetensors"),
        (entry(shape=[2, 1, 1 << 40]), 96, "safetensors"),
        (entry(shape=[1 << 40, 1 << 40]), 96, "safetensors"),
        (entry(shape=None), 96, "safetensors"),
        (entry(data_offsets=[4, 100]), 100, "safetensors"),
        (entry(data_offsets=[96, 0]), 96, "safetensors"),
        (entry(data_offsets="x"), 96, "safetensors"),
        ({"text": 3}, 96, "safetensors"),
        ({**entry(), "more": entry()["text"]}, 96, "safetensors"),
        ({}, 0, "[]"),
        ({"other": entry()["text"]}, 96, "other"),
    ],
)
def test_broken_files_are_refused(artifact_folder, tmp_path, header, size, found):
    text = json.dumps(header).encode()
    path = tmp_path / "c.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    assert found in refusal(path, artifact_folder)


def refusal(path, artifact_folder):
    """The one line that says why a file is refused."""
    with pytest.raises(RequestError) as caught:
        read_conditioning(path, Artifact.open(artifact_folder).manifest)
    message = str(caught.value)
    assert "otc encode" in message and "\n" not in message
    return message


def test_duplicate_names_and_large_headers_are_refused(artifact_folder, tmp_path):
    path = tmp_path / "c.safetensors"
    one = json.dumps(entry())[1:-1]
    for text in (f"{{{one},{one}}}".encode(), json.dumps(entry()).encode() + b" " * (1 << 20)):
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(96))
        refusal(path, artifact_folder)
    assert "a header of" in refusal(path, artifact_folder)


def test_a_file_that_is_too_large_is_not_read(artifact_folder, tmp_path):
    path = tmp_path / "c.safetensors"
    with open(path, "wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse
    assert f"{MAX_BYTES + 1} bytes" in refusal(path, artifact_folder)


@given(st.data())
def test_any_damage_is_refused_in_one_line_or_does_no_harm(artifact_folder, tmp_path_factory, data):
    manifest = Artifact.open(artifact_folder).manifest
    text = json.dumps(entry()).encode()
    content = bytearray(struct.pack("<Q", len(text)) + text + bytes(96))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "c.safetensors"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = read_conditioning(path, manifest)
    except RequestError as error:
        assert "\n" not in str(error)
    else:
        assert set(found) == {"text"} and found["text"].nbytes <= 2 * 96


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\x02" + bytes(7) + b"[]", b"\x40" + bytes(7), struct.pack("<Q", 4) + b'{"a"']
)
def test_headers_that_are_none_are_refused(artifact_folder, tmp_path, data):
    (tmp_path / "c.safetensors").write_bytes(data)
    with pytest.raises(RequestError, match="--conditioning"):
        read_conditioning(tmp_path / "c.safetensors", Artifact.open(artifact_folder).manifest)
