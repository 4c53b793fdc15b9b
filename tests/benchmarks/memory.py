"""Peak memory of cut and export: `otc compile` of a FLUX-shaped model with random weights, against its size and its
largest block.

    python tests/benchmarks/memory.py                                   # FLUX.1's widths, 4 billion parameters
    python tests/benchmarks/memory.py --heads 8 --double 2 --single 2   # small

Makes a pipeline's folder in `--folder` and compiles it with everything else as small as can be, up to the transformer's
export: loading, calibration and searches in float32 are those of every compile. Prints one JSON object. Peaks are those
of the process during each of the two passes, less what it held before the model was loaded, as Linux counts it (VmHWM
and VmRSS of /proc/self/status: memory of its own and what is mapped). Exit code 1: more than the size of the model as
it is served and twice its largest block. The disk needs room for the stored model, and with `--dtype` for 4 bytes a
parameter and twice the served model.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make import save_model

from otcache.compiler.export.onnx_stages import export_stages
from otcache.compiler.export.precision import in_dtype, inputs_in
from otcache.compiler.graph.cut import cut
from otcache.compiler.models.load import load_model
from otcache.compiler.options import CompileOptions
from otcache.compiler.passes.compile import compile_model
from otcache.compiler.workspace.progress import LineReporter, Pass

HEAD_DIM = 128
CHUNK = 1 << 20
PASSES = ("cut", "export")


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since `reset`), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def reset() -> None:
    """Let VmHWM start again from what is held now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


class ExportedError(Exception):
    """The transformer is exported, and the compile has nothing more to show."""


class Peaks(LineReporter):
    """Keeps the highest memory of passes, and ends the compile after the export of the transformer."""

    def __init__(self) -> None:
        self.before = memory("VmRSS")
        self.found: dict[str, int] = {}

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        reset()
        with super().on(name, description) as current:
            yield current
        held, peak = memory("VmRSS") - self.before, memory("VmHWM") - self.before
        self.note(f"{name}: {peak / 1e9:.3f} GB at most, {held / 1e9:.3f} GB in the end")
        self.found[name] = max(peak, self.found.get(name, 0))
        if name == "export":
            raise ExportedError


def transformer(heads: int, double: int, single: int, dtype: torch.dtype) -> FluxTransformer2DModel:
    """As wide as its heads say, made on the meta device and filled without a second copy."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=HEAD_DIM,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=False,
        )
    model = model.to(dtype).to_empty(device="cpu").requires_grad_(False)
    noise = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)).to(dtype)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5
        for part in parameter.view(-1).split(CHUNK):
            torch.mul(noise[: len(part)], scale, out=part)
    return model


def save(
    folder: Path, heads: int, double: int, single: int, stored: torch.dtype, served: torch.dtype
) -> dict[str, int]:
    """Write a pipeline's folder; the sizes of its transformer as it is served."""
    save_model(folder)
    model = transformer(heads, double, single, stored)
    shutil.rmtree(folder / "transformer")
    model.save_pretrained(folder / "transformer")
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    count = sum(parameter.numel() for parameter in model.parameters())
    largest = max(sum(parameter.numel() for parameter in block.parameters()) for block in blocks)
    return {
        "parameters": count,
        "model_bytes": count * served.itemsize,
        "largest_block_bytes": largest * served.itemsize,
    }


def peaks(folder: Path, dtype: str, workspace: Path) -> dict[str, int]:
    """Bytes at most in each pass of a compile."""
    options = CompileOptions(
        model=str(folder),
        output=workspace / "artifact",
        workspace=workspace,
        dtype=dtype,
        budgets=(1,),
        num_inference_steps=3,
        reference_budget=2,
        anchor_budget=1,
        trials=1,
        calibration_prompts=1,
        evaluation_prompts=1,
        payload="output",
    )
    reporter = Peaks()
    with contextlib.suppress(ExportedError):
        compile_model(options, reporter)
    return reporter.found


def directly(folder: Path, dtype: torch.dtype, workspace: Path) -> dict[str, int]:
    """The same without calibration and searches: load, cut, cast, cut and export."""
    reporter, random = Peaks(), torch.Generator().manual_seed(1)
    with reporter.on("load", str(folder)):
        model = load_model(str(folder), scratch=workspace)
    config, tokens = model.transformer.config, 4
    shapes = {
        "hidden_states": (tokens, config.in_channels),
        "encoder_hidden_states": (tokens, config.joint_attention_dim),
        "pooled_projections": (config.pooled_projection_dim,),
    }
    example = {name: torch.randn(2, *shape, generator=random) for name, shape in shapes.items()}
    example["timestep"] = torch.tensor([0.3, 0.8])
    ids = {"img_ids": torch.rand(tokens, 3, generator=random), "txt_ids": torch.zeros(tokens, 3), "return_dict": False}
    model.give_back()
    with reporter.on("cut", "in float32"):
        stages = cut(model.transformer, example, constants=ids)
    with contextlib.suppress(ExportedError), reporter.on("export", str(dtype)) as advance:
        inputs = example
        if dtype != torch.float32:
            inputs = inputs_in(example, dtype, kept=("timestep",))
            stages = cut(in_dtype(model.transformer, dtype, workspace), inputs, constants=ids)

        def exported(done: int, total: int) -> None:
            shutil.rmtree(workspace / "stages")  # the disk needs room for one
            advance(done, total)
            reporter.note(f"{done} of {total}: {(memory('VmHWM') - reporter.before) / 1e9:.3f} GB at most")

        export_stages(stages, inputs, workspace / "stages", progress=exported)
    return reporter.found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help=f"of {HEAD_DIM}; FLUX.1 has 24")
    parser.add_argument("--double", type=int, default=10, help="blocks; FLUX.1 has 19")
    parser.add_argument("--single", type=int, default=4, help="blocks; FLUX.1 has 38")
    dtypes = ["float32", "float16", "bfloat16"]
    parser.add_argument("--stored", choices=dtypes, default="bfloat16", help="dtype of the model's files")
    parser.add_argument("--dtype", choices=dtypes, default="bfloat16", help="as for otc compile")
    parser.add_argument("--folder", type=Path, help="on a disk, not in memory")
    parser.add_argument(
        "--directly", action="store_true", help="without calibration and searches, which read all weights many times"
    )
    options = parser.parse_args()
    stored, served = getattr(torch, options.stored), getattr(torch, options.dtype)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        save(folder / "small", 1, 1, 1, torch.float32, served)
        measured = partial(directly, dtype=served) if options.directly else partial(peaks, dtype=options.dtype)
        measured(folder / "small", workspace=folder / "warm-up")  # what is imported on first use is no model
        sizes = save(folder / "model", options.heads, options.double, options.single, stored, served)
        gc.collect()
        start = time.monotonic()
        found = measured(folder / "model", workspace=folder / "workspace")
    allowed = sizes["model_bytes"] + 2 * sizes["largest_block_bytes"]
    result = {
        **sizes,
        "allowed_bytes": allowed,
        "peak_bytes": {name: found[name] for name in PASSES},
        "seconds": round(time.monotonic() - start),
        "stored": options.stored,
        "dtype": options.dtype,
    }
    print(json.dumps(result))
    return int(max(result["peak_bytes"].values()) > allowed)


if __name__ == "__main__":
    sys.exit(main())
