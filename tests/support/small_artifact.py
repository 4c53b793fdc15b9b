"""A small artifact, made by hand: embed, two blocks, head, text encoder and decoder as tiny ONNX graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from otcache.schemas.digest import canonical_json, digest_of_bytes, digest_of_file
from otcache.schemas.manifest import MANIFEST_NAME, SCHEMA_VERSION, core_digest

TOKENS, WIDTH, LENGTH, STEPS = 4, 12, 3, 6
WORDS = ["<pad>", "<unk>", "a", "red", "blue", "ring", "star"]
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def tensor(name: str, *shape: Any, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


HIDDEN = ("batch", TOKENS, WIDTH)
STAGES: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = {
    "embed": ("embed", [tensor("latents", *HIDDEN), tensor("timestep", "batch")], [tensor("h0", *HIDDEN)]),
    "block_0": ("block", [tensor("h0", *HIDDEN), tensor("text", "batch", WIDTH)], [tensor("h1", *HIDDEN)]),
    "block_1": ("block", [tensor("h1", *HIDDEN)], [tensor("h2", *HIDDEN)]),
    "head": ("head", [tensor("h2", *HIDDEN), tensor("timestep", "batch")], [tensor("velocity", *HIDDEN)]),
    "text": ("text_encoder", [tensor("ids", "batch", LENGTH, dtype="int64")], [tensor("text", "batch", WIDTH)]),
    "decoder": ("decoder", [tensor("decoder_latents", *HIDDEN)], [tensor("pictures", "batch", 4, 4, 3)]),
}


def weight(name: str, *shape: int) -> np.ndarray:
    random = np.random.default_rng(sum(name.encode()))
    return (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


MATRICES = {name: weight(name, WIDTH, WIDTH) for name in ("embed", "block_0", "block_1", "head")}
TABLE = weight("table", len(WORDS), WIDTH)


def _nodes(name: str) -> tuple[list[Any], dict[str, np.ndarray]]:
    node = helper.make_node
    time = [node("Unsqueeze", ["timestep", "axes"], ["time"])]
    axes = np.array([1, 2])
    if name == "embed":
        return [*time, node("MatMul", ["latents", "w"], ["y"]), node("Add", ["y", "time"], ["h0"])], {"axes": axes}
    if name == "block_0":
        shift = [node("Unsqueeze", ["text", "axes"], ["shift"]), node("Add", ["h0", "shift"], ["x"])]
        rest = [node("MatMul", ["x", "w"], ["y"]), node("Tanh", ["y"], ["z"]), node("Add", ["h0", "z"], ["h1"])]
        return [*shift, *rest], {"axes": np.array([1])}
    if name == "block_1":
        parts = [node("MatMul", ["h1", "w"], ["y"]), node("Tanh", ["y"], ["z"]), node("Add", ["h1", "z"], ["h2"])]
        return parts, {}
    if name == "head":
        return [*time, node("MatMul", ["h2", "w"], ["y"]), node("Mul", ["y", "time"], ["velocity"])], {"axes": axes}
    if name == "text":
        return [node("Gather", ["table", "ids"], ["e"]), node("ReduceMean", ["e", "axes"], ["text"], keepdims=0)], {
            "table": TABLE,
            "axes": np.array([1]),
        }
    return [node("Sigmoid", ["decoder_latents"], ["s"]), node("Reshape", ["s", "shape"], ["pictures"])], {
        "shape": np.array([-1, 4, 4, 3])
    }


def _onnx(name: str) -> bytes:
    _, inputs, outputs = STAGES[name]
    nodes, constants = _nodes(name)
    if name in MATRICES:
        constants["w"] = MATRICES[name]
    sides = [
        [helper.make_tensor_value_info(t["name"], _TYPES[t["dtype"]], t["shape"]) for t in side]
        for side in (inputs, outputs)
    ]
    initializers = [numpy_helper.from_array(value, key) for key, value in constants.items()]
    graph = helper.make_graph(nodes, name, *sides, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    return model.SerializeToString()


def output_program(schedule: tuple[int, ...]) -> dict[str, Any]:
    """Euler over the steps of `schedule`, with a little of the output before."""
    ends = [*schedule[1:], STEPS]
    steps = []
    for index, (start, end) in enumerate(zip(schedule, ends, strict=True)):
        size = (end - start) / STEPS
        coefs = [-size] if index == 0 else [0.25 * size, -1.25 * size]
        steps.append(
            {"step_index": start, "timestep": 1000.0 * (1 - start / STEPS), "latent_coef": 1.0, "output_coefs": coefs}
        )
    return {"payload": "output", "steps": steps}


def adaptive_program(schedule: tuple[int, ...]) -> dict[str, Any]:
    """As `output_program`, with coefficients that follow the sample from the second step on."""
    steps = output_program(schedule)["steps"]
    for step in steps[1:]:
        step["slopes"] = {"centre": -0.5, "spread": 0.7, "latent_coef": 0.02, "output_coefs": [0.01, -0.05]}
    return {"payload": "adaptive", "steps": steps}


def banded_program(schedule: tuple[int, ...]) -> dict[str, Any]:
    """As `adaptive_program`, with means weighed apart."""
    steps = adaptive_program(schedule)["steps"]
    steps[0]["means"] = {"latent_coef": 0.03, "output_coefs": [-0.1]}
    for step in steps[1:]:
        step["means"] = {
            "latent_coef": -0.04,
            "output_coefs": [0.05, 0.1],
            "latent_slope": 0.06,
            "output_slopes": [0.02, -0.03],
        }
    return {"payload": "banded", "steps": steps}


def residual_program() -> dict[str, Any]:
    """All steps; every other one forecasts the residual from the computed ones."""
    steps = []
    for index in range(STEPS):
        coefs = [] if index % 2 == 0 else [1.0] if index == 1 else [-0.5, 1.5]
        steps.append(
            {
                "step_index": index,
                "timestep": 1000.0 * (1 - index / STEPS),
                "compute": not coefs,
                "residual_coefs": coefs,
                "latent_coef": 1.0,
                "output_coefs": [-1 / STEPS],
            }
        )
    return {"payload": "residual", "steps": steps}


def manifest_value(files: list[dict[str, Any]]) -> dict[str, Any]:
    zeros = "sha256:" + "0" * 64
    statistic = {"mean": 30.0, "std": 1.0, "worst": 25.0}
    quality = {"psnr_db": statistic, "ssim": statistic, "relative_latent_error": statistic}
    programs = {"2": adaptive_program((0, 3)), "3": residual_program(), "full": output_program(tuple(range(STEPS)))}
    return {
        "schema_version": SCHEMA_VERSION,
        "producer": {"otcache": "0.1.0"},
        "model": {
            "name": "small",
            "pipeline": "SmallPipeline",
            "transformer": "SmallTransformer",
            "config_digest": zeros,
            "weights_digest": zeros,
        },
        "sampler": {
            "scheduler": "FlowMatchEulerDiscreteScheduler",
            "config": {"shift": 3.0},
            "num_inference_steps": STEPS,
        },
        "conditions": {
            "height": 4,
            "width": 4,
            "max_sequence_length": LENGTH,
            "dtype": "float32",
            "objective": "ssim",
            "prompts_digest": zeros,
            "calibration_prompts": 4,
            "evaluation_prompts": 4,
            "seed": 0,
        },
        "latents": {
            "noise_shape": [3, 4, 4],
            "split": [3, 2, 2, 2, 2],
            "permutation": [1, 3, 0, 2, 4],
            "shape": [TOKENS, WIDTH],
            "initial_scale": 1.0,
        },
        "timestep_scale": 0.001,
        "latents_input": "latents",
        "timestep_input": "timestep",
        "output": "velocity",
        "guidance": {"kind": "cfg", "scale": 4.0, "minimum": 2.0, "maximum": 6.0, "negative_prompt": ""},
        "stages": [
            {
                "name": name,
                "kind": kind,
                "inputs": inputs,
                "outputs": outputs,
                "onnx": f"engines/onnx/{name}.onnx",
                "max_relative_error": 1e-6,
            }
            for name, (kind, inputs, outputs) in STAGES.items()
        ],
        "features": [{"source": "h0", "result": "h2"}],
        "tokenizers": [{"input_name": "ids", "path": "tokenizers/words.json", "length": LENGTH, "pad_id": 0}],
        "reference": {"schedule": [0, 2, 4], "num_inference_steps": STEPS, "source": "graph"},
        "anchor": {"schedule": [0, 3], "num_inference_steps": STEPS, "source": "optuna"},
        "programs": [
            {"budget": budget, "program": program, "quality": quality} for budget, program in programs.items()
        ],
        "costs": [],
        "engines": [],
        "files": files,
        "attachments": [],
        "measurements": [
            {"name": "latency_s/2", "value": 0.1, "unit": "s"},
            {"name": "latency_s/3", "value": 0.2, "unit": "s"},
        ],
    }


def write_manifest(folder: Path, value: dict[str, Any], *, seal: bool = True) -> None:
    """Write manifest.json; `seal` states the right digest."""
    if seal:
        value["digest"] = core_digest(value)
    (folder / MANIFEST_NAME).write_bytes(canonical_json(value))


def read_manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_NAME).read_bytes())


def write_artifact(folder: Path) -> Path:
    """The whole artifact in a new folder."""
    (folder / "engines/onnx").mkdir(parents=True)
    (folder / "tokenizers").mkdir()
    contents = {f"engines/onnx/{name}.onnx": _onnx(name) for name in STAGES}
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    contents["tokenizers/words.json"] = vocabulary.to_str().encode()
    files = []
    for path, data in contents.items():
        (folder / path).write_bytes(data)
        files.append({"path": path, "size_bytes": len(data), "digest": digest_of_bytes(data)})
    write_manifest(folder, manifest_value(files))
    return folder


def with_means(folder: Path) -> Path:
    """The artifact with a program of 4 evaluations that weighs means apart."""
    value = read_manifest(folder)
    entry = next(entry for entry in value["programs"] if entry["budget"] == "2")
    value["programs"].insert(2, {**entry, "budget": "4", "program": banded_program((0, 1, 3, 4))})
    write_manifest(folder, value)
    return folder


def with_qualities(folder: Path, qualities: dict[str, tuple[float, float]]) -> Path:
    """The artifact with mean PSNR (the worst is 5 dB below) and SSIM of some budgets."""
    value = read_manifest(folder)
    for entry in value["programs"]:
        if entry["budget"] in qualities:
            psnr, ssim = qualities[entry["budget"]]
            entry["quality"] = {
                **entry["quality"],
                "psnr_db": {"mean": psnr, "std": 1.0, "worst": psnr - 5.0},
                "ssim": {"mean": ssim, "std": 0.01, "worst": ssim},
            }
    write_manifest(folder, value)
    return folder


def reseal_file(folder: Path, path: str) -> None:
    """State the size and digest that a file has now."""
    value = read_manifest(folder)
    for entry in value["files"]:
        if entry["path"] == path:
            entry.update(size_bytes=(folder / path).stat().st_size, digest=digest_of_file(folder / path))
    write_manifest(folder, value)


def ids_of(text: str) -> list[int]:
    ids = [WORDS.index(word) if word in WORDS else 1 for word in text.split()][:LENGTH]
    return ids + [0] * (LENGTH - len(ids))


def oracle(text: np.ndarray, noise: np.ndarray, program: Any, weights: tuple[float, ...]) -> np.ndarray:
    """float64 latents of a program; text (g, n, WIDTH), noise (n, 3, height, width), which are 4 unless sizes are
    chosen.
    """
    n, rows, columns = len(noise), noise.shape[2] // 2, noise.shape[3] // 2
    x = np.zeros((n, rows * columns, WIDTH))
    for row, column in np.ndindex(rows, columns):
        x[:, columns * row + column] = noise[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(n, WIDTH)
    w = {name: matrix.astype(np.float64) for name, matrix in MATRICES.items()}
    residuals, outputs = [], []
    for step in program.steps:
        time = step.timestep * 0.001
        h0 = np.stack([step.input_scale * x] * len(text)) @ w["embed"] + time
        if step.compute:
            h1 = h0 + np.tanh((h0 + text[:, :, None]) @ w["block_0"])
            residuals.append(h1 + np.tanh(h1 @ w["block_1"]) - h0)
            result = h0 + residuals[-1]
        else:
            used = residuals[-len(step.residual_coefs) :]
            result = h0 + sum(c * r for c, r in zip(step.residual_coefs, used, strict=True))
        velocity = result @ w["head"] * time
        outputs.append(sum(c * v for c, v in zip(weights, velocity, strict=True)))
        used = outputs[-len(step.output_coefs) :] if step.output_coefs else []
        coefs = np.outer([step.latent_coef, *step.output_coefs], np.ones(n))
        if step.slopes:
            moved, size = (np.linalg.norm(v.reshape(n, -1), axis=1) for v in (used[-1] - used[-2], used[-1]))
            place = np.clip((np.log(moved / size) - step.slopes.centre) / step.slopes.spread, -2.5, 2.5)
            coefs += np.outer([step.slopes.latent_coef, *step.slopes.output_coefs], place)
        moved_to = sum(c[:, None, None] * term for c, term in zip(coefs, [x, *used], strict=True))
        if step.means:
            coefs = np.outer([step.means.latent_coef, *step.means.output_coefs], np.ones(n))
            if step.slopes:
                coefs += np.outer([step.means.latent_slope, *step.means.output_slopes], place)
            moved_to += sum(c[:, None] * term.mean(1) for c, term in zip(coefs, [x, *used], strict=True))[:, None]
        x = moved_to
    return x
