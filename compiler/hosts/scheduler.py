"""`OTCacheScheduler`: a program of outputs as a diffusers scheduler.

Consumes an artifact's manifest; no engine is read. Set on a pipeline, it gives out the B times of a budget instead of
all T, and its `step` applies the program's coefficients to the outputs so far: the loop of `otcache.runtime.loop.loop`,
with the pipeline as the model.

    x ← latent_coef · x + Σ_m output_coefs_m · v_m         v the guided outputs of this request, newest last

What a program holds for is refused as soon as it can be known, or warned about with `strict=False`:

    from_artifact    a budget that the artifact does not hold, another payload
    check(pipeline)  another transformer (class, options, weights, LoRA), another scheduler than was compiled
    set_timesteps    another number of steps, times or noise levels of the user's own;
                     after `check`: a transformer that has changed since
    the first step   a start in the middle (img2img with strength < 1); a size that the artifact does not serve
    every step       noise by `eta`; after `check`: guidance outside of the calibrated range

Shapes: B steps, latents (n, …) of any dtype; sums are in float32 and go back to the latents' dtype.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from pydantic import ValidationError
from torch import Tensor
from typing_extensions import Self

from otcache.schemas.errors import ArtifactError, ModelError, OTCacheError, RequestError
from otcache.schemas.program import Payload, Program, Step

from ..programs.update import apply_step
from .calls import calling_pipeline_call
from .guidance import GuidanceProbe, guidance_fault
from .identify import ModelState, model_faults, model_state
from .recipe import Recipe, recipe_from_artifact
from .refusal import refuse
from .sources import full_timeline, noise_levels, source_scheduler, times_tensor


class OTCacheScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """A drop-in scheduler that runs one budget of an artifact. One pipeline at a time, as all of diffusers' schedulers.

    `config` holds the recipe and, for pipelines that look there, the options of the scheduler that was compiled.
    """

    order = 1
    """Model evaluations per step."""
    timesteps: Tensor
    """(B,) of the program."""
    sigmas: Tensor | None
    """Noise levels float32 (B + 1,) at the times and after the last one, where they are known."""
    payloads: tuple[Payload, ...] = ("output", "adaptive", "banded")
    """Of the programs that it runs."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, recipe: dict[str, Any], strict: bool = True) -> None:
        """recipe: JSON value of a `Recipe`. strict: refuse what the program was not calibrated for, rather than
        warn.
        """
        try:
            self._recipe = Recipe.model_validate(recipe)
        except ValidationError as error:
            raise ArtifactError(
                f"{type(self).__name__}: its configuration is no recipe ({error.errors()[0]['msg']}): make it from an "
                "artifact"
            ) from None
        self._check_payload()
        self._source = source_scheduler(self._recipe.sampler)
        self._timeline = full_timeline(self._source, self._recipe.sampler.num_inference_steps)
        self._take_program(self._recipe.program)
        self.init_noise_sigma = self._recipe.initial_scale
        self.num_inference_steps: int | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._outputs: list[Tensor] = []
        self._pipeline: Callable[[], Any] = _nothing
        self._checked: ModelState | None = None
        self._probe: GuidanceProbe | None = None
        self._warned = False
        """Of this request's guidance."""

    @classmethod
    def from_artifact(cls, folder: str | Path, budget: int | str, *, strict: bool = True, pipeline: Any = None) -> Self:
        """The scheduler of one budget of an artifact.

        pipeline: `check` it as well. Raises ArtifactError, RequestError, ModelError.
        """
        scheduler = cls(recipe=recipe_from_artifact(folder, budget).model_dump(mode="json"), strict=strict)
        if pipeline is not None:
            scheduler.check(pipeline)
        return scheduler

    def check(self, pipeline: Any) -> None:
        """Compare a pipeline's transformer with the one that was compiled; and from now on, in every request, whether
        it has changed, and at every step its guidance.

        Reads all weights once: seconds per gigabyte. Raises ModelError.
        """
        for fault in model_faults(pipeline, self._recipe, self._source):
            self._refuse(fault)
        self._pipeline, self._checked = weakref.ref(pipeline), model_state(pipeline)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Leaves out the compiled scheduler's options, which `config` shows beside this class's own."""
        own = {key: value for key, value in config_dict.items() if key in ("recipe", "strict") or key.startswith("_")}
        return super().extract_init_dict(own, **kwargs)

    @property
    def config(self) -> Any:
        return FrozenDict({**self._source.config, **self._internal_dict})

    @property
    def step_index(self) -> int | None:
        """Steps that the running request has taken; None before its first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        if begin_index != 0:
            self._refuse(self._late_start(begin_index))
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Begin a request.

        Pipelines may pass times, noise levels and shift as they do to the scheduler that was compiled: the program has
        its own, so that only their number counts. What the user has given is refused unless it is the program's own.
        The program is that of the size that the pipeline was asked for, where the artifact has others. Raises
        RequestError.
        """
        call = calling_pipeline_call()
        self._take_program(self._recipe.program_at({} if call is None else call.values))
        self._check_own_times(mu, timesteps=timesteps, sigmas=sigmas)
        given = next((len(each) for each in (timesteps, sigmas) if each is not None), num_inference_steps)
        if given != len(self._steps):
            self._refuse(
                RequestError(
                    f"num_inference_steps is {given}: expected {len(self._steps)}, the evaluations of {self._recipe} "
                    f"(compiled from {self._recipe.sampler.num_inference_steps} steps): pass that, or take another "
                    "budget"
                )
            )
        self.num_inference_steps = len(self._steps)
        self.timesteps = self.timesteps.to(device=device)
        self._begin_request()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents as the model reads them at the current step."""
        scale = self._steps[self._step_index or self._begin_index or 0].input_scale
        return sample if scale == 1.0 else scale * sample

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        return_dict: bool = True,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The latents (n, …) after one more step. Raises RequestError.

        eta, generator: how much noise to add and where it comes from, which pipelines pass to schedulers that know
        them: none is.
        """
        if self._step_index is None:
            self._step_index = self._first_step(timestep, sample)
            if eta and "eta" in inspect.signature(self._source.step).parameters:
                self._refuse(
                    RequestError(
                        f"eta is {eta:g}: expected 0, as {self._recipe} was compiled without noise: leave it out"
                    )
                )
        if self._step_index >= len(self._steps):
            raise RequestError(
                f"{self._recipe} has taken all of its {len(self._steps)} steps: call set_timesteps first"
            )
        self._check_guidance(model_output)
        step = self._steps[self._step_index]
        self._outputs = [*self._outputs, model_output][-self._program.output_memory :]
        result = apply_step(step, sample.float(), self._outputs).to(sample.dtype)
        self._step_index += 1
        if self._step_index == len(self._steps):
            self._end_request()
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    @property
    def add_noise(self) -> Callable[..., Tensor]:
        """As the scheduler that was compiled, where it has it."""
        return self._of_source("add_noise")

    @property
    def scale_noise(self) -> Callable[..., Tensor]:
        """As the scheduler that was compiled, where it has it."""
        return self._of_source("scale_noise")

    def __len__(self) -> int:
        return int(self._source.config.num_train_timesteps)

    @property
    def _steps(self) -> tuple[Step, ...]:
        return self._program.steps

    def _take_program(self, program: Program) -> None:
        """Run this program from now on."""
        self._program = program
        self.timesteps = times_tensor(self._timeline, program.steps, self._source)
        self.sigmas = noise_levels(self._timeline, program.steps, self._source)

    def _begin_request(self) -> None:
        """Forget the request before, and listen to the pipeline's guidance where it is known."""
        self._end_request()
        self._step_index = self._begin_index = None
        pipeline = self._pipeline()
        if pipeline is not None:
            if self._checked is None or not model_state(pipeline).is_still(self._checked):
                self.check(pipeline)
            self._probe, self._warned = GuidanceProbe(pipeline), False

    def _end_request(self) -> None:
        self._outputs = []
        if self._probe is not None:
            self._probe.close()
            self._probe = None

    def _check_own_times(self, mu: float | None, **passed: Sequence[float] | None) -> None:
        """Refuse times and noise levels that the user has chosen, unless the compiled sampler makes the program's of
        them.

        Within a pipeline the user's are those of its call, as what it passes on may be its own default. Outside of one
        the default that pipelines of flow matching have, evenly spaced levels, is taken for such.
        """
        call = calling_pipeline_call()
        for name, values in passed.items():
            chosen = values if call is None else call.given.get(name)
            if chosen is None or len(chosen) != len(self._steps):
                continue  # another number is refused as such
            default = np.linspace(1.0, 1.0 / len(chosen), len(chosen))
            if call is None and name == "sigmas" and np.allclose([float(each) for each in chosen], default, atol=1e-4):
                continue
            if not self._makes_own_times(name, chosen, mu):
                self._refuse(
                    RequestError(
                        f"{name} is {_first_few(chosen)}: expected none, as {self._recipe} has times of its own "
                        f"({_first_few(self.timesteps)}), which its coefficients are for: leave it out"
                    )
                )

    def _makes_own_times(self, name: str, chosen: Sequence[float], mu: float | None) -> bool:
        """Whether the compiled sampler would run at the program's times if it were given these times or noise
        levels.
        """
        source = copy.deepcopy(self._source)
        values = [int(each) if name == "timesteps" and float(each).is_integer() else float(each) for each in chosen]
        try:
            source.set_timesteps(**{name: values}, **({} if mu is None else {"mu": mu}))
        except (TypeError, ValueError, AttributeError):
            return False
        times = source.timesteps
        return len(times) == len(self.timesteps) and torch.allclose(times.double().cpu(), self.timesteps.double().cpu())

    def _check_payload(self) -> None:
        if self._recipe.program.payload not in self.payloads:
            expected = " or ".join(repr(payload) for payload in self.payloads)
            raise RequestError(
                f"{self._recipe} has payload {self._recipe.program.payload!r}: expected {expected} here: use "
                "apply_residual_cache for residuals and OTCacheScheduler for outputs"
            )

    def _of_source(self, name: str) -> Callable[..., Tensor]:
        """A method of the source that reads times, noise levels and place of this scheduler."""
        source = self._source
        method: Callable[..., Tensor] = getattr(source, name)
        if self.sigmas is None and hasattr(source, "sigmas"):
            raise ModelError(
                f"{type(source).__name__} adds noise by levels that the times of {self._recipe} do not tell: expected "
                "one of known times: give latents rather than an image"
            )
        source.timesteps, source.sigmas = self.timesteps, self.sigmas
        source._step_index, source._begin_index = self._step_index, self._begin_index
        return method

    def _first_step(self, timestep: Any, sample: Tensor) -> int:
        """Where the request starts, after what the first latents tell was checked."""
        if not self._recipe.takes(tuple(sample.shape[1:]), self._program):
            self._refuse(
                RequestError(
                    f"latents are {tuple(sample.shape)}: expected {self._recipe.served}, the size that "
                    f"{self._recipe} was calibrated for: ask for that size, or compile for this one"
                )
            )
        if self._begin_index is not None:
            return self._begin_index
        place = int((self.timesteps.double().cpu() - float(timestep)).abs().argmin())
        if place:
            self._refuse(self._late_start(place))
        return place

    def _late_start(self, place: int) -> RequestError:
        return RequestError(
            f"the request starts at step {place} of {len(self._steps)}: expected the first, where {self._recipe} was "
            "calibrated from: use strength = 1"
        )

    def _check_guidance(self, model_output: Tensor) -> None:
        if self._probe is None:
            return
        seen = self._probe.take()
        if (
            seen
            and not self._warned
            and (fault := guidance_fault(seen, model_output, self._recipe, self._step_index or 0))
        ):
            self._warned = True
            self._refuse(fault)

    def _refuse(self, error: OTCacheError) -> None:
        refuse(error, strict=self._internal_dict["strict"])


def _first_few(values: Sequence[float] | Tensor) -> str:
    """The first of some numbers, in words."""
    return f"[{', '.join(f'{float(value):.4g}' for value in values[:4])}{', …' if len(values) > 4 else ''}]"


def _nothing() -> None:
    """In place of a pipeline that is not known."""
