"""For vLLM-Omni, whose diffusion pipelines take a scheduler by name.

    AsyncOmni(model="Qwen/Qwen-Image", diffusion_scheduler="otcache",
              diffusion_scheduler_kwargs={"artifact": "artifacts/qwen-image", "budget": 8})

It asks for `from_pretrained(MODEL, subfolder="scheduler", …)`, `set_timesteps` with named `sigmas` and `timesteps`,
`set_begin_index`, `step(output, time, latents, return_dict=False, generator=…)`, `config.num_train_timesteps`, and
makes a deep copy for each request (its scheduler injection, RFC 6269). It finds this class by the entry point
`vllm_omni.schedulers`. Guidance is applied before `step` and is not seen here: requests keep to the artifact's range.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from diffusers import SchedulerMixin

from otcache.schemas.errors import ModelError, UsageError

from ..models.digests import own_options
from .recipe import recipe_from_artifact
from .scheduler import OTCacheScheduler


class OmniScheduler(OTCacheScheduler):
    """One budget of an artifact as the scheduler of an engine."""

    @classmethod
    def from_pretrained(  # type: ignore[override]  # the engine's own arguments by name
        cls,
        model: str | Path,
        subfolder: str | None = None,
        *,
        artifact: str | Path | None = None,
        budget: int | str | None = None,
        strict: bool = False,
        **loading: Any,
    ) -> Self:
        """The scheduler of a budget, in the place of a model's own.

        Args:
            model: folder or hub id of the pipeline that is served.
            subfolder: of its scheduler.
            artifact: its folder; needed.
            budget: one that it has; needed.
            strict: refuse requests with another number of steps. By default the program runs as it is, with a warning:
                engines warm up with a step or two, and clients may leave the number out.
            loading: what diffusers' own `from_pretrained` takes, such as `local_files_only` and `revision`.

        Raises UsageError without an artifact or budget, ArtifactError, RequestError, and ModelError for a model whose
        scheduler is another than the one that was compiled.
        """
        if artifact is None or budget is None:
            raise UsageError(
                f"{cls.__name__} is not told what to run (artifact is {artifact!r}, budget {budget!r}): expected both: "
                'give diffusion_scheduler_kwargs={"artifact": FOLDER, "budget": 8}'
            )
        scheduler = cls(recipe=recipe_from_artifact(artifact, budget).model_dump(mode="json"), strict=strict)
        scheduler._check_source(str(model), cls.load_config(model, subfolder=subfolder, **loading))
        return scheduler

    def _check_source(self, model: str, config: dict[str, Any]) -> None:
        """Raise ModelError where the model's own scheduler is not the one that was compiled."""
        kind, expected = type(self._source), own_options(self._source)
        found = {}
        if config.get("_class_name") == kind.__name__ and issubclass(kind, SchedulerMixin):
            found = own_options(kind.from_config(config))
        if found != expected:
            different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            raise ModelError(
                f"{model} has the scheduler {config.get('_class_name')}, another than was compiled (it differs in "
                f"{', '.join(different[:4])}): expected {kind.__name__} as {self._recipe} has it: take that model's "
                "artifact, or compile this one"
            )
