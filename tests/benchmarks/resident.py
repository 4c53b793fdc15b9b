"""The resident loop on this host's GPU: its latents against the CPU's, captured against uncaptured, per block against
whole trunk.

    python tests/benchmarks/resident.py [--artifact DIR] [--rounds 5] [-o FILE]

The engines are the first that this host can execute: plans of TensorRT or TensorRT for RTX, built here from the
artifact's ONNX files, else stages that `compiler.graph.cut` makes of a FLUX transformer, run by torch behind the same
protocol (a copy per output more than plans need). With a GPU, torch's figures are of FLUX.1's sizes at 1024² in
bfloat16 with random weights; agreement is always that of a reduced size in float32, because a CPU cannot run the other.
Without a GPU everything is of reduced size, graphs are replayed call by call, and the output says so: then it shows
that the script runs, and what the loop itself costs the host. Prints JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from output import host, output_option, write

from otcache.compiler.graph import cut as cutting
from otcache.compiler.programs.baselines import extrapolated_program
from otcache.compiler.programs.lower import lower
from otcache.compiler.programs.residual import residual_program
from otcache.compiler.programs.schedule import uniform_schedule
from otcache.compiler.programs.solver_table import program_from_table
from otcache.runtime import Sampler
from otcache.runtime.build.build_engines import build_engines
from otcache.runtime.engines.gpu import why_no_gpu
from otcache.runtime.loop.backend import Run
from otcache.runtime.loop.device_loop import ResidentLoop
from otcache.runtime.loop.launches import list_launches
from otcache.runtime.loop.loop import sample
from otcache.runtime.loop.timing import Timer
from otcache.runtime.serving.bench import versions
from otcache.schemas.combinations import COEFS, Combination, combinations
from otcache.schemas.digest import canonical_json, digest_of_value
from otcache.schemas.errors import OTCacheError
from otcache.schemas.manifest import Manifest
from otcache.schemas.program import Program
from otcache.schemas.segments import coarsen, name_of, segments

NEWEST = max((Path(__file__).parents[1] / "golden").glob("1.*"), key=lambda path: int(path.name[2:])) / "artifact"
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64}
REDUCED = {
    "num_layers": 2,
    "num_single_layers": 2,
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": False,
}
REAL = {"guidance_embeds": False}
"""diffusers' defaults, which are FLUX.1's sizes."""
FLUX_BLOCKS = 57
GRANULARITIES = ("block", "segment", "trunk")
SHARE = 0.02
"""Of a step's time, that the host may take on a GPU at FLUX.1's sizes."""


class Subject:
    """A FLUX transformer with random weights, cut; its manifest for one sample without guidance."""

    def __init__(
        self, options: dict[str, Any], *, tokens: tuple[int, int], steps: int, dtype: str, device: str
    ) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            model = FluxTransformer2DModel(**options).to(TORCH[dtype]).eval()
            image, text = tokens
            example = {
                "hidden_states": torch.randn(2, image, model.config.in_channels, dtype=TORCH[dtype]),
                "timestep": torch.rand(2, dtype=TORCH[dtype]),
                "encoder_hidden_states": torch.randn(2, text, model.config.joint_attention_dim, dtype=TORCH[dtype]),
                "pooled_projections": torch.randn(2, model.config.pooled_projection_dim, dtype=TORCH[dtype]),
            }
            constants = {
                "img_ids": torch.rand(image, 3),
                "txt_ids": torch.zeros(text, 3),
                "guidance": None,
                "joint_attention_kwargs": {},
                "return_dict": False,
            }
        self.stages = cutting.cut(model, example, constants=constants)
        self.manifest = _manifest(self.stages, example, dtype, steps)
        random = np.random.default_rng(0)
        self.latents = random.standard_normal((1, image, model.config.in_channels)).astype(np.float32)
        self.conditioning = {
            tensor.name: random.standard_normal((1, 1, *tensor.shape[1:])).astype(np.float32)
            for tensor in self.manifest.conditioning
        }

    def run(self, budget: str) -> Run:
        entry = self.manifest.program(budget)
        assert entry is not None
        return Run(
            manifest=self.manifest,
            budget=budget,
            program=entry.program,
            latents=self.latents,
            inputs=self.conditioning,
            guidance_weights=(1.0,),
            timer=Timer(),
            step_done=lambda done, total: None,
            watched=False,
        )


def _manifest(stages: cutting.Stages, example: Mapping[str, torch.Tensor], dtype: str, steps: int) -> Manifest:
    tensors = dict(example)
    for stage in stages.stages:
        tensors.update(stage.run(tensors))

    def info(name: str) -> dict[str, Any]:
        kind = str(tensors[name].dtype).removeprefix("torch.")
        return {"name": name, "dtype": kind, "shape": ["batch", *tensors[name].shape[1:]]}

    zeros = digest_of_value(None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    table = lower(scheduler)
    half = uniform_schedule(steps // 2, steps)
    programs: dict[str, Program] = {
        "full": program_from_table(table),
        str(steps // 4): extrapolated_program(table, uniform_schedule(steps // 4, steps), order=1),
        str(steps // 2): residual_program(table, half, "taylor-1", np.eye(steps)),
    }
    paths = [f"engines/onnx/{stage.name}.onnx" for stage in stages.stages]
    shape = list(example["hidden_states"].shape[1:])
    policy = {"schedule": list(half), "num_inference_steps": steps, "source": "uniform"}
    value: dict[str, Any] = {
        "producer": {},
        "digest": zeros,
        "tokenizers": [],
        "reference": policy,
        "anchor": policy,
        "model": {
            "name": "random",
            "pipeline": "FluxPipeline",
            "transformer": "FluxTransformer2DModel",
            "config_digest": zeros,
            "weights_digest": zeros,
        },
        "sampler": {"scheduler": type(scheduler).__name__, "config": {}, "num_inference_steps": steps},
        "conditions": {
            "height": 1,
            "width": 1,
            "max_sequence_length": 1,
            "dtype": dtype,
            "objective": "none",
            "prompts_digest": zeros,
            "calibration_prompts": 0,
            "evaluation_prompts": 0,
            "seed": 0,
        },
        "latents": {"noise_shape": shape, "split": shape, "permutation": [0, 1], "shape": shape, "initial_scale": 1.0},
        "timestep_scale": 0.001,
        "latents_input": "hidden_states",
        "timestep_input": "timestep",
        "output": stages.output,
        "guidance": {"kind": "none", "scale": 1.0, "minimum": 1.0, "maximum": 1.0},
        "features": [{"source": source, "result": result} for source, result in stages.features],
        "programs": [
            {"budget": name, "program": program.model_dump(mode="json")} for name, program in programs.items()
        ],
        "stages": [
            {
                "name": stage.name,
                "kind": stage.kind,
                "inputs": [info(name) for name in stage.inputs],
                "onnx": path,
                "outputs": [info(name) for name in stage.outputs],
                "max_relative_error": 0.0,
            }
            for stage, path in zip(stages.stages, paths, strict=True)
        ],
        "files": [{"path": path, "size_bytes": 0, "digest": zeros} for path in paths],
    }
    return Manifest.model_validate_json(canonical_json(value))


# --- a device and engines by torch
# ----------------------------------------------------------------------------------------


class TorchDevice:
    """The first GPU or, without one, this host's memory, by torch's allocator and streams."""

    def __init__(self, kind: str) -> None:
        self.kind, self.blocks = kind, {}
        self.stream = torch.cuda.Stream() if kind == "cuda" else None

    def activate(self) -> None:
        """Torch knows the device in every thread."""

    def allocate(self, size_bytes: int) -> int:
        block = torch.zeros(size_bytes, dtype=torch.uint8, device=self.kind)
        self.blocks[block.data_ptr()] = block
        return block.data_ptr()

    def free(self, address: int) -> None:
        del self.blocks[address]

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0] if self.kind == "cuda" else 0

    def view(self, address: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        base = max(start for start in self.blocks if start <= address)
        size = int(np.prod(shape)) * dtype.itemsize
        return self.blocks[base][address - base : address - base + size].view(dtype).reshape(shape)

    def upload(self, address: int, array: np.ndarray) -> None:
        data = torch.from_numpy(np.array(array).view(np.uint8).reshape(-1))
        with torch.cuda.stream(self.stream):
            self.view(address, (array.nbytes,), torch.uint8).copy_(data)

    def download(self, address: int, array: np.ndarray) -> None:
        with torch.cuda.stream(self.stream):
            data = self.view(address, (array.nbytes,), torch.uint8).cpu()
        array[...] = data.numpy().view(array.dtype).reshape(array.shape)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()

    def record(self, launch: Callable[[], None]) -> Any:
        return _CudaRecording(launch, self.stream) if self.stream is not None else _Calls(launch)


class _CudaRecording:
    def __init__(self, launch: Callable[[], None], stream: torch.cuda.Stream) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), stream
        with torch.cuda.graph(self._graph, stream=stream):
            launch()

    def __call__(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()

    def close(self) -> None:
        self._graph.reset()


class _Calls:
    def __init__(self, launch: Callable[[], None]) -> None:
        self._launch = launch

    def __call__(self) -> None:
        self._launch()

    def close(self) -> None: ...


class TorchEngine:
    """Stages in a row, or a combination, on memory that it is told of."""

    workspace_bytes = 0

    def __init__(
        self, contract: Any, run: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], device: TorchDevice
    ) -> None:
        self.contract, self.run, self.device = contract, run, device

    def context(self) -> TorchContext:
        return TorchContext(self)


class TorchContext:
    def __init__(self, engine: TorchEngine) -> None:
        self._engine = engine
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._types = {t.name: TORCH[t.dtype] for t in (*engine.contract.inputs, *engine.contract.outputs)}
        self._fixed = {
            t.name: tuple(1 if isinstance(size, str) else size for size in t.shape)
            for t in (*engine.contract.inputs, *engine.contract.outputs)
        }

    def use_workspace(self, address: int, size_bytes: int) -> None:
        """Torch has its own."""

    def set_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        self._shapes[tensor] = shape

    def set_address(self, tensor: str, address: int) -> None:
        shape = self._shapes.get(tensor, self._fixed[tensor])
        self._tensors[tensor] = self._engine.device.view(address, shape, self._types[tensor])

    def enqueue(self) -> None:
        with torch.no_grad(), torch.cuda.stream(self._engine.device.stream):
            for name, value in self._engine.run(self._tensors).items():
                self._tensors[name].copy_(value)


def torch_loop(subject: Subject, kind: str, granularity: str, *, cuda_graph: bool) -> ResidentLoop:
    device, held = TorchDevice(kind), segments(subject.manifest, granularity)
    stages = {stage.name: stage for stage in subject.stages.stages}
    members = {name_of(segment): segment for segment in held}
    engines = {
        stage.name: TorchEngine(
            stage,
            _stages_run(
                [stages[name] for name in members.get(stage.name, (stage.name,))],
                [tensor.name for tensor in stage.outputs],
            ),
            device,
        )
        for stage in coarsen(subject.manifest, held).trunk
    }
    engines |= {"@" + one.name: TorchEngine(one, _sum_run(one), device) for one in combinations(subject.manifest)}
    return ResidentLoop(subject.manifest, engines, device, segments=held, cuda_graph=cuda_graph)


def _stages_run(stages: list[cutting.Stage], outputs: list[str]) -> Callable[..., dict[str, torch.Tensor]]:
    def run(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        known = dict(tensors)
        for stage in stages:
            known.update(stage.run(known))
        return {name: known[name] for name in outputs}

    return run


def _sum_run(one: Combination) -> Callable[..., dict[str, torch.Tensor]]:
    """Of an artifact without guidance."""
    count = len(one.terms)

    def run(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        terms = [tensors[f"term_{index}"].float() for index in range(count)]
        if one.kind == "residual":
            return {"total": terms[0] - terms[1]}
        coefs = tensors[COEFS]
        if one.kind == "forecast":
            return {"total": terms[0] + sum(coefs[i] * term for i, term in enumerate(terms[1:]))}
        return {"total": sum(coefs[i] * term for i, term in enumerate(terms))}

    return run


class HostModel:
    """The loop's `Model` on the CPU: what the resident loop is compared with."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.tensors = subject, {}

    def embed(self, x: np.ndarray, timestep: float) -> None:
        held = {name: torch.from_numpy(value[0]) for name, value in self.subject.conditioning.items()}
        self.tensors = {**held, "hidden_states": torch.from_numpy(x), "timestep": torch.full((len(x),), timestep)}
        self._run("embed")

    def blocks(self) -> None:
        self._run("block")

    def residual(self) -> tuple[np.ndarray, ...]:
        pairs = self.subject.stages.features
        return tuple((self.tensors[result] - self.tensors[source]).numpy() for source, result in pairs)

    def apply(self, residual: tuple[np.ndarray, ...]) -> None:
        for (source, result), part in zip(self.subject.stages.features, residual, strict=True):
            self.tensors[result] = self.tensors[source] + torch.from_numpy(part)

    def head(self) -> np.ndarray:
        self._run("head")
        return self.tensors[self.subject.stages.output].numpy()[None]

    def _run(self, kind: str) -> None:
        for stage in self.subject.stages.of_kind(kind):
            self.tensors.update(stage.run(self.tensors))


# --- what is measured
# -----------------------------------------------------------------------------------------------------


def agreement(kind: str) -> dict[str, float]:
    """Largest difference of latents from the loop on the CPU, by budget and granularity; captured ones from
    uncaptured.
    """
    steps = 8
    subject = Subject(REDUCED, tokens=(16, 8), steps=steps, dtype="float32", device="cpu")
    expected = {
        budget: sample(
            HostModel(subject),
            subject.run(budget).program,
            subject.latents,
            guidance_weights=(1.0,),
            timestep_scale=subject.manifest.timestep_scale,
        )
        for budget in subject.manifest.budgets
    }
    for stage in subject.stages.stages:
        stage.module.to(kind)
    found: dict[str, float] = {}
    for granularity in GRANULARITIES:
        for cuda_graph in (False, True):
            loop = torch_loop(subject, kind, granularity, cuda_graph=cuda_graph)
            for budget, latents in expected.items():
                runs = [loop(subject.run(budget)) for _ in range(2 + cuda_graph)]
                worst = max(float(np.abs(run - latents).max() / np.abs(latents).max()) for run in runs)
                found[f"{budget}, {granularity}, {'captured' if cuda_graph else 'uncaptured'}"] = worst
                if cuda_graph:
                    found[f"{budget}, {granularity}, captured from uncaptured"] = float(np.abs(runs[2] - runs[0]).max())
            loop.close()
    return found


def timing(subject: Subject, kind: str, rounds: int) -> dict[str, Any]:
    """Of the full program and each budget: milliseconds per step; of uncaptured ones the host's share."""
    found: dict[str, Any] = {}
    for granularity in GRANULARITIES:
        for cuda_graph in (False, True):
            loop = torch_loop(subject, kind, granularity, cuda_graph=cuda_graph)
            for budget in subject.manifest.budgets:
                run = subject.run(budget)
                seconds = timed(lambda loop=loop, run=run: loop(run), rounds)
                name = f"{budget}, {granularity}, {'captured' if cuda_graph else 'uncaptured'}"
                found[name] = {"step_ms": round(1e3 * seconds / len(run.program.steps), 4)}
            loop.close()
    return found


def host_cost(subject: Subject, rounds: int) -> dict[str, Any]:
    """What the loop itself costs the host in each step, with as many blocks as FLUX.1 has and engines that do nothing.

    Processor time, so that a busy host does not count; the request's uploads and download are in it.
    """
    manifest = with_blocks(subject.manifest, FLUX_BLOCKS)
    found: dict[str, Any] = {}
    for granularity in GRANULARITIES:
        held = segments(manifest, granularity)
        names = [stage.name for stage in coarsen(manifest, held).trunk]
        device = TorchDevice("cpu")
        engine = IdleEngine()
        engines = {name: engine for name in (*names, *("@" + one.name for one in combinations(manifest)))}
        loop = ResidentLoop(manifest, engines, device, segments=held)
        run = dataclasses.replace(subject.run("full"), manifest=manifest)
        seconds = timed(lambda loop=loop, run=run: loop(run), 20 * rounds, clock=time.process_time)
        launches = len(list_launches(coarsen(manifest, held), run.program).launches)
        steps = len(run.program.steps)
        told, requests = engine.told, 20 * rounds + 2
        loop.close()
        found[granularity] = {
            "launches_a_step": launches / steps,
            "told_a_step": round(told / steps / requests, 2),
            "host_us_a_step": round(1e6 * seconds / steps, 1),
        }
    return found


class IdleEngine:
    """Takes what it is told and does nothing: what is left is the loop."""

    workspace_bytes = 0

    def __init__(self) -> None:
        self.told = 0
        """Shapes and addresses."""

    def context(self) -> IdleEngine:
        return self

    def use_workspace(self, address: int, size_bytes: int) -> None: ...

    def set_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        self.told += 1

    def set_address(self, tensor: str, address: int) -> None:
        self.told += 1

    def enqueue(self) -> None: ...


def with_blocks(manifest: Manifest, count: int) -> Manifest:
    """The first block of a manifest so many times in a row."""
    embed, block, *_, head = manifest.trunk
    source, result = manifest.features[0].source, manifest.features[0].result
    hidden = {tensor.name: tensor.name for tensor in block.inputs}
    pairs = [(source, block.outputs[0].name)]
    pairs += [
        (a.name, b.name)
        for a, b in zip(block.inputs, block.outputs[1:], strict=False)
        if a.shape == b.shape and a.name != source
    ]
    blocks = []
    for index in range(count):
        outputs = tuple(tensor.model_copy(update={"name": f"{tensor.name}_{index}"}) for tensor in block.outputs)
        inputs = tuple(tensor.model_copy(update={"name": hidden[tensor.name]}) for tensor in block.inputs)
        blocks.append(block.model_copy(update={"name": f"block_{index}", "inputs": inputs, "outputs": outputs}))
        hidden |= {before: f"{after}_{index}" for before, after in pairs}
    last = tuple(t.model_copy(update={"name": hidden[source]}) if t.name == result else t for t in head.inputs)
    feature = manifest.features[0].model_copy(update={"result": hidden[source]})
    return manifest.model_copy(
        update={"stages": (embed, *blocks, head.model_copy(update={"inputs": last})), "features": (feature,)}
    )


def timed(run: Callable[[], object], rounds: int, *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds, after two calls that do not count: one that prepares, one that records."""
    seconds = []
    for _ in range(rounds + 2):
        start = clock()
        run()
        seconds.append(clock() - start)
    return statistics.median(seconds[2:])


def plans(artifact: Path, backend: str, rounds: int) -> dict[str, Any]:
    """The same of an artifact's plans, built here; latents against ONNX Runtime's. Raises OTCacheError if they cannot
    run.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, Sampler.load(artifact, "onnxruntime") as onnx:
        copy = Path(shutil.copytree(artifact, Path(folder) / "artifact"))
        prompt = onnx.encode("a red ring")
        expected = {budget: onnx.sample(prompt, budget=budget, seed=1) for budget in onnx.budgets}
        for granularity in GRANULARITIES:
            build_engines(copy, backend=backend, granularity=granularity)
            for cuda_graph in (False, True):
                with Sampler.load(copy, backend, cuda_graph=cuda_graph) as sampler:
                    for budget, latents in expected.items():
                        run = lambda s=sampler, b=budget: s.sample(prompt, budget=b, seed=1)  # noqa: E731
                        first, steps = run(), len(sampler.manifest.program(budget).program.steps)
                        step_ms = round(1e3 * timed(run, rounds) / steps, 4)
                        found[f"{budget}, {granularity}, {'captured' if cuda_graph else 'uncaptured'}"] = {
                            "step_ms": step_ms,
                            "error": float(np.abs(first - latents).max() / np.abs(latents).max()),
                            "same_bits_again": bool((run() == first).all()),
                        }
    return found


def first_plans(artifact: Path, rounds: int) -> tuple[dict[str, Any] | None, dict[str, str]]:
    reasons = {}
    for backend in ("tensorrt", "tensorrt-rtx"):
        reason = why_no_gpu()[0]
        try:
            if reason is None:
                return {"backend": backend, "results": plans(artifact, backend, rounds)}, reasons
        except OTCacheError as error:
            reason = str(error)
        reasons[backend] = str(reason)
    return None, reasons


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path, default=NEWEST)
    parser.add_argument("--rounds", type=int, default=5)
    output_option(parser)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    kind = "cuda" if gpu else "cpu"
    built, reasons = first_plans(options.artifact, options.rounds)
    small = Subject(REDUCED, tokens=(16, 8), steps=8, dtype="float32", device="cpu")
    measured = Subject(REAL, tokens=(4096, 512), steps=28, dtype="bfloat16", device="cuda") if gpu else small
    found = {
        "what": "FLUX.1's sizes at 1024², bfloat16, random weights"
        if gpu
        else "reduced size in this host's memory: nothing here was executed on a GPU, and no graph was captured",
        "device": torch.cuda.get_device_name() if gpu else "none",
        "engines": built["backend"] if built else "torch",
        "plans_passed_over": reasons,
        "plans": built and built["results"],
        "host": host(),
        "versions": {**versions(), "torch": torch.__version__},
        "agreement_with_the_cpu": agreement(kind),
        "torch": timing(measured, kind, options.rounds),
        "host_cost_at_flux_blocks": host_cost(small, options.rounds),
        "target_share": SHARE,
    }
    write(found, options.output)


if __name__ == "__main__":
    main()
