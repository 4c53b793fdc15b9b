"""Every hand-made attack ends in its one error, from `otc verify` and from loading, and nothing outside is opened."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import small_artifact as small
from click.testing import CliRunner

from otcache.runtime import Sampler
from otcache.runtime.cli import main as cli
from otcache.runtime.shipping.verify import verify
from otcache.schemas.errors import ArtifactError

_spec = importlib.util.spec_from_file_location("attacks", Path(__file__).parents[2] / "attacks" / "attacks.py")
assert _spec is not None and _spec.loader is not None
attacks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(attacks)

ABOUT_FILES = {
    "files_of_terabytes",
    "onnx_of_terabytes",
    "file_of_another_size",
    "file_of_a_negative_size",
    "file_of_a_huge_size",
    "file_with_another_digest",
    "file_with_a_weak_digest",
}
"""Attacks on what the manifest says of files: they are not stated anew."""
_opened: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str | bytes | Path):
        _opened.append(str(arguments[0]))


sys.addaudithook(_watch)


@pytest.mark.parametrize("name", attacks.ATTACKS)
def test_attack(damaged, name):
    global _opened
    change, message = attacks.ATTACKS[name]
    value = small.read_manifest(damaged)
    before = {path: path.read_bytes() for path in damaged.rglob("*") if path.is_file()}
    change(damaged, value)
    for entry in value.get("files", []) if name not in ABOUT_FILES else []:
        path = damaged / "engines/onnx" / Path(entry["path"]).name
        if path in before and path.is_file() and not path.is_symlink() and path.read_bytes() != before[path]:
            data = path.read_bytes()
            entry.update(size_bytes=len(data), digest=small.digest_of_bytes(data))
    small.write_manifest(damaged, value)
    result = CliRunner().invoke(cli.main, ["verify", str(damaged)])
    assert result.exit_code == 4 and not result.stdout, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    assert result.stderr.removesuffix("\n").isprintable()
    _opened = []
    try:
        with pytest.raises(ArtifactError):
            verify(damaged)
        opened = _opened
    finally:
        _opened = None
    assert opened and not [path for path in opened if not path.startswith(str(damaged))]
    with pytest.raises(ArtifactError):
        Sampler.load(damaged)


@pytest.mark.parametrize("name", attacks.TOKENIZER_ATTACKS)
def test_attack_on_a_tokenizer(damaged, name):
    change, message = attacks.TOKENIZER_ATTACKS[name]
    change(damaged, {})
    small.reseal_file(damaged, "tokenizers/words.json")
    result = CliRunner().invoke(cli.main, ["verify", str(damaged), "--level", "host"])
    assert result.exit_code == 4 and not result.stdout, result.output
    assert message in result.stderr and len(result.stderr.splitlines()) == 1, result.stderr
    with pytest.raises(ArtifactError):
        Sampler.load(damaged)


def test_there_are_many():
    assert len(attacks.ATTACKS) > 120


def test_declared_external_data_is_served(damaged):
    """What the attacks abuse, used as it is meant: weights of a block in a listed file beside it."""
    import numpy as np
    from onnx import TensorProto, load

    with Sampler.load(damaged) as sampler:
        expected = sampler("a red ring", budget=2)
    model = load(damaged / attacks.BLOCK)
    (tensor,) = [each for each in model.graph.initializer if each.name == "w"]
    data = attacks.BLOCK + ".data"
    (damaged / data).write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=Path(data).name)
    (damaged / attacks.BLOCK).write_bytes(model.SerializeToString())
    value = small.read_manifest(damaged)
    entry = {"path": data, "size_bytes": 0, "digest": "sha256:" + "0" * 64}
    value["files"].append(entry)
    (stage,) = [stage for stage in value["stages"] if stage["onnx"] == attacks.BLOCK]
    stage["external_data"] = [data]
    small.write_manifest(damaged, value)
    small.reseal_file(damaged, attacks.BLOCK)
    small.reseal_file(damaged, data)
    with Sampler.load(damaged) as sampler:
        np.testing.assert_array_equal(sampler("a red ring", budget=2), expected)
    (damaged / data).write_bytes(bytes(len((damaged / data).read_bytes())))
    with pytest.raises(ArtifactError, match=r"block_1\.onnx\.data: found digest"):
        Sampler.load(damaged)
