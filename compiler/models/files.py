"""The files of a model's folder as a loader sees them: through symbolic links, of files and of whole folders.

People link a component (`transformer` → a fine-tune elsewhere), and hub caches link every file. Digests, checks and
copies all list files here, so that none of them sees less than diffusers loads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from otcache.schemas.errors import ModelError

INDEX = "model_index.json"
WEIGHTS = ".safetensors"
_SHARD = re.compile(r"-\d+-of-\d+")


def files_in(folder: Path) -> list[Path]:
    """Every file below a folder, sorted. A link to a folder above itself is passed over, and so is one to nothing."""
    return sorted(_files(folder, frozenset()))


def _files(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    above |= {folder.resolve()}
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in above:
            yield from _files(path, above)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files among `files_in`."""
    return [path for path in files_in(folder) if path.suffix == WEIGHTS]


def read_config(path: Path, subject: str) -> dict[str, Any]:
    """A config file, or an empty dict where it holds another JSON value. Raises ModelError for what is no JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{subject}: {path.name} cannot be read ({error}): expected a JSON object") from None
    return value if isinstance(value, dict) else {}


def components_of(index: Mapping[str, Any]) -> list[str]:
    """The components that a `model_index.json` names, which are the folders that belong to the model.

    >>> components_of({"_class_name": "X", "vae": ["diffusers", "V"], "feature_extractor": [None, None], "flag": True})
    ['vae']
    """
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and value and value[0] is not None and re.fullmatch(r"[A-Za-z0-9]\w*", name)
    ]


def components_without(index: Mapping[str, Any]) -> list[str]:
    """Names of components that a pipeline was saved without, such as the T5 of Stable Diffusion 3.

    >>> components_without({"_class_name": "P", "vae": ["diffusers", "AutoencoderKL"], "text_encoder_3": [None, None]})
    ['text_encoder_3']
    """
    return [name for name, value in index.items() if value == [None, None]]


def variant_of(name: str) -> str | None:
    """The variant that the name of a weights file says, as diffusers writes it; None for the plain weights.

    >>> names = ["m.safetensors", "m.fp16.safetensors", "m.fp16-00001-of-00002.safetensors"]
    >>> names += ["m-00001-of-00002.safetensors"]
    >>> [variant_of(name) for name in names]
    [None, 'fp16', 'fp16', None]
    """
    stem = _SHARD.sub("", name.removesuffix(WEIGHTS))
    return stem.rpartition(".")[2] if "." in stem else None


def chosen_weights(names: Sequence[str], variant: str | None) -> list[str]:
    """Of the weights files of one component those that diffusers loads: the variant's, or the plain ones without it.

    >>> chosen_weights(["m.safetensors", "m.fp16.safetensors"], "fp16"), chosen_weights(["m.safetensors"], "fp16")
    (['m.fp16.safetensors'], ['m.safetensors'])
    """
    weights = [name for name in names if name.endswith(WEIGHTS)]
    own = [name for name in weights if variant is not None and variant_of(name) == variant]
    return own or [name for name in weights if variant_of(name) is None]


def check_variant(component: str, names: Sequence[str], variant: str | None, subject: str) -> None:
    """Raise ModelError where a component's weights files are all of variants that were not asked for."""
    stored = sorted(name for name in names if name.endswith(WEIGHTS))
    if not stored or chosen_weights(stored, variant):
        return
    variants = sorted({str(variant_of(name)) for name in stored})
    given = "no --variant" if variant is None else f"--variant {variant}"
    raise ModelError(
        f"{subject} has its {component} as {', '.join(variants)} only ({stored[0]}), and {given} was given: expected "
        f"--variant {variants[0]}"
    )
