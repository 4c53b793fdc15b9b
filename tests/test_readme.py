"""Every command and snippet on the pages runs, links lead somewhere, and figures are those of a command.

A page is a story: its commands and snippets run from top to bottom in a folder of its own, as a reader would run them
who has the repository, the bundled model compiled, and a FLUX of their own (a tiny one). Command lines are verbatim;
what would take hours is reduced by defaults for options that the line does not name, and by the sizes of `REDUCED`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pages
import pytest
from click.testing import CliRunner
from PIL import Image

import otcache.compiler
from otcache.artifacts import comparisons, readme
from otcache.compiler.compare.cells import verdict_at
from otcache.runtime.cli.main import main

ROOT = pages.ROOT
SMALL = {"calibration_prompts": 4, "evaluation_prompts": 2, "trials": 1}
DEFAULTS = {
    "compile": {**SMALL, "payload": "output", "force": True, "threads": 1, "bench": False},
    "compare": {
        **SMALL,
        "force": True,
        "num_inference_steps": 12,
        "budgets": "8",
        "claim": False,
        "robustness": False,
        "against": "euler,fora",
    },
    "bench": {"repeat": 1},
}
"""Defaults of options that a command on a page does not name."""
REDUCED = {
    "1024x1024,1344x768": "16x16,24x16",
    "--height 1344 --width 768": "--height 24 --width 16",
    "height=1024, width=1024": "height=16, width=16",
}
"""Sizes of real models on the pages, and those of the tiny one that stands in for them."""
NOT_RUN = {
    "pip install": "needs a network; that the extras exist is checked",
    "pip download": "needs a network",
    "python -m otcache.compiler.calibration.lpips_weights": "needs that archive: test_lpips.py runs it",
    "make test": "is this test run",
    "otc compile ./my-flux-pipeline --device cuda": "needs a GPU: tests/gpu runs it where there is one",
    "otc compile ./my-flux-pipeline --workers": "needs as many cores: tests/end_to_end/test_workers.py runs it on two",
    "otc compile ./my-flux-pipeline --ray": "needs a cluster: tests/end_to_end/test_workers.py has one",
    "otc compare shapes --workers": "needs workers: tests/end_to_end/test_workers.py compares with and without",
    "otc serve": "runs until it is stopped: tests/runtime/server/test_app.py starts it",
    "curl": "needs the server: tests/runtime/server/test_app.py asks it the same",
    "client.py": "needs the server: tests/runtime/server/test_app.py has OpenAI's client",
    "tritonserver": "needs Triton: tests/runtime/deploy/test_triton.py runs it where there is one",
    "ask_triton.py": "needs that server: tests/runtime/deploy/test_triton.py runs it there",
    "serve run": "runs until it is stopped: tests/runtime/deploy/test_ray_serve.py runs this line",
    "docker": "needs Docker: tests/runtime/deploy/test_docker.py runs this line where there is one",
    "python tests/benchmarks/": "tests/benchmarks/test_benchmarks.py runs each of these lines at a tiny size",
}
"""Beginnings of commands, and names of snippets, that no page test runs, each with the reason."""


@dataclass(frozen=True)
class Step:
    """A command or snippet of a page."""

    line: int
    kind: str
    """`command`, or `python` for a snippet."""
    text: str
    name: str = ""


def steps_of(page: str) -> Iterator[Step]:
    for block in pages.blocks(page):
        if block.language == "python":
            yield Step(block.line, "python", block.text, block.name)
        for line, command in pages.commands(block):
            yield Step(line, "command", command)


STEPS = {page: list(steps_of(page)) for page in pages.NAMES}


def is_listed(step: Step) -> bool:
    return any(step.text.startswith(begin) or step.name == begin for begin in NOT_RUN)


def reduced(text: str) -> str:
    for old, new in REDUCED.items():
        text = text.replace(old, new)
    return text


# --- a reader's folder


@pytest.fixture(scope="session")
def my_flux(tiny_flux_folder, tmp_path_factory) -> Path:
    """The tiny FLUX with embedded guidance, as FLUX.1-dev has it."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("mine") / "my-flux-pipeline"
    shutil.copytree(tiny_flux_folder, folder)
    config = FluxTransformer2DModel.load_config(folder, subfolder="transformer")
    transformer = FluxTransformer2DModel.from_config({**config, "guidance_embeds": True})
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.fixture(scope="session")
def reader(my_flux, tiny_flux_lora, workspace, tmp_path_factory) -> Path:
    """A folder with what the pages name, copied for each page."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "artifacts").mkdir()
    for path in (ROOT / "artifacts").glob("*.py"):
        shutil.copy(path, folder / "artifacts")
    shutil.copytree(ROOT / "artifacts/results", folder / "artifacts/results")
    shutil.copytree(ROOT / "artifacts/pictures", folder / "artifacts/pictures")
    (folder / "artifacts/models").symlink_to(ROOT / "artifacts/models")
    (folder / "imported/otcache").mkdir(parents=True)
    for part in ("schemas", "runtime", "compiler"):
        (folder / "imported/otcache" / part).symlink_to(ROOT / part)
    (folder / "imported/otcache/artifacts").symlink_to("../../artifacts")
    for name in ("tests", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for page in ("README.md", "compiler/programs/README.md"):
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, folder / page)
    shutil.copytree(my_flux, folder / "my-flux-pipeline")
    shutil.copytree(tiny_flux_lora, folder / "my-lora")
    shutil.copy(my_flux / "prompts.txt", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for model in ("shapes", "./my-flux-pipeline"):
            run_otc(f"otc compile {model} --budgets 4,8,16", workspace)
    return folder


def run_otc(command: str, workspace: Path) -> None:
    """The command line in this process, with the small defaults."""
    _, *arguments = shlex.split(reduced(command), comments=True)
    environment = {"OTC_CACHE": str(workspace)}
    done = CliRunner(env=environment).invoke(main, arguments, default_map=DEFAULTS)
    assert done.exit_code == 0, f"{command}\n{done.output}"


def run_program(command: str, folder: Path) -> None:
    """A command that is not `otc`, in a process of its own that imports the reader's copy of the package."""
    first, *rest = shlex.split(command, comments=True)
    line = [sys.executable if first == "python" else first, *rest]
    environment = {**os.environ, "PYTHONPATH": str(folder / "imported"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def run_make(command: str, folder: Path, workspace: Path) -> None:
    """What make would run, but for the environment: the `otc` lines of its recipe."""
    printed = subprocess.run(
        ["make", "-n", *command.split("#")[0].split()[1:], "VENV=/nowhere", "OUT=artifacts/shapes"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.replace("\\\n", " ")
    lines = re.findall(r"^/nowhere/bin/(otc .*)$", printed, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        run_otc(line, workspace)
    assert (folder / "artifacts/shapes/report.html").is_file() and (folder / "artifacts/shapes.png").is_file()


def run_step(step: Step, folder: Path, workspace: Path) -> None:
    if step.kind == "python":
        exec(compile(reduced(step.text), step.name or "snippet", "exec"), {})
    elif step.text.startswith("otc "):
        run_otc(step.text, workspace)
    elif step.text.startswith("make "):
        run_make(step.text, folder, workspace)
    else:
        run_program(step.text, folder)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, steps in STEPS.items() if any(not is_listed(step) for step in steps)])
def test_a_pages_commands_and_snippets_run(page, reader, workspace, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(reader, tmp_path / "reader", symlinks=True))
    small = functools.partial(otcache.compiler.compile, **SMALL, workspace=workspace, threads=1)
    monkeypatch.setattr(otcache.compiler, "compile", small, raising=False)
    monkeypatch.chdir(folder)
    for step in STEPS[page]:
        if not is_listed(step):
            try:
                run_step(step, folder, workspace)
            except Exception as error:
                raise AssertionError(f"{page}, line {step.line}: {step.text}") from error


# --- what is on the pages


def test_there_are_commands_and_snippets():
    found = [step for steps in STEPS.values() for step in steps if not is_listed(step)]
    assert len([step for step in found if step.kind == "command"]) >= 30
    assert len([step for step in found if step.kind == "python"]) >= 5


def test_what_is_not_run_is_on_a_page():
    every = [step for steps in STEPS.values() for step in steps]
    for begin in NOT_RUN:
        assert [step for step in every if step.text.startswith(begin) or step.name == begin], f"{begin}: not on a page"
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in pages.NAMES]
    assert all(any(old in text for text in texts) for old in REDUCED)


@pytest.mark.parametrize("page", pages.NAMES)
def test_blocks_of_a_page_say_what_they_are(page):
    """A snippet without its language would be run by nobody."""
    for block in pages.blocks(page):
        assert block.language in ("", "sh", "python", "text"), f"{page}, line {block.line}: {block.language}"
        if block.language == "sh":
            count = len([line for line in block.text.splitlines() if line.strip()])
            assert len(list(pages.commands(block))) == count, f"{page}, line {block.line}: a line is no known command"
        elif block.language != "python":
            assert "import " not in block.text, f"{page}, line {block.line}: Python that is not marked as such"


def otc_lines() -> list[str]:
    """Commands of `otc` in blocks and in inline code, without placeholders."""
    lines = [step.text for steps in STEPS.values() for step in steps if step.text.startswith("otc ")]
    spans = [span for page in pages.NAMES for span in pages.code_spans(page) if span.startswith("otc ")]
    return sorted({*lines, *spans})


@pytest.mark.parametrize("line", otc_lines())
def test_otc_commands_exist_with_their_options(line):
    _, name, *arguments = shlex.split(line, comments=True)
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None, f"otc {name} does not exist"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("-") and argument != "-"} <= known | {"--help"}


@pytest.mark.parametrize(
    "span", sorted({span for page in pages.NAMES for span in pages.code_spans(page) if span.startswith("python ")})
)
def test_programs_that_are_named_exist(span):
    name = span.split()[2 if span.startswith("python -m ") else 1]
    if span.startswith("python -m "):
        assert importlib.util.find_spec(name) is not None
    else:
        assert (ROOT / name).is_file()


def test_extras_that_are_named_exist():
    tomllib = pytest.importorskip("tomllib")
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        extra
        for page in pages.NAMES
        for extra in re.findall(r"otcache\[([\w,-]+)\]|`\[([\w-]+)\]`", (ROOT / page).read_text(encoding="utf-8"))
    }
    assert {part for pair in named for part in pair if part} <= extras
    assert named


@pytest.mark.parametrize("page", pages.NAMES)
def test_links_lead_somewhere(page):
    for link in pages.links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in pages.anchors(str(target.resolve().relative_to(ROOT))), f"{page}: {link}"


def test_links_are_found():
    assert "artifacts/pictures/shapes-pictures.png" in pages.pictures("README.md")
    assert "runtime/README.md#on-nvidia-gpus" in pages.links("README.md")
    assert "on-nvidia-gpus" in pages.anchors("runtime/README.md")


def test_every_picture_is_shown():
    shown = {(ROOT / page).parent / path for page in pages.NAMES for path in pages.pictures(page)}
    assert {path.resolve() for path in shown} >= set((ROOT / "artifacts/pictures").resolve().iterdir())
    for path in shown:
        with Image.open(path) as picture:
            picture.verify()


def test_the_readme_is_a_front_page():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and all(len(line) <= 120 for line in lines if not line.startswith("|"))


def test_snippets_need_no_more_imports_than_they_say():
    for steps in STEPS.values():
        for step in steps:
            if step.kind == "python":
                ast.parse(step.text)


def test_every_command_has_help_with_examples():
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        assert command.help and "otc " + name in (command.help + (command.epilog or "")), name


# --- figures


def test_the_readmes_results_are_those_that_are_kept():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.results_table(comparisons.read_comparisons())
    assert comparisons.replace_section(text, table, readme.MARKS) == text
    assert len(table.splitlines()) == 2 + 3 * len(readme.BUDGETS)


def test_the_readmes_needs_are_those_of_the_dry_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.needs_section(readme.count_evaluations())
    assert comparisons.replace_section(text, section, readme.NEEDS_MARKS) == text


def test_the_results_page_is_written_from_what_is_kept(tmp_path):
    for part in ("results", "models"):
        (tmp_path / part).symlink_to(ROOT / "artifacts" / part)
    (tmp_path / "results").unlink()
    shutil.copytree(ROOT / "artifacts/results", tmp_path / "results")
    comparisons.write_page(tmp_path)
    page = "results/README.md"
    assert (tmp_path / page).read_text(encoding="utf-8") == (ROOT / "artifacts" / page).read_text(encoding="utf-8")


def test_sections_are_replaced_between_marks():
    marks = ("<!-- a -->", "<!-- b -->")
    text = "x\n<!-- a -->\nold\n<!-- b -->\ny"
    assert comparisons.replace_section(text, "new", marks) == text.replace("old", "new")
    with pytest.raises(ValueError, match="no section between"):
        comparisons.replace_section("nothing", "new", marks)


def test_further_comparisons_of_a_model_are_tables_below_its_picture():
    text = comparisons.comparison_sections(comparisons.read_comparisons())
    models = {comparisons.model_name(each) for each in comparisons.read_comparisons()}
    assert text.count("\n## ") == text.count("![") == len(models)
    below = text.partition("apart, for information")[2]
    assert "--budgets 2,3 " in below and "B = 2 |" in below


def test_a_folder_without_a_comparison_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["comparisons", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"has no comparison\.json: expected a folder that"):
        comparisons.main()


@pytest.mark.parametrize(
    "comparison",
    comparisons.read_comparisons(),
    ids=lambda comparison: f"{comparison.model}-{len(comparison.budgets)}",
)
def test_a_comparison_is_consistent(comparison):
    assert comparison.prompts >= 32 and comparison.num_inference_steps == 50
    assert [verdict.budget for verdict in comparison.verdicts] == list(comparison.budgets)
    assert all(
        cell.nfe_mean <= cell.budget + 1e-9 and cell.psnr_db.worst <= cell.psnr_db.mean for cell in comparison.cells
    )
    for verdict in comparison.verdicts:
        assert verdict == verdict_at(comparison.cells, verdict.budget)
    assert sum(comparison.costs.values()) <= 10
    assert {claim.budget for claim in comparison.claims} in (set(), set(comparison.budgets))
    assert all(len(claim.schedule) == claim.budget and claim.psnr_db > 0 for claim in comparison.claims)
    if comparison.robustness:
        assert {row.guidance_scale for row in comparison.robustness.at_scales} == {2, 4, 6}
        assert [row.calibration_prompts for row in comparison.robustness.calibrated] == [4, 8, 16, 64]


def test_pictures_are_made_of_the_report(compiled, tmp_path):
    readme.copy_pictures(compiled / "report", "shapes", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"shapes-{name}" for name in readme.FIGURES}
    with (
        Image.open(tmp_path / "shapes-schedules.png") as whole,
        Image.open(compiled / "report" / "quantiles.png") as part,
    ):
        right = whole.crop((whole.width - part.width, 0, whole.width, part.height))
        assert whole.width > part.width and right.tobytes() == part.convert("RGB").tobytes()
