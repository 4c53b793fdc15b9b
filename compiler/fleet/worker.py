"""What runs in each worker: a model that it has loaded itself, sessions like the asking process's, sets of samples.

A worker is asked by methods with bytes and answers with bytes (`packing`). It makes full runs into a workspace of the
same path as the asking process's, where a later worker on the same host, or on the same shared disk, finds them.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch

from otcache.schemas.errors import ModelError
from otcache.schemas.shapes import AxisName, describe_size

from ..calibration.runs import Runs
from ..calibration.samples import Samples, Walk
from ..graph.stages import Stages
from ..models.model import Model
from ..options import CompileOptions
from ..passes.capture import local_runs, missing_runs
from ..passes.crew import SampleSet, key_differences
from ..passes.prepare import (
    check_room,
    example_of_short_run,
    lower_sampler,
    samples_of,
    stages_of,
    with_tables,
)
from ..passes.session import Session, begin
from ..programs.solver_table import SolverTable
from ..sizes.requested import Point
from ..sizes.served import Sizes
from ..workspace.disk import remove_leftovers
from ..workspace.progress import Pass, Reporter
from ..workspace.quiet import quiet
from ..workspace.workspace import RESULT
from .packing import pack, pack_error, shared_by_name, unpack


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """From what a worker makes a session like the asking process's."""

    options: CompileOptions
    """With the micro-batch, the threads, the device and the prompts that were chosen there."""
    key: str
    """JSON of that session's calibration key, which the worker's own has to be."""
    point: tuple[tuple[AxisName, int], ...] | None = None
    """The size, of programs that are fitted at another than the compiled one."""


@dataclass(frozen=True, kw_only=True)
class Holding:
    """Which samples a worker is to hold, and how."""

    recipe: Recipe
    wanted: SampleSet
    rows: tuple[int, int]
    """The first of the set's samples that is held, and the one after the last."""
    cut: bool = False
    lpips: bool = False


class Notes(Reporter):
    """Keeps notes until they are sent with the next answer."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)

    def take(self) -> list[str]:
        """Those since the last time."""
        texts, self.texts = self.texts, []
        return texts


class Worker:
    """See the module. Whoever asks knows sets and walks by names of its own."""

    def __init__(self) -> None:
        quiet()
        self.notes = Notes()
        self.models: dict[Any, Model] = {}
        self.opened: dict[CompileOptions, tuple[Session, list[str], SolverTable]] = {}
        self.sessions: dict[Recipe, tuple[Session, SolverTable]] = {}
        self.stages: dict[Any, tuple[Stages | None, Sizes]] = {}
        self.runs: dict[tuple[Recipe, SampleSet, tuple[int, int]], Runs] = {}
        self.sets: dict[str, tuple[Samples, Session]] = {}
        self.walks: dict[str, Walk] = {}
        self.steps_done = 0

    def place(self) -> tuple[str, int]:
        """Host and process."""
        return socket.gethostname(), os.getpid()

    @ray.method(concurrency_group="watch")  # type: ignore[untyped-decorator]
    def progress(self) -> int:
        """Evaluations of the full runs that are being made."""
        return self.steps_done

    def ask(self, method: str, data: bytes) -> bytes:
        """What a method of this class answers to packed arguments: (error or None, answer, notes)."""
        error: bytes | None = None
        answer: Any = None
        try:
            answer = getattr(self, method)(data)
        except Exception as raised:
            error = pack_error(raised)
        return pickle.dumps((error, answer, self.notes.take()), protocol=5)

    def capture(self, data: bytes) -> dict[str, Any]:
        """Make full runs: their `timesteps`, the shapes of their `conditioning`, and `evaluations`."""
        holding: Holding = unpack(data, {})
        advance = Pass(show=self._advance)
        runs = self._runs(holding, advance)
        return {
            "timesteps": runs.timesteps,
            "elements": runs.latents_shape,
            "conditioning": sorted({tuple(sorted(chunk.conditioning_shapes().items())) for chunk in runs.chunks}),
            "evaluations": advance.facts.get("evaluations", 0),
            "reused": advance.facts.get("evaluations_reused", 0),
        }

    def hold(self, data: bytes) -> dict[str, Any]:
        """Hold samples under a name."""
        name, holding = unpack(data, {})
        self.drop(pack(name, {}))
        session, table = self._session(holding.recipe)
        runs = self._runs(holding, Pass(show=self._advance))
        stages, sizes = self._cut(holding.recipe.options, holding.cut)
        if holding.recipe.point is None:
            session = with_tables(session, sizes)
        samples = samples_of(session, runs, table, stages, lpips=holding.lpips, first=holding.rows[0])
        self.sets[name] = samples, session
        return {"elements": samples.elements, "caches_residuals": samples.caches_residuals}

    def drop(self, data: bytes) -> None:
        """Hold a set no longer."""
        samples, _ = self.sets.pop(unpack(data, {}), (None, None))
        if samples is not None:
            samples.close()

    def gram(self, data: bytes) -> Any:
        """See `Samples.trajectory_gram`."""
        return self.sets[unpack(data, {})][0].trajectory_gram()

    def map(self, data: bytes) -> Any:
        """See `Samples.map`."""
        name, question = pickle.loads(data)
        samples, session = self.sets[name]
        function, rows = unpack(question, shared_by_name(session))
        return samples.map(function, slice(*rows))

    def walk(self, data: bytes) -> None:
        """Begin a walk under a name."""
        name, samples, memory = unpack(data, {})
        self.walks[name] = self.sets[samples][0].walk(memory)

    def step(self, data: bytes) -> Any:
        """Ask a walk: `compute`, `advance`, `finish` or `close` with arguments."""
        name, method, arguments = unpack(data, {})
        walk = self.walks[name]
        if method in ("finish", "close"):
            del self.walks[name]
        return getattr(walk, method)(*arguments)

    def close(self) -> None:
        """Give back everything that is held, scratch folders above all."""
        for samples, _ in self.sets.values():
            samples.close()
        self.sets.clear()
        self.walks.clear()

    def _advance(self, current: Pass) -> None:
        self.steps_done = current.done

    def _runs(self, holding: Holding, advance: Pass) -> Runs:
        key = (holding.recipe, holding.wanted, holding.rows)
        if key not in self.runs:
            session, table = self._session(holding.recipe)
            rows = slice(*holding.rows)
            check_room(session, table.num_inference_steps, missing_runs(session, holding.wanted, rows))
            self.steps_done = 0
            self.runs[key] = local_runs(session, table, holding.wanted, rows, advance)
        return self.runs[key]

    def _session(self, recipe: Recipe) -> tuple[Session, SolverTable]:
        """Raises ModelError for a session that would compute something else than the asking process's."""
        if recipe not in self.sessions:
            session, _, table = self._opened(recipe.options)
            if recipe.point is not None:
                session, table = _at_size(session, dict(recipe.point))
            if differences := key_differences(json.loads(recipe.key), json.loads(json.dumps(session.key))):
                raise ModelError(
                    f"the worker on {socket.gethostname()} has another {'; another '.join(differences)}: expected "
                    "every node to have what this process has: give MODEL as a folder on a shared path, or a hub id "
                    "with --revision"
                )
            self.sessions[recipe] = session, table
        torch.set_num_threads(recipe.options.threads or torch.get_num_threads())
        return self.sessions[recipe]

    def _opened(self, options: CompileOptions) -> tuple[Session, list[str], SolverTable]:
        """The model, loaded once, and probed with some options; calibration prompts; the sampler."""
        if options not in self.opened:
            identity = (options.model, options.revision, options.variant, options.lora)
            session, prompts, _ = begin(options, self.notes, self.models.get(identity))
            self.models[identity] = session.model
            session.workspace.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(session.workspace.folder, f"samples|{RESULT}")  # of a worker that died here
            self.opened[options] = session, prompts, lower_sampler(session)
        return self.opened[options]

    def _cut(self, options: CompileOptions, cut: bool) -> tuple[Stages | None, Sizes]:
        """The stages of the compiled size, cut once for all its sessions; None, and the sizes, of a model as it is."""
        session, prompts, _ = self._opened(options)
        call = session.call
        key = (cut, call.height, call.width, call.num_frames, call.max_sequence_length)
        if key not in self.stages:
            self.stages[key] = stages_of(session, partial(example_of_short_run, session, prompts) if cut else None)
        return self.stages[key]


def _at_size(session: Session, point: Point) -> tuple[Session, SolverTable]:
    """The session at one of its other sizes (`passes.compile`), and the sampler there."""
    seen = next(each for each in session.seen if describe_size(each.point) == describe_size(point))
    key = {**session.key, "served at": seen.point}
    return replace(session, call=seen.call, interface=seen.interface, decoder=None, key=key), seen.table
