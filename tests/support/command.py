"""The command line, run in the test's own process, and a compile that is small enough for tests."""

from __future__ import annotations

from pathlib import Path

COMPILE = (
    "--budgets",
    "2,4",
    "--num-inference-steps",
    "8",
    "--calibration-prompts",
    "8",
    "--evaluation-prompts",
    "3",
    "--trials",
    "4",
    "--threads",
    "1",
    "--no-bench",
)
"""Options of a compile that is small enough for the tests."""


def otc(*arguments: str, workspace: Path | None = None):
    """Run the command line in this process; `exit_code`, `stdout` and `stderr` are those of the command."""
    from click.testing import CliRunner

    from otcache.runtime.cli.main import main

    return CliRunner(env={"OTC_CACHE": str(workspace)} if workspace else {}).invoke(main, list(arguments))
