"""`otc completion`, and what the shell completes: artifact folders, an artifact's budgets, backends.

The scripts are click's. They call `otc` again with the words typed so far, so candidates are always those of the
installed version. Nothing here may fail or print: a completion that cannot be found out is no completion.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from otcache.schemas.errors import HostError, OTCacheError

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_OTC_COMPLETE"
"""The environment variable through which the scripts ask; click derives it from the program's name."""
DEPTH = 2
"""Levels of folders below the typed one that are searched for artifacts."""
MOST_FOLDERS = 500
"""Folders looked at before a completion gives up: pressing a key must not crawl a disk."""
MANIFEST = "manifest.json"


def folders_with(name: str, incomplete: str) -> list[str]:
    """Paths that begin with `incomplete` and hold a file called `name`, written as they were typed, sorted."""
    parent, _, start = incomplete.rpartition("/")
    root = Path(parent + "/" if incomplete.startswith("/") and not parent else parent or ".")
    prefix = incomplete[: len(incomplete) - len(start)]
    left = [MOST_FOLDERS]
    return sorted(prefix + path for path in _search(root, "", start, name, DEPTH, left))


def _search(root: Path, below: str, start: str, name: str, depth: int, left: list[int]) -> Iterator[str]:
    try:
        entries = sorted(entry.name for entry in os.scandir(root / below) if entry.is_dir())
    except OSError:
        return
    for entry in entries:
        if not entry.startswith(start) or (entry.startswith(".") and not start.startswith(".")) or left[0] <= 0:
            continue
        left[0] -= 1
        path = f"{below}{entry}"
        if (root / path / name).is_file():
            yield path
        elif depth:
            yield from _search(root, path + "/", "", name, depth - 1, left)


def complete_artifacts(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Artifacts below the folder typed so far, else folders."""
    found = folders_with(MANIFEST, incomplete)
    return [CompletionItem(path) for path in found] or [CompletionItem(incomplete, type="dir")]


def complete_budgets(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Budgets of the artifact on the line; after a comma those that are not named yet."""
    from ..artifact.reader import Artifact

    # An option whose value is being typed ends click's parsing early: the artifact is then among the words left over.
    artifact = ctx.params.get("artifact") or next((word for word in ctx.args if Path(word, MANIFEST).is_file()), None)
    if artifact is None:
        return []
    try:
        budgets = Artifact.open(artifact).manifest.budgets
    except OTCacheError:
        return []
    before, comma, last = incomplete.rpartition(",")
    taken = before.split(",")
    return [
        CompletionItem(f"{before}{comma}{budget}")
        for budget in budgets
        if budget.startswith(last) and budget not in taken
    ]


def complete_qualities(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The tiers that a request may name."""
    from otcache.schemas.targets import TIERS

    return [CompletionItem(name, help=target) for name, target in TIERS.items() if name.startswith(incomplete)]


def complete_backends(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`auto` and every backend by name, whether or not it can run here."""
    from ..engines.choose import BACKENDS

    return [CompletionItem(name) for name in ("auto", *BACKENDS) if name.startswith(incomplete)]


@click.command(
    epilog="""\b
Examples:
  otc completion bash
  otc completion zsh
  otc completion fish

\b
To use it, write the script to a file and let the shell read that at its start:
  bash   add to ~/.bashrc:  . ~/.local/share/otc-completion.bash
  zsh    add to ~/.zshrc:   . ~/.local/share/otc-completion.zsh
  fish   write it to ~/.config/fish/completions/otc.fish
"""
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of SHELL: bash (4.4 or later), zsh or fish.

    Completed are commands, options and their choices, bundled models, artifact folders, the budgets of the artifact on
    the line, and backends.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise HostError(
            f"click has no completion for {shell}: expected one of {', '.join(SHELLS)}: pip install -U click"
        )
    click.echo(kind(click.Group("otc"), {}, "otc", VARIABLE).source())
