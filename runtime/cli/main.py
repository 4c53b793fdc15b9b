"""The command `otc`. Serving commands are here; others come through the entry-point group `otcache.commands`."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import click

from otcache.schemas.errors import HostError, OTCacheError

from .completion import completion
from .deploy import deploy
from .inspect import inspect
from .json_lines import json_lines_only
from .run import run
from .serve import serve
from .shipping import pack, sign, unpack, verify

GROUP = "otcache.commands"
EXIT_CODES = """\b
Exit codes:
  0  success
  1  any other failure
  2  usage: an option, an argument, or a place that cannot be written
  3  model: cannot be loaded or compiled
  4  artifact: damaged, incomplete or of an unknown version
  5  request: a budget, prompt or size that is not served
  6  host: a package, backend or device is missing
  130, 143  stopped by Ctrl-C or SIGTERM

\b
Environment:
  OTC_LOG          debug, info, warning (default) or error: what is logged to stderr
  OTC_MAX_BYTES    most bytes of an artifact that is opened; default 256 GiB
  OTC_CACHE        where compiles keep their results; default ~/.cache/otcache
  HF_HUB_OFFLINE   1: hub ids are taken from the local cache only
"""
INTERRUPTED = 130
"""Exit code of Ctrl-C, as shells report it."""
AGAIN = "interrupted: start it again"
KINDS = {1: "other", 2: "usage", 3: "model", 4: "artifact", 5: "request", 6: "host"}
"""Exit codes by name, as `--json` reports errors."""
_JSON = "--json"
_log = logging.getLogger(__name__)


class Commands(click.Group):
    """Commands of this module and of the entry points; every error ends in one line and a documented exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_entry_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        own = super().get_command(ctx, cmd_name)
        point = _entry_points().get(cmd_name)
        return own if own is not None or point is None else _load_command(cmd_name, point)

    def main(  # type: ignore[override]  # click overloads it by standalone_mode
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """As click's, but with `--json` on the line an error is a JSON object on stderr."""
        args = list(sys.argv[1:] if args is None else args)
        if not standalone_mode or not _asks_for_json(args):
            return super().main(args, prog_name, standalone_mode=standalone_mode, **extra)
        with json_lines_only():
            try:
                code = super().main(args, prog_name, standalone_mode=False, **extra)
            except click.ClickException as error:
                _print_json_error(error.format_message(), error.exit_code)
                sys.exit(error.exit_code)
            except click.Abort:
                _print_json_error(AGAIN, INTERRUPTED)
                sys.exit(INTERRUPTED)
            sys.exit(code if isinstance(code, int) else 0)

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """As click's, where Ctrl-C meanwhile ends as everywhere else."""
        try:
            return super().make_context(*args, **extra)
        except KeyboardInterrupt:
            raise _one_line_error(AGAIN, INTERRUPTED) from None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_JSON] = _asks_for_json(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OTCacheError as error:
            _log.debug("%s was raised here", type(error).__name__, exc_info=True)
            raise _one_line_error(str(error), error.exit_code) from None
        except KeyboardInterrupt:
            raise _one_line_error(AGAIN, INTERRUPTED) from None
        except (click.exceptions.Exit, click.ClickException, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            _log.debug("unexpected %s was raised here", type(error).__name__, exc_info=True)
            what = f"unexpected {type(error).__name__}: {error}: set OTC_LOG=debug to see where"
            raise _one_line_error(what, 1) from None


def _asks_for_json(args: Sequence[str]) -> bool:
    """Whether `--json` is among the options of a command line, also of one that does not parse."""
    return _JSON in (args[: args.index("--")] if "--" in args else args)


def _print_json_error(message: str, exit_code: int) -> None:
    """The last line of stderr: `{"event": "error", "exit_code": 4, "kind": "artifact", "message": …}`."""
    from otcache.schemas.messages import one_line

    event = {
        "event": "error",
        "exit_code": exit_code,
        "kind": "interrupted" if exit_code > 128 else KINDS.get(exit_code, "other"),
        "message": one_line(message, 2000),
    }
    click.echo(json.dumps(event, ensure_ascii=False), err=True)


def _one_line_error(message: str, exit_code: int) -> click.ClickException:
    from otcache.schemas.messages import one_line

    error = click.ClickException(one_line(message, 2000))
    error.exit_code = exit_code  # type: ignore[misc]
    return error


def _entry_points() -> dict[str, metadata.EntryPoint]:
    return {point.name: point for point in metadata.entry_points(group=GROUP)}


def _load_command(name: str, point: metadata.EntryPoint) -> click.Command:
    """The command, or one that says what is missing."""
    try:
        command: click.Command = point.load()
        return command
    except (ImportError, AttributeError) as error:
        reason = str(error)

    def fail(**_: Any) -> None:
        raise HostError(f"otc {name} cannot be loaded: {reason}: pip install 'otcache[compiler]'")

    arguments = click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)
    settings = {"ignore_unknown_options": True}
    return click.Command(
        name, callback=fail, params=[arguments], context_settings=settings, help="(its packages are not installed)"
    )


@click.group(
    cls=Commands,
    epilog=f"""\b
Examples:
  otc run artifacts/shapes --budget 8 --prompt "a small red ring on blue" -o ring.png
  otc inspect artifacts/shapes --json
  otc completion bash

{EXIT_CODES}""",
)
@click.version_option(package_name="otcache", prog_name="otc")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Ahead-of-time compiled sampling for diffusion models.

    Results go to stdout, progress, logs and errors to stderr. With --json stdout holds one JSON value, and every line
    on stderr is a JSON object too: the last one of a command that fails is its error.
    """
    from .logs import configure

    configure(as_json=ctx.meta[_JSON])


for _command in (completion, deploy, inspect, pack, run, serve, sign, unpack, verify):
    main.add_command(_command)


if __name__ == "__main__":
    main()
