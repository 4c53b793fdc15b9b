"""Peak memory of cut and export: a FLUX-shaped transformer with random weights, against its size and its largest block.

    python tests/benchmarks/memory.py                                   # FLUX.1's widths, 4 billion parameters in bfloat16
    python tests/benchmarks/memory.py --heads 8 --double 2 --single 2   # small

Prints one JSON object. The peak is that of the process from just before the model is made, less what the process held then,
as Linux counts it (VmHWM and VmRSS of /proc/self/status). Exit code 1: more than the size of the model and twice its largest
block. A stage's files are removed once they are measured, so that the disk needs room for one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel

from otcache.compiler.cut import cut
from otcache.compiler.export import export_stages
from otcache.compiler.precision import in_dtype

HEAD_DIM = 128
TOKENS = 4
CHUNK = 1 << 20


def memory(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since `reset`), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def reset() -> None:
    """Let VmHWM start again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def flux(heads: int, double: int, single: int, dtype: torch.dtype) -> FluxTransformer2DModel:
    """As wide as its heads say, made on the meta device and filled without a second copy."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            num_layers=double, num_single_layers=single, num_attention_heads=heads, attention_head_dim=HEAD_DIM,
            joint_attention_dim=heads * 170, guidance_embeds=False,
        )  # fmt: skip
    model = in_dtype(model, dtype).to_empty(device="cpu").eval().requires_grad_(False)
    noise = torch.randn(CHUNK, generator=torch.Generator().manual_seed(0)).to(dtype)
    for parameter in model.parameters():
        scale = parameter.shape[-1] ** -0.5
        for part in parameter.view(-1).split(CHUNK):
            torch.mul(noise[: len(part)], scale, out=part)
    return model


def example(model: FluxTransformer2DModel, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """What varies in a call with two samples, and the rest of its arguments."""
    random, config = torch.Generator().manual_seed(1), model.config
    shapes = {
        "hidden_states": (2, TOKENS, config.in_channels), "encoder_hidden_states": (2, TOKENS, config.joint_attention_dim),
        "pooled_projections": (2, config.pooled_projection_dim),
    }  # fmt: skip
    inputs = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
    ids = {"img_ids": torch.rand(TOKENS, 3, generator=random), "txt_ids": torch.zeros(TOKENS, 3)}
    return {**inputs, "timestep": torch.tensor([0.3, 0.8])}, {**ids, "return_dict": False}


def bytes_of(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def compiled(heads: int, double: int, single: int, dtype: torch.dtype, folder: Path) -> dict[str, int]:
    """Make, cut and export a model; its sizes."""
    model = flux(heads, double, single, dtype)
    inputs, constants = example(model, dtype)
    stages = cut(model, inputs, constants=constants)
    print(f"cut: {memory('VmHWM') / 1e9:.2f} GB at most, {memory('VmRSS') / 1e9:.2f} GB now", file=sys.stderr)

    def exported(done: int, total: int) -> None:
        shutil.rmtree(folder)
        print(
            f"{done} of {total}: {memory('VmHWM') / 1e9:.2f} GB at most, {memory('VmRSS') / 1e9:.2f} GB now",
            file=sys.stderr,
        )

    export_stages(stages, inputs, folder, progress=exported)
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "model_bytes": bytes_of(model),
        "largest_block_bytes": max(map(bytes_of, blocks)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=24, help=f"of {HEAD_DIM}; FLUX.1 has 24")
    parser.add_argument("--double", type=int, default=10, help="blocks; FLUX.1 has 19")
    parser.add_argument("--single", type=int, default=4, help="blocks; FLUX.1 has 38")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compiled(1, 1, 1, torch.float32, Path(folder) / "warm-up")  # what is imported on first use is no model
        reset()
        before, start = memory("VmRSS"), time.monotonic()
        dtype = getattr(torch, options.dtype)
        sizes = compiled(options.heads, options.double, options.single, dtype, Path(folder) / "stages")
    peak, allowed = memory("VmHWM") - before, sizes["model_bytes"] + 2 * sizes["largest_block_bytes"]
    result = {**sizes, "allowed_bytes": allowed, "peak_bytes": peak, "before_bytes": before,
              "seconds": round(time.monotonic() - start), "dtype": options.dtype}  # fmt: skip
    print(json.dumps(result))
    return int(peak > allowed)


if __name__ == "__main__":
    sys.exit(main())
