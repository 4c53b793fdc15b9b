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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    known: dict[str, Prepared] = {}

    def of(name: str) -> Prepared:
        if name not in known:
            case: Case = CASES[name]
            pipeline: Any = case.make()
            tape, table = full_run(case, pipeline)
            folder = tmp_path_factory.mktemp("hosts") / "artifact"
            known[name] = Prepared(case, write_manifest(folder, case, pipeline, tape, table), tape)
        return known[name]

    return of


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
