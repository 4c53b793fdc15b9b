"""Attacks on an artifact end in ArtifactError and nothing else."""

import json
import os
import random

import pytest
import small_artifact as small
from hypothesis import given, settings
from hypothesis import strategies as st

from otcache.runtime.artifact.reader import Artifact
from otcache.schemas.errors import ArtifactError, OTCacheError
from otcache.schemas.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from otcache.schemas.strict_json import MAX_DEPTH

BLOCK = "engines/onnx/block_0.onnx"
OTHER = "engines/onnx/block_1.onnx"


def refused(folder, *words):
    """The message of the ArtifactError that opening and verifying ends in."""
    with pytest.raises(ArtifactError) as caught:
        Artifact.open(folder).verify()
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    for word in words:
        assert word in message, message
    return message


def edit(folder, change):
    value = small.read_manifest(folder)
    change(value)
    small.write_manifest(folder, value)


def raw(folder, data):
    (folder / MANIFEST_NAME).write_bytes(data)


def test_whole(artifact_folder):
    artifact = Artifact.open(artifact_folder)
    result = artifact.verify()
    assert result.files == len(artifact.manifest.files) + 1 and not result.unlisted
    assert artifact.path(BLOCK).is_file() and artifact.read(BLOCK) == (artifact_folder / BLOCK).read_bytes()


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "nothing there", "otc compile")
    refused(tmp_path, "no manifest.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "a file")
    refused("bad\0name")


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_truncated(damaged, length):
    raw(damaged, (damaged / MANIFEST_NAME).read_bytes()[:length])
    refused(damaged, MANIFEST_NAME, "valid JSON")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"\xff\xfe{}", "UTF-8"),
        (b"[]", "JSON object"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "found"),
        (b"[" * (MAX_DEPTH + 1), "levels"),
        (b"[" * 1_000_000, "levels"),
        (b'{"a":' * 100_000, "levels"),
        (b'{"a": "\\ud800"}', "schema_version"),
        (b'{"schema_version": "1.0", "a": "\\ud800"}', "found"),
        (b'{"schema_version": "2.0"}', "pip install --upgrade otcache"),
        (b'{"schema_version": "0.9"}', "compile it again"),
        (b'{"schema_version": 1.0}', "schema_version"),
        (b'{"schema_version": "1.0\\n"}', "schema_version"),
        (b'{"schema_version": "1.0", "digest": "sha256:0"}', "digest"),
        (b'"' + b'\\"' * 100_000, "JSON"),
    ],
)
def test_manifest_bytes(damaged, data, word):
    raw(damaged, data)
    refused(damaged, MANIFEST_NAME, word)


def test_manifest_too_large(damaged):
    with open(damaged / MANIFEST_NAME, "r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    refused(damaged, "at most")


def test_unknown_minor_and_field_are_read(damaged):
    edit(damaged, lambda value: value.update(schema_version="1.7", novelty={"x": [1]}))
    Artifact.open(damaged).verify()


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../b", "a//b", ".hidden", "a\\b", "c:/x", "a/./b", "x\n"])
def test_paths_that_leave(damaged, path):
    edit(damaged, lambda value: value["files"][0].update(path=path))
    refused(damaged, "path")


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v["files"].append(dict(v["files"][0])),
        lambda v: v["files"].append({**v["files"][0], "path": v["files"][0]["path"].upper()}),
        lambda v: v["files"].pop(),
        lambda v: v["files"][0].update(size_bytes="12"),
        lambda v: v["files"][0].update(size_bytes=-1),
        lambda v: v["programs"][0]["program"]["steps"][0].update(latent_coef=1e9),
        lambda v: v["programs"][0].update(budget="5"),
        lambda v: v["latents"].update(permutation=[0, 0, 1, 2, 3]),
        lambda v: v.pop("guidance"),
        lambda v: v["model"].update(name="x" * 300),
    ],
)
def test_structure(damaged, change):
    edit(damaged, change)
    refused(damaged, "a valid manifest")


def test_edited_without_its_digest(damaged):
    value = small.read_manifest(damaged)
    value["programs"][0]["program"]["steps"][0]["latent_coef"] = 0.5
    small.write_manifest(damaged, value, seal=False)
    refused(damaged, MANIFEST_NAME, "digest")


def test_wrong_content(damaged):
    data = bytearray((damaged / BLOCK).read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / BLOCK).write_bytes(data)
    refused(damaged, BLOCK, "found digest sha256:", "expected sha256:")


def test_changed_after_it_was_verified(damaged):
    artifact = Artifact.open(damaged)
    artifact.path(BLOCK)
    data = (damaged / BLOCK).read_bytes()
    (damaged / BLOCK).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="digest"):
        artifact.path(BLOCK)


def test_swapped_files(damaged):
    (damaged / BLOCK).rename(damaged / "x")
    (damaged / OTHER).rename(damaged / BLOCK)
    (damaged / "x").rename(damaged / OTHER)
    refused(damaged, BLOCK)


def test_missing_and_longer_file(damaged):
    with open(damaged / BLOCK, "ab") as file:
        file.write(b"x")
    refused(damaged, BLOCK, "bytes")
    (damaged / BLOCK).unlink()
    refused(damaged, BLOCK, "nothing there")


def test_symbolic_links(damaged, tmp_path):
    (damaged / BLOCK).rename(tmp_path / "outside")
    (damaged / BLOCK).symlink_to(tmp_path / "outside")
    refused(damaged, BLOCK, "symbolic link")


def test_symbolic_link_as_a_parent(damaged, tmp_path):
    (damaged / "engines").rename(tmp_path / "elsewhere")
    (damaged / "engines").symlink_to(tmp_path / "elsewhere")
    refused(damaged, "symbolic link at engines")


def test_symbolic_link_as_the_manifest(damaged, tmp_path):
    (damaged / MANIFEST_NAME).rename(tmp_path / "m")
    (damaged / MANIFEST_NAME).symlink_to(tmp_path / "m")
    refused(damaged, MANIFEST_NAME, "symbolic link")


def test_special_files(damaged):
    (damaged / BLOCK).unlink()
    os.mkfifo(damaged / BLOCK)
    refused(damaged, BLOCK, "special file")
    (damaged / MANIFEST_NAME).unlink()
    (damaged / MANIFEST_NAME).mkdir()
    refused(damaged, MANIFEST_NAME, "a folder")


def test_not_listed(damaged):
    (damaged / "extra.txt").write_text("x")
    artifact = Artifact.open(damaged)
    assert artifact.verify().unlisted == ("extra.txt",)
    for name in ("extra.txt", "../small/extra.txt", "a\0b", "x\x1b[31m"):
        with pytest.raises(ArtifactError, match="not listed"):
            artifact.path(name)


def test_attachments_may_be_absent_but_not_wrong(damaged):
    entry = {"path": "report.html", "size_bytes": 1, "digest": "sha256:" + "0" * 64}
    edit(damaged, lambda value: value.update(attachments=[entry]))
    Artifact.open(damaged).verify()
    (damaged / "report.html").write_text("x")
    refused(damaged, "report.html", "digest")


def test_flips_in_the_manifest(damaged):
    """A flipped bit is refused, or stands outside the digested core."""
    data = (damaged / MANIFEST_NAME).read_bytes()
    whole = json.loads(data)
    outside = ("measurements", "attachments")
    core = {key: value for key, value in whole.items() if key not in outside}
    choice = random.Random(0)
    for _ in range(250):
        place = choice.randrange(len(data))
        raw(damaged, data[:place] + bytes([data[place] ^ (1 << choice.randrange(8))]) + data[place + 1 :])
        try:
            Artifact.open(damaged)
        except OTCacheError:
            continue
        found = small.read_manifest(damaged)
        assert {key: value for key, value in found.items() if key not in outside} == core


@settings(max_examples=150, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
            max_leaves=12,
        ).map(lambda value: json.dumps({"schema_version": "1.0", "x": value}).encode()),
    )
)
def test_anything(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "anything"
    folder.mkdir(exist_ok=True)
    raw(folder, data)
    refused(folder, MANIFEST_NAME)
