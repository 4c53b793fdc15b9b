"""The command line as a whole: help, examples, completion, JSON, logs, exit codes, and a snapshot of its surface.

A changed flag is a conscious change: `python tests/test_command_line.py` writes the snapshot anew.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from otcache.runtime.cli import main as cli
from otcache.runtime.cli.completion import folders_with

SNAPSHOT = Path(__file__).parent / "snapshots" / "command_line.json"
CONTEXT = click.Context(cli.main)
NAMES = cli.main.list_commands(CONTEXT)
NO_JSON = {"completion"}
"""Commands that print something else: a script."""


def command(name):
    found = cli.main.get_command(CONTEXT, name)
    assert found is not None
    return found


def examples(found):
    text = (found.help or "") + "\n" + (found.epilog or "")
    return [
        line.strip().split("  #")[0].split(" | ")[0].split(" > ")[0]
        for line in text.splitlines()
        if line.startswith("  ") and line.strip().startswith("otc ")
    ]


def surface():
    """What a script relies on: names, options, whether they are required, repeated, flags, and their choices."""
    return {
        name: [
            " ".join(
                [
                    "/".join((*param.opts, *param.secondary_opts)),
                    *(["flag"] if getattr(param, "is_flag", False) else [param.type.name]),
                    *(["required"] if param.required else []),
                    *(["repeated"] if getattr(param, "multiple", False) else []),
                    *([",".join(map(str, param.type.choices))] if isinstance(param.type, click.Choice) else []),
                ]
            )
            for param in command(name).params
        ]
        for name in NAMES
    }


def test_surface_is_that_of_the_snapshot():
    expected = json.loads(SNAPSHOT.read_text())
    assert surface() == expected, (
        "if the change is meant: python tests/test_command_line.py, and a line in CHANGELOG.md"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_command_and_option_has_help(name):
    found = command(name)
    assert found.help and len(found.get_short_help_str()) > 10
    bare = [param.opts for param in found.params if isinstance(param, click.Option) and not param.help]
    assert not bare, f"otc {name}: no help for {bare}"
    assert name in NO_JSON or any("--json" in param.opts for param in found.params)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_examples_that_parse(name):
    lines = examples(command(name))
    assert any(line.startswith(f"otc {name}") for line in lines)
    for line in lines:
        _, called, *arguments = shlex.split(line)
        command(called).make_context(called, arguments, parent=click.Context(cli.main))


@pytest.mark.parametrize("name", NAMES)
def test_examples_do_not_run_together(name):
    found = command(name)
    with click.Context(found, info_name=name, parent=click.Context(cli.main, info_name="otc")) as context:
        shown = [line.strip() for line in found.get_help(context).splitlines()]
    text = (found.help or "") + "\n" + (found.epilog or "")
    written = [line.strip() for line in text.splitlines() if line.startswith("  ") and line.strip().startswith("otc ")]
    assert written and [line for line in shown if line.startswith("otc ")] == written


def test_examples_of_the_group_parse():
    lines = examples(cli.main)
    assert len(lines) >= 3
    for line in lines:
        _, called, *arguments = shlex.split(line)
        command(called).make_context(called, arguments, parent=click.Context(cli.main))


def otc(*arguments, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    line = [
        sys.executable,
        "-c",
        "from otcache.runtime.cli.main import main; main(prog_name='otc')",
        *map(str, arguments),
    ]
    return subprocess.run(line, capture_output=True, text=True, env=env, timeout=120)


def test_exit_codes_are_documented():
    readme = (Path(__file__).parents[1] / "runtime" / "README.md").read_text(encoding="utf-8")
    text = cli.main.get_help(CONTEXT)
    for code in (0, *cli.KINDS):
        assert re.search(rf"^ *{code}  \w", text, re.MULTILINE) and re.search(rf"\b{code} \w", readme), code


@pytest.mark.parametrize(
    ("arguments", "exit_code", "kind"),
    [
        (["run", "nothing", "--json"], 2, "usage"),
        (["inspect", "nothing", "--json"], 4, "artifact"),
        (["nothing", "--json"], 2, "usage"),
        (["compile", "no/such/model", "--json", "-o", "/nowhere/out"], None, None),
    ],
)
def test_errors_as_json(arguments, exit_code, kind):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.stdout == ""
    error = json.loads(result.stderr.splitlines()[-1])
    assert error["event"] == "error" and error["message"] and error["exit_code"] == result.exit_code != 0
    assert exit_code is None or (error["exit_code"], error["kind"]) == (exit_code, kind)
    assert cli.KINDS[error["exit_code"]] == error["kind"]


def test_errors_as_text():
    result = CliRunner().invoke(cli.main, ["inspect", "nothing"])
    assert result.stderr.startswith("Error: nothing is no artifact") and len(result.stderr.splitlines()) == 1


def test_log_levels(monkeypatch):
    for level, lines in (("", 1), ("error", 1), ("info", 1), ("DEBUG", 2)):
        monkeypatch.setenv("OTC_LOG", level)
        result = CliRunner().invoke(cli.main, ["inspect", "nothing"])
        assert result.exit_code == 4
        assert ("Traceback" in result.stderr) == (lines > 1) and (len(result.stderr.splitlines()) > 1) == (lines > 1)
    result = CliRunner().invoke(cli.main, ["inspect", "nothing", "--json"])
    events = [json.loads(line) for line in result.stderr.splitlines()]
    assert [event["event"] for event in events] == ["log", "error"]
    assert events[0]["level"] == "debug" and events[0]["logger"].startswith("otcache.") and events[0]["traceback"]
    monkeypatch.setenv("OTC_LOG", "loud")
    result = CliRunner().invoke(cli.main, ["inspect", "nothing"])
    assert result.exit_code == 2 and "expected one of debug, info, warning, error" in result.stderr


def complete(*words):
    """What bash is told for `otc words…`, the last word being typed."""
    line = shlex.join(["otc", *words[:-1]]) + " " + words[-1]
    done = otc(COMP_WORDS=line, COMP_CWORD=str(len(words)), _OTC_COMPLETE="bash_complete")
    assert done.stderr == ""
    return [item.partition(",")[2] for item in done.stdout.splitlines() if item]


def test_completion(tmp_path, monkeypatch):
    (tmp_path / "mine" / "first").mkdir(parents=True)
    (tmp_path / "mine" / "first" / "manifest.json").write_text("damaged")
    monkeypatch.chdir(tmp_path)
    assert folders_with("manifest.json", "") == folders_with("manifest.json", "mi") == ["mine/first"]
    assert folders_with("manifest.json", f"{tmp_path}/mine/f") == [f"{tmp_path}/mine/first"]
    assert folders_with("manifest.json", "other/") == []
    assert complete("insp") == ["inspect"]
    assert complete("inspect", "m") == ["mine/first"]
    assert complete("run", "mine/first", "--budget", "") == [], "a damaged artifact completes to nothing"
    assert complete("run", "mine/first", "--backend", "tensorrt-") == ["tensorrt-rtx"]
    assert complete("compile", "shapes-q") == ["shapes-qwen"]
    assert complete("completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize(
    ("shell", "call"), [("bash", "complete -o nosort -F"), ("zsh", "#compdef otc"), ("fish", "complete ")]
)
def test_completion_scripts(shell, call):
    script = CliRunner().invoke(cli.main, ["completion", shell]).stdout
    assert call in script and f"_OTC_COMPLETE={shell}_complete" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(tmp_path):
    """In a real bash: the script is read, its function is called as readline calls it."""
    (tmp_path / "otc").write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} "
        '-c \'from otcache.runtime.cli.main import main; main(prog_name="otc")\' "$@"\n'
    )
    (tmp_path / "otc").chmod(0o755)
    code = (
        ". <(otc completion bash); COMP_WORDS=(otc ver); COMP_CWORD=1; _otc_completion otc ver otc; "
        'echo "${COMPREPLY[*]}"'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == "verify", done.stderr


if __name__ == "__main__":
    SNAPSHOT.parent.mkdir(exist_ok=True)
    SNAPSHOT.write_text(json.dumps(surface(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
