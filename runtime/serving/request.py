"""What a caller asks for, read once: `parse_request` checks it against the artifact and makes a frozen `Request`, and
everything after goes by that.

Shapes: n samples, g branches of guidance (negative first).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from otcache.schemas.arithmetic import latents_from_noise
from otcache.schemas.errors import RequestError
from otcache.schemas.manifest import BudgetProgram, Guidance, Manifest, TensorInfo
from otcache.schemas.messages import one_line
from otcache.schemas.program import Program

from ..loop.backend import MOST_SAMPLES, Array
from ..loop.finite import is_spoilt
from .noise import SEED_MAXIMUM, SEED_MINIMUM, noise
from .request_size import Given, Sizes

Texts = tuple[tuple[str | None, ...], ...]
"""Of each branch, those of all prompts; None stands for zeros instead of what the text encoder writes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What is to be drawn, checked. It holds either `texts` or `conditioning`."""

    manifest: Manifest
    """At the request's size."""
    constants: Mapping[str, Array]
    """The trunk's inputs that follow from the size alone."""
    budget: str
    program: Program
    guidance_weights: tuple[float, ...]
    """(g,)"""
    seed: int | tuple[int, ...]
    """One that draws the noise of all samples in one go, or n of them."""
    samples: int
    """n ≥ 1."""
    texts: Texts = ()
    """(g, prompts): of each branch; each prompt is drawn n / prompts times, side by side."""
    conditioning: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    """Each (g, n, …), or without a batch as the manifest has it."""
    latents: Array | None = None
    """Noise (n, *latents.shape) in place of the seed's, before it is scaled."""

    def at_budget(self, budget: str) -> Request:
        """The same at another budget of the artifact."""
        return dataclasses.replace(self, budget=budget, program=_program(budget, self.manifest).program)


def parse_request(
    sizes: Sizes,
    *,
    budget: Any,
    size: Given,
    prompt: Any = None,
    negative_prompt: Any = None,
    images_per_prompt: Any = 1,
    conditioning: Any = None,
    latents: Any = None,
    seed: Any = 0,
    guidance_scale: Any = None,
    most_samples: int = MOST_SAMPLES,
) -> Request:
    """The request that a caller's values make. Costs next to nothing. Raises RequestError for what is not served.

    Args:
        sizes: of the artifact.
        budget: one of its budgets, as a number or as text.
        size: what the caller says of it; what is left out is the artifact's own.
        prompt: a text or a list of them; unless there is `conditioning`.
        negative_prompt: one text for all prompts, or one for each; None for the artifact's.
        images_per_prompt: how many pictures of each prompt.
        conditioning: instead of a prompt, an array (g, n, …) for each of the manifest's `conditioning` with a batch;
            others in the manifest's shape.
        latents: noise (n, *latents.shape) instead of the seed's; with `conditioning` only.
        seed: one, or a list of n.
        guidance_scale: within the calibrated range; None for the artifact's.
        most_samples: pictures that the request may be for.
    """
    at_size = sizes.at(size)
    manifest = at_size.manifest
    program = _program(budget, manifest).program
    weights = _guidance_weights(guidance_scale, manifest.guidance)
    texts: Texts = ()
    if conditioning is None:
        texts, conditioning = parse_texts(prompt, negative_prompt, manifest.guidance), {}
        samples = len(texts[-1]) * _check_images(images_per_prompt)
    else:
        samples = _check_conditioning(conditioning, latents, seed, manifest)
    if samples > most_samples:
        raise RequestError(
            f"the request is for {samples} pictures: expected at most {most_samples}: ask for fewer at once"
        )
    _check_seed(seed, samples)
    if latents is not None and len(check_latents(latents, manifest.latents.shape)) != samples:
        raise RequestError(f"latents hold {len(latents)} samples: expected {samples} as the conditioning")
    return Request(
        manifest=manifest,
        constants=at_size.constants,
        budget=str(budget),
        program=program,
        guidance_weights=weights,
        seed=tuple(map(int, seed)) if isinstance(seed, list | tuple) else int(seed),
        samples=samples,
        texts=texts,
        conditioning=conditioning,
        latents=latents,
    )


def noise_of(request: Request) -> Array:
    """The noise that a request begins with, before it is scaled: float32 (n, *latents.shape)."""
    layout, n = request.manifest.latents, request.samples
    if request.latents is None:
        drawn = latents_from_noise(noise(layout.noise_shape, request.seed, n), layout.split, layout.permutation)
    else:
        drawn = np.asarray(request.latents, np.float32)
    return drawn.reshape(n, *layout.shape)


def parse_texts(prompt: Any, negative_prompt: Any, guidance: Guidance) -> Texts:
    """The prompts of each branch, (g, prompts), negative first; None for zeros. Raises RequestError.

    >>> guidance = Guidance(kind="cfg", scale=4.0, minimum=1.0, maximum=6.0, negative_prompt="blurred")
    >>> parse_texts(["a ring", "a star"], None, guidance)
    (('blurred', 'blurred'), ('a ring', 'a star'))
    """
    positive = _check_prompts(prompt)
    if guidance.branches != 2:
        if negative_prompt is not None:
            raise RequestError("negative_prompt is given, but this artifact has no guidance to use it: leave it out")
        return (positive,)
    if negative_prompt is None:
        return (guidance.negative_prompt,) * len(positive), positive
    negative = _check_prompts(negative_prompt, "negative_prompt")
    if isinstance(negative_prompt, str):
        return negative * len(positive), positive
    if len(negative) != len(positive):
        raise RequestError(
            f"negative_prompt has {len(negative)} texts: expected one, or {len(positive)} as the prompts"
        )
    return negative, positive


def check_latents(latents: Any, shape: tuple[int, ...]) -> Array:
    """Latents as an array of floats (n, *shape), n ≥ 1. Raises RequestError."""
    array = np.asarray(latents)
    if array.shape[1:] != shape or array.ndim != len(shape) + 1 or not len(array) or array.dtype.kind != "f":
        raise RequestError(
            f"latents are {array.dtype} {array.shape}: expected float32 (n, {', '.join(map(str, shape))})"
        )
    _check_finite("latents", array)
    return array


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, Python's or numpy's; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_images(images_per_prompt: Any) -> int:
    if not is_whole(images_per_prompt) or images_per_prompt < 1:
        raise RequestError(
            f"images_per_prompt is {one_line(repr(images_per_prompt), 40)}: expected a whole number of at least 1"
        )
    return int(images_per_prompt)


def _program(budget: Any, manifest: Manifest) -> BudgetProgram:
    entry = manifest.program(budget) if is_whole(budget) or isinstance(budget, str) else None
    if entry is None:
        raise RequestError(
            f"budget is {one_line(repr(budget), 40)}: expected one of {', '.join(manifest.budgets)}: choose one, or "
            "compile the artifact for it"
        )
    return entry


def _guidance_weights(scale: Any, guidance: Guidance) -> tuple[float, ...]:
    """Of the branches, (g,)."""
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


def _check_prompts(prompt: Any, name: str = "prompt") -> tuple[str, ...]:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list | tuple) or not texts:
        raise RequestError(f"{name} is {one_line(repr(prompt), 60)}: expected a string or a list of at least one")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(f"{name}[{index}] is {one_line(repr(text), 60)}: expected a string")
        if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
            raise RequestError(f"{name}[{index}] holds half a surrogate pair: expected text that UTF-8 can hold")
    return tuple(texts)


def _check_seed(seed: Any, samples: int) -> None:
    seeds = seed if isinstance(seed, list | tuple) else [seed]
    for one in seeds:
        if not is_whole(one) or not SEED_MINIMUM <= one <= SEED_MAXIMUM:
            raise RequestError(
                f"seed is {one_line(repr(one), 40)}: expected a whole number in [-2**63, 2**64), as in torch"
            )
    if isinstance(seed, list | tuple) and len(seeds) != samples:
        raise RequestError(f"seed is a list of {len(seeds)}: expected one number, or {samples} for {samples} pictures")


def _check_conditioning(conditioning: Any, latents: Any, seed: Any, manifest: Manifest) -> int:
    """The number of samples, after every tensor has been checked."""
    if not isinstance(conditioning, Mapping):
        raise RequestError(f"conditioning is a {type(conditioning).__name__}: expected a dict of arrays")
    wanted = {tensor.name: tensor for tensor in manifest.conditioning}
    if set(conditioning) != set(wanted):
        have = one_line(sorted(map(str, conditioning)))
        raise RequestError(f"conditioning holds {have}: expected exactly {sorted(wanted)}")
    batched = [name for name, tensor in wanted.items() if tensor.shape[:1] == ("batch",)]
    given = np.shape(conditioning[batched[0]])[1:2] if batched else () if latents is None else np.shape(latents)[:1]
    samples = given[0] if given else len(seed) if isinstance(seed, Sequence) else 1
    for name, tensor in wanted.items():
        _check_tensor(tensor, conditioning[name], manifest.guidance.branches, samples)
    if samples < 1:
        raise RequestError("conditioning holds 0 samples: expected at least one")
    return int(samples)


def _check_tensor(tensor: TensorInfo, value: Any, branches: int, samples: int) -> None:
    array = np.asarray(value)
    expected: tuple[Any, ...] = tensor.shape
    if tensor.shape[:1] == ("batch",):
        expected = (branches, samples, *tensor.shape[1:])
    if array.shape != expected or array.dtype.kind not in "fiub":
        raise RequestError(
            f"conditioning {tensor.name} is {array.dtype} {array.shape}: expected {tensor.dtype} {expected}"
        )
    _check_finite(f"conditioning {tensor.name}", array)


def _check_finite(name: str, array: Array) -> None:
    if is_spoilt(array):
        raise RequestError(
            f"{name} holds NaN or infinity: expected finite numbers: make it again, in float32 if need be"
        )
