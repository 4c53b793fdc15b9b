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

from otcache.schemas.arithmetic import noise_from_latents
from otcache.schemas.errors import HostError, RequestError, UsageError
from otcache.schemas.manifest import Manifest, Stage
from otcache.schemas.messages import one_line

from ..artifact.reader import Artifact
from ..engines.choose import Selection, select_backend
from ..loop.backend import MOST_THREADS, Array, Denoiser, Engine, Options, Run
from ..loop.finite import check_output, spoilt_run_error
from ..loop.host_loop import check_trunk, run_stage
from ..loop.loop import Callback, Float32
from ..loop.timing import Timer
from .quality import budget_of_quality, budget_of_target, target_from_figures
from .request import MOST_SAMPLES, Request, Texts, check_latents, is_whole, noise_of, parse_request, parse_texts
from .request_size import Given, Sizes
from .tokenizers import Tokenizers

LATENCY = "latency_s/"
"""Measurements of the manifest with this prefix say how long one picture takes at the budget that follows."""
_HISTORY = 64
"""Latencies remembered for each budget."""
_ENCODER = ("text_encoder", "give `sample` its conditioning instead")
_DECODER = ("decoder", "decode the latents of `sample` elsewhere")
"""A kind of stage, and what to do where an artifact has none."""


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
        if threads is not None and not (is_whole(threads) and 1 <= threads <= MOST_THREADS):
            raise UsageError(f"threads is {threads!r}: expected a whole number of at least 1, at most {MOST_THREADS}")
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
        request = self.request(
            prompt,
            budget=budget,
            negative_prompt=negative_prompt,
            seed=seed,
            images_per_prompt=images_per_prompt,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            num_frames=num_frames,
            max_sequence_length=max_sequence_length,
        )
        return self.draw(request, progress=progress, timer=timer)

    def draw(self, request: Request, *, progress: Callback | None = None, timer: Timer | None = None) -> Float32:
        """The pictures of a request that `request` has made, as those that calling the sampler gives."""
        watched = progress is not None or timer is not None
        timer = timer or Timer()
        self._backend.check(request.samples, request.manifest)
        conditioning = request.conditioning
        if request.texts:
            conditioning = self._encode(request.manifest, request.texts, request.samples, timer)
        latents = self._sample(request, conditioning, progress, timer, watched=watched)
        pictures = self._decode(request.manifest, latents, timer)
        if request.samples == 1 and request.manifest.conditions == self.manifest.conditions:
            with self._latencies_lock:
                self._latencies.setdefault(request.budget, deque(maxlen=_HISTORY)).append(timer.timing().latency_s)
        return pictures

    def request(
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
        most_samples: int = MOST_SAMPLES,
    ) -> Request:
        """The request that these arguments make, for `draw`; costs next to nothing.

        They are as for calling the sampler. most_samples: pictures that it may be for. Raises RequestError for what the
        artifact, or the plans that were loaded of it, do not serve.
        """
        request = parse_request(
            self._sizes,
            prompt=prompt,
            budget=budget,
            negative_prompt=negative_prompt,
            seed=seed,
            images_per_prompt=images_per_prompt,
            guidance_scale=guidance_scale,
            size=_size(height, width, num_frames, max_sequence_length),
            most_samples=most_samples,
        )
        self._backend.check(request.samples, request.manifest)
        return request

    def can_hold(self, samples: int, request: Request) -> bool:
        """Whether the plans that were loaded take as many samples at once, at a request's size."""
        try:
            self._backend.check(samples, request.manifest)
        except RequestError:
            return False
        return True

    def check(self, prompt: str | list[str], *, budget: int | str, **options: Any) -> int:
        """How many pictures a request with these arguments makes, as for `request`. Raises RequestError."""
        return self.request(prompt, budget=budget, **options).samples

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
        manifest = self._sizes.at({"max_sequence_length": max_sequence_length}).manifest
        _stage(manifest, *_ENCODER)
        texts = parse_texts(prompt, negative_prompt, manifest.guidance)
        return self._encode(manifest, texts, len(texts[-1]), timer or Timer())

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
        request = parse_request(
            self._sizes,
            conditioning=conditioning,
            latents=latents,
            budget=budget,
            seed=seed,
            guidance_scale=guidance_scale,
            size=_size(height, width, num_frames, max_sequence_length),
        )
        self._backend.check(request.samples, request.manifest)
        return self._sample(request, request.conditioning, progress, timer or Timer(), watched=watched)

    def decode(
        self,
        latents: Array,
        *,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        timer: Timer | None = None,
    ) -> Float32:
        """Pictures, float32 (n, [frames,] height, width, 3) in [0, 1], from latents (n, *latents.shape at that size).

        Raises RequestError where the artifact has no decoder or the latents have another shape.
        """
        manifest = self._sizes.at(_size(height, width, num_frames, None)).manifest
        _stage(manifest, *_DECODER)
        return self._decode(manifest, check_latents(latents, manifest.latents.shape), timer or Timer())

    def budget_for(
        self,
        *,
        latency_s: float | None = None,
        psnr_db: float | None = None,
        ssim: float | None = None,
        worst: bool = False,
        quality: str | None = None,
    ) -> str:
        """The budget for a latency, or for a quality.

        latency_s: the largest budget that was measured to make a picture within it. Takes the median of this sampler's
        own single pictures, without the time they waited for others, else the artifact's measurements.
        psnr_db, ssim: the smallest budget whose mean over held-out prompts was measured to be at least that, of both
        where both are given; with `worst` that of the worst prompt; `full` where no smaller one was. quality: the same
        of a tier (draft, good, high, best) or a text such as `psnr>=35`. Raises RequestError if nothing was measured or
        nothing fits.
        """
        figures = psnr_db is not None or ssim is not None
        if (latency_s is not None) + figures + (quality is not None) != 1:
            raise RequestError("budget_for: expected either latency_s, or psnr_db and ssim, or quality")
        if quality is not None:
            return budget_of_quality(self.manifest, quality)
        if latency_s is None:
            target = target_from_figures(psnr_db=psnr_db, ssim=ssim, worst=worst)
            return budget_of_target(self.manifest, target)
        return self._budget_within(latency_s)

    def _budget_within(self, latency_s: float) -> str:
        """The largest budget that takes at most so long."""
        if isinstance(latency_s, bool) or not isinstance(latency_s, int | float) or not latency_s > 0:
            raise RequestError(f"latency_s is {one_line(repr(latency_s), 40)}: expected seconds above 0")
        measured = {budget: found for budget in self.budgets if (found := self._latency(budget)) is not None}
        if not measured:
            raise RequestError("no budget has a measured latency yet: make one picture with each budget first")
        fitting = [budget for budget in self.budgets if measured.get(budget, math.inf) <= latency_s]
        if not fitting:
            fastest = min(measured, key=lambda budget: measured[budget])
            raise RequestError(
                f"latency_s is {latency_s}: expected at least {measured[fastest]:.3g}, which budget {fastest} takes: "
                "allow more time, or serve on a faster host"
            )
        return fitting[-1]

    def close(self) -> None:
        """Free engines and tokenizers, once the request that is running has ended.

        Calls after it raise RequestError.
        """
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
                raise _closed_error()
            yield
        finally:
            self._lock.release()

    def _encode(self, manifest: Manifest, texts: Texts, samples: int, timer: Timer) -> dict[str, Array]:
        """Outputs (g, samples, …) of the text encoder for texts (g, prompts), zeros for None, repeated side by side."""
        stage = _stage(manifest, *_ENCODER)
        unique = list(dict.fromkeys(text for branch in texts for text in branch if text is not None))
        tokenizers = self._tokenizers
        if tokenizers is None:
            raise _closed_error()
        with timer.part("encode"):
            lengths = {entry.input_name: entry.length for entry in manifest.tokenizers}
            encoded = self._run(stage, tokenizers(unique, lengths), timer)
        for array in encoded.values():
            check_output(array, stage.name, manifest)
        repeats = samples // len(texts[0])
        places = {text: place for place, text in enumerate((*unique, None))}
        rows = [[places[text] for text in branch for _ in range(repeats)] for branch in texts]
        wanted = {tensor.name for tensor in manifest.conditioning}
        zeros = any(None in branch for branch in texts)
        return {
            name: (np.concatenate([array, np.zeros_like(array[:1])]) if zeros else array)[rows]
            for name, array in encoded.items()
            if name in wanted
        }

    def _sample(
        self,
        request: Request,
        conditioning: Mapping[str, Array],
        progress: Callback | None,
        timer: Timer,
        *,
        watched: bool,
    ) -> Float32:
        """The final latents. watched: somebody looks at single steps."""
        steps = request.program.steps

        def step_done(done: int, total: int) -> None:
            timer.end_step(steps[done - 1].step_index, steps[done - 1].compute)
            if progress is not None:
                progress(done, total)

        try:
            run = Run(
                manifest=request.manifest,
                budget=request.budget,
                program=request.program,
                latents=_initial_latents(request),
                inputs={**conditioning, **request.constants},
                guidance_weights=request.guidance_weights,
                timer=timer,
                step_done=step_done,
                watched=watched,
            )
            with self._device(timer):
                if self._denoise is None:
                    raise _closed_error()
                latents: Float32 = self._denoise(run)
                if not np.isfinite(latents).all():
                    raise spoilt_run_error(run, self._denoise.origin_of_spoilt(run))
                return latents
        except MemoryError:
            raise HostError(
                f"no memory for {request.samples} samples at once: ask for fewer, or use a larger host"
            ) from None

    def _decode(self, manifest: Manifest, latents: Array, timer: Timer) -> Float32:
        stage, layout = _stage(manifest, *_DECODER), manifest.latents
        if layout.decoded_as == "noise":
            latents = noise_from_latents(latents, layout.split, layout.permutation)
            latents = latents.reshape(-1, *stage.inputs[0].shape[1:])
        with timer.part("decode"):
            decoded = self._run(stage, {stage.inputs[0].name: latents}, timer)[stage.outputs[0].name]
            check_output(decoded, stage.name, manifest)
            if decoded.ndim == 4 and decoded.shape[1] == 3 and decoded.shape[3] != 3:
                decoded = decoded.transpose(0, 2, 3, 1)
            return np.ascontiguousarray(np.clip(decoded, 0.0, 1.0), np.float32)

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


def _initial_latents(request: Request) -> Float32:
    """Noise in the order and scale of the sampler, float32 (n, *latents.shape)."""
    scaled: Float32 = np.float32(request.manifest.latents.initial_scale) * noise_of(request)
    return scaled


def _size(height: int | None, width: int | None, num_frames: int | None, max_sequence_length: int | None) -> Given:
    return {"height": height, "width": width, "num_frames": num_frames, "max_sequence_length": max_sequence_length}


def _stage(manifest: Manifest, kind: str, instead: str) -> Stage:
    stage = manifest.stage(kind)
    if stage is None:
        raise RequestError(f"this artifact has no {kind.replace('_', ' ')} at this size: {instead}")
    return stage


def _closed_error() -> RequestError:
    return RequestError("this sampler is closed: load it again")
