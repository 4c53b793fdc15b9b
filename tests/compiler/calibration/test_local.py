"""Samples of one device: micro-batches, fleets, shared evaluations, and devices without memory."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from equations import TOTAL, equation_evaluator, normal, samples_from_equation, write_chunk

from otcache.compiler.calibration.fit import fit_output_program
from otcache.compiler.calibration.local import LocalSamples, OutputStore
from otcache.compiler.calibration.micro_batch import MicroBatch
from otcache.compiler.calibration.runs import Runs
from otcache.compiler.calibration.samples import Fleet
from otcache.compiler.calibration.scoring import scores_of
from otcache.compiler.calibration.trials import Calibration
from otcache.compiler.pipelines.out_of_memory import is_out_of_memory
from otcache.compiler.programs.solver_table import extrapolated_jump
from otcache.compiler.workspace.ledger import Ledger
from otcache.schemas.errors import HostError

SAMPLES, SHAPE = 10, (4, 3)
SCHEDULE = (0, 2, 5, 9)
MATRIX = torch.linspace(-1.0, 1.0, 9).view(3, 3)
ROUNDING = 1e-5
"""Of coefficients: a matrix product of other batches may round otherwise, within float32.
"""


def rate(x, step, k):
    """Every sample's own decay, a rotation of the channels, and something that is not linear."""
    return -k * x + x @ MATRIX - 0.1 * x.pow(3)


def samples_of(folder, **more):
    return samples_from_equation(folder, normal(SAMPLES, *SHAPE), rate, k=torch.linspace(0.5, 2.5, SAMPLES), **more)


def fitted(samples, schedule=SCHEDULE):
    table = equation_evaluator(rate, SHAPE).table
    return fit_output_program(samples, schedule, lambda c, end: extrapolated_jump(table, c, end, 1), table)


def calibration_of(samples, **more):
    table = equation_evaluator(rate, SHAPE).table
    return Calibration(samples=samples, table=table, objective="psnr", ledger=Ledger(), **more)


def coefficients(program):
    """Every number of a program that is fitted, in one array."""
    steps = program.model_dump(mode="json")["steps"]
    return np.concatenate([np.ravel(value) for step in steps for value in numbers(step)])


def numbers(value):
    if isinstance(value, dict):
        return [each for entry in value.values() for each in numbers(entry)]
    if isinstance(value, list):
        return [each for entry in value for each in numbers(entry)]
    return [] if value is None else [float(value)]


def assert_same(first, second):
    """Byte-identical programs, and identical scores."""
    assert first.program.model_dump_json() == second.program.model_dump_json()
    assert first.drifts == second.drifts
    assert all(np.array_equal(first.scores[name], second.scores[name]) for name in first.scores)


def test_the_same_micro_batch_gives_the_same_bytes(tmp_path):
    first, second = (fitted(samples_of(tmp_path / name, micro_batch=3)) for name in "ab")
    assert first.program.payload == "banded", "slopes and means are fitted"
    assert_same(first, second)


def test_micro_batches_agree_within_rounding(tmp_path):
    whole = fitted(samples_of(tmp_path / "all"))
    for size in (1, 3):
        samples = samples_of(tmp_path / str(size), micro_batch=size)
        found = fitted(samples)
        assert coefficients(found.program) == pytest.approx(coefficients(whole.program), rel=ROUNDING, abs=ROUNDING)
        assert max(samples.evaluator.transformer.batches) == size
        assert found.evaluations == whole.evaluations == samples.evaluator.transformer.evaluations
        assert found.scores["psnr_db"] == pytest.approx(whole.scores["psnr_db"], abs=1e-3)


@pytest.mark.parametrize("counts", [(4, 6), (3, 1, 6)])
def test_a_fleet_is_as_one_set(counts, tmp_path):
    """Members of 4 samples and of 6 at a micro-batch of 1, which rounds alike wherever a sample is."""
    start, k = normal(SAMPLES, *SHAPE), torch.linspace(0.5, 2.5, SAMPLES)
    whole = samples_from_equation(tmp_path / "whole", start, rate, k=k, micro_batch=1)
    members = [
        samples_from_equation(tmp_path / str(position), part, rate, k=of_part, micro_batch=1)
        for position, (part, of_part) in enumerate(zip(start.split(counts), k.split(counts), strict=True))
    ]
    fleet = Fleet(members)
    assert fleet.count == SAMPLES and fleet.elements == whole.elements == 12 and not fleet.caches_residuals
    assert np.array_equal(fleet.trajectory_gram(), whole.trajectory_gram())
    one, several = fitted(whole), fitted(fleet)
    assert_same(one, several)
    assert one.evaluations == several.evaluations
    for rows in (slice(None), slice(2, 5), slice(3, 4), slice(0, 4)):
        expected = whole.map(scores_of(one.program), rows)
        found = fleet.map(scores_of(one.program), rows)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_chunks_of_a_set_are_as_one(tmp_path):
    start, k = normal(SAMPLES, *SHAPE), torch.linspace(0.5, 2.5, SAMPLES)
    parts = zip(start.split(4), k.split(4), strict=True)
    runs = Runs([write_chunk(tmp_path / str(i), part, rate, k=of) for i, (part, of) in enumerate(parts)])
    chunked = LocalSamples(runs, equation_evaluator(rate, SHAPE), MicroBatch(3), tmp_path / "scratch")
    assert_same(fitted(chunked), fitted(samples_of(tmp_path / "whole", micro_batch=3)))


def test_the_program_of_a_walk_scores_as_it_is_rolled_out(tmp_path):
    """With coefficients that are fitted to all: close to the walk's, and exactly those of a plain loop."""
    samples = samples_of(tmp_path)
    found = fitted(samples)
    rolled = samples.map(scores_of(found.program))
    assert np.mean(rolled["latent_error"]) <= np.mean(found.scores["latent_error"]) < 0.05


def test_walks_share_the_evaluations_of_their_first_steps(tmp_path):
    samples = samples_of(tmp_path)
    equation, calibration = samples.evaluator.transformer, calibration_of(samples)
    made = []
    for schedule in [(0, 2, 5, 9), (0, 2, 5, 8), (0, 2, 6, 9), (0, 3, 5, 9), (0, 2, 5, 9)]:
        before = equation.evaluations
        calibration.fit(schedule)
        made.append((equation.evaluations - before) // SAMPLES)
    # A step is fitted to land at the next one: (0, 2, 5) comes to 2 and 5 as (0, 2, 5, 9) does. The first is known.
    assert made == [3, 1, 2 - 1 + 1, 3, 0]
    assert calibration.ledger.computed == equation.evaluations == calibration.ledger.charged


def test_shared_evaluations_change_nothing(tmp_path):
    """A walk after others comes to what it comes to alone."""
    shared = samples_of(tmp_path / "shared")
    for schedule in [(0, 2, 5, 8), (0, 2, 7, 9)]:
        fitted(shared, schedule)
    assert_same(fitted(shared), fitted(samples_of(tmp_path / "alone")))


def test_outputs_make_room_for_others_and_results_stay(tmp_path):
    size = SAMPLES * 12 * 4
    plenty, scarce = samples_of(tmp_path / "a"), samples_of(tmp_path / "b", output_bytes=2 * size)
    for schedule in [SCHEDULE, (0, 2, 5, 8), (0, 1, 2, 3, 4, 5), SCHEDULE]:
        assert_same(fitted(plenty, schedule), fitted(scarce, schedule))
        kept = [path for path in scarce.scratch.glob("*.npy") if len(path.stem) == 24]
        assert len(kept) <= 2, "of outputs, within the limit"
    made = [each.evaluator.transformer.evaluations for each in (plenty, scarce)]
    assert made[0] < made[1], "what made room is evaluated again"


def put(store, key, values):
    """A filled array that the store knows."""
    array = store.new(key, values.shape)
    array[:] = values
    store.keep(key, array)
    return array


def test_an_array_that_made_room_stays_readable(tmp_path):
    store = OutputStore(tmp_path, 3 * 40)
    held = [put(store, str(value), np.full(10, value, np.float32)) for value in range(3)]
    assert np.array_equal(store.get("0"), held[0]), "used: 1 is now the oldest"
    put(store, "3", np.full(10, 3, np.float32))
    assert store.get("1") is None and not (tmp_path / "1.npy").exists()
    assert [store.get(key)[0] for key in ("0", "2", "3")] == [0.0, 2.0, 3.0]
    assert np.array_equal(held[1], np.full(10, 1.0, np.float32))
    put(store, "large", np.zeros(100, np.float32))
    assert [path.name for path in tmp_path.iterdir()] == ["large.npy"], "the newest one is there whatever it takes"


def test_an_array_that_was_not_filled_is_not_known(tmp_path):
    """An evaluation that fails leaves nothing that a later walk takes for outputs."""
    samples = samples_of(tmp_path, micro_batch=4)
    equation = samples.evaluator.transformer
    equation.rate = lambda x, step, k: (_ for _ in ()).throw(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        fitted(samples)
    equation.rate = rate
    assert_same(fitted(samples), fitted(samples_of(tmp_path / "whole", micro_batch=4)))


@pytest.mark.parametrize(("room", "sizes"), [(4, [3]), (2, [2]), (1, [1])])
def test_out_of_memory_halves_the_micro_batch_and_goes_on(room, sizes, tmp_path):
    notes = []
    micro_batch = MicroBatch(6, notes.append)
    samples = samples_of(tmp_path / "a", micro_batch=micro_batch, room=room)
    found = fitted(samples)
    assert coefficients(found.program) == pytest.approx(
        coefficients(fitted(samples_of(tmp_path / "b")).program), rel=ROUNDING, abs=ROUNDING
    )
    assert micro_batch.size <= room and max(samples.evaluator.transformer.batches) == micro_batch.size
    assert notes[-1] == f"out of memory on the device: going on with {micro_batch.size} samples at a time"
    assert len(notes) == len(set(notes)), "said once for each size"
    assert found.evaluations == 3 * SAMPLES


def test_a_device_without_room_for_one_sample_is_said_in_one_line(tmp_path):
    samples = samples_of(tmp_path, room=0)
    with pytest.raises(HostError, match="one sample at a time: out of memory") as error:
        fitted(samples)
    assert "\n" not in str(error.value) and "--height" in str(error.value)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)


def test_a_rest_that_is_smaller_than_the_micro_batch_is_halved_itself():
    """Of 3 samples in a micro-batch of 16 two thirds are too many: 1 is tried next, not 8."""
    tried = []

    def compute(part):
        tried.append(part.stop - part.start)
        if part.stop - part.start > 1:
            raise torch.OutOfMemoryError("out of memory")
        return part.start

    micro_batch = MicroBatch(16)
    answers = list(micro_batch.run(slice(2, 5), compute, torch.device("cpu")))
    assert tried == [3, 1, 1, 1] and [answer for _, answer in answers] == [2, 3, 4]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("MPS backend out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_other_errors_are_the_callers(tmp_path):
    samples = samples_of(tmp_path)
    with pytest.raises(ZeroDivisionError):
        samples.map(lambda batch: {"x": np.array([1 / 0])})


def test_the_scratch_folder_goes_with_the_samples(tmp_path):
    samples = samples_of(tmp_path)
    fitted(samples)
    folder = samples.scratch
    assert folder.exists() and len(list(folder.glob("*.npy"))) == len(SCHEDULE), "outputs; the walk's own is gone"
    del samples
    gc.collect()
    assert not folder.exists()


def test_the_scratch_folder_goes_when_samples_are_closed(tmp_path):
    """As a compile closes them that ends in an error, whose traceback still holds the samples."""
    samples = samples_of(tmp_path)
    fitted(samples)
    assert samples.scratch.exists()
    samples.close()
    assert not samples.scratch.exists() and not list(tmp_path.rglob(".*.part"))
    samples.close()


def test_a_set_is_its_full_runs(tmp_path):
    samples = samples_of(tmp_path)
    table = samples.evaluator.table
    gram = samples.trajectory_gram()
    assert gram.shape == (SAMPLES, 2 * TOTAL + 1, 2 * TOTAL + 1)
    latents = samples.runs.latents(slice(None), 3).reshape(SAMPLES, -1).astype(float)
    assert gram[:, 3, 3] == pytest.approx(np.square(latents).sum(axis=1))
    found = fit_output_program(
        samples, range(TOTAL), lambda c, end: extrapolated_jump(table, c, end, 1), table, penalty=1.0
    )
    assert found.scores["latent_error"].max() < 1e-3, "every step computed"
