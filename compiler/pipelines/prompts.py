"""What a pipeline is conditioned on: texts, or the labels and numbers of classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from otcache.schemas.errors import ModelError

from ..models.model import transformer_of

COUNTS = ("num_embeds_ada_norm", "num_class_embeds", "num_classes")
"""Options of transformers that say how many classes there are."""


def class_numbers(pipeline: Any) -> dict[str, int] | None:
    """The prompts of a class-conditional pipeline and their classes: its labels, and the numbers themselves.

    None for a pipeline of texts. A label wins over a number of the same text.
    """
    labels = getattr(pipeline, "labels", None)
    if not isinstance(labels, dict):
        return None
    config = transformer_of(pipeline, type(pipeline).__name__).config
    counts = [count for name in COUNTS if isinstance(count := getattr(config, name, None), int)]
    count = counts[0] if counts else 1 + max(labels.values(), default=-1)
    return {**{str(number): number for number in range(count)}, **labels}


def class_prompts(pipeline: Any) -> list[str] | None:
    """One prompt for each class of a class-conditional pipeline, a label where there is one; None for one of texts."""
    numbers = class_numbers(pipeline)
    if numbers is None:
        return None
    return list({number: prompt for prompt, number in numbers.items()}.values())  # labels come behind the numbers


def prompt_arguments(pipeline: Any, prompts: Sequence[str]) -> dict[str, list[Any]]:
    """Prompts as the pipeline's call takes them: texts, or the numbers of the classes that they name.

    Raises:
        ModelError: a class-conditional pipeline has no such class.
    """
    numbers = class_numbers(pipeline)
    if numbers is None:
        return {"prompt": list(prompts)}
    if unknown := [prompt for prompt in prompts if prompt not in numbers]:
        shown = (class_prompts(pipeline) or [])[:3]
        raise ModelError(
            f"{type(pipeline).__name__} has no label {unknown[0]!r}: expected one of {len(set(numbers.values()))} "
            f"classes, by label or number, such as {', '.join(map(repr, shown))}"
        )
    return {"class_labels": [numbers[prompt] for prompt in prompts]}


def any_prompts(pipeline: Any, count: int) -> dict[str, list[Any]]:
    """For a call whose result does not depend on its prompts."""
    return prompt_arguments(pipeline, [(class_prompts(pipeline) or [""])[0]] * count)


def probe_prompts(pipeline: Any, prompts: Sequence[str], count: int) -> list[str]:
    """Distinct prompts, as far as there are so many: those given, then others that the pipeline takes."""
    own = list(dict.fromkeys(prompts))[:count]
    classes = class_prompts(pipeline)
    if classes is None:
        return own + [f"probe {position}" for position in range(count - len(own))]
    others = itertools.chain((each for each in classes if each not in own), itertools.cycle(classes))
    return own + list(itertools.islice(others, count - len(own)))


def split_labels(labels: Sequence[str], calibration: int, evaluation: int) -> tuple[list[str], list[str]]:
    """Labels of so many samples of calibration and evaluation. They repeat, because every sample has a seed of its own.

    >>> split_labels(["cat", "dog", "owl"], 4, 3)
    (['cat', 'dog', 'owl', 'cat'], ['dog', 'owl', 'cat'])
    """
    turns = list(itertools.islice(itertools.cycle(labels), calibration + evaluation))
    return turns[:calibration], turns[calibration:]
