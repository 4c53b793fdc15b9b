"""What an ONNX file consists of, and which other files it makes a library read, found without ONNX and without loading
the model.

An ONNX file may say of any tensor that its values lie in another file, by a path that ONNX Runtime opens as it stands:
`../../etc/passwd`, an absolute path, or `*/_ORT_MEM_ADDR_/*`, which is an address in the process's own memory. A digest
proves whose file it is, not that it is harmless, so `Artifact.engine_path` compares these paths with the manifest
first. And it may hold loops that never end: only the operators of `schemas/operators.py` are let through, and neither
functions, nor graphs in nodes, nor training.

This walks the protobuf wire format through every place where a tensor or a node can stand. Field numbers:
onnx/onnx.proto3.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from otcache.schemas.errors import ArtifactError
from otcache.schemas.messages import damage_error, one_line
from otcache.schemas.operators import fault_of

MAX_FIELDS = 4_000_000
"""Fields of one file that are looked at: minutes in Python; exported graphs have some ten thousand."""
MAX_TEXT = 4096
"""Bytes of a path or name that is read."""

_INSIDE: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {4: "operator", 5: "attribute", 7: "domain"},
    "attribute": {5: "tensor", 6: "inner", 10: "tensor", 11: "inner", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}
"""Of each message, the fields that lead to tensors and nodes, and what is in them. No message holds one of its kind."""
_REFUSED = {
    "function": "a function, which may call others without end",
    "inner": "a graph within a node, as loops and branches have",
    "training": "a graph for training",
}
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


def external_locations(path: Path, name: str) -> tuple[str, ...]:
    """Every path that an ONNX file names as external data, in order, as it names them.

    `name` is what messages call the file. Raises ArtifactError for a file that is no protobuf message, or holds
    anything but plain operators.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            return tuple(dict.fromkeys(_Walk(file, name).locations(size, "model")))
    except OSError as error:
        raise damage_error(name, one_line(error), "a readable file") from None


class _Walk:
    """A walk over the fields of a protobuf message, as they stand in the file."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.file, self.name, self.fields = file, name, 0

    def locations(self, end: int, kind: str) -> Iterator[str]:
        """External paths in the message `kind` between here and `end`."""
        operator, domain = "", ""
        for field, size in self.messages(end):
            inside = _INSIDE[kind].get(field)
            after = self.file.tell() + size
            if inside == "external":
                yield from self.location(size)
            elif inside == "operator":
                operator = self.text(size)
                self.check_operator(operator, "")
            elif inside == "domain":
                domain = self.text(size)
            elif inside in _REFUSED:
                raise self.fault(_REFUSED[inside])
            elif inside is not None:
                yield from self.locations(after, inside)
            self.file.seek(after)
        if kind == "node":
            self.check_operator(operator, domain)

    def check_operator(self, operator: str, domain: str) -> None:
        """Raise ArtifactError unless an engine may hold a node of this type."""
        if found := fault_of(operator, domain):
            raise self.fault(found)

    def fault(self, found: str) -> ArtifactError:
        """The error of a graph that holds something else than plain operators."""
        return damage_error(self.name, found, "operators that otc compile exports", "compile it again")

    def text(self, size: int) -> str:
        """The name that stands here, made fit for messages."""
        return one_line(self.file.read(min(size, MAX_TEXT)).decode("utf-8", "replace"), 80)

    def messages(self, end: int) -> Iterator[tuple[int, int]]:
        """Number and length of every field with bytes; the caller leaves the file behind them."""
        while (place := self.file.tell()) < end:
            self.fields += 1
            if self.fields > MAX_FIELDS:
                raise damage_error(self.name, f"more than {MAX_FIELDS} fields", "an ONNX model")
            tag = self.varint(end)
            field, wire = tag >> 3, tag & 7
            if wire == _BYTES:
                size = self.varint(end)
                if self.file.tell() + size > end:
                    raise damage_error(self.name, f"a field beyond its message at byte {place}", "an ONNX model")
                yield field, size
            elif wire == _VARINT:
                self.varint(end)
            elif wire in (_FIXED_64, _FIXED_32):
                self.file.seek(8 if wire == _FIXED_64 else 4, 1)
            else:
                raise damage_error(self.name, f"wire type {wire} at byte {place}", "an ONNX model")
            if field == 0 or self.file.tell() > end:
                raise damage_error(self.name, f"a broken field at byte {place}", "an ONNX model")

    def varint(self, end: int) -> int:
        """The number of up to 64 bits that stands here, in groups of seven bits, the lowest first."""
        value = 0
        for shift in range(0, 70, 7):
            byte = self.file.read(1)
            if not byte or self.file.tell() > end:
                break
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value & 0xFFFF_FFFF_FFFF_FFFF
        raise damage_error(self.name, f"a broken number at byte {self.file.tell()}", "an ONNX model")

    def location(self, size: int) -> list[str]:
        """The values of a key-value pair whose key is `location`; all of them, should there be several."""
        if size > MAX_TEXT:
            raise damage_error(self.name, f"an external path of {size} bytes", f"at most {MAX_TEXT}")
        pair = BytesIO(self.file.read(size))
        inner = _Walk(pair, self.name)
        texts: dict[int, list[bytes]] = {}
        for field, length in inner.messages(size):
            texts.setdefault(field, []).append(pair.read(length))
        return (
            [one_line(value.decode("utf-8", "replace")) for value in texts.get(2, [])]
            if b"location" in texts.get(1, [])
            else []
        )
