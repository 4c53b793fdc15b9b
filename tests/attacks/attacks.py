"""Artifacts made to harm whoever opens them: each attack changes a whole, sealed artifact, and has the message it ends
in.

An attack is `change(folder, value)`: it may edit the folder's files and the manifest's JSON value, which is sealed
again afterwards, with the right digest, as an attacker would. Files that it edits state their size and digest anew as
well, unless the attack is about those. The message is a part of what `otc verify` then says.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Value = dict[str, Any]
Attack = Callable[[Path, Value], None]
BLOCK = "engines/onnx/block_1.onnx"
ATTACKS: dict[str, tuple[Attack, str]] = {}


def attack(message: str) -> Callable[[Attack], Attack]:
    def register(function: Attack) -> Attack:
        ATTACKS[function.__name__] = (function, message)
        return function

    return register


def fields(name: str, message: str, change: Callable[[Value], object]) -> None:
    """An attack on the manifest alone."""
    ATTACKS[name] = (lambda folder, value: change(value) and None, message)


# --- paths and files
# -----------------------------------------------------------------------------------------------------


def _rename(path: str) -> Callable[[Value], object]:
    def change(value: Value) -> None:
        value["files"][0]["path"] = path

    return change


for _name, _path in {
    "parent": "../x",
    "absolute": "/etc/passwd",
    "inner_parent": "a/../../b",
    "empty_part": "a//b",
    "hidden": ".ssh/id",
    "backslash": "..\\x",
    "drive": "c:/x",
    "here": "a/./b",
    "newline": "x\n",
    "nul": "a\0b",
    "escape": "a\x1b[2J",
    "trailing_dot": "a./b",
    "device": "engines/CON.onnx",
    "printer": "lpt1",
    "right_to_left": "a\u202eb",
    "fullwidth": "a．．/b",
    "deep": "/".join("abcdefghi"),
    "long": "a" * 256,
    "none": "",
    "space": "a b",
    "tilde": "~/x",
    "url": "file://x",
}.items():
    fields(f"path_{_name}", "no plain relative path", _rename(_path))
fields("path_of_the_manifest", "is reserved", _rename("Manifest.json"))
fields("path_of_the_signature", "is reserved", _rename("manifest.sig"))
fields("path_below_the_manifest", "is reserved", _rename("manifest.json/x"))
fields("path_below_a_file", "lies in another file", lambda v: v["files"][0].update(path=BLOCK + "/x"))
fields("path_twice", "same path", lambda v: v["files"].append(dict(v["files"][0])))
fields(
    "path_twice_by_case",
    "same path",
    lambda v: v["files"].append({**v["files"][0], "path": v["files"][0]["path"].upper()}),
)
fields("path_also_an_attachment", "same path", lambda v: v["attachments"].append(v["files"][0]))
fields("engine_not_listed", "used but not listed", lambda v: v["files"].pop(0))
fields("engine_is_a_tokenizer", "no ONNX file", lambda v: v["stages"][0].update(onnx="tokenizers/words.json"))
fields("engine_in_another_format", "no ONNX file", lambda v: v["stages"][0].update(onnx="engines/onnx/embed.ort"))
fields("file_of_another_size", "expected 1 bytes", lambda v: v["files"][0].update(size_bytes=1))
fields("file_of_a_negative_size", "greater than or equal to 0", lambda v: v["files"][0].update(size_bytes=-1))
fields("files_of_terabytes", "set OTC_MAX_BYTES=", lambda v: v["files"][-1].update(size_bytes=4 << 40))
fields("onnx_of_terabytes", "expected at most 2147483647", lambda v: v["files"][0].update(size_bytes=4 << 40))
fields("file_of_a_huge_size", "less than or equal to", lambda v: v["files"][0].update(size_bytes=1 << 60))
fields("file_with_another_digest", "found digest", lambda v: v["files"][0].update(digest="sha256:" + "0" * 64))
fields("file_with_a_weak_digest", "should match pattern", lambda v: v["files"][0].update(digest="md5:" + "0" * 32))
fields("too_many_attachments", "at most 65536", lambda v: v.update(attachments=[v["files"][0]] * 65537))


@attack("a symbolic link at block_1.onnx")
def link_to_a_file_outside(folder: Path, value: Value) -> None:
    (folder / BLOCK).rename(folder.parent / "outside")
    (folder / BLOCK).symlink_to(folder.parent / "outside")


@attack("a symbolic link at engines")
def link_to_a_folder_outside(folder: Path, value: Value) -> None:
    (folder / "engines").rename(folder.parent / "elsewhere")
    (folder / "engines").symlink_to(folder.parent / "elsewhere")


@attack("a special file at block_1.onnx")
def pipe_that_never_ends(folder: Path, value: Value) -> None:
    (folder / BLOCK).unlink()
    os.mkfifo(folder / BLOCK)


@attack("a folder at block_1.onnx")
def folder_in_place_of_a_file(folder: Path, value: Value) -> None:
    (folder / BLOCK).unlink()
    (folder / BLOCK).mkdir()


# --- ONNX files that refer to others
# -------------------------------------------------------------------------------------


def _external(location: str, **more: str) -> Any:
    tensor = numpy_helper.from_array(np.zeros((12, 12), "float32"), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in {"location": location, "offset": "0", "length": "576", **more}.items():
        tensor.external_data.add(key=key, value=text)
    return tensor


def _model(folder: Path, nodes: list[Any], initializers: list[Any], functions: list[Any] | None = None) -> None:
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4, 12])] for name in ("h1", "h2")]
    graph = helper.make_graph(nodes, "block", *sides, initializers)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, opset_imports=imports, functions=functions or [])
    model.ir_version = 10
    (folder / BLOCK).write_bytes(model.SerializeToString())


_PLAIN = [helper.make_node("MatMul", ["h1", "w"], ["h2"])]


def external(name: str, location: str, message: str = "found weights that are read from") -> None:
    ATTACKS[f"external_{name}"] = (lambda folder, value: _model(folder, _PLAIN, [_external(location)]), message)


external("parent", "../../../outside")
external("absolute", "/etc/passwd")
external("here", "./block_0.onnx")
external("memory_of_the_process", "*/_ORT_MEM_ADDR_/*")
external("listed_but_not_declared", "block_0.onnx", "expected no other file, as the manifest says")
external("itself", "block_1.onnx")
external("empty", "")
external("nul", "block_0.onnx\0.data")
external("network", "\\\\host\\share\\x")


@attack("found weights that are read from 'secret'")
def external_not_listed(folder: Path, value: Value) -> None:
    (folder / "engines/onnx/secret").write_bytes(bytes(576))
    _model(folder, _PLAIN, [_external("secret")])


@attack("found weights that are read from 'block_0.onnx'")
def external_beside_a_declared_one(folder: Path, value: Value) -> None:
    """The declared file is fine, and a second location in the same tensor is not."""
    tensor = _external("head.onnx")
    tensor.external_data.add(key="location", value="block_0.onnx")
    _model(folder, _PLAIN, [tensor])
    value["schema_version"] = "1.1"
    next(stage for stage in value["stages"] if stage["onnx"] == BLOCK)["external_data"] = ["engines/onnx/head.onnx"]


@attack("found weights that are read from '/etc/passwd'")
def external_in_a_constant(folder: Path, value: Value) -> None:
    node = helper.make_node("Constant", [], ["w"], value=_external("/etc/passwd"))
    _model(folder, [node, *_PLAIN], [])


@attack("found the operator If")
def external_in_a_branch(folder: Path, value: Value) -> None:
    inner = [helper.make_node("Constant", [], ["c"], value=_external("/etc/passwd"))]
    graph = helper.make_graph(inner, "then", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [12, 12])])
    condition = numpy_helper.from_array(np.array(True), "yes")
    node = helper.make_node("If", ["yes"], ["w"], then_branch=graph, else_branch=graph)
    _model(folder, [node, *_PLAIN], [condition])


@attack("found the operator Read")
def external_in_a_function(folder: Path, value: Value) -> None:
    inner = [helper.make_node("Constant", [], ["c"], value=_external("/etc/passwd"))]
    function = helper.make_function("own", "Read", [], ["c"], inner, [helper.make_opsetid("", 20)])
    _model(folder, [helper.make_node("Read", [], ["w"], domain="own"), *_PLAIN], [], [function])


@attack("found the operator EPContext")
def engine_in_another_file(folder: Path, value: Value) -> None:
    node = helper.make_node(
        "EPContext", ["h1"], ["h2"], domain="com.microsoft", ep_cache_context="/etc/passwd", embed_mode=0
    )
    _model(folder, [node], [])


@attack("found a graph within a node")
def onnx_nested_without_end(folder: Path, value: Value) -> None:
    """Graphs in attributes in nodes in graphs, 200 deep."""

    def wrap(field: int, inner: bytes) -> bytes:
        size, digits = len(inner), b""
        while True:
            digits += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
            size >>= 7
            if not size:
                return bytes([field << 3 | 2]) + digits + inner

    data = b""
    for _ in range(200):
        data = wrap(1, wrap(5, wrap(6, data)))
    (folder / BLOCK).write_bytes(wrap(7, data))


def _loop(condition: str) -> tuple[list[Any], list[Any]]:
    """A loop that never ends, as nodes and initializers."""
    sides = [helper.make_tensor_value_info(name, kind, []) for name, kind in (("i", 7), ("go", 9), ("went", 9))]
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["went"])], "body", sides[:2], sides[2:])
    return [helper.make_node("Loop", ["", condition], [], body=body), *_PLAIN], [
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.zeros((12, 12), "float32"), "w"),
    ]


@attack("found the operator Loop")
def loop_without_end(folder: Path, value: Value) -> None:
    _model(folder, *_loop("yes"))


@attack("found a graph within a node")
def loop_in_an_operator_that_is_let_through(folder: Path, value: Value) -> None:
    nodes, initializers = _loop("yes")
    inner = helper.make_graph(nodes[:1], "inner", [], [])
    _model(folder, [helper.make_node("MatMul", ["h1", "w"], ["h2"], body=inner)], initializers)


@attack("found a function, which may call others")
def loop_in_a_function(folder: Path, value: Value) -> None:
    nodes, initializers = _loop("yes")
    function = helper.make_function("", "MatMul", ["a", "b"], ["c"], nodes[:1], [helper.make_opsetid("", 20)])
    _model(folder, _PLAIN, initializers, [function])


@attack("found the operator Gelu of com.microsoft")
def operator_of_a_library(folder: Path, value: Value) -> None:
    _model(folder, [helper.make_node("Gelu", ["h1"], ["h2"], domain="com.microsoft")], [])


@attack("found the operator RegexFullMatch")
def operator_that_backtracks(folder: Path, value: Value) -> None:
    _model(folder, [helper.make_node("RegexFullMatch", ["h1"], ["h2"], pattern="(a+)+$")], [])


@attack("a field beyond its message")
def onnx_longer_than_its_file(folder: Path, value: Value) -> None:
    (folder / BLOCK).write_bytes(b"\x3a\xff\xff\xff\xff\x0f")


# --- tokenizers
# ---------------------------------------------------------------------------------------------------------------


def tokenizer(name: str, message: str, change: Callable[[Value], object]) -> None:
    """An attack on the tokenizer file: seen when it is loaded, which `otc verify` does on its level host."""

    def attack(folder: Path, value: Value) -> None:
        path = folder / "tokenizers/words.json"
        content = json.loads(path.read_bytes())
        change(content)
        path.write_bytes(json.dumps(content).encode())

    TOKENIZER_ATTACKS[name] = (attack, message)


TOKENIZER_ATTACKS: dict[str, tuple[Attack, str]] = {}
_THOUSAND = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
_TEN = {**_THOUSAND, "content": "a" * 10}


def _split(pattern: str) -> Callable[[Value], object]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda v: v.update(pre_tokenizer=split)


def _normalizers(*parts: Value) -> Callable[[Value], object]:
    return lambda v: v.update(normalizer={"type": "Sequence", "normalizers": list(parts)})


def _table(*texts: bytes) -> Value:
    """A table of SentencePiece with an empty trie."""
    table = (4).to_bytes(4, "little") + bytes(4) + b"\0".join(texts)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


tokenizer("regex_that_backtracks", "the regular expression '(a+)+$'", _split("(a+)+$"))
tokenizer("regex_that_is_none", "the regular expression '('", _split("("))
tokenizer("thousandfold", "at most 64 characters", _normalizers(*[_THOUSAND] * 8))
tokenizer("tenfold_four_times", "makes up to 1e+04 bytes of one: expected at most 1024", _normalizers(*[_TEN] * 4))
tokenizer(
    "tenfold_four_times_inside", "makes up to 1e+04", _normalizers({"type": "Sequence", "normalizers": [_TEN] * 4})
)
tokenizer("table_of_long_texts", "makes up to 2e+03 bytes of one", _normalizers(_table(b"a", b"b" * 2000)))
tokenizer("table_that_is_none", "has a trie of", _normalizers({**_table(), "precompiled_charsmap": "AAAA"}))
tokenizer("replaces_nothing", "at least 1 character", _normalizers({**_TEN, "pattern": {"String": ""}}))
tokenizer("normalizers_without_end", "at most 16", _normalizers(*[{"type": "NFC"}] * 17))
tokenizer("of_another_kind", "does not match any of the expected tags", lambda v: v["model"].update(type="WordPiece"))
tokenizer("that_drops_merges", "dropout: Input should be null", lambda v: v.update(model=_bpe(dropout=0.5)))
tokenizer("with_an_empty_piece", "at least 1 character", lambda v: v.update(model=_unigram(["", 0.0])))
tokenizer("without_pieces", "at least 1 item", lambda v: v.update(model=_unigram()))
tokenizer("of_a_wrong_id", "less than 2147483648", lambda v: v["model"]["vocab"].update(ring=1 << 40))
tokenizer("with_a_merge_of_nothing", "tokenizers/words.json", lambda v: v.update(model=_bpe(merges=[["x", "y"]])))
tokenizer("whose_unknown_is_none", "tokenizers/words.json", lambda v: v.update(model=_unigram(["a", 0.0], unk_id=7)))
tokenizer("with_another_component", "Extra inputs are not permitted", lambda v: v["model"].update(cache=1 << 40))
tokenizer("with_long_tokens", "at most 512", lambda v: v["model"]["vocab"].update({"a" * 513: 9}))
tokenizer("that_is_empty", "Field required", lambda v: v.clear())


def _bpe(**more: Any) -> Value:
    return {"type": "BPE", "vocab": {"a": 0}, "merges": [], **more}


def _unigram(*vocabulary: Any, **more: Any) -> Value:
    return {"type": "Unigram", "vocab": list(vocabulary), **more}


# --- programs
# ------------------------------------------------------------------------------------------------------------


def step(name: str, message: str, budget: int = 0, place: int = 1, **change: Any) -> None:
    fields(f"step_{name}", message, lambda v: v["programs"][budget]["program"]["steps"][place].update(change))


step("repeated", "expected more than 0", step_index=0)
step("beyond_the_last", "beyond the last", step_index=6)
step("negative", "greater than or equal to 0", step_index=-1)
step("not_a_number", "valid integer", step_index="1")
step("coefficient_too_large", "less than or equal to 1000000", latent_coef=1e7)
step("timestep_too_large", "less than or equal to 1000000", timestep=1e300)
step("outputs_that_are_not_there", "more outputs than there are", output_coefs=[0.1] * 3)
step("outputs_without_end", "at most 64", output_coefs=[0.1] * 65)
step("computed_and_forecast", "either compute the blocks or forecast", residual_coefs=[1.0])
step("forecast_of_nothing", "either compute the blocks or forecast", budget=1, residual_coefs=[])
step("forecast_from_the_future", "more residuals than were computed", budget=1, residual_coefs=[0.5, 0.5])
step("forecast_first", "either compute the blocks or forecast", place=0, compute=False)
step("forecast_in_an_output_program", "computed steps only", compute=False, residual_coefs=[1.0])
fields("budget_that_lies", "expected 3", lambda v: v["programs"][0].update(budget="3") or v["programs"].pop(1))
fields("budget_with_a_zero", "should match pattern", lambda v: v["programs"][0].update(budget="02"))
fields("budget_without_end", "should match pattern", lambda v: v["programs"][0].update(budget="9" * 5000))
fields("budget_twice", "two have the same budget", lambda v: v["programs"].append(v["programs"][0]))
fields("no_steps", "at least 1 item", lambda v: v["programs"][0]["program"].update(steps=[]))
fields("residuals_of_nothing", "no features are declared", lambda v: v.update(features=[]))
fields("policy_not_increasing", "increasing step indices", lambda v: v["anchor"].update(schedule=[0, 3, 3]))
fields("policy_beyond_the_last", "from 0 to 5", lambda v: v["anchor"].update(schedule=[0, 6]))
fields("policy_of_other_steps", "expected 6", lambda v: v["anchor"].update(num_inference_steps=50))
fields("guidance_outside_its_range", "expected 2.0 to 6.0", lambda v: v["guidance"].update(scale=9.0))
fields("scale_too_large", "less than or equal to 1000000", lambda v: v.update(timestep_scale=1e9))

# --- stages
# --------------------------------------------------------------------------------------------------------------


def stage(name: str, message: str, index: int, change: Callable[[Value], object]) -> None:
    fields(f"stage_{name}", message, lambda v: change(v["stages"][index]))


def _tensor(name: str, *shape: Any, dtype: str = "float32") -> Value:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


_HIDDEN = ("batch", 4, 12)
stage("cycle", "writes h2, which exists already", 1, lambda s: s["inputs"].append(_tensor("h2", *_HIDDEN)))
stage("reads_itself", "writes h1, which exists already", 1, lambda s: s["inputs"].append(_tensor("h1", *_HIDDEN)))
stage("hole", "reads mask, which nothing writes", 1, lambda s: s["inputs"].append(_tensor("mask", "batch", 4)))
stage("written_twice", "exists already", 2, lambda s: s["outputs"].append(_tensor("h1", *_HIDDEN)))
stage("writes_a_request_input", "exists already", 2, lambda s: s["outputs"].append(_tensor("latents", *_HIDDEN)))
stage("of_another_shape", "another type or shape", 2, lambda s: s["inputs"][0].update(shape=["batch", 4, 13]))
stage("of_another_type", "another type or shape", 2, lambda s: s["inputs"][0].update(dtype="float16"))
stage("same_name", "two have the same name", 2, lambda s: s.update(name="block_0"))
stage("tensor_twice", "two tensors of the same name", 2, lambda s: s["inputs"].append(s["inputs"][0]))
stage("no_head", "one embed, at least one block and one head", 3, lambda s: s.update(kind="block"))
stage("unknown_kind", "Input should be", 3, lambda s: s.update(kind="shell"))
stage("batch_in_the_middle", "batch not first", 4, lambda s: s["inputs"][0].update(shape=[3, "batch"]))
stage("huge_tensor", "more than 2**40 elements", 2, lambda s: s["outputs"].append(_tensor("x", 1 << 31, 1 << 31)))
stage("empty_tensor", "greater than or equal to 1", 2, lambda s: s["outputs"].append(_tensor("x", 0)))
stage("tensor_of_many_axes", "at most 8", 2, lambda s: s["outputs"].append(_tensor("x", *[1] * 9)))
stage("encoder_of_another_length", "ids has shape", 4, lambda s: s["inputs"][0].update(shape=["batch", 4]))
stage("encoder_of_floats", "ids is float32", 4, lambda s: s["inputs"][0].update(dtype="float32"))
stage("encoder_of_another_width", "text has shape", 4, lambda s: s["outputs"][0].update(shape=["batch", 13]))
stage("encoder_of_another_name", "reads text, which nothing writes", 4, lambda s: s["outputs"][0].update(name="other"))
stage("decoder_of_another_size", "pictures has shape", 5, lambda s: s["outputs"][0].update(shape=["batch", 4, 5, 3]))
stage(
    "decoder_of_other_latents", "decoder_latents has shape", 5, lambda s: s["inputs"][0].update(shape=["batch", 5, 12])
)
stage("decoder_of_integers", "pictures is int64", 5, lambda s: s["outputs"][0].update(dtype="int64"))
stage("decoder_of_two_inputs", "one input and one output", 5, lambda s: s["inputs"].append(_tensor("x", "batch")))
fields(
    "stage_two_decoders",
    "at most one text encoder and one decoder",
    lambda v: v["stages"].append({**v["stages"][5], "name": "again"}),
)


def declared(name: str, message: str, path: str) -> None:
    fields(
        f"external_{name}",
        message,
        lambda v: v.update(schema_version="1.1") or v["stages"][0].update(external_data=[path]),
    )


declared("declared_elsewhere", "expected it beside", "tokenizers/words.json")
declared("declared_but_not_listed", "used but not listed", "engines/onnx/x.data")
declared("declared_outside", "no plain relative path", "engines/onnx/../../x")
fields("tokenizer_of_nothing", "expected one for each input", lambda v: v["tokenizers"][0].update(input_name="other"))
fields("tokenizer_too_long", "less than or equal to 65536", lambda v: v["tokenizers"][0].update(length=1 << 30))
fields("feature_that_a_block_writes", "a block writes it", lambda v: v["features"][0].update(source="h1"))
fields(
    "feature_that_no_block_writes", "no tensors of the same shape", lambda v: v["features"][0].update(result="latents")
)
fields("feature_that_is_not_enough", "the head reads h2", lambda v: v["features"][0].update(result="h1"))
fields("feature_twice", "two have the same result", lambda v: v["features"].append(v["features"][0]))
fields("output_elsewhere", "is not an output of the head", lambda v: v.update(output="h2"))
fields("latents_nowhere", "is no input of the model", lambda v: v.update(latents_input="h0"))
fields("latents_as_time", "latents and timestep at once", lambda v: v.update(timestep_input="latents"))
fields("latents_of_another_shape", "latents has shape", lambda v: v["latents"].update(shape=[12, 4]))
fields("latents_of_other_sizes", "expected the same", lambda v: v["latents"].update(shape=[4, 13]))
fields(
    "latents_without_end",
    "at most 2**32",
    lambda v: v["latents"].update(noise_shape=[1 << 31, 4], split=[1 << 31, 4], permutation=[0, 1], shape=[1 << 31, 4]),
)
fields("latents_permuted_twice", "an order of 5 axes", lambda v: v["latents"].update(permutation=[0, 0, 1, 2, 3]))
fields(
    "engines_for_some_stages",
    "but not both",
    lambda v: v.update(
        engines=[{"backend": "tensorrt", "version": "10", "target": "sm_89", "stages": {"embed": BLOCK}}]
    ),
)


def _engine(backend: str, **swapped: str) -> Callable[[Value], object]:
    """An entry of `engines`, with some of the files of stages in the places of others."""

    def change(value: Value) -> None:
        names = [stage["name"] for stage in value["stages"]]
        paths = {stage["name"]: stage["onnx"] for stage in value["stages"]}
        if backend != "onnx":
            paths = {name: f"engines/plans/{name}.plan" for name in names}
            value["files"] += [{**value["files"][0], "path": path} for path in paths.values()]
        stages = {name: paths[swapped.get(name, name)] for name in names}
        value["engines"] = [{"backend": backend, "version": "10", "target": "any", "stages": stages}]

    return change


for _backend in ("onnx", "tensorrt-rtx"):
    fields(
        f"engines_swapped_{_backend.partition('-')[0]}",
        "engines: block_0 for any is",
        _engine(_backend, block_0="block_1", block_1="block_0"),
    )
    fields(
        f"engines_of_another_kind_{_backend.partition('-')[0]}",
        "engines: decoder for any is",
        _engine(_backend, decoder="text", text="decoder"),
    )

# --- golden
# --------------------------------------------------------------------------------------------------------------


def golden(name: str, message: str, **change: Any) -> None:
    record = {
        "prompt": "a red ring",
        "budget": "2",
        "seed": 3,
        "guidance_scale": 4.0,
        "latents": "tokenizers/words.json",
        "max_relative_error": 1e-3,
        **change,
    }
    fields(f"golden_{name}", message, lambda v: v.update(schema_version="1.1", golden=record))


golden("of_another_size", "with 192 bytes")
golden("not_listed", "with 192 bytes", latents="golden/x")
golden("of_another_budget", "expected one of 2, 3, full", budget="4")
golden("of_another_scale", "expected 2.0 to 6.0", guidance_scale=7.0)
golden("without_a_scale", "with guidance of kind cfg", guidance_scale=None)
golden("of_a_huge_seed", "out of range", seed=1 << 64)
golden("that_allows_everything", "less than or equal to 1", max_relative_error=1e9)
golden("outside", "no plain relative path", latents="../x")

# --- numbers that nothing else is compared with
# ----------------------------------------------------------------------------------------


def number(name: str, message: str, value: Any, *place: Any) -> None:
    def change(manifest: Value) -> None:
        holder: Any = manifest
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = value

    fields(f"number_{name}", message, change)


_COST = [{"name": "capture", "full_runs": -1.0}]
number("tokens_without_end", "less than or equal to 65536", 1 << 48, "conditions", "max_sequence_length")
number("frames_without_end", "less than or equal to 65536", 1 << 31, "conditions", "num_frames")
number("negative_cost", "greater than or equal to 0", _COST, "costs")
number("huge_error", "less than or equal to 1", 1e308, "max_relative_error")
number("huge_error_of_a_stage", "less than or equal to 1", 1e308, "stages", 0, "max_relative_error")
number("negative_prompts", "greater than or equal to 0", -1, "conditions", "calibration_prompts")
number("huge_quality", "less than or equal to 1000000", 1e300, "programs", 0, "quality", "ssim", "mean")
number("negative_latency", "greater than or equal to 0", -1.0, "measurements", 0, "value")
number("padding_beyond_any_table", "less than 2147483648", 1 << 40, "tokenizers", 0, "pad_id")
number("huge_seed", "out of range", 1 << 64, "conditions", "seed")

# --- the value as a whole
# ------------------------------------------------------------------------------------------------

fields("version_of_tomorrow", "expected 1.x", lambda v: v.update(schema_version="2.0"))
fields("version_in_other_digits", "expected a version such as", lambda v: v.update(schema_version="１.0"))
fields("number_beyond_64_bits", "out of range", lambda v: v.update(extra=1 << 70))
fields("number_without_end", "out of range", lambda v: v.update(extra=int("9" * 4000)))
fields("million_values", "more than 2097152 values", lambda v: v.update(extra=[0] * (1 << 21)))
fields("truth_as_a_number", "valid number", lambda v: v.update(timestep_scale=True))
fields("number_as_text", "valid number", lambda v: v.update(timestep_scale="0.001"))
fields("field_missing", "Field required", lambda v: v.pop("guidance"))
