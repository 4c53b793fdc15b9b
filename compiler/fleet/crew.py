"""The crew of a compile: workers on Ray that make full runs and hold samples (`passes.crew.Crew`).

Each worker has a post. Where one dies, its post gets another, or hands its samples to a worker that lives where the
cluster has no room left; samples are made again there and walks taken up to where they were (`members`). The asking
process waits in a loop, so that signals and progress are never behind an answer.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch

from otcache.schemas.errors import HostError

from ..options import CompileOptions
from ..passes.capture import PASS_CHUNK
from ..passes.crew import SampleSet
from ..passes.session import Session, listed_prompts
from ..pipelines.placement import device_from_name
from ..workspace import interrupts
from ..workspace.disk import remove_leftovers
from ..workspace.progress import Pass, PassingReporter, Reporter
from ..workspace.workspace import RESULT, default_workspace
from .cluster import Cluster, connected
from .members import HeldRuns, Member
from .packing import pack, shared_by_name, unpack_error
from .traffic import TENSOR_ROWS, TENSORS, Traffic
from .worker import Holding, Recipe, Worker

Answer = TypeVar("Answer")

POLL_S = 0.2
"""Between two looks at signals and progress."""
FINISH_S = 5.0
"""That workers have to give back what they hold, and to end."""
MOST_DEATHS = 10
"""Of workers that are asked one question: after so many it is the question's fault, or the host's."""
ROOM_S = 60.0
"""That a replacement may wait for room in the cluster, as after a node has died; then those that live do its work."""


LOST = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError)
"""What Ray raises where a worker, or its node, has died."""


class Gone(Exception):
    """A worker has died."""


class RayPost:
    """See `members.Post`."""

    def __init__(self, crew: RayCrew, index: int) -> None:
        self.crew, self.index = crew, index
        self.lock = threading.Lock()
        self.worker: Any = None

    def on_worker(self, answer: Callable[[Any], Answer]) -> Answer:
        """See `members.Post`. Raises HostError where workers keep dying."""
        for _ in range(MOST_DEATHS):
            worker = None
            try:
                worker = self.crew.worker_at(self)
                return answer(worker)
            except Gone:
                if self.crew.closed:
                    raise
                self.crew.bury(self, worker)
        raise HostError(
            f"workers died {MOST_DEATHS} times over one question: the last of them on {self.crew.cluster.name}: "
            "expected them to live: look at their memory, or give a smaller --micro-batch"
        )

    def ask(self, worker: Any, kind: str, method: str, data: bytes, sample_steps: int) -> Any:
        """See `members.Post`."""
        return self.crew.ask(worker, kind, method, data, sample_steps)

    def tell(self, worker: Any, method: str, data: bytes) -> None:
        """See `members.Post`."""
        if not self.crew.closed:
            with contextlib.suppress(Exception):
                worker.ask.remote(method, data)


class RayCrew:
    """See the module."""

    def __init__(self, cluster: Cluster, note: Callable[[str], None]) -> None:
        self.cluster, self.note = cluster, note
        self.traffic = Traffic()
        self.closed = False
        self.replaced = 0
        self.holding = 0
        """Samples that were asked for last."""
        self.posts = [RayPost(self, index) for index in range(cluster.workers)]
        self.pool = ThreadPoolExecutor(max_workers=cluster.workers, thread_name_prefix="crew")
        self.notes: list[str] = []
        self.said: set[str] = set()
        self.folders: set[Path] = set()
        """Of the workspace, which workers on this host share."""

    def full_runs(self, session: Session, wanted: SampleSet, advance: Pass) -> HeldRuns:
        """See `passes.crew.Crew`."""
        recipe = recipe_of(session)
        parts = split(wanted.count, unit_of(session), len(self.posts))
        self._check_spread(session, wanted, parts)
        self.holding = wanted.count
        self.folders.add(session.workspace.folder)
        found = self._capture(recipe, wanted, parts, advance)
        if len({shapes for each in found for shapes in each["conditioning"]}) > 1 and len(parts) > 1:
            self._say(
                f"{type(session.model.pipeline).__name__} pads prompts to the longest one of a call: one worker holds "
                "all samples"
            )
            parts = [(0, wanted.count)]
            found = self._capture(recipe, wanted, parts, advance)
        advance.facts["evaluations"] = sum(each["evaluations"] for each in found)
        advance.facts["evaluations_reused"] = sum(each["reused"] for each in found)
        shared = shared_by_name(session)

        def members(*, cut: bool, lpips: bool) -> Sequence[Member]:
            def member(post: RayPost, rows: tuple[int, int]) -> Member:
                holding = Holding(recipe=recipe, wanted=wanted, rows=rows, cut=cut, lpips=lpips)
                return Member(post, holding, shared, len(found[0]["timesteps"]))

            return self.each(member, self.posts[: len(parts)], parts)

        return HeldRuns(members, self.each, found[0]["timesteps"])

    def _capture(
        self, recipe: Recipe, wanted: SampleSet, parts: Sequence[tuple[int, int]], advance: Pass
    ) -> list[dict[str, Any]]:
        """Full runs by all workers at once; `advance` is told of evaluations meanwhile."""
        steps, done = recipe.options.num_inference_steps, [0] * len(parts)
        advance.facts.update(workers=len(parts), samples=0)

        def make(post: RayPost, rows: tuple[int, int]) -> dict[str, Any]:
            data = pack(Holding(recipe=recipe, wanted=wanted, rows=rows), {})
            samples = rows[1] - rows[0]
            found: dict[str, Any] = post.on_worker(
                lambda worker: self.ask(worker, "capture", "capture", data, steps * samples)
            )
            done[post.index] = steps * samples
            return found

        def watch() -> None:
            for post, (start, stop) in zip(self.posts, parts, strict=False):
                if done[post.index] < steps * (stop - start):
                    done[post.index] = min(self._progress(post), steps * (stop - start) - 1)
            advance.facts.update(workers=self.living(len(parts)), samples=sum(done) // steps)
            advance(sum(done), steps * wanted.count)

        return self.each(make, self.posts[: len(parts)], parts, watch=watch)

    def _progress(self, post: RayPost) -> int:
        """Evaluations that a worker has made of what it is asked for; 0 where it does not say."""
        with contextlib.suppress(Exception):
            if post.worker is not None:
                return int(ray.get(post.worker.progress.remote(), timeout=1.0))
        return 0

    def living(self, most: int) -> int:
        """Workers of the first posts that are at work."""
        return len({id(post.worker) for post in self.posts[:most] if post.worker is not None})

    def each(
        self, function: Callable[..., Answer], *rows: Any, watch: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """As `map`, all at once; signals, notes and progress are looked after meanwhile."""
        futures = [self.pool.submit(function, *each) for each in zip(*rows, strict=True)]
        pending = set(futures)
        while pending:
            interrupts.check()
            _, pending = wait(pending, timeout=POLL_S)
            self._tell()
            watch()
        self._tell()
        return [future.result() for future in futures]

    def ask(self, worker: Any, kind: str, method: str, data: bytes, sample_steps: int) -> Any:
        """What a worker answers; raises what it raised, Gone where it is no more."""
        try:
            packed = ray.get(worker.ask.remote(method, data))
        except LOST as error:
            raise Gone from error
        raised, answer, notes = pickle.loads(packed)
        self.notes += notes
        if isinstance(answer, dict) and TENSOR_ROWS & answer.keys():
            kind = TENSORS
        self.traffic.add(kind, len(data), len(packed), sample_steps)
        if raised is not None:
            raise unpack_error(raised)
        return answer

    def worker_at(self, post: RayPost) -> Any:
        """The worker of a post, which is started, opened and compared with this process where there is none."""
        with post.lock:
            if post.worker is None:
                post.worker = self._start(post)
            return post.worker

    def bury(self, post: RayPost, worker: Any) -> None:
        """Take a dead worker off every post that it had."""
        if worker is not None:
            with contextlib.suppress(Exception):
                ray.kill(worker, no_restart=True)
        for each in self.posts:
            with each.lock:
                if each.worker is worker:
                    each.worker = None
        self.replaced += 1
        self.notes.append(f"worker {post.index + 1} has died: its samples are made again")

    def _start(self, post: RayPost) -> Any:
        """A worker, or one that lives already, where the cluster has no room for another."""
        gpus = 1 if self.cluster.resource == "GPU" else 0
        worker = actor_class().options(num_cpus=1, num_gpus=gpus).remote()
        living = [each.worker for each in self.posts if each is not post and each.worker is not None]
        began, placed = time.monotonic(), worker.place.remote()
        try:
            while not ray.wait([placed], timeout=1.0)[0]:
                if self.closed:
                    raise Gone
                if time.monotonic() - began < ROOM_S:
                    continue
                if self.replaced and living:
                    ray.kill(worker, no_restart=True)
                    self._say(f"worker {post.index + 1} finds no room in the cluster: another one does its work")
                    return living[post.index % len(living)]
                self._say(f"waiting for room in {self.cluster.name}")
            ray.get(placed)
        except ray.exceptions.RayTaskError as error:
            raise HostError(
                f"a worker does not start on {self.cluster.name} ({str(error.cause).splitlines()[0][:200]}): expected "
                "otcache[ray,compiler] in the Python of every node, of the same versions as here"
            ) from error
        except LOST as error:
            raise Gone from error
        return worker

    def _check_spread(self, session: Session, wanted: SampleSet, parts: Sequence[tuple[int, int]]) -> None:
        """Say where micro-batches are too large to occupy all workers, or threads more than there are cores."""
        unit = unit_of(session)
        if len(parts) < len(self.posts):
            fitting = max(1, wanted.count // len(self.posts))
            self._say(
                f"{wanted.count} samples in micro-batches of {unit} occupy {len(parts)} of {len(self.posts)} workers: "
                f"--micro-batch {fitting} occupies more, and changes the last digits"
            )
        threads, cores = torch.get_num_threads(), int(ray.cluster_resources().get("CPU", 0))
        if self.cluster.resource == "CPU" and threads > 1 and threads * len(parts) > cores:
            self._say(
                f"{len(parts)} workers of {threads} threads each share {cores} cores: --threads 1 is faster, and "
                "changes the last digits"
            )

    def _say(self, text: str) -> None:
        """A note, once; the main thread says it."""
        if text not in self.said:
            self.said.add(text)
            self.notes.append(text)

    def _tell(self) -> None:
        """Notes of workers and of their deaths, from the main thread."""
        while self.notes:
            self.note(self.notes.pop(0))

    def finish(self) -> None:
        """Have all workers give back what they hold, if they do at once."""
        with contextlib.suppress(Exception):
            ray.get([post.worker.close.remote() for post in self.posts if post.worker is not None], timeout=FINISH_S)

    def close(self) -> None:
        """End all workers; what waits for them ends with Gone."""
        self.closed = True
        for post in self.posts:
            if post.worker is not None:
                with contextlib.suppress(Exception):
                    ray.kill(post.worker, no_restart=True)
        self.pool.shutdown(wait=True, cancel_futures=True)


class CrewReporter(PassingReporter):
    """Another reporter, whose passes say how many workers and samples they have."""

    def __init__(self, inner: Reporter, crew: RayCrew) -> None:
        super().__init__(inner)
        self.crew = crew

    @contextlib.contextmanager
    def on(self, name: str, description: str) -> Iterator[Pass]:
        with super().on(name, description) as current:
            if self.crew.living(len(self.crew.posts)):
                current.facts.update(workers=self.crew.living(len(self.crew.posts)), samples=self.crew.holding)
            yield current


@functools.cache
def actor_class() -> Any:
    """`Worker` as an actor that answers to `progress` while it is at work."""
    return ray.remote(concurrency_groups={"watch": 1})(Worker)  # type: ignore[call-overload]


@contextlib.contextmanager
def crew_of(
    options: CompileOptions, reporter: Reporter, workers: int | None, address: str | None
) -> Iterator[tuple[RayCrew, Reporter]]:
    """A crew while the context lasts, and the reporter that shows it. Afterwards no worker is left.

    Args:
        options: of the compile; its device says what each worker takes one of.
        reporter: told of workers that died, and in the end of what crossed the network.
        workers: how many; None takes what the cluster has.
        address: of a running cluster; None takes what RAY_ADDRESS says, else a cluster on this host.

    Raises HostError for a cluster that does not answer, or is too small.
    """
    resource = "GPU" if device_from_name(options.device).type == "cuda" else "CPU"
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(connected(workers, address, resource))
        crew = RayCrew(cluster, reporter.note)
        try:
            yield crew, CrewReporter(reporter, crew)
            crew.finish()
            replaced = f", {crew.replaced} replaced" if crew.replaced else ""
            count = f"{cluster.workers} worker{'s' if cluster.workers != 1 else ''}"
            reporter.note(f"{count} on {cluster.name}{replaced}: {crew.traffic.text()}")
        finally:
            crew.close()
            stack.close()
            for folder in crew.folders:
                sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what workers that were killed have left on this host; they may take a moment to end."""
    end = time.monotonic() + FINISH_S
    while time.monotonic() < end and list(folder.glob(".*.part")):
        remove_leftovers(folder, f"samples|{RESULT}")
        time.sleep(POLL_S)


def recipe_of(session: Session) -> Recipe:
    """From what a worker makes a session like this one."""
    listed = listed_prompts(session.options)
    point = session.key.get("served at")
    model = session.options.model
    options = replace(
        session.options,
        model=str(Path(model).absolute()) if session.model.folder == Path(model) else model,
        lora=None if session.options.lora is None else session.options.lora.absolute(),
        output=None,
        micro_batch=int(session.key["placement"]["micro batch"]),
        threads=torch.get_num_threads(),
        prompts=None if listed is None else tuple(listed),
        device=session.placement.device.type,
        workspace=(session.options.workspace or default_workspace()).absolute(),
    )
    return Recipe(options=options, key=json.dumps(session.key), point=None if point is None else tuple(point.items()))


def unit_of(session: Session) -> int:
    """Samples that stay together, so that no micro-batch and no chunk of full runs goes across workers."""
    size = int(session.key["placement"]["micro batch"])
    return math.lcm(size, min(size, PASS_CHUNK))


def split(count: int, unit: int, workers: int) -> list[tuple[int, int]]:
    """Which samples each worker holds: as even as whole units are, and none without any.

    >>> split(7, 2, 3)
    [(0, 4), (4, 6), (6, 7)]
    """
    units = math.ceil(count / unit)
    parts = min(units, workers)
    sizes = [units // parts + (index < units % parts) for index in range(parts)]
    ends = [0, *itertools.accumulate(sizes)]
    return [(start * unit, min(count, end * unit)) for start, end in itertools.pairwise(ends)]
