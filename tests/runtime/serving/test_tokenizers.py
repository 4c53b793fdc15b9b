"""Tokenizers: what the library raises, and what files of the families look like."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_artifact as small
import tokenizers

from otcache.runtime import Sampler
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.serving.tokenizers import Tokenizers, _named
from otcache.schemas.errors import ArtifactError
from otcache.schemas.tokenizer_file import MAX_TOKENIZER_BYTES, parse_tokenizer

ROOT = Path(__file__).parents[3]
FILES = [
    *ROOT.glob("artifacts/models/*/tokenizer*/tokenizer.json"),
    *ROOT.glob("tests/golden/1.[08]/artifact/tokenizers/*.json"),
]
PROMPTS = ("", "A Photo,  of: two (2) CATS!", "a café – naïve 北京 🙂 ﬁne ½ <|endoftext|> </s><pad>", "ring " * 60)


@pytest.mark.parametrize("path", FILES, ids=lambda path: "/".join(path.parts[-4:]))
def test_what_was_checked_gives_the_same_ids(path):
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.no_padding()
    raw.no_truncation()
    checked = tokenizers.Tokenizer.from_str(parse_tokenizer(path.read_bytes(), path.name))
    for prompt in PROMPTS:
        assert checked.encode(prompt).ids == raw.encode(prompt).ids


def test_a_panic_of_the_library_ends_in_the_one_error(artifact_folder):
    """An expression that backtracks beyond Oniguruma's limit; no file may have it."""
    (entry,) = Artifact.open(artifact_folder).manifest.tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    with pytest.raises(ArtifactError, match=r"tokenizer tokenizers/words\.json: "), _named(entry):
        tokenizer.encode("a" * 64 + "b")


def test_interrupts_are_left_alone(artifact_folder):
    (entry,) = Artifact.open(artifact_folder).manifest.tokenizers
    with pytest.raises(KeyboardInterrupt), _named(entry):
        raise KeyboardInterrupt


def test_a_file_that_is_too_large_is_not_read(damaged):
    path = damaged / "tokenizers/words.json"
    with open(path, "r+b") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    small.reseal_file(damaged, "tokenizers/words.json")
    with pytest.raises(ArtifactError, match=f"expected at most {MAX_TOKENIZER_BYTES} bytes"):
        Tokenizers(Artifact.open(damaged))
    with pytest.raises(ArtifactError):
        Sampler.load(damaged)
