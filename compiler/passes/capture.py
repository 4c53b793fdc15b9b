"""Pass `capture`: session + prompts → full runs, in chunks that the workspace keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..calibration.runs import PICTURES, Chunk, Runs, RunWriter, new_array
from ..pipelines.encode_once import encoders_aside
from ..pipelines.full_run import encode_prompts, record_full_runs
from ..programs.solver_table import SolverTable
from ..workspace.progress import Pass
from .crew import AnyRuns, SampleSet
from .session import Session

PASS_CHUNK = 8
"""Full runs that are kept together at most: an interrupted capture redoes these."""


def calibration_scales(minimum: float, maximum: float, count: int, margin: float = 1.0) -> list[float]:
    """Guidance scales of `count` samples: one value, or three that cover the range in turn; every fourth one times
    `margin`.

    >>> calibration_scales(2.0, 6.0, 4, margin=1.5)
    [2.0, 4.0, 6.0, 3.0]
    """
    levels = [minimum] if minimum == maximum else [minimum, (minimum + maximum) / 2, maximum]
    return [levels[i % len(levels)] * (margin if i % 4 == 3 else 1.0) for i in range(count)]


def capture_key(session: Session, prompts: Sequence[str], seed: int, scales: Sequence[float]) -> Any:
    """What a chunk of full runs depends on, for the workspace."""
    return [session.key, list(prompts), seed, list(scales), "mapped files"]


def scales_of(session: Session, wanted: SampleSet) -> list[float]:
    """Guidance scales of a set's samples."""
    return calibration_scales(*session.options.guidance_scale, wanted.count, wanted.margin)


def missing_runs(session: Session, wanted: SampleSet, rows: slice = slice(None)) -> int:
    """How many full runs of a set's samples `rows`, which begin and end with chunks, are not in the workspace."""
    return sum(
        part.stop - part.start
        for part in capture_chunks(session, wanted.count, rows)
        if not session.workspace.has(wanted.name, _key_of(session, wanted, part), "")
    )


def _key_of(session: Session, wanted: SampleSet, rows: slice) -> Any:
    scales = scales_of(session, wanted)
    return capture_key(session, list(wanted.prompts[rows]), wanted.seed + rows.start, scales[rows])


def capture_chunks(session: Session, count: int, rows: slice = slice(None)) -> list[slice]:
    """How full runs of `count` samples are cut into chunks that are kept one by one: those that begin among `rows`."""
    size = min(PASS_CHUNK, int(session.key["placement"]["micro batch"]))
    first, last, _ = rows.indices(count)
    return [slice(start, min(start + size, count)) for start in range(0, count, size) if first <= start < last]


def full_runs(
    session: Session, table: SolverTable, name: str, prompts: Sequence[str], seed: int, margin: float = 1.0
) -> AnyRuns:
    """Full runs of `prompts` at consecutive seeds, from the workspace where they were made before.

    Args:
        session: with the pipeline on its device; with a crew, they are made and kept there.
        table: the full sampler.
        name: of the pass.
        prompts: one for each sample.
        seed: of the first sample.
        margin: see `calibration_scales`.
    """
    wanted = SampleSet(name=name, prompts=tuple(prompts), seed=seed, margin=margin)
    with session.reporter.on(name, f"{len(prompts)} full runs") as advance:
        advance.expect(table.num_inference_steps * wanted.count)
        if session.crew is not None:
            return session.crew.full_runs(session, wanted, advance)
        return local_runs(session, table, wanted, slice(0, wanted.count), advance)


def local_runs(session: Session, table: SolverTable, wanted: SampleSet, rows: slice, advance: Pass) -> Runs:
    """Full runs of a set's samples `rows`, which begin and end with chunks, made here."""
    steps, count, scales = table.num_inference_steps, rows.stop - rows.start, scales_of(session, wanted)
    advance.facts["evaluations"] = 0

    def chunk(part: slice) -> Chunk:
        own = list(wanted.prompts[part])
        first, seed = part.start - rows.start, wanted.seed + part.start

        def compute(folder: Path) -> None:
            advance.facts["evaluations"] += steps * len(own)
            advance.found(steps * first, steps * count)
            _write_chunk(folder, session, table, own, seed, scales[part], advance, first, count)

        return Chunk(session.workspace.tree(wanted.name, _key_of(session, wanted, part), compute))

    with encoders_aside(session.model.pipeline, session.placement) as leave:
        for part in capture_chunks(session, wanted.count, rows):
            if not session.workspace.has(wanted.name, _key_of(session, wanted, part), ""):
                _encode_chunk(session, list(wanted.prompts[part]), scales[part])
        leave()
        chunks = [chunk(part) for part in capture_chunks(session, wanted.count, rows)]
        if count == wanted.count and len({tuple(sorted(each.conditioning_shapes().items())) for each in chunks}) > 1:
            # A pipeline that pads prompts to the longest one of a call: they have to be in one call.
            chunks = [chunk(slice(0, count))]
    advance.facts["evaluations_reused"] = steps * count - min(int(advance.facts["evaluations"]), steps * count)
    return Runs(chunks)


def _at_once(session: Session, count: int) -> int:
    """How many samples of a chunk run together: more than are evaluated at once only where they have to."""
    return count if count > int(session.key["placement"]["micro batch"]) else session.micro_batch.size


def _encode_chunk(session: Session, prompts: Sequence[str], scales: Sequence[float]) -> None:
    """Encode the prompts of a chunk, in the calls in which they will be asked for."""
    if session.placement.device.type == "cpu" or session.placement.offload != "none":
        return  # the encoders stay where they are
    size = _at_once(session, len(prompts))
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        encode_prompts(session.model.pipeline, session.interface, session.call, prompts[part], scales[part])


def _write_chunk(
    folder: Path,
    session: Session,
    table: SolverTable,
    prompts: Sequence[str],
    seed: int,
    scales: Sequence[float],
    advance: Pass,
    first: int,
    total: int,
) -> None:
    """Run the pipeline for some prompts, as many at once as the device takes, and decode what comes out."""
    steps, count = table.num_inference_steps, len(prompts)
    writer = RunWriter(folder, count, steps, session.interface.latents_shape)

    def record(part: slice) -> dict[str, torch.Tensor]:
        start, own = first + part.start, part.stop - part.start

        def progress(done: int, of: int) -> None:
            advance(steps * start + steps * own * done // of, steps * total)

        return record_full_runs(
            session.model.pipeline,
            session.interface,
            session.call,
            prompts[part],
            [seed + row for row in range(part.start, part.stop)],
            scales[part],
            writer,
            rows=range(part.start, part.stop),
            progress=progress,
        )

    parts = session.micro_batch.run(slice(0, count), record, session.placement.device, _at_once(session, count))
    conditionings = [conditioning for _, conditioning in parts]
    writer.finish({name: torch.cat([each[name] for each in conditionings], dim=1) for name in conditionings[0]}, scales)
    _write_pictures(folder, session, count)


def _write_pictures(folder: Path, session: Session, count: int) -> None:
    """Decode the final latents of a chunk, one sample after the other."""
    final = Chunk(folder).latents
    device = session.placement.device

    def decode(part: slice) -> np.ndarray:
        return session.decode(torch.from_numpy(final[part, -1].copy()).to(device))

    pictures = None
    for part, decoded in session.micro_batch.run(slice(0, count), decode, device, at_once=1):
        if pictures is None:
            pictures = new_array(folder / PICTURES, (count, *decoded.shape[1:]))
        pictures[part] = decoded
