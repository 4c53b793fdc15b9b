"""Every class of the table: compiled through its real pipeline, served by the runtime, compared with the pipeline.

`OTC_COVERAGE=write pytest -m long tests/compiler/coverage` writes what `otc models` prints anew; without it the suite
holds the shipped table to what it finds.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
from click.testing import CliRunner
from model_zoo.pipelines import CASES, REFUSED
from model_zoo.suite import cover

from otcache.compiler.models import coverage
from otcache.compiler.models.coverage import NAME, Row, rows, write_rows
from otcache.compiler.models.model import transformer_of
from otcache.runtime.cli import main as cli
from otcache.schemas.errors import ModelError

SHIPPED = Path(coverage.__file__).parent / NAME


def shipped(name: str) -> Row:
    return next(row for row in rows() if row.pipeline == name)


def record(row: Row) -> None:
    """Put a row into the shipped table, or hold the table to it."""
    if os.environ.get("OTC_COVERAGE") == "write":
        others = [other for other in rows() if other.pipeline != row.pipeline] if SHIPPED.exists() else []
        write_rows([*others, row], SHIPPED)
        return
    known, errors = shipped(row.pipeline), {"stage_error", "full_error", "program_error"}
    assert {k: v for k, v in asdict(row).items() if k not in errors} == {
        k: v for k, v in asdict(known).items() if k not in errors
    }


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_class_is_compiled_and_served(name, tmp_path):
    case = CASES[name]
    record(cover(case.pipeline(), case.call, case.prompts, tmp_path))


@pytest.mark.long
@pytest.mark.parametrize("name", REFUSED)
def test_class_is_refused_with_the_reason(name, tmp_path):
    case = REFUSED[name]
    pipeline = case.pipeline()
    with pytest.raises(ModelError) as refusal:
        cover(pipeline, case.call, case.prompts, tmp_path)
    transformer = type(transformer_of(pipeline, name)).__name__
    record(Row(transformer=transformer, pipeline=name, supported=False, reason=str(refusal.value)))


def test_the_shipped_table_has_every_case_and_nothing_else():
    assert {row.pipeline for row in rows() if row.supported} == set(CASES)
    assert {row.pipeline for row in rows() if not row.supported} >= set(REFUSED)


def test_otc_models_prints_the_table():
    result = CliRunner().invoke(cli.main, ["models", "--json"])
    assert result.exit_code == 0
    assert [entry["pipeline"] for entry in json.loads(result.stdout)] == [row.pipeline for row in rows()]
    printed = CliRunner().invoke(cli.main, ["models"]).stdout
    assert all(row.pipeline in printed for row in rows())


def test_otc_models_says_why_an_axis_stays_fixed(monkeypatch):
    row = Row(
        transformer="T", pipeline="P", supported=True, symbolic=("batch", "width"), fixed={"height": "it is counted"}
    )
    monkeypatch.setattr(coverage, "rows", lambda: [row])
    printed = CliRunner().invoke(cli.main, ["models"]).stdout
    assert "batch, width" in printed and "height stays: it is counted" in printed
