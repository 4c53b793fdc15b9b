"""What is shipped: the wheel's content, the same from the source distribution; bounds, licences, lowest versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from otcache.artifacts.licences import installed_metadata, licence_from_metadata, packages_by_extra

ROOT = Path(__file__).parents[1]
LOWEST = ROOT / "constraints-lowest.txt"


def pyproject():
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(path):
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def test_lowest_versions_are_those_that_are_promised():
    project = pyproject()
    lowest = pins(LOWEST)
    requirements = [
        Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["compiler"])
    ]
    assert {canonicalize_name(one.name) for one in requirements} == set(lowest)
    for one in requirements:
        name = canonicalize_name(one.name)
        assert Version(lowest[name]) in one.specifier
        if name != "torch":
            (bound,) = [part.version for part in one.specifier if part.operator == ">="]
            assert Version(bound) == Version(lowest[name]), name


def test_licences_are_listed():
    rows = dict(re.findall(r"^\| ([\w.-]+) \| ([^|]+) \|", (ROOT / "LICENSES.md").read_text(), re.MULTILINE))
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    for extra, names in packages_by_extra().items():
        for name in names:
            assert name in rows, (
                f"{name} of [{extra}] is not listed: run python -m otcache.artifacts.licences LICENSES.md"
            )
            if fields := installed_metadata(name):
                assert rows[name] == licence_from_metadata(fields)


def run(*line, **options):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run([str(part) for part in line], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def copy_source(target):
    """The tree as a clone would have it, without what a working tree holds beside it."""
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """(wheel from the tree, wheel from the source distribution)."""
    pytest.importorskip("build")
    work = tmp_path_factory.mktemp("wheels")
    source = copy_source(work / "source")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", work / "tree", source)
    run(sys.executable, "-m", "build", "--outdir", work / "sdist", source)
    return next((work / "tree").glob("*.whl")), next((work / "sdist").glob("*.whl"))


@pytest.mark.slow
def test_wheel_holds_what_it_should_and_nothing_else(wheels):
    contents = []
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            contents.append({name: file.read(name) for name in file.namelist() if not name.endswith("RECORD")})
    assert contents[0] == contents[1], "the wheel from the source distribution differs"
    names = set(contents[0])
    for part in ("compiler", "runtime", "schemas"):
        assert f"otcache/{part}/py.typed" in names
    data = subprocess.run(
        ["git", "ls-files", "-z", "compiler", "runtime", "schemas", "artifacts/models"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout.split("\0")
    expected = {f"otcache/{name}" for name in data if name and not name.endswith(".md") and (ROOT / name).is_file()}
    assert expected <= names, f"not packaged: {sorted(expected - names)}"
    assert not [name for name in names if not re.match(r"otcache/|otcache-[\d.]+\.dist-info/", name)]
    assert not [name for name in names if "test" in name.lower() and not name.startswith("otcache/artifacts/models")]
    assert any(name.endswith("licenses/LICENSES.md") for name in names)
    assert wheels[0].stat().st_size < 40e6


@pytest.mark.long
def test_extras_resolve(wheels):
    for extra in ("compiler", "sign", "server", "dev"):
        run(
            sys.executable,
            "-m",
            "pip",
            "install",
            "--dry-run",
            "--quiet",
            "-c",
            ROOT / "constraints.txt",
            f"{wheels[0]}[{extra}]",
        )


def python_310():
    """Python 3.10, or this one: pyenv's shim of a version that is not chosen is found, and fails."""
    candidates = [*sorted(map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python"))), shutil.which("python3.10")]
    found = (path for path in candidates if path and subprocess.run([path, "-V"], capture_output=True).returncode == 0)
    return next(found, sys.executable)


@pytest.mark.long
def test_runtime_with_the_lowest_versions(wheels, tmp_path):
    """On Python 3.10 where there is one. Tests that compare with torch are left out: the runtime has none."""
    run(python_310(), "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "-c", LOWEST, wheels[0], "pytest", "hypothesis", "onnx")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "schemas", tmp_path / "schemas", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    needs = re.compile(
        r"^(?:import|from) (torch|starlette|httpx|cryptography|psutil|safetensors|matplotlib)\b", re.MULTILINE
    )
    files = [path for part in ("runtime", "schemas") for path in sorted((tmp_path / "tests" / part).glob("test_*.py"))]
    chosen = [path for path in files if not needs.search(path.read_text())]
    assert len(chosen) >= 4
    print(run(python, "-m", "pytest", "-q", *chosen, cwd=tmp_path)[-500:])
