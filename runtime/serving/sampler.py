"""`Sampler`: prompt → pictures from an artifact, at any of its budgets.

Shapes: n samples, g branches of guidance (negative first), latents float32 (n, *latents.shape) as the scheduler sees
them, pictures float32 (n, height, width, 3) in [0, 1].
"""

from __future__ import annotations

import math
import os
import statistics
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otcache.schemas.errors import HostError, RequestError, UsageError
from otcache.schemas.manifest import BudgetProgram, Latents, Manifest, Stage, TensorInfo
from otcache.schemas.messages import one_line

from ..artifact.reader import Artifact
from ..engines.choose import Selection, select_backend
from ..loop.backend import Array, Denoiser, Engine, Options, Request
from ..loop.host_loop import check_trunk, run_stage
from ..loop.loop import Callback, Float32
from ..loop.timing import Timer
from .noise import SEED_MAXIMUM, SEED_MINIMUM, noise
from .request_size import Given, Sizes
from .tokenizers import Tokenizers, check_prompts

LATENCY = "latency_s/"
"""Measurements of the manifest with this prefix say how long one picture takes at the budget that follows."""
_HISTORY = 64
"""Latencies remembered for each budget."""


class Sampler:
    """An artifact, loaded. Safe to call from several threads: requests take turns on the device.

    A request's result depends on its arguments alone, not on what ran before it. Make one with `Sampler.load`.
    """

    def __init__(self, artifact: Artifact, selection: Selection) -> None:
        check_trunk(artifact.manifest)
        self.artifact = artifact
        self._sizes = Sizes(artifact)
        self.backend = selection.backend.name
        self.passed_over = selection.passed_over
        """Backends that were not taken, with the reason."""
        self._backend = selection.backend
        self._lock = threading.Lock()
        self._latencies: dict[str, deque[float]] = {}
        self._latencies_lock = threading.Lock()
        self.load_s: dict[str, float] = {}
        """Seconds that loading took: of `tokenizers` and of every stage, its file's digest included."""
        self._engines: dict[str, Engine] = {}
        self._denoise: Denoiser | None = None
        timer = Timer()
        try:
            with timer.part("encode", "tokenizers"):
                self._tokenizers: Tokenizers | None = Tokenizers(artifact)
            for part in self._backend.parts(self.manifest):
                with timer.part("overhead", part.name):
                    self._engines[part.name] = self._backend.load(part, artifact)
            self._denoise = self._backend.denoiser(self.manifest, self._engines)
        except BaseException:
            self.close()
            raise
        self.load_s = timer.timing().stages

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        backend: str = "auto",
        threads: int | None = None,
        *,
        cuda_graph: bool = False,
    ) -> Sampler:
        """Check the artifact's files, choose a backend and load every stage.

        threads: CPU threads of a stage; None takes one for each core. cuda_graph: on a backend that keeps everything on
        a GPU, record each budget's loop on its first use and replay it as a whole after that; such requests cannot be
        cancelled between steps. Raises ArtifactError, HostError, UsageError.
        """
        if threads is not None and (not _is_int(threads) or threads < 1):
            raise UsageError(f"threads is {threads!r}: expected a whole number of at least 1")
        artifact = Artifact.open(folder)
        options = Options(threads=threads, cuda_graph=cuda_graph)
        return cls(artifact, select_backend(backend, artifact.manifest, options))

    @property
    def manifest(self) -> Manifest:
        return self.artifact.manifest

    @property
    def budgets(self) -> tuple[str, ...]:
        """The budgets that are served, in increasing order, then `full`."""
        return self.manifest.budgets

    def __call__(
        self,
        prompt: str | list[str],
        *,
        budget: int | str,
        negative_prompt: str | list[str] | None = None,
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
        progress: Callback | None = None,
        timer: Timer | None = None,
    ) -> Float32:
        """Pictures, float32 (n, height, width, 3) in [0, 1], n = prompts · images_per_prompt, a prompt's side by side.

        Of a video artifact, float32 (n, frames, height, width, 3).

        seed: one draws the noise of all n pictures in one go, a list of n draws each picture's on its own: as one
        generator and a list of generators do in diffusers. height, width, num_frames, max_sequence_length: one of the
        sizes that the artifact serves; None takes its own. progress: called with (finished, all) steps after each step;
        what it raises ends the request. timer: `timer.timing()` says afterwards where the time went. Raises
        RequestError for what the artifact does not serve.
        """
        watched = progress is not None or timer is not None
        size = _size(height, width, num_frames, max_sequence_length)
        n = self.check(
            prompt,
            budget=budget,
            negative_prompt=negative_prompt,
            seed=seed,
            images_per_prompt=images_per_prompt,
            guidance_scale=guidance_scale,
            **size,
        )
        timer = timer or Timer()
        prompts = [text for text in check_prompts(prompt) for _ in range(images_per_prompt)]
        negative = negative_prompt
        if isinstance(negative, list | tuple):
            negative = [text for text in negative for _ in range(images_per_prompt)]
        conditioning = self.encode(
            prompts, negative_prompt=negative, max_sequence_length=max_sequence_length, timer=timer
        )
        latents = self._sample(conditioning, budget, seed, None, guidance_scale, size, progress, timer, watched=watched)
        pictures = self._decode(latents, size, timer)
        if n == 1 and self._sizes.manifest(size).conditions == self.manifest.conditions:
            with self._latencies_lock:
                self._latencies.setdefault(str(budget), deque(maxlen=_HISTORY)).append(timer.timing().latency_s)
        return pictures

    def check(
        self,
        prompt: str | list[str],
        *,
        budget: int | str,
        negative_prompt: str | list[str] | None = None,
        seed: int | Sequence[int] = 0,
        images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
    ) -> int:
        """How many pictures a request with these arguments makes; costs next to nothing. Raises RequestError."""
        if not _is_int(images_per_prompt) or images_per_prompt < 1:
            raise RequestError(f"images_per_prompt is {images_per_prompt!r}: expected a whole number of at least 1")
        manifest = self._sizes.manifest(_size(height, width, num_frames, max_sequence_length))
        self._program(budget, manifest)
        self._guidance_weights(guidance_scale)
        prompts = check_prompts(prompt)
        self._check_negative(negative_prompt, len(prompts))
        _check_seed(seed, len(prompts) * images_per_prompt)
        self._backend.check(len(prompts) * images_per_prompt, manifest)
        return len(prompts) * images_per_prompt

    def encode(
        self,
        prompt: str | list[str],
        *,
        negative_prompt: str | list[str] | None = None,
        max_sequence_length: int | None = None,
        timer: Timer | None = None,
    ) -> dict[str, Array]:
        """Conditioning of n prompts: each of the text encoder's outputs as (g, n, …), the negative branch first.

        negative_prompt: one for all or n of them; None takes the artifact's. Raises RequestError.
        """
        manifest = self._sizes.manifest({"max_sequence_length": max_sequence_length})
        stage = _stage(manifest, "text_encoder", "give `sample` its conditioning instead")
        timer = timer or Timer()
        positive = check_prompts(prompt)
        self._check_negative(negative_prompt, len(positive))
        branches = [positive]
        if self.manifest.guidance.branches == 2:
            branches.insert(0, self._negative(negative_prompt, len(positive)))
        texts = [text for branch in branches for text in branch]
        unique = list(dict.fromkeys(texts))
        tokenizers = self._tokenizers
        if tokenizers is None:
            raise _closed()
        with timer.part("encode"):
            lengths = {entry.input_name: entry.length for entry in manifest.tokenizers}
            encoded = self._run(stage, tokenizers(unique, lengths), timer)
        rows = [unique.index(text) for text in texts]
        shape = (len(branches), len(positive))
        wanted = {tensor.name for tensor in self.manifest.conditioning}
        return {
            name: array[rows].reshape(*shape, *array.shape[1:]) for name, array in encoded.items() if name in wanted
        }

    def sample(
        self,
        conditioning: Mapping[str, Array],
        *,
        budget: int | str,
        seed: int | Sequence[int] = 0,
        latents: Array | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        max_sequence_length: int | None = None,
        progress: Callback | None = None,
        timer: Timer | None = None,
    ) -> Float32:
        """Final latents, float32 (n, *latents.shape at the request's size), from conditioning tensors.

        conditioning: an array (g, n, …) for each of `manifest.conditioning` with a batch, as `encode` gives it; the
        others in the manifest's shape. latents: noise (n, *latents.shape) to use instead of the seed's, before it is
        scaled for the sampler. Raises RequestError.
        """
        watched = progress is not None or timer is not None
        size = _size(height, width, num_frames, max_sequence_length)
        return self._sample(
            conditioning, budget, seed, latents, guidance_scale, size, progress, timer or Timer(), watched=watched
        )

    def decode(
        self,
        latents: Array,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        timer: Timer | None = None,
    ) -> Float32:
        """Pictures, float32 (n, [frames,] height, width, 3) in [0, 1], from latents (n, *latents.shape at that size)."""
        return self._decode(latents, _size(height, width, num_frames, None), timer or Timer())

    def _decode(self, latents: Array, size: Given, timer: Timer) -> Float32:
        manifest = self._sizes.manifest(size)
        stage = _stage(manifest, "decoder", "decode the latents of `sample` elsewhere")
        layout = manifest.latents
        latents = _check_latents(latents, layout.shape)
        if layout.decoded_as == "noise":
            latents = as_noise(latents, layout).reshape(-1, *stage.inputs[0].shape[1:])
        with timer.part("decode"):
            decoded = self._run(stage, {stage.inputs[0].name: latents}, timer)[stage.outputs[0].name]
            if decoded.ndim == 4 and decoded.shape[1] == 3 and decoded.shape[3] != 3:
                decoded = decoded.transpose(0, 2, 3, 1)
            return np.ascontiguousarray(np.clip(decoded, 0.0, 1.0), np.float32)

    def budget_for(self, *, latency_s: float) -> str:
        """The largest budget that was measured to make a picture within `latency_s`.

        Takes the median of this sampler's own single pictures, without the time they waited for others, else the
        artifact's measurements. Raises RequestError if nothing was measured or nothing fits.
        """
        if isinstance(latency_s, bool) or not isinstance(latency_s, int | float) or not latency_s > 0:
            raise RequestError(f"latency_s is {one_line(repr(latency_s), 40)}: expected seconds above 0")
        measured = {budget: found for budget in self.budgets if (found := self._latency(budget)) is not None}
        if not measured:
            raise RequestError("no budget has a measured latency yet: make one picture with each budget first")
        fitting = [budget for budget in self.budgets if measured.get(budget, math.inf) <= latency_s]
        if not fitting:
            fastest = min(measured, key=lambda budget: measured[budget])
            raise RequestError(
                f"latency_s is {latency_s}: expected at least {measured[fastest]:.3g}, "
                f"which budget {fastest} takes: allow more time, or serve on a faster host"
            )
        return fitting[-1]

    def close(self) -> None:
        """Free engines and tokenizers, once the request that is running has ended. Calls after it raise RequestError."""
        with self._lock:
            if self._denoise is not None:
                self._denoise.close()
            for engine in self._engines.values():
                engine.close()
            self._denoise = None
            self._engines = {}
            self._tokenizers = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _device(self, timer: Timer) -> Iterator[None]:
        """The device for one caller at a time, and the engines there."""
        with timer.part("wait"):
            self._lock.acquire()
        try:
            if not self._engines:
                raise _closed()
            yield
        finally:
            self._lock.release()

    def _program(self, budget: object, manifest: Manifest) -> BudgetProgram:
        found = manifest.program(budget) if _is_int(budget) or isinstance(budget, str) else None  # type: ignore[arg-type]
        if found is None:
            raise RequestError(
                f"budget is {one_line(repr(budget), 40)}: expected one of {', '.join(manifest.budgets)}: "
                "choose one, or compile the artifact for it"
            )
        return found

    def _guidance_weights(self, scale: float | None) -> tuple[float, ...]:
        guidance = self.manifest.guidance
        if scale is None:
            return guidance.weights(guidance.scale)
        if guidance.kind == "none":
            raise RequestError("guidance_scale is given, but this artifact has no guidance to scale: leave it out")
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if not is_number or not guidance.minimum <= scale <= guidance.maximum:
            raise RequestError(
                f"guidance_scale is {one_line(repr(scale), 40)}: expected {guidance.minimum:g} to "
                f"{guidance.maximum:g}, which it was calibrated for: compile with a wider --guidance-scale"
            )
        return guidance.weights(float(scale))

    def _check_negative(self, negative_prompt: str | list[str] | None, n: int) -> None:
        if negative_prompt is None:
            return
        if self.manifest.guidance.branches != 2:
            raise RequestError("negative_prompt is given, but this artifact has no guidance to use it: leave it out")
        texts = check_prompts(negative_prompt, "negative_prompt")
        if not isinstance(negative_prompt, str) and len(texts) != n:
            raise RequestError(f"negative_prompt has {len(texts)} texts: expected one, or {n} as the prompts")

    def _negative(self, negative_prompt: str | list[str] | None, n: int) -> list[str]:
        if negative_prompt is None:
            return [self.manifest.guidance.negative_prompt or ""] * n
        return [negative_prompt] * n if isinstance(negative_prompt, str) else list(negative_prompt)

    def _count(
        self, manifest: Manifest, conditioning: Mapping[str, Array], seed: int | Sequence[int], latents: Array | None
    ) -> int:
        """Number of samples, after every conditioning tensor has been checked."""
        if not isinstance(conditioning, Mapping):
            raise RequestError(f"conditioning is a {type(conditioning).__name__}: expected a dict of arrays")
        wanted = {tensor.name: tensor for tensor in manifest.conditioning}
        if set(conditioning) != set(wanted):
            have = one_line(sorted(map(str, conditioning)))
            raise RequestError(f"conditioning holds {have}: expected exactly {sorted(wanted)}")
        branches = manifest.guidance.branches
        batched = [name for name, tensor in wanted.items() if tensor.shape[:1] == ("batch",)]
        given = np.shape(conditioning[batched[0]])[1:2] if batched else () if latents is None else np.shape(latents)[:1]
        n = given[0] if given else len(seed) if isinstance(seed, Sequence) else 1
        for name, tensor in wanted.items():
            _check_conditioning(tensor, conditioning[name], branches, n)
        if n < 1:
            raise RequestError("conditioning holds 0 samples: expected at least one")
        _check_seed(seed, n)
        if latents is not None and len(_check_latents(latents, manifest.latents.shape)) != n:
            raise RequestError(f"latents hold {len(latents)} samples: expected {n} as the conditioning")
        return n

    @staticmethod
    def _initial_latents(layout: Latents, seed: int | Sequence[int], latents: Array | None, n: int) -> Float32:
        if latents is None:
            drawn = noise(layout.noise_shape, seed, n).reshape(n, *layout.split)
            drawn = drawn.transpose(0, *(axis + 1 for axis in layout.permutation))
        else:
            drawn = np.asarray(latents, np.float32)
        return np.float32(layout.initial_scale) * drawn.reshape(n, *layout.shape)

    def _sample(
        self,
        conditioning: Mapping[str, Array],
        budget: int | str,
        seed: int | Sequence[int],
        latents: Array | None,
        guidance_scale: float | None,
        size: Given,
        progress: Callback | None,
        timer: Timer,
        *,
        watched: bool,
    ) -> Float32:
        """As `sample`. watched: somebody looks at single steps."""
        manifest = self._sizes.manifest(size)
        program = self._program(budget, manifest).program
        weights = self._guidance_weights(guidance_scale)
        n = self._count(manifest, conditioning, seed, latents)
        held = {**conditioning, **self._sizes.constants(size)}
        self._backend.check(n, manifest)

        def step_done(done: int, total: int) -> None:
            step = program.steps[done - 1]
            timer.end_step(step.step_index, step.compute)
            if progress is not None:
                progress(done, total)

        try:
            request = Request(
                manifest=manifest,
                budget=str(budget),
                program=program,
                latents=self._initial_latents(manifest.latents, seed, latents, n),
                held=held,
                guidance_weights=weights,
                timer=timer,
                step_done=step_done,
                watched=watched,
            )
            with self._device(timer):
                if self._denoise is None:
                    raise _closed()
                return self._denoise(request)
        except MemoryError:
            raise HostError(f"no memory for {n} samples at once: ask for fewer, or use a larger host") from None

    def _run(self, stage: Stage, inputs: Mapping[str, Array], timer: Timer) -> dict[str, Array]:
        with self._device(timer):
            return run_stage(stage, self._engines[stage.name], self._backend, inputs, timer)

    def _latency(self, budget: str) -> float | None:
        with self._latencies_lock:
            own = list(self._latencies.get(budget, ()))
        if own:
            return statistics.median(own)
        stated = [m.value for m in self.manifest.measurements if m.name == LATENCY + budget]
        return stated[-1] if stated else None


def as_noise(latents: Array, layout: Latents) -> Array:
    """Latents (n, *shape) back in the order in which their noise was drawn: (n, elements)."""
    order = layout.permutation
    packed = latents.reshape(-1, *(layout.split[axis] for axis in order))
    inverse = [order.index(axis) + 1 for axis in range(len(order))]
    return packed.transpose(0, *inverse).reshape(len(latents), -1)


def _size(height: int | None, width: int | None, num_frames: int | None, max_sequence_length: int | None) -> Given:
    return {"height": height, "width": width, "num_frames": num_frames, "max_sequence_length": max_sequence_length}


def _stage(manifest: Manifest, kind: str, instead: str) -> Stage:
    stage = manifest.stage(kind)
    if stage is None:
        raise RequestError(f"this artifact has no {kind.replace('_', ' ')} at this size: {instead}")
    return stage


def _closed() -> RequestError:
    return RequestError("this sampler is closed: load it again")


def _is_int(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_seed(seed: Any, n: int) -> None:
    seeds = seed if isinstance(seed, list | tuple) else [seed]
    for one in seeds:
        if not _is_int(one) or not SEED_MINIMUM <= one <= SEED_MAXIMUM:
            raise RequestError(
                f"seed is {one_line(repr(one), 40)}: expected a whole number in [-2**63, 2**64), as in torch"
            )
    if isinstance(seed, list | tuple) and len(seeds) != n:
        raise RequestError(f"seed is a list of {len(seeds)}: expected one number, or {n} for {n} pictures")


def _check_latents(latents: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.asarray(latents)
    if array.shape[1:] != shape or array.ndim != len(shape) + 1 or not len(array) or array.dtype.kind != "f":
        raise RequestError(
            f"latents are {array.dtype} {array.shape}: expected float32 (n, {', '.join(map(str, shape))})"
        )
    return array


def _check_conditioning(tensor: TensorInfo, value: Any, branches: int, n: int) -> None:
    array = np.asarray(value)
    expected: tuple[Any, ...] = tensor.shape
    if tensor.shape[:1] == ("batch",):
        expected = (branches, n, *tensor.shape[1:])
    if array.shape != expected or array.dtype.kind not in "fiub":
        raise RequestError(
            f"conditioning {tensor.name} is {array.dtype} {array.shape}: expected {tensor.dtype} {expected}"
        )
