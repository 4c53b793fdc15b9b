"""One request through the queue: submitted, awaited, encoded; cancelled when its client hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from ..loop.timing import Timing
from ..pictures import encoded
from ..serving.service import PictureFuture, Service
from .fields import Generation, PictureQuery, budget_of_quality, size_of
from .metrics import Metrics
from .refusals import Refusal

PICTURE_KINDS = ("png", "jpeg", "webp")
VIDEO_KINDS = ("gif",)
Submit = Callable[[dict[str, Any]], Awaitable[PictureFuture]]
"""The arguments of `Service.submit` → what it returns; raises what it raises."""


@dataclass(frozen=True)
class Drawn:
    """What is answered."""

    files: list[bytes]
    kind: str
    """`png`, `jpeg`, `webp` or `gif`."""
    size: tuple[int, int]
    """(width, height) of a picture."""
    budget: str
    """That was served."""
    timing: Timing

    @property
    def media_type(self) -> str:
        return f"image/{self.kind}"

    @property
    def headers(self) -> dict[str, str]:
        """`X-Budget`, and `Server-Timing` in milliseconds."""
        waited_ms, drawing_ms = 1e3 * self.timing.parts["wait"], 1e3 * self.timing.latency_s
        return {"X-Budget": self.budget, "Server-Timing": f"queue;dur={waited_ms:.1f}, draw;dur={drawing_ms:.1f}"}


def options_of(asked: PictureQuery | Generation, service: Service) -> dict[str, Any]:
    """The arguments of `Service.submit` that a request makes. Raises Refusal for a model that is another one."""
    common = {
        "prompt": asked.prompt,
        "negative_prompt": asked.negative_prompt,
        "budget": asked.budget,
        "minimum_budget": asked.minimum_budget,
        "seed": asked.seed,
        "guidance_scale": asked.guidance_scale,
    }
    if isinstance(asked, PictureQuery):
        return {**common, "height": asked.height, "width": asked.width}
    own = service.sampler.manifest.model.name
    if asked.model not in (None, own):
        raise Refusal(f"model is {asked.model!r}: expected {own!r}, which this server has, or none", 404, "model")
    common["budget"] = asked.budget or budget_of_quality(asked.quality, service.sampler.budgets)
    return {**common, "images_per_prompt": asked.n, **size_of(asked.size)}


def kind_of(asked: PictureQuery | Generation, service: Service) -> str:
    """The format that is answered. Raises Refusal for one that this artifact's pictures or videos do not have."""
    frames = service.sampler.manifest.conditions.num_frames
    kinds = PICTURE_KINDS if frames is None else VIDEO_KINDS
    if asked.output_format not in (None, *kinds):
        what = "draws pictures" if frames is None else "draws videos"
        raise Refusal(
            f"output_format is {asked.output_format}: expected {' or '.join(kinds)}: the artifact {what}",
            parameter="output_format",
        )
    return asked.output_format or kinds[0]


def submit_at_once(service: Service) -> Submit:
    async def submit(options: dict[str, Any]) -> PictureFuture:
        return service.submit(**options)

    return submit


async def draw(
    request: Request, asked: PictureQuery | Generation, service: Service, submit: Submit, metrics: Metrics
) -> Drawn | None:
    """The pictures that are asked for; None if the client hung up, whose request has then ended, too.

    request: whose body has been read. Raises what `Service.submit` and its future raise.
    """
    kind = kind_of(asked, service)
    job = await submit(options_of(asked, service))
    pictures = await _result_unless_left(request, job)
    if pictures is None or job.timing is None or job.budget is None:
        return None
    metrics.drawn(job.request.budget, job.budget, len(pictures), job.timing)
    files = [await run_in_threadpool(encoded, picture, kind) for picture in pictures]
    height, width = pictures.shape[-3:-1]
    return Drawn(files, kind, (width, height), job.budget, job.timing)


async def _result_unless_left(request: Request, job: PictureFuture) -> Any:
    drawing = asyncio.wrap_future(job)
    leaving = asyncio.ensure_future(request.receive())  # after the body only a disconnect can come
    both: set[asyncio.Future[Any]] = {drawing, leaving}
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return drawing.result() if drawing.done() else None
    finally:
        leaving.cancel()
        drawing.cancel()  # ends the request, at its next step if it runs
