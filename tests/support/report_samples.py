"""Reports beyond what a small compile gives: many budgets and peers, other samplers, hostile text. Numbers are
drawn.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from otcache.compiler.report.evidence import Bench, PassEvidence, PeerPictures, gather
from otcache.compiler.report.page import write_report

STEPS = 40
WORD = "incomprehensibilities" * 12


def schedule(budget: int) -> list[int]:
    return [STEPS * step // budget for step in range(budget)]


def statistic(values, worst=np.min):
    return {"mean": float(np.mean(values)), "std": float(np.std(values)), "worst": float(worst(values))}


def quality(psnr, ssim, errors):
    return {
        "psnr_db": statistic(psnr),
        "ssim": statistic(ssim),
        "relative_latent_error": statistic(errors, np.max),
    }


def sample(
    *,
    budgets: tuple[int, ...] = (4, 8, 16),
    peers: int = 3,
    sigmas: np.ndarray | None = None,
    prompts: tuple[str, ...] = ("a red ring", "a blue star", "a green cross", "a white ring"),
    size: tuple[int, int] = (40, 64),
    name: str = "sample",
    latencies: bool = False,
    bench: Bench | None = None,
    targets: tuple[str, ...] = (),
):
    """Manifest fields, evidence and pictures."""
    draw = np.random.default_rng(7)
    count = len(prompts)
    references = draw.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    kept, programs = {}, []
    for budget in budgets:
        noise = draw.normal(0, 60 / budget, references.shape)
        pictures = np.clip(references + noise, 0, 255).astype(np.uint8)
        psnr, ssim = draw.uniform(10, 20, count) + 2 * budget, 1 - draw.uniform(0.01, 0.5, count) / budget
        worst = np.argsort(psnr, kind="stable")[:3]
        steps = schedule(budget)
        errors = draw.uniform(0.1, 0.5, (budget + 1, count)) / budget
        errors[0] = 0
        kept[budget] = {
            "pictures": pictures[:6],
            "worst": worst,
            "worst_pictures": pictures[worst],
            "psnr_db": psnr,
            "ssim": ssim,
            "positions": np.array([*steps, STEPS]),
            "errors": errors,
        }
        baselines = [
            {
                "name": f"peer {index}",
                "nfe": budget,
                "quality": quality(psnr - 1 - index, ssim - 0.01 * (1 + index), errors[-1]),
            }
            for index in range(peers)
        ]
        candidates = [
            {
                "name": "interpolated",
                "payload": "output",
                "schedule": steps,
                "weight": 0.5,
                "psnr_db": 30.0 - index,
                "ssim": 0.9 - index / 100,
                "chosen": index == 0,
            }
            for index in range(7)
        ]
        programs.append(
            {
                "budget": str(budget),
                "quality": quality(psnr, ssim, errors[-1]),
                "baselines": baselines,
                "candidates": candidates,
                "program": {
                    "payload": "output",
                    "steps": [
                        {"step_index": step, "timestep": float(step), "latent_coef": 1.0, "output_coefs": [1.0]}
                        for step in steps
                    ],
                },
            }
        )
    fields = {
        "producer": {"otcache": "0", "torch": "0", "diffusers": "0"},
        "model": {
            "name": name,
            "pipeline": "Pipeline",
            "transformer": "Transformer",
            "config_digest": "sha256:" + "0" * 64,
            "weights_digest": "sha256:" + "1" * 64,
        },
        "sampler": {"scheduler": "Scheduler", "config": {}, "num_inference_steps": STEPS},
        "conditions": {
            "height": size[0],
            "width": size[1],
            "max_sequence_length": 8,
            "dtype": "float32",
            "objective": "ssim",
            "prompts_digest": "sha256:" + "2" * 64,
            "calibration_prompts": 5,
            "evaluation_prompts": count,
            "seed": 0,
        },
        "guidance": {"kind": "cfg", "scale": 4.0, "minimum": 2.0, "maximum": 6.0, "negative_prompt": ""},
        "reference": {"schedule": schedule(16), "num_inference_steps": STEPS, "source": "graph"},
        "anchor": {"schedule": schedule(4), "num_inference_steps": STEPS, "source": "anchor"},
        "programs": programs,
        "max_relative_error": 1e-6,
        "costs": [{"name": "capture", "full_runs": 1.0}, {"name": "interpolate and fit", "full_runs": 2.5}],
    }
    if latencies:
        names = [*map(str, budgets), "full"]
        fields["measurements"] = [
            {"name": f"latency_s/{name}", "value": 0.1 * (index + 1), "unit": "s"} for index, name in enumerate(names)
        ]
    passes = [
        PassEvidence(name="load", seconds=1.0),
        PassEvidence(name="capture", seconds=2.0, evaluations=200),
        PassEvidence(name="interpolate, fit", seconds=3.0, evaluations=0, reused=500),
    ]
    evidence, shown = gather(
        kept,
        references,
        prompts=prompts,
        seeds=range(count),
        timesteps=np.linspace(1000, 25, STEPS).tolist(),
        sigmas=None if sigmas is None else sigmas.tolist(),
        passes=passes,
        peers={budget: peer_pictures(references[:6], budget, draw) for budget in budgets} if peers else None,
        targets=targets,
    )
    return fields, evidence.model_copy(update={"bench": bench}), shown


def peer_pictures(references, budget: int, draw) -> PeerPictures:
    noise = draw.normal(0, 90 / budget, references.shape)
    pictures = np.clip(references + noise, 0, 255).astype(np.uint8)
    return PeerPictures(name="peer 0", psnr_db=np.linspace(10, 12, len(references)) + budget, pictures=pictures)


def written(folder: Path, **options) -> Path:
    """The folder with a report in it."""
    folder.mkdir(exist_ok=True)
    write_report(folder, *sample(**options))
    return folder


FLOW = np.linspace(1, 0, STEPS + 1)
EXPLODING = np.append(np.geomspace(14.6, 0.03, STEPS), 0.0)
EXTREME = {
    "budgets": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    "peers": 9,
    "sigmas": EXPLODING,
    "name": WORD,
    "latencies": True,
    "prompts": (
        WORD,
        "<script>alert(1)</script>",
        '"quoted" & <b>bold</b>',
        "一つの赤い輪",
        "a ring",
        "a star",
        "a cross",
    ),
}
"""A report that is hard to lay out."""
