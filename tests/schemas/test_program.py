"""Programs are consistent or refused with the place that is wrong."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from otcache.schemas.program import Program


def step(index, **fields):
    return {"step_index": index, "timestep": 1000.0 - index, "latent_coef": 1.0, "output_coefs": [0.1], **fields}


MEANS = {"latent_coef": 0.1, "output_coefs": [0.2]}
SLOPES = {"centre": 0.0, "spread": 1.0, "latent_coef": 0.0, "output_coefs": [0.1, -0.1]}


def test_a_program_knows_its_schedule_and_memory():
    program = Program.model_validate(
        {
            "payload": "residual",
            "steps": [
                step(0),
                step(1, compute=False, residual_coefs=[1.0]),
                step(2, output_coefs=[0.1, 0.2]),
                step(3, compute=False, residual_coefs=[-1.0, 2.0]),
            ],
        }
    )
    assert program.nfe == 2 and program.schedule == (0, 2)
    assert (program.output_memory, program.residual_memory) == (2, 2)
    assert Program.model_validate_json(program.model_dump_json()) == program


@pytest.mark.parametrize(
    ("payload", "steps", "message"),
    [
        ("output", [], "at least 1 item"),
        ("output", [step(0, compute=False, residual_coefs=[1.0])], "computed steps only"),
        ("residual", [step(0, compute=False, residual_coefs=[1.0])], "more residuals than were computed"),
        ("output", [step(3), step(3)], r"steps\[1\].step_index is 3: expected more than 3"),
        ("output", [step(0, output_coefs=[0.1, 0.2])], "weighs more outputs than there are"),
        ("residual", [step(0), step(1, compute=False)], "either compute the blocks or forecast"),
        ("residual", [step(0), step(1, residual_coefs=[1.0])], "either compute the blocks or forecast"),
        ("output", [step(0, latent_coef=float("nan"))], "finite number"),
        ("output", [step(0, output_coefs=[1e9])], "less than or equal to 1000000"),
        ("output", [step(-1)], "greater than or equal to 0"),
        ("cache", [step(0)], "'output', 'residual', 'adaptive' or 'banded'"),
        ("adaptive", [step(0, compute=False, residual_coefs=[1.0])], "computed steps only"),
        (
            "output",
            [step(0), step(1, output_coefs=[1.0, 1.0], slopes=SLOPES)],
            "only an adaptive or a banded program has",
        ),
        ("adaptive", [step(0), step(1, slopes=SLOPES)], "slopes of 2 output_coefs: expected 1"),
        ("adaptive", [step(0, slopes={**SLOPES, "output_coefs": [0.0]})], "at least 2 items"),
        ("adaptive", [step(0), step(1, slopes={**SLOPES, "spread": 0.0})], "greater than or equal to 0.000001"),
        ("adaptive", [step(0, means=MEANS)], "only a banded program has, and this one is adaptive"),
        (
            "banded",
            [step(0, means={**MEANS, "output_coefs": [0.1, 0.2]})],
            "means of 2 output_coefs and 0 output_slopes: expected 1",
        ),
        (
            "banded",
            [step(0, means={**MEANS, "output_slopes": [0.1]})],
            "and 1 output_slopes: expected 1, as many as it weighs, and 0",
        ),
        ("banded", [step(0, means={**MEANS, "latent_coef": float("inf")})], "finite number"),
        ("banded", [step(0, means={**MEANS, "latent_slope": 0.1})], "a latent_slope, and no slopes: expected 0"),
        ("banded", [step(0, compute=False, residual_coefs=[1.0])], "computed steps only"),
    ],
)
def test_inconsistent_programs_are_refused(payload, steps, message):
    with pytest.raises(ValidationError, match=message):
        Program.model_validate({"payload": payload, "steps": steps})
