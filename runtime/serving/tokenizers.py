"""Prompts → conditioning: tokens, then the text encoder stage. Consumes the artifact's tokenizer files."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import Tokenizer
from otcache.schemas.messages import one_line
from otcache.schemas.tokenizer_file import MAX_TOKENIZER_BYTES, parse_tokenizer

from ..artifact.reader import Artifact
from ..loop.backend import Array

Texts = Sequence[str]


class Tokenizers:
    """The tokenizers of an artifact, by the text encoder's input that each feeds."""

    def __init__(self, artifact: Artifact) -> None:
        self._lock = threading.Lock()
        self._tokenizers = [(entry, _load(artifact, entry)) for entry in artifact.manifest.tokenizers]

    def __call__(self, texts: Texts, lengths: Mapping[str, int] | None = None) -> Mapping[str, Array]:
        """Token ids int64 (n, length) of every tokenizer: cut to its length, special tokens kept, padded on the right.

        lengths: by input name; None takes those that the artifact was compiled at.
        """
        # One by one: a batch would wake a pool of threads for what takes microseconds, and keep it for ever.
        with self._lock:
            ids = {}
            for entry, tokenizer in self._tokenizers:
                said = [entry.text(text) for text in texts]
                with _named(entry):
                    _set_length(tokenizer, entry, lengths[entry.input_name] if lengths else entry.length)
                    ids[entry.input_name] = np.array([tokenizer.encode(text).ids for text in said], np.int64)
            return ids


def _set_length(tokenizer: Any, entry: Tokenizer, length: int) -> None:
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=entry.pad_id)


def _load(artifact: Artifact, entry: Tokenizer) -> Any:
    from tokenizers import Tokenizer as FastTokenizer

    checked = parse_tokenizer(artifact.read(entry.path, MAX_TOKENIZER_BYTES), entry.path)
    with _named(entry):
        tokenizer = FastTokenizer.from_str(checked)
        _set_length(tokenizer, entry, entry.length)
    return tokenizer


@contextlib.contextmanager
def _named(entry: Tokenizer) -> Iterator[None]:
    """Whatever the library raises, a panic of its Rust code among it, which is no Exception, as an ArtifactError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ArtifactError(
            f"tokenizer {entry.path}: {one_line(error)}: expected a tokenizer.json: compile it again"
        ) from None
