"""`otc deploy`: an artifact → a folder with all that a target needs, whole or not at all.

The folder holds a verified copy of the artifact, the files of the target, and `deployment.json`, which says what the
folder is. The programs among the files are those of this room, unchanged; what differs from one deployment to another
is in configuration files.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from otcache.schemas.errors import UsageError
from otcache.schemas.manifest import Manifest
from otcache.schemas.messages import one_line
from otcache.schemas.places import check_creatable, unwritable
from otcache.schemas.whole_files import own_part, part_folder, publish_folder, recover_folder, sweep_leftovers

from ..artifact.reader import Artifact
from ..shipping.copying import copy_artifact
from . import docker_files, ray_files, triton_files
from .settings import Settings, Target, check_settings

MARK = "deployment.json"
"""What a folder that was written here holds; a folder without it is not replaced."""
_FILES: Mapping[Target, Callable[[Manifest, Settings], dict[str, str]]] = {
    "triton": triton_files.files_of,
    "ray-serve": ray_files.files_of,
    "docker": docker_files.files_of,
}


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """What has been written."""

    target: Target
    name: str
    digest: str
    """Of the artifact."""
    files: tuple[str, ...]
    """Of the target, relative to the folder."""
    artifact: str
    """The copy's folder, relative to the folder."""


def deploy(artifact: Artifact, target: Target, folder: Path, settings: Settings, *, force: bool = False) -> Deployed:
    """Write a deployment. Raises ArtifactError, UsageError.

    folder: must not exist, or with `force` be a deployment that this function has written and nobody added to.
    """
    check_settings(settings, artifact.manifest)
    files = _FILES[target](artifact.manifest, settings)
    place = triton_files.artifact_place(settings) if target == "triton" else "artifact"
    deployed = Deployed(
        target=target, name=settings.name, digest=artifact.manifest.digest, files=tuple(sorted(files)), artifact=place
    )
    with _naming(folder):
        recover_folder(folder, MARK)
    _check_folder(folder, force)
    with _naming(folder):
        sweep_leftovers(folder)
    with _naming(folder), part_folder(folder, own_part(folder.absolute())) as part:
        copy_artifact(artifact, part / place)
        for name, text in files.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text(text, encoding="utf-8")
        (part / MARK).write_text(json.dumps(_mark(deployed), indent=1) + "\n", encoding="utf-8")
        part.chmod(0o755)
        _check_folder(folder, force)
        publish_folder(part, folder)
    return deployed


def _mark(deployed: Deployed) -> dict[str, object]:
    """What `deployment.json` holds."""
    top = sorted({Path(name).parts[0] for name in (*deployed.files, deployed.artifact)})
    written = {"otcache": metadata.version("otcache"), "target": deployed.target, "name": deployed.name}
    return {**written, "artifact": deployed.digest, "holds": top}


@contextlib.contextmanager
def _naming(folder: Path) -> Iterator[None]:
    """Turn the system's errors of writing into one that names the folder."""
    try:
        yield
    except OSError as error:
        raise unwritable(folder, "-o", error) from None


def _check_folder(folder: Path, force: bool) -> None:
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UsageError(f"-o is {one_line(folder)}: it is there and no folder: choose another")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"-o is {one_line(folder)}: its folder does not exist: create it, or choose another")
    if folder.is_dir() and (present := {path.name for path in folder.iterdir()}):
        if not force:
            raise UsageError(f"-o is {one_line(folder)}: it exists: choose another, or replace it with --force")
        if odd := sorted(present - _held(folder)):
            raise UsageError(
                f"-o is {one_line(folder)}: it holds {one_line(odd[0], 80)}, which otc deploy has not written, so "
                "--force will not remove it: choose another"
            )
    check_creatable(folder, "-o")


def _held(folder: Path) -> set[str]:
    """Names in a folder that `deploy` has written; none of what it does not know."""
    try:
        held = json.loads((folder / MARK).read_text(encoding="utf-8"))["holds"]
        return {MARK, "__pycache__", *map(str, held)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
