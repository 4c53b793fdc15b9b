"""Manifests of older minor versions as of the newest: one function for each version, applied one after the other.

A migration takes the JSON value of a manifest whose digest has been checked and returns that of the next minor version.
The value has not been compared with any schema yet, so a migration touches what has the form that it expects and leaves
everything else for the schema to refuse; it never raises. A released migration is never changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Value = dict[str, Any]


def _from_1_0(value: Value) -> Value:
    """1.1 names the external data of every stage, which 1.0 fixed by name; and has `golden`, which 1.0 did not know."""
    files = value.get("files")
    listed = [entry.get("path") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    stages = value.get("stages")
    if isinstance(stages, list):
        stages = [_with_external_data(stage, listed) for stage in stages]
    result = {key: item for key, item in value.items() if key != "golden"}
    return result if stages is None else {**result, "stages": stages}


def _with_external_data(stage: Any, listed: list[Any]) -> Any:
    if not isinstance(stage, dict) or not isinstance(stage.get("onnx"), str):
        return stage
    data = stage["onnx"] + ".data"
    return {**stage, "external_data": [data] if data in listed else []}


def _from_1_1(value: Value) -> Value:
    """1.2 has `model.denoiser_digest`, which 1.1 did not know."""
    return _model_without(value, "denoiser_digest")


def _model_without(value: Value, name: str) -> Value:
    return {**value, "model": _without(value["model"], name)} if "model" in value else value


def _from_1_2(value: Value) -> Value:
    """1.3 has templates of tokenizers and frames of videos, which 1.2 did not know."""
    conditions, tokenizers = value.get("conditions"), value.get("tokenizers")
    result = dict(value)
    if isinstance(conditions, dict):
        result["conditions"] = {key: item for key, item in conditions.items() if key != "num_frames"}
    if isinstance(tokenizers, list):
        result["tokenizers"] = [
            {key: item for key, item in entry.items() if key != "template"} if isinstance(entry, dict) else entry
            for entry in tokenizers
        ]
    return result


def _from_1_3(value: Value) -> Value:
    """1.4 says how plans were built, and has combinations, which 1.3 did not know."""
    engines = value.get("engines")
    if not isinstance(engines, list):
        return value
    new = ("combinations", "platform", "profile", "workspace_bytes", "sources", "layers")
    return {
        **value,
        "engines": [
            {key: item for key, item in entry.items() if key not in new} if isinstance(entry, dict) else entry
            for entry in engines
        ],
    }


def _from_1_4(value: Value) -> Value:
    """1.5 has sizes that a request chooses, which 1.4 did not know: `shapes`, and what follows symbols."""
    result = {key: item for key, item in value.items() if key != "shapes"}
    if isinstance(latents := value.get("latents"), dict):
        new = ("noise_symbols", "split_symbols", "shape_symbols", "decoded_as")
        result["latents"] = {key: item for key, item in latents.items() if key not in new}
    if isinstance(tokenizers := value.get("tokenizers"), list):
        result["tokenizers"] = [_without(entry, "length_symbol") for entry in tokenizers]
    if isinstance(stages := value.get("stages"), list):
        result["stages"] = [_with_fixed_shapes(stage) for stage in stages]
    return result


def _with_fixed_shapes(stage: Any) -> Any:
    if not isinstance(stage, dict):
        return stage
    sides = {side: stage[side] for side in ("inputs", "outputs") if isinstance(stage.get(side), list)}
    return {**stage, **{side: [_without(tensor, "symbols") for tensor in tensors] for side, tensors in sides.items()}}


def _without(value: Any, name: str) -> Any:
    return {key: item for key, item in value.items() if key != name} if isinstance(value, dict) else value


def _from_1_5(value: Value) -> Value:
    """1.6 has slopes of coefficients, which 1.5 did not know."""
    return _with_steps_without(value, "slopes")


def _from_1_6(value: Value) -> Value:
    """1.7 has coefficients of means, which 1.6 did not know."""
    return _with_steps_without(value, "means")


def _from_1_7(value: Value) -> Value:
    """1.8 has `model.denoiser_digest_float16` and steps of prompts, which 1.7 did not know; and manifests without
    stages.
    """
    value = _model_without(value, "denoiser_digest_float16")
    tokenizers = value.get("tokenizers")
    if not isinstance(tokenizers, list):
        return value
    return {**value, "tokenizers": [_without(entry, "steps") for entry in tokenizers]}


def _from_1_8(value: Value) -> Value:
    """1.9 has `guidance.negative_zeros`, which 1.8 did not know."""
    return {**value, "guidance": _without(value["guidance"], "negative_zeros")} if "guidance" in value else value


def _with_steps_without(value: Value, name: str) -> Value:
    """A manifest whose programs, those of its sizes among them, have steps without a field."""
    result = _programs_without(value, name)
    shapes = value.get("shapes")
    if isinstance(shapes, dict) and isinstance(sizes := shapes.get("sizes"), list):
        return {**result, "shapes": {**shapes, "sizes": [_programs_without(size, name) for size in sizes]}}
    return result


def _programs_without(value: Any, name: str) -> Any:
    if not isinstance(value, dict) or not isinstance(entries := value.get("programs"), list):
        return value
    return {**value, "programs": [_steps_without(entry, name) for entry in entries]}


def _steps_without(entry: Any, name: str) -> Any:
    program = entry.get("program") if isinstance(entry, dict) else None
    if not isinstance(program, dict) or not isinstance(steps := program.get("steps"), list):
        return entry
    return {**entry, "program": {**program, "steps": [_without(step, name) for step in steps]}}


MIGRATIONS: dict[int, Callable[[Value], Value]] = {
    0: _from_1_0,
    1: _from_1_1,
    2: _from_1_2,
    3: _from_1_3,
    4: _from_1_4,
    5: _from_1_5,
    6: _from_1_6,
    7: _from_1_7,
    8: _from_1_8,
}
"""Of major version 1: minor version → function to the next one."""


def migrate(
    value: Value, minor: int, newest: int, migrations: dict[int, Callable[[Value], Value]] | None = None
) -> Value:
    """`value`, of version 1.`minor`, in the form of 1.`newest`; a newer one stays as it is.

    The argument is not changed, and `schema_version` still says what the file says.
    """
    steps = MIGRATIONS if migrations is None else migrations
    for version in range(minor, newest):
        value = steps[version](value)
    return value
