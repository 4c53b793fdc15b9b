"""An artifact → the same artifact in another folder: what its manifest lists and nothing else, checked on the way."""

from __future__ import annotations

from pathlib import Path

from ..artifact.reader import Artifact
from .packing import copy_checked, small_parts


def copy_artifact(artifact: Artifact, folder: Path) -> None:
    """Copy an artifact, with its signature if it has one, into a folder that does not exist yet.

    No link is followed or made. The manifest is written last. Raises ArtifactError for a damaged file, OSError.
    """
    parts = small_parts(artifact)
    folder.mkdir(parents=True)
    for entry in artifact.present():
        path = folder / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        entry, file = artifact.open_file(entry.path)
        with file, open(path, "xb") as out:
            copy_checked(file.read, entry, out.write)
    for name, data in reversed(parts):
        (folder / name).write_bytes(data)
