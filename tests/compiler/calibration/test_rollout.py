"""Residuals weighed on some of their positions, and programs rolled out, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from equations import TOTAL, equation_evaluator, normal, write_chunk
from hypothesis import given
from hypothesis import strategies as st

from otcache.compiler.calibration.batch import batch_from_rows
from otcache.compiler.calibration.rollout import WEIGHED_POSITIONS, residual_gram, roll_out, take_positions
from otcache.compiler.calibration.runs import Runs
from otcache.compiler.calibration.scoring import Measure, eight_bits, kept_latents, kept_pictures, scores_of
from otcache.compiler.graph.stages import StageGraph, Stages
from otcache.compiler.programs.solver_table import program_from_table
from otcache.schemas.program import position_axes

SAMPLES = 3
MATRIX = torch.linspace(-0.5, 0.5, 16).view(4, 4)


class Embed(torch.nn.Module):
    def forward(self, latents, timestep, k):
        return (latents * (1 + 0.1 * timestep.view(-1, 1, 1)),)


class Block(torch.nn.Module):
    def forward(self, hidden, k):
        return (hidden + torch.tanh(hidden @ MATRIX) * k.view(-1, 1, 1),)


class Head(torch.nn.Module):
    def forward(self, hidden):
        return (-hidden,)


def stages_of_tokens() -> Stages:
    """A model of one block on tokens (n, tokens, 4)."""
    return Stages(
        stages=(
            StageGraph(
                name="embed", kind="embed", module=Embed(), inputs=("latents", "timestep", "k"), outputs=("hidden",)
            ),
            StageGraph(name="block_0", kind="block", module=Block(), inputs=("hidden", "k"), outputs=("made",)),
            StageGraph(name="head", kind="head", module=Head(), inputs=("made",), outputs=("output",)),
        ),
        inputs=("latents", "timestep", "k"),
        output="output",
        features=(("hidden", "made"),),
    )


def rate(x, step, k):
    hidden = x * (1 + 0.1 * step)
    return -(hidden + torch.tanh(hidden @ MATRIX) * k)


def batch_of(folder, tokens, rows=slice(0, SAMPLES)):
    """A batch whose model is cut, and the full runs' residuals (n, T, tokens · 4)."""
    k = torch.linspace(0.5, 1.5, SAMPLES)
    chunk = write_chunk(folder / "runs", normal(SAMPLES, tokens, 4), rate, k=k)
    evaluator = equation_evaluator(rate, (tokens, 4), stages=stages_of_tokens())
    folder.joinpath("scratch").mkdir()
    batch = batch_from_rows(Runs([chunk]), evaluator, rows, folder / "scratch")
    hidden = torch.from_numpy(chunk.latents[rows, :TOTAL].copy()) * (1 + 0.1 * torch.arange(TOTAL).view(1, -1, 1, 1))
    residuals = torch.tanh(hidden @ MATRIX) * k[rows].view(-1, 1, 1, 1)
    return batch, residuals.flatten(2).double().numpy()


def full_program():
    return program_from_table(equation_evaluator(rate, (1, 4)).table, payload="residual")


@pytest.mark.parametrize("rows", [slice(0, SAMPLES), slice(1, 2)])
def test_on_all_positions_it_is_the_full_product(rows, tmp_path):
    batch, residuals = batch_of(tmp_path, tokens=20, rows=rows)
    told = []
    found = residual_gram(batch, full_program(), batch.scratch, progress=lambda done, total: told.append((done, total)))
    expected = np.einsum("nrd,nsd->nrs", residuals, residuals) / residuals.shape[2]
    assert found.shape == expected.shape and found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert told == [(step, TOTAL) for step in range(1, TOTAL + 1)]
    assert list(batch.scratch.iterdir()) == [], "residuals are gone"


def test_some_positions_are_an_estimate_of_all(tmp_path):
    """Of 4,000 positions 1,000 differ by a few hundredths: less than one prompt differs from another."""
    batch, residuals = batch_of(tmp_path, tokens=4000)
    found = residual_gram(batch, full_program(), batch.scratch, positions=1000)
    whole = np.einsum("nrd,nsd->nrs", residuals, residuals) / residuals.shape[2]
    error = np.linalg.norm(found - whole, axis=(1, 2)) / np.linalg.norm(whole, axis=(1, 2))
    between = np.linalg.norm(whole - whole.mean(axis=0), axis=(1, 2)) / np.linalg.norm(whole, axis=(1, 2))
    assert 0 < error.max() < 0.05 and error.max() < 0.25 * between.mean()


@given(
    st.sampled_from([(3, 6), (3, 50, 2), (3, 2, 5, 9), (3, 2, 3, 4, 5)]),
    st.integers(1, 60),
)
def test_weighed_positions_are_the_same_ones_at_every_call(shape, limit):
    value = torch.arange(float(np.prod(shape))).view(shape)
    found = take_positions(value, limit)
    assert torch.equal(found, take_positions(value, limit)), "at every call"
    shifted = take_positions(value + 1000, limit)
    assert torch.equal(shifted, found + 1000), "whatever the values are"
    axes = position_axes(len(shape))
    count = int(np.prod([shape[axis] for axis in axes])) if axes else 1
    channels = int(np.prod(shape[1:])) // count
    assert found.shape == (3, channels * (min(limit, count) if axes else 1))
    for row, chosen in zip(value, found, strict=True):
        assert set(chosen.tolist()) <= set(row.flatten().tolist()) and len(set(chosen.tolist())) == found.shape[1]
    if axes and limit < count:  # a position is taken with all its channels
        ids = torch.arange(count).view([shape[axis] for axis in axes])
        ids = ids[:, None] if len(shape) == 3 else ids
        places = take_positions(ids.expand(shape).float(), limit)
        assert all((places == place).sum(dim=1).eq(channels).all() for place in places[0].unique())


def test_at_most_the_stated_number_of_positions_is_weighed():
    assert take_positions(torch.zeros(2, WEIGHED_POSITIONS + 1, 3)).shape == (2, WEIGHED_POSITIONS * 3)
    assert take_positions(torch.zeros(2, 3, 65, 65)).shape == (2, WEIGHED_POSITIONS * 3)


def test_the_full_program_ends_where_the_full_run_did(tmp_path):
    batch, _ = batch_of(tmp_path, tokens=5)
    observed = []
    table = batch.evaluator.table
    for program in (program_from_table(table), full_program()):
        final = roll_out(
            program,
            batch.denoiser,
            batch.latents(0),
            batch.evaluator.stages,
            observe=lambda index, latents: observed.append((index, (latents - batch.latents(index)).abs().max())),
        )
        assert torch.allclose(final, batch.latents(-1), atol=1e-5)
    assert [index for index, _ in observed] == 2 * list(range(TOTAL)) and max(error for _, error in observed) < 1e-5


def test_a_known_first_output_is_not_evaluated(tmp_path):
    batch, _ = batch_of(tmp_path, tokens=5)
    program = program_from_table(batch.evaluator.table)
    equation = batch.evaluator.transformer
    expected = scores_of(program)(batch)
    assert equation.evaluations == (TOTAL - 1) * SAMPLES
    final = roll_out(program, batch.denoiser, batch.latents(0))
    assert equation.evaluations == (2 * TOTAL - 1) * SAMPLES
    assert expected["latent_error"].max() < 1e-6 and torch.allclose(final, batch.latents(-1), atol=1e-5)


def test_what_was_measured_is_kept(tmp_path):
    batch, _ = batch_of(tmp_path, tokens=5)
    program = program_from_table(batch.evaluator.table)
    scores = Measure(program)(batch)
    assert scores["errors"].shape == (SAMPLES, TOTAL + 1) and scores["errors"].max() < 1e-5
    assert np.array_equal(scores["errors"][:, -1], scores["latent_error"])
    final = kept_latents(program)(batch)["latents"]
    assert final.dtype == np.float32 and np.allclose(final, batch.latents(-1).numpy(), atol=1e-5)
    expected = eight_bits(batch.references())
    assert np.abs(kept_pictures(program)(batch)["pictures"].astype(int) - expected).max() <= 1


def test_of_videos_the_first_middle_and_last_frame_are_shown():
    video = np.linspace(0, 1, 5)[None, :, None, None, None] * np.ones((2, 5, 2, 3, 3))
    shown = eight_bits(video)
    assert shown.shape == (2, 2, 9, 3) and shown.dtype == np.uint8
    assert [shown[0, 0, column, 0] for column in (0, 3, 6)] == [0, 128, 255]
