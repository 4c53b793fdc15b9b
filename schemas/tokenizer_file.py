"""Tokenizer files of the `tokenizers` library, read as what a stranger wrote: which components they may have, and how
large.

The library runs what such a file says: a regular expression that backtracks for hours, replacements that make a
thousand characters of one, a chance of dropping merges. So a file is checked against the types below first, and the
library is given what was checked, written anew. They hold what the tokenizers of the families that are served from the
prompt on consist of (CLIP, T5 and UMT5, Qwen2, Llama 3, words of DiT), and nothing else.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .messages import damage_error, one_line

MAX_TOKENIZER_BYTES = 64 << 20
"""The largest known, of 256 thousand pieces with their merges, have 35 MB."""
MAX_TOKENS = 1 << 20
MAX_EXPANSION = 1024
"""How many bytes normalizers, one after the other, may make of one: real ones make 100 at most."""
MAX_NORMALIZERS = 16
MAX_ADDED_CHARACTERS = 1 << 16
"""Of all added tokens together, each of which passes through the normalizers on loading."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CLIP = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = frozenset(
    {
        r"\s+",  # CLIP's normalizer
        " {2,}",  # SentencePiece's, as transformers converts it
        _CLIP,  # CLIP, as transformers 4 converts it
        r"<\|startoftext\|>|<\|endoftext\|>|" + _CLIP,  # and transformers 5
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,  # Qwen2
        _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,  # Llama 3
    }
)
"""Regular expressions that a file may have, word for word: whether another one backtracks is more than one can see."""
_EXPANSIONS = {"NFC": 3.0, "Lowercase": 2.0, "Strip": 1.0}
"""Bytes of UTF-8 at most that normalizers make of one (Unicode Standard Annex 15; U+0130 in lower case)."""

Token = Annotated[str, Field(max_length=512)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Short = Annotated[str, Field(max_length=64)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Text(_Part):
    """A text that is looked for as it stands."""

    String: Annotated[str, Field(min_length=1, max_length=64)]


class Expression(_Part):
    """One of `REGEXES`."""

    Regex: Annotated[str, Field(max_length=512)]

    @model_validator(mode="after")
    def _known(self) -> Expression:
        if self.Regex not in REGEXES:
            raise ValueError(f"the regular expression {one_line(self.Regex, 60)!r} is none of the families'")
        return self


# --- normalizers


class Unicode(_Part):
    """Composition, or lower case."""

    type: Literal["NFC", "Lowercase"]


class Strip(_Part):
    """White space at the ends."""

    type: Literal["Strip"]
    strip_left: bool
    strip_right: bool


class Replace(_Part):
    """A pattern by a text."""

    type: Literal["Replace"]
    pattern: Text | Expression
    content: Short


class Precompiled(_Part):
    """SentencePiece's table of replacements, in base64: the size of a trie, the trie, texts that end in zero bytes."""

    type: Literal["Precompiled"]
    precompiled_charsmap: Annotated[str, Field(max_length=4 << 20)]

    @property
    def longest(self) -> int:
        """Bytes of the longest text. Raises ValueError."""
        try:
            table = base64.b64decode(self.precompiled_charsmap, validate=True)
        except binascii.Error:
            raise ValueError("precompiled_charsmap is no base64") from None
        size = int.from_bytes(table[:4], "little")
        if size % 4 or not 0 < size <= len(table) - 4:
            raise ValueError(f"precompiled_charsmap of {len(table)} bytes has a trie of {size}")
        return max(map(len, table[4 + size :].split(b"\0")))


class Normalizers(_Part):
    """Several, one after the other."""

    type: Literal["Sequence"]
    normalizers: Annotated[list[Normalizer], Field(max_length=MAX_NORMALIZERS)]


Normalizer = Annotated[Unicode | Strip | Replace | Precompiled | Normalizers, Field(discriminator="type")]


def _steps(normalizer: Any) -> Iterator[Any]:
    if isinstance(normalizer, Normalizers):
        for part in normalizer.normalizers:
            yield from _steps(part)
    elif normalizer is not None:
        yield normalizer


def _expansion(step: Any) -> float:
    """How many bytes a normalizer makes of one, at most. Raises ValueError."""
    if isinstance(step, Precompiled):
        return max(1.0, step.longest)
    if isinstance(step, Replace):
        found = len(step.pattern.String.encode()) if isinstance(step.pattern, Text) else 1
        return max(1.0, len(step.content.encode()) / found)
    return _EXPANSIONS[step.type]


# --- pre-tokenizers


class Split(_Part):
    """At a pattern."""

    type: Literal["Split"]
    pattern: Text | Expression
    behavior: Literal["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]
    invert: bool


class ByteLevel(_Part):
    """Bytes as characters; as a post-processor, offsets."""

    type: Literal["ByteLevel"]
    add_prefix_space: bool = True
    trim_offsets: bool = True
    use_regex: bool = True


class Metaspace(_Part):
    """Spaces as a character."""

    type: Literal["Metaspace"]
    replacement: Annotated[str, Field(min_length=1, max_length=1)]
    prepend_scheme: Literal["first", "never", "always"] = "always"
    split: bool = True


class Spaces(_Part):
    """At white space; `Whitespace` also at punctuation."""

    type: Literal["WhitespaceSplit", "Whitespace"]


class PreTokenizers(_Part):
    """Several, one after the other."""

    type: Literal["Sequence"]
    pretokenizers: Annotated[list[PreTokenizer], Field(max_length=16)]


PreTokenizer = Annotated[Split | ByteLevel | Metaspace | Spaces | PreTokenizers, Field(discriminator="type")]


# --- post-processors


class Place(_Part):
    """Of a text or a special token in a template."""

    id: Token
    type_id: Annotated[int, Field(ge=0, le=255)]


class OfText(_Part):
    """Where a text stands."""

    Sequence: Place


class OfToken(_Part):
    """Where a special token stands."""

    SpecialToken: Place


class SpecialToken(_Part):
    """What it stands for."""

    id: Token
    ids: Annotated[list[TokenId], Field(max_length=16)]
    tokens: Annotated[list[Token], Field(max_length=16)]


Pieces = Annotated[list[OfText | OfToken], Field(max_length=16)]


class Template(_Part):
    """Special tokens around a text."""

    type: Literal["TemplateProcessing"]
    single: Pieces
    pair: Pieces
    special_tokens: Annotated[dict[Token, SpecialToken], Field(max_length=64)]


class Roberta(_Part):
    """A special token at either end."""

    type: Literal["RobertaProcessing"]
    sep: tuple[Token, TokenId]
    cls: tuple[Token, TokenId]
    trim_offsets: bool
    add_prefix_space: bool


class PostProcessors(_Part):
    """Several, one after the other."""

    type: Literal["Sequence"]
    processors: Annotated[list[PostProcessor], Field(max_length=4)]


PostProcessor = Annotated[Template | Roberta | ByteLevel | PostProcessors, Field(discriminator="type")]


# --- models


class Bpe(_Part):
    """Pairs that are merged, without chance."""

    type: Literal["BPE"]
    dropout: None = None
    unk_token: Token | None = None
    continuing_subword_prefix: Short | None = None
    end_of_word_suffix: Short | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False
    vocab: Annotated[dict[Token, TokenId], Field(max_length=MAX_TOKENS)]
    merges: Annotated[list[tuple[Token, Token] | Annotated[str, Field(max_length=1025)]], Field(max_length=MAX_TOKENS)]


class Unigram(_Part):
    """Pieces with their logarithms; an empty one would be found for ever."""

    type: Literal["Unigram"]
    unk_id: TokenId | None = None
    vocab: Annotated[
        list[tuple[Annotated[str, Field(min_length=1, max_length=512)], Annotated[float, Field(ge=-1e6, le=1e6)]]],
        Field(min_length=1, max_length=MAX_TOKENS),
    ]
    byte_fallback: bool = False


class WordLevel(_Part):
    """Whole words."""

    type: Literal["WordLevel"]
    vocab: Annotated[dict[Token, TokenId], Field(max_length=MAX_TOKENS)]
    unk_token: Token


class AddedToken(_Part):
    """A token that is found before all others."""

    id: TokenId
    content: Annotated[str, Field(min_length=1, max_length=256)]
    single_word: bool
    lstrip: bool
    rstrip: bool
    normalized: bool
    special: bool


class TokenizerFile(BaseModel):
    """A file as far as ids follow from it: decoder, truncation and padding are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    added_tokens: Annotated[list[AddedToken], Field(max_length=4096)] = []
    normalizer: Normalizer | None = None
    pre_tokenizer: PreTokenizer | None = None
    post_processor: PostProcessor | None = None
    model: Annotated[Bpe | Unigram | WordLevel, Field(discriminator="type")]

    @model_validator(mode="after")
    def _bounded(self) -> TokenizerFile:
        steps = list(_steps(self.normalizer))
        if len(steps) > MAX_NORMALIZERS:
            raise ValueError(f"normalizer has {len(steps)} steps: expected at most {MAX_NORMALIZERS}")
        if (growth := math.prod(map(_expansion, steps))) > MAX_EXPANSION:
            raise ValueError(f"normalizer makes up to {growth:.3g} bytes of one: expected at most {MAX_EXPANSION}")
        if (total := sum(len(token.content) for token in self.added_tokens)) > MAX_ADDED_CHARACTERS:
            raise ValueError(f"added_tokens have {total} characters: expected at most {MAX_ADDED_CHARACTERS}")
        return self


def parse_tokenizer(data: bytes | str, name: str) -> str:
    """The JSON of a tokenizer file as the `tokenizers` library is to read it: what was checked, and nothing else.

    Args:
        data: the file's content.
        name: what messages call it.

    Raises ArtifactError and nothing else: a component, a size or an expression that no family has.
    """
    if len(data) > MAX_TOKENIZER_BYTES:
        raise damage_error(name, f"{len(data)} bytes", f"at most {MAX_TOKENIZER_BYTES} bytes")
    try:
        checked = TokenizerFile.model_validate_json(data, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        first = max(faults, key=lambda fault: fault["type"] == "value_error")  # ours say more than a union's first
        place = ".".join(map(str, first["loc"])) or "structure"
        found = f"{one_line(place, 80)}: {one_line(first['msg'].removeprefix('Value error, '), 150)}"
        raise damage_error(name, found, "a tokenizer as the families have them") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise damage_error(name, error, "a tokenizer as the families have them") from None
    return checked.model_dump_json()
