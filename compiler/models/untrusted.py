"""What a pipeline folder may bring: JSON, tokenizers and safetensors. Code and pickles are found before anything is
loaded.

diffusers and transformers execute Python that lies beside a model when a config names it, some of it from local folders
without asking, and reading a pickle executes what it says. Here only files are read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from otcache.schemas.errors import ModelError

from .files import INDEX, WEIGHTS, check_variant, components_of, read_config

LIBRARIES = ("diffusers", "transformers")
"""Where the classes of `model_index.json` may come from, beside the modules of `diffusers.pipelines`."""
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
CODE_KEYS = ("auto_map", "custom_pipelines", "custom_pipeline")
"""Keys of a config that name Python of the model's own."""
TRUST = "read that code, then allow it with --trust-remote-code; or take a model of diffusers' own classes"


def check_code(folder: Path, name: str) -> None:
    """Raise ModelError if the folder holds Python, or names classes that diffusers and transformers do not have."""
    files = _files(folder)
    for path in files:
        if path.suffix in (".py", ".pyc", ".pyd", ".pyw", ".so"):
            _refuse(name, f"brings Python code ({path.relative_to(folder).as_posix()})")
    for path in files:
        if path.name.endswith("config.json") and (key := _code_key(read_config(path, f"MODEL {name!r}"))) is not None:
            _refuse(name, f"names Python code of its own ({key} in {path.relative_to(folder).as_posix()})")
    for component, value in _index(folder, name).items():
        if component == "_class_name" and not isinstance(value, str):
            _refuse(name, f"is of a class of its own ({str(value)[:80]!r} in model_index.json)")
        if isinstance(value, list) and not component.startswith("_"):
            library = value[0] if value else None
            if library is not None and library not in LIBRARIES and not _is_pipeline_module(library):
                _refuse(name, f"takes {component[:80]!r} from {str(library)[:80]!r} (model_index.json)")


def check_weights(folder: Path, name: str, variant: str | None = None) -> None:
    """Raise ModelError if a component has no safetensors that diffusers would load, but other weights.

    Reading a pickle runs what it says. Weights of a variant such as fp16 alone are loaded where `variant` names it.
    """
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [path.name for path in sorted(part.iterdir()) if path.is_file()]
        pickled = [file for file in files if file.endswith(PICKLED)]
        stored = [file for file in files if file.endswith(WEIGHTS)]
        if pickled and not stored:
            raise ModelError(
                f"MODEL {name!r} has its {part.name} as a pickle only ({pickled[0]}), which runs code when it is read: "
                f"expected {WEIGHTS}: on a host where you trust it, load the pipeline and save_pretrained it again"
            )
        if part.name in components_of(_index(folder, name)):
            check_variant(part.name, files, variant, f"MODEL {name!r}")


def _index(folder: Path, name: str) -> dict[str, Any]:
    return read_config(folder / INDEX, f"MODEL {name!r}")


def _files(folder: Path) -> list[Path]:
    """Files of the folder and of its components, through links too: a component may be a link to a folder elsewhere."""
    parts = [folder, *(path for path in sorted(folder.iterdir()) if path.is_dir())]
    return [path for part in parts for path in sorted(part.iterdir()) if path.is_file()]


def _refuse(name: str, what: str) -> None:
    raise ModelError(f"MODEL {name!r} {what}, which otcache does not run: expected data only: {TRUST}")


def _code_key(config: dict[str, Any]) -> str | None:
    return next((key for key in CODE_KEYS if config.get(key)), None)


def _is_pipeline_module(library: object) -> bool:
    """Whether the library is a module of `diffusers.pipelines`, as older configs name them; nothing is imported by
    name.
    """
    if not isinstance(library, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", library):
        return False
    from diffusers import pipelines

    return (Path(pipelines.__file__).parent / library).is_dir()
