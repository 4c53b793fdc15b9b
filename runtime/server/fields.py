"""What a request may say: the query of `GET /picture` and the body of `POST /v1/images/generations`, as models.

The OpenAPI document is made of the same models, so it cannot say anything else. What is not named here is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from otcache.schemas.messages import one_line

from ..serving.noise import SEED_MAXIMUM, SEED_MINIMUM
from .refusals import Refusal

MOST_CHARACTERS = 4096
"""Of a prompt: several times what the longest text encoder in use (512 tokens) reads."""
MOST_PIXELS = 1 << 16
"""Of a side; which ones are served is the artifact's to say."""
QUALITIES = ("auto", "low", "medium", "high", "standard", "hd")
"""As OpenAI's models name them."""

Model = TypeVar("Model", bound="_Fields")


def _whole_number(value: Any) -> Any:
    """Text of a query as a whole number; other text stays what it is, and is refused."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,20}", value) else value


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


Budget = Annotated[str, BeforeValidator(_text), Field(max_length=20)]
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Whole = Annotated[int, BeforeValidator(_whole_number)]


class _Fields(BaseModel):
    """What both routes take."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: Text = Field(description="What to draw.")
    negative_prompt: Text | None = Field(None, description="What to steer away from; left out: the artifact's.")
    budget: Budget | None = Field(
        None,
        description="Model evaluations to spend at most: one of the artifact's budgets. Left out: the highest. Under "
        "load less is spent; the answer's header X-Budget says how much.",
    )
    minimum_budget: Budget | None = Field(
        None,
        description="The lowest budget that may be served under load. Left out: the server's; of budget `full`: "
        "`full`.",
    )
    seed: Whole = Field(
        0,
        description="As a torch CPU generator's seed in diffusers.",
        json_schema_extra={"minimum": SEED_MINIMUM, "maximum": SEED_MAXIMUM},
    )
    output_format: Literal["png", "jpeg", "webp", "gif"] | None = Field(
        None, description="Of pictures png, jpeg or webp; a video is a gif. Left out: png, gif."
    )


class PictureQuery(_Fields):
    """The query of `GET /picture`."""

    guidance_scale: Annotated[float, Field(allow_inf_nan=False, strict=False)] | None = Field(
        None, description="Within the calibrated range; left out: the artifact's."
    )
    height: Annotated[Whole, Field(ge=1, le=MOST_PIXELS)] | None = Field(
        None, description="Pixels; a size that the artifact serves."
    )
    width: Annotated[Whole, Field(ge=1, le=MOST_PIXELS)] | None = Field(
        None, description="Pixels; a size that the artifact serves."
    )


class Generation(_Fields):
    """The body of `POST /v1/images/generations`: OpenAI's fields, and those of this server beside them."""

    guidance_scale: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None, description="Within the calibrated range; left out: the artifact's."
    )
    model: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="The artifact's name, or left out: this server has one."
    )
    n: Annotated[int, Field(ge=1)] = Field(1, description="Pictures.")
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = Field(
        None, description="`WIDTHxHEIGHT`, one that the artifact serves; `auto` or left out: the artifact's."
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        None,
        description="Instead of `budget`: `low`, `medium` and `high` are the lowest, middle and highest compiled "
        "budget, `hd` is `full`; `auto` and `standard` are the highest that the load allows.",
    )
    response_format: Literal["b64_json"] | None = Field(
        None, description="`b64_json`: pictures come in the answer. Addresses (`url`) are not served."
    )
    user: Annotated[str, Field(max_length=MOST_CHARACTERS)] | None = Field(
        None, description="Who asks; read by nobody, kept nowhere."
    )


def parse_query(pairs: Sequence[tuple[str, str]]) -> PictureQuery:
    """The query's parameters, each at most once. Raises Refusal, which names the parameter."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise Refusal(f"{one_line(twice, 40)} is given twice: expected it once", parameter=one_line(twice, 40))
    return _parsed(PictureQuery, dict(pairs))


def parse_generation(fields: Mapping[str, Any]) -> Generation:
    """The fields of a body. A field that is `null` counts as left out. Raises Refusal, which names the field."""
    parsed = _parsed(Generation, {name: value for name, value in fields.items() if value is not None})
    if parsed.budget is not None and parsed.quality is not None:
        raise Refusal("budget and quality are both given: expected one of them, for both choose the budget")
    return parsed


def _parsed(kind: type[Model], values: Mapping[str, Any]) -> Model:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    name = one_line(first["loc"][0] if first["loc"] else "request", 40)
    raise Refusal(_reason(kind, name, first), parameter=name)


def _reason(kind: type[_Fields], name: str, first: ErrorDetails) -> str:
    if first["type"] == "extra_forbidden":
        return f"{name} is no parameter of this request: expected some of {', '.join(kind.model_fields)}: leave it out"
    if first["type"] == "missing":
        return f"{name} is missing: expected a text"
    what = one_line(first["msg"].partition(" should ")[2])
    expected = what.removeprefix("be ") if what.startswith("be ") else f"to {what}"
    return f"{name} is {one_line(repr(first['input']), 60)}: expected {expected}"


def budget_of_quality(quality: str | None, budgets: Sequence[str]) -> str | None:
    """The budget that one of OpenAI's qualities means; None for the highest that the load allows.

    >>> [budget_of_quality(quality, ["4", "8", "16", "full"]) for quality in QUALITIES]
    [None, '4', '8', '16', None, 'full']
    """
    compiled = budgets[:-1] or budgets
    named = {"low": compiled[0], "medium": compiled[(len(compiled) - 1) // 2], "high": compiled[-1], "hd": budgets[-1]}
    return named.get(quality or "auto")


def size_of(text: str | None) -> dict[str, int]:
    """`width` and `height` of `1024x768`; nothing of `auto`.

    >>> size_of("1024x768"), size_of("auto")
    ({'width': 1024, 'height': 768}, {})
    """
    if text in (None, "auto"):
        return {}
    width, height = str(text).split("x")
    return {"width": int(width), "height": int(height)}
