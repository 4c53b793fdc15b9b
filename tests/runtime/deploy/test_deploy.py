"""What every target has in common: a verified copy, whole or not at all, and nothing of a user's is overwritten."""

from __future__ import annotations

import ast
import json
import os
import shutil

import pytest
import small_artifact as small
from command import otc

from otcache.runtime import Artifact, UsageError
from otcache.runtime.cli import deploy as command
from otcache.runtime.deploy import settings

TARGETS = {"triton": "small/1/artifact", "ray-serve": "artifact", "docker": "artifact"}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_targets_are_those_of_the_room():
    assert command.TARGETS == settings.TARGETS == tuple(TARGETS) and set(command.NEXT) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_folder_holds_the_artifact_and_no_link(deployed, artifact_folder, tmp_path, target):
    (folder,) = [deployed(artifact_folder, target, tmp_path / "out")]
    copy = folder / TARGETS[target]
    assert contents(copy) == contents(artifact_folder)
    assert Artifact.open(copy).verify().unlisted == ()
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert os.listdir(tmp_path) == ["out"], "nothing temporary is left"
    mark = json.loads((folder / "deployment.json").read_text())
    assert mark["artifact"] == Artifact.open(artifact_folder).manifest.digest and mark["target"] == target
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts = [path.read_text() for path in files if path.suffix in (".py", ".yaml", ".pbtxt", "")]
    assert str(artifact_folder) not in "".join(texts) and str(tmp_path) not in "".join(texts)
    for program in folder.rglob("*.py"):
        ast.parse(program.read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_the_same_artifact_makes_the_same_folder(deployed, artifact_folder, tmp_path, target):
    first, second = (deployed(artifact_folder, target, tmp_path / name) for name in ("one", "two"))
    assert contents(first) == contents(second)


def test_what_is_no_part_of_an_artifact_stays_behind(deployed, damaged, tmp_path):
    (damaged / "notes.txt").write_text("mine")
    (damaged / "link").symlink_to("/etc")
    folder = deployed(damaged, "docker", tmp_path / "out")
    assert not (folder / "artifact/notes.txt").exists() and not os.path.lexists(folder / "artifact/link")


def refused(exit_code, *arguments):
    result = otc("deploy", *map(str, arguments))
    assert result.exit_code == exit_code and len(result.stderr.splitlines()) == 1, result.output
    return result.stderr


def test_a_damaged_artifact_is_not_deployed(damaged, tmp_path):
    path = damaged / "engines/onnx/head.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "head.onnx: found digest" in refused(4, damaged, "--to", "docker", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_manifest_that_leads_outside_is_not_followed(damaged, tmp_path):
    value = small.read_manifest(damaged)
    value["files"][0]["path"] = "../outside.onnx"
    small.write_manifest(damaged, value)
    refused(4, damaged, "--to", "docker", "-o", tmp_path / "out")
    link = damaged / "engines"
    shutil.move(link, tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    refused(4, damaged, "--to", "docker", "-o", tmp_path / "out")


def test_a_folder_is_replaced_with_force_only_if_it_is_a_deployment(deployed, artifact_folder, tmp_path):
    folder = deployed(artifact_folder, "docker", tmp_path / "out")
    line = (artifact_folder, "--to", "triton", "-o", folder)
    assert "it exists: choose another, or replace it with --force" in refused(2, *line)
    deployed(artifact_folder, "triton", folder, "--force")
    assert (folder / "small/config.pbtxt").is_file() and not (folder / "Dockerfile").exists()
    (folder / "another_model").mkdir()
    assert "it holds another_model, which otc deploy has not written" in refused(2, *line, "--force")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine").write_text("mine")
    assert "it holds mine" in refused(2, *line, "--force") and (folder / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--name", "../a"), "--name is '../a': expected words of letters"),
        (("--name", 'a" }'), "expected words of letters"),
        (("--name", ""), "expected words of letters"),
        (("--lowest-budget", "9"), "--lowest-budget is 9: expected one of 2, 3, full"),
        (("-o", "/nowhere/at/all"), "its folder does not exist"),
    ],
)
def test_what_is_refused(artifact_folder, tmp_path, options, message):
    arguments = {"--to": "triton", "-o": str(tmp_path / "out"), options[0]: options[1]}
    assert message in refused(2, artifact_folder, *[word for pair in arguments.items() for word in pair])


def test_as_json(artifact_folder, tmp_path):
    result = otc("deploy", str(artifact_folder), "--to", "docker", "-o", str(tmp_path / "out"), "--json")
    found = json.loads(result.stdout)
    assert found["target"] == "docker" and "Dockerfile" in found["files"] and found["name"] == "small"


def test_names_that_are_none():
    for name in ("a" * 64, "-a", "a--b", "a b", "a\n"):
        with pytest.raises(UsageError):
            settings.Settings(name=name)
