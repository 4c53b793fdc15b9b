"""A model's name → its folder: a bundled one, a folder, or a snapshot of the hub's with what is loaded from it."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from otcache.schemas.errors import ModelError

from .files import INDEX, check_variant, chosen_weights, components_of, read_config

SAFE_SUFFIXES = (".json", ".txt", ".model", ".jinja")
"""What is fetched from the hub beside safetensors: configs, vocabularies and chat templates. `.py` only on request,
pickled weights never.
"""
OWN_FILES = (INDEX, "call.json", "prompts.txt")
"""What is fetched beside the components."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+\Z")

_log = logging.getLogger(__name__)


def bundled_folder() -> Path:
    """Folder of the models that come with otcache."""
    return Path(str(resources.files("otcache.artifacts"))) / "models"


def bundled_models() -> list[str]:
    """Names of the models that come with otcache."""
    return sorted(path.parent.name for path in bundled_folder().glob(f"*/{INDEX}"))


def complete_models(incomplete: str) -> list[str]:
    """Bundled names that begin so, for the shell's completion."""
    return [name for name in bundled_models() if name.startswith(incomplete)]


def find_model(
    name: str, *, revision: str | None = None, variant: str | None = None, trust_remote_code: bool = False
) -> Path:
    """Folder of a bundled model, the folder itself, or that of a hub model's snapshot.

    Args:
        name: a bundled name, a path, or a hub id.
        revision: branch, tag or commit of a hub model.
        variant: which of a hub model's weights are fetched, such as fp16.
        trust_remote_code: fetch Python files as well.

    Raises:
        ModelError: `name` is none of these, or the hub cannot be reached.
    """
    if revision is not None and (name in bundled_models() or Path(name).exists()):
        raise ModelError(f"--revision is {revision!r}, but MODEL {name!r} is no hub id: leave --revision out")
    if name in bundled_models():
        return bundled_folder() / name
    folder = Path(name)
    if (folder / INDEX).is_file():
        return folder
    known = ", ".join(bundled_models()) or "none"
    expected = f"expected a bundled name ({known}), a folder with {INDEX}, or a hub id such as org/name"
    if folder.exists():
        raise ModelError(f"MODEL {name!r} has no {INDEX}: {expected}")
    if not HUB_ID.match(name):
        raise ModelError(f"MODEL {name!r} was not found: {expected}")
    at = f" at revision {revision!r}" if revision else ""
    _log.info("looks for %s%s on the hub%s", name, at, ", offline" if constants.HF_HUB_OFFLINE else "")
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(name, revision=revision))
        return _fetch(name, revision, variant, trust_remote_code)
    except ModelError:
        raise
    except Exception as error:
        if constants.HF_HUB_OFFLINE:
            raise ModelError(
                f"MODEL {name!r}{at} is not in the local hub cache, and HF_HUB_OFFLINE forbids fetching it: unset "
                "HF_HUB_OFFLINE, or give a folder"
            ) from error
        raise ModelError(
            f"MODEL {name!r}{at} is not here and could not be fetched from the hub ({first_line(error)}): {expected}"
        ) from error


def _fetch(name: str, revision: str | None, variant: str | None, trust_remote_code: bool) -> Path:
    """Fetch the files that a hub model's `model_index.json` names; where the hub is out of reach, what is cached."""
    try:
        listed = [sibling.rfilename for sibling in HfApi().model_info(name, revision=revision).siblings or ()]
    except OSError:  # no network
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    index = Path(hf_hub_download(name, INDEX, revision=revision))
    components = components_of(read_config(index, f"MODEL {name!r}"))
    for component in components:
        own = [path for path in listed if path.startswith(f"{component}/")]
        check_variant(component, own, variant, f"MODEL {name!r}")
    wanted = files_to_fetch(listed, components, variant, trust_remote_code)
    return Path(snapshot_download(name, revision=revision, allow_patterns=[glob.escape(path) for path in wanted]))


def files_to_fetch(
    listed: Sequence[str], components: Sequence[str], variant: str | None = None, trust_remote_code: bool = False
) -> list[str]:
    """Of a repository's files those that are loaded.

    >>> listed = ["model_index.json", "all.safetensors", "vae/config.json", "vae/m.safetensors", "old/config.json"]
    >>> files_to_fetch(listed, ["vae"])
    ['model_index.json', 'vae/config.json', 'vae/m.safetensors']
    """
    code = (".py",) if trust_remote_code else ()
    wanted = [path for path in listed if path in OWN_FILES or (code and "/" not in path and path.endswith(code))]
    for component in components:
        own = [path for path in listed if path.startswith(f"{component}/")]
        wanted += [path for path in own if path.endswith((*SAFE_SUFFIXES, *code))]
        wanted += chosen_weights(own, variant)
    return wanted


def first_line(error: Exception) -> str:
    """The first line of an error, or its name."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
