"""One artifact for each tiny pipeline, made when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from host_cases import CASES, Case
from host_manifests import full_run, write_manifest

from otcache.compiler.pipelines.record import Tape


@dataclass(frozen=True)
class Prepared:
    """A case with its artifact and what its own scheduler made of all steps."""

    case: Case
    artifact: Path
    tape: Tape


def prepare(case: Case, folder: Path) -> Prepared:
    """Run a case with all steps, and write the artifact of its sampler."""
    pipeline: Any = case.make()
    tape, table = full_run(case, pipeline)
    return Prepared(case, write_manifest(folder / "artifact", case, pipeline, tape, table), tape)


@pytest.fixture
def prepare_case(tmp_path: Path) -> Callable[[Case], Prepared]:
    """Of a case that no other test has."""
    return lambda case: prepare(case, tmp_path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    known: dict[str, Prepared] = {}

    def of(name: str) -> Prepared:
        if name not in known:
            known[name] = prepare(CASES[name], tmp_path_factory.mktemp("hosts"))
        return known[name]

    return of


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
