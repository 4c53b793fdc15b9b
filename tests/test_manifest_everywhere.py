"""Every command and every host takes the same manifests, and refuses the others with the same message.

Of each kind of manifest that nobody takes (another major version, a key that comes twice, …), all of them end in the
one line of `schemas/manifest_file.py`. Artifacts of every older minor version, those of `tests/golden`, are usable by
all of them; what a command writes back is consistent, and states its right digest.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import otc
from host_cases import flux, golden_folder

from otcache.compiler.hosts import OTCacheScheduler, apply_residual_cache
from otcache.compiler.passes.emit import emit
from otcache.compiler.report.evidence import gather
from otcache.compiler.report.page import write_report
from otcache.schemas.digest import digest_of_file
from otcache.schemas.errors import ArtifactError, RequestError
from otcache.schemas.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, SCHEMA_VERSION
from otcache.schemas.manifest_file import parse_manifest, read_manifest, seal, write_manifest

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name[0].isdigit())
RTX = "tensorrt-rtx"
PROMPT = "a red ring"


@dataclass(frozen=True)
class Answer:
    """What a user sees of a refusal: the exit code, and the line."""

    exit_code: int
    line: str


def command(*arguments: object) -> Answer | None:
    """None where the command line succeeds."""
    result = otc(*map(str, arguments))
    if result.exit_code == 0:
        return None
    assert len(result.stderr.splitlines()) == 1 and "Traceback" not in result.output, result.output
    return Answer(result.exit_code, result.stderr.strip().removeprefix("Error: "))


def host(use: Callable[[Path], object], folder: Path) -> Answer | None:
    """None where the host takes the artifact."""
    try:
        use(folder)
    except ArtifactError as error:
        return Answer(error.exit_code, str(error))
    return None


def residual_budget(folder: Path) -> str | None:
    programs = read_manifest(folder).manifest.programs
    return next((entry.budget for entry in programs if entry.program.payload == "residual"), None)


def use_residual_cache(folder: Path) -> None:
    """Weights are not compared: artifacts before 1.2 do not say which they were made from."""
    apply_residual_cache(flux(), folder, residual_budget(folder) or "2", check=False)


EVERYONE: dict[str, Callable[[Path], Answer | None]] = {
    "run": lambda folder: command(
        "run", folder, "--budget", "2", "--prompt", PROMPT, "-o", folder.parent / "picture.png", "--force"
    ),
    "inspect": lambda folder: command("inspect", folder),
    "verify": lambda folder: command("verify", folder),
    "verify of the structure": lambda folder: command("verify", folder, "--level", "structure"),
    "bench": lambda folder: command("bench", folder, "--repeat", "1", "--warmup", "0", "--save"),
    "pack": lambda folder: command("pack", folder, "-o", folder.parent / "packed.otc", "--force"),
    "encode": lambda folder: command(
        "encode", golden_folder(), "--for", folder, "--prompt", PROMPT, "-o", folder.parent / "c.safetensors", "--force"
    ),
    "report": lambda folder: command("report", folder),
    "export-schedule": lambda folder: command("export-schedule", folder, "--for", "diffusers", "--budget", "2"),
    "build-engines": lambda folder: command("build-engines", folder, "--backend", RTX, "--target", "sm_89"),
    "OTCacheScheduler": functools.partial(host, lambda folder: OTCacheScheduler.from_artifact(folder, "full")),
    "apply_residual_cache": functools.partial(host, use_residual_cache),
}
NEEDS_RTX = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx-cu13")


# --- what nobody takes


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change a manifest's value and state the right digest."""
    path = folder / MANIFEST_NAME
    path.write_text(json.dumps(seal(change(json.loads(path.read_bytes())))))


def spoil_text(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / MANIFEST_NAME
    path.write_bytes(change(path.read_bytes()))


def replace_with_link(folder: Path) -> None:
    (folder / MANIFEST_NAME).rename(folder.parent / "elsewhere.json")
    (folder / MANIFEST_NAME).symlink_to(folder.parent / "elsewhere.json")


def state_other_digest(folder: Path) -> None:
    value = json.loads((folder / MANIFEST_NAME).read_bytes())
    (folder / MANIFEST_NAME).write_text(json.dumps({**value, "timestep_scale": 2.0}))


def break_old_stages(folder: Path) -> None:
    """Of version 1.0, whose migration meets what it does not expect."""
    rewrite(folder, lambda value: {**value, "schema_version": "1.0", "stages": [7, *value["stages"]]})


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "version 2.0": (
        lambda folder: rewrite(folder, lambda value: {**value, "schema_version": "2.0"}),
        "found schema 2.0: expected 1.x: pip install --upgrade otcache",
    ),
    "version 0.9": (
        lambda folder: rewrite(folder, lambda value: {**value, "schema_version": "0.9"}),
        "found schema 0.9: expected 1.x: compile it again",
    ),
    "no version": (
        lambda folder: rewrite(folder, lambda value: {**value, "schema_version": 1}),
        "found schema_version 1: expected a version such as",
    ),
    "a key twice": (
        lambda folder: spoil_text(folder, lambda text: text.replace(b'"conditions"', b'"digest": "", "conditions"', 1)),
        "found key 'digest' twice: expected valid JSON",
    ),
    "no number": (
        lambda folder: spoil_text(folder, lambda text: text.replace(b'"initial_scale": 1.0', b'"initial_scale": NaN')),
        "found number NaN: expected valid JSON",
    ),
    "half a file": (
        lambda folder: spoil_text(folder, lambda text: text[: len(text) // 2]),
        ": expected valid JSON",
    ),
    "another digest": (state_other_digest, "as it states"),
    "too large": (
        lambda folder: spoil_text(folder, lambda text: text + b" " * MAX_MANIFEST_BYTES),
        f"expected at most {MAX_MANIFEST_BYTES} bytes",
    ),
    "a link": (replace_with_link, "found a symbolic link at manifest.json: expected a regular file"),
    "a folder in its place": (
        lambda folder: ((folder / MANIFEST_NAME).unlink(), (folder / MANIFEST_NAME).mkdir()),
        "found a folder at manifest.json: expected a regular file",
    ),
    "a field that does not fit": (
        lambda folder: rewrite(folder, lambda value: {**value, "output": "nothing"}),
        "nothing is not an output of the head",
    ),
    "an old one that cannot be migrated": (break_old_stages, "stages.0"),
    "no manifest": (lambda folder: (folder / MANIFEST_NAME).unlink(), "is no artifact: found no manifest.json"),
    "no folder": (shutil.rmtree, "is no artifact: found nothing there: expected a folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_everyone_refuses_it_with_the_same_message(kind, tmp_path):
    spoil, words = REFUSED[kind]
    folder = Path(shutil.copytree(GOLDEN / "1.5" / "artifact", tmp_path / "artifact"))
    spoil(folder)
    answers = {name: use(folder) for name, use in EVERYONE.items()}
    (answer,) = set(answers.values())
    assert answer is not None and answer.exit_code == 4 and words in answer.line, answers
    assert sorted(path.name for path in tmp_path.iterdir()) in (["artifact"], [], ["artifact", "elsewhere.json"])


# --- what everyone takes


def add_report(folder: Path) -> None:
    """A report with evidence that fits the artifact's programs, as a compile attaches it; golden artifacts have
    none.
    """
    read = read_manifest(folder)
    draw = np.random.default_rng(0)
    total, count = read.manifest.sampler.num_inference_steps, read.manifest.conditions.evaluation_prompts
    size = (read.manifest.conditions.height, read.manifest.conditions.width)
    pictures = draw.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    kept = {
        int(entry.budget): {
            "pictures": pictures,
            "worst": np.arange(count),
            "worst_pictures": pictures,
            "psnr_db": draw.uniform(20, 30, count),
            "ssim": draw.uniform(0.5, 1, count),
            "positions": np.array([*entry.program.schedule, total]),
            "errors": draw.uniform(0, 1, (1 + len(entry.program.schedule), count)),
        }
        for entry in read.manifest.programs
        if entry.quality is not None
    }
    evidence, shown = gather(
        kept,
        pictures,
        prompts=[PROMPT] * count,
        seeds=range(count),
        timesteps=np.linspace(1000, 0, total).tolist(),
        sigmas=None,
    )
    write_report(folder, read.manifest.model_dump(mode="json"), evidence, shown)
    names = ["report.html", *(f"report/{path.name}" for path in sorted((folder / "report").iterdir()))]
    entries = [
        {"path": name, "size_bytes": (folder / name).stat().st_size, "digest": digest_of_file(folder / name)}
        for name in names
    ]
    write_manifest(folder, {**read.stated, "attachments": entries})


@pytest.fixture(params=VERSIONS)
def old(request, tmp_path):
    """The version, and an artifact of it with a report."""
    folder = Path(shutil.copytree(GOLDEN / request.param / "artifact", tmp_path / "artifact"))
    add_report(folder)
    return request.param, folder


def test_everyone_takes_an_old_one(old):
    version, folder = old
    stated = read_manifest(folder).stated
    for name, use in EVERYONE.items():
        if name == "build-engines":
            continue
        if name == "apply_residual_cache" and residual_budget(folder) is None:
            with pytest.raises(RequestError, match="residual"):
                use(folder)
            continue
        assert use(folder) is None, name
    read = read_manifest(folder)
    outside = ("attachments", "measurements")
    assert {key: value for key, value in read.stated.items() if key not in outside} == {
        key: value for key, value in stated.items() if key not in outside
    }, "what was written back has another core"
    assert read.manifest.schema_version == version and read.manifest.digest == stated["digest"]
    assert {"latency_s/2", "latency_s/full"} <= {entry.name for entry in read.manifest.measurements}
    assert "No latency" not in (folder / "report.html").read_text(), "it was drawn after they were measured"


@NEEDS_RTX
@pytest.mark.parametrize("old", ["1.0", "1.3", "1.6"], indirect=True)
def test_engines_of_an_old_one_are_listed_in_the_newest_version(old):
    """Its fields of 1.4 have a meaning only if the manifest states it, so that digest and version are new ones."""
    _, folder = old
    before = read_manifest(folder)
    assert EVERYONE["build-engines"](folder) is None
    read = read_manifest(folder)
    assert read.manifest.schema_version == SCHEMA_VERSION and read.manifest.digest != before.manifest.digest
    assert [(engine.backend, engine.target) for engine in read.manifest.engines][-1] == (RTX, "sm_89")
    assert read.manifest.stages == before.manifest.stages and read.manifest.programs == before.manifest.programs
    for name in ("run", "inspect", "verify", "report", "bench", "OTCacheScheduler"):
        assert EVERYONE[name](folder) is None, name
    assert read_manifest(folder).manifest.digest == read.manifest.digest


# --- the writer


def test_what_a_reader_would_refuse_is_not_written(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "1.7" / "artifact", tmp_path / "artifact"))
    read = read_manifest(folder)
    for value, words in (
        ({**read.stated, "timestep_scale": 2.0}, "as it states"),
        (seal({**read.stated, "output": "nothing"}), "nothing is not an output of the head"),
        ({**read.stated, "attachments": [{"path": "../x", "size_bytes": 1, "digest": "sha256:" + "0" * 64}]}, "path"),
        ({**read.stated, "unknown": "x" * MAX_MANIFEST_BYTES}, f"expected at most {MAX_MANIFEST_BYTES}"),
    ):
        with pytest.raises(ArtifactError, match=f"its manifest .*{words}"):
            write_manifest(folder, value)
        assert (folder / MANIFEST_NAME).read_bytes() == read.data
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_a_manifest_is_written_as_a_compile_writes_it(tmp_path):
    """The same value gives the same bytes, whoever writes it, and what is read is what was written."""
    newest = GOLDEN / VERSIONS[-1] / "artifact"
    read = parse_manifest((newest / MANIFEST_NAME).read_bytes())
    (tmp_path / "a").mkdir()
    written = write_manifest(tmp_path / "a", read.stated)
    assert written.data == read.data and read_manifest(tmp_path / "a") == written

    def fill(folder: Path) -> None:
        for source in newest.iterdir():
            if source.is_dir():
                shutil.copytree(source, folder / source.name)

    fields = {key: value for key, value in read.stated.items() if key not in ("files", "attachments", "digest")}
    manifest = emit(tmp_path / "b", fill, fields, force=False, attachments=frozenset())
    compiled = read_manifest(tmp_path / "b")
    assert compiled.manifest == manifest and manifest.files == read.manifest.files
    assert write_manifest(tmp_path / "a", compiled.stated).data == compiled.data
