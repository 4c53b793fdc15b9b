"""The README's commands exist with the options that it uses, its Python runs, and its results are those of a command."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import click
import pytest

from otcache.artifacts.comparisons import MARKS, kept, section
from otcache.artifacts.comparisons import main as write_comparisons
from otcache.artifacts.readme import BEGIN, END, copy_pictures, rewrite
from otcache.compiler.compare.cells import verdict_at
from otcache.runtime.cli.main import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.strip().split("  ")[0] for line in README.splitlines() if line.startswith("    otc ")]


def test_there_are_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("line", COMMANDS)
def test_command_lines_parse(line):
    _, name, *arguments = shlex.split(line)
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None, f"otc {name} does not exist"
    command.make_context(name, arguments, parent=context)


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_python_example_runs(compiled):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    code = block.replace('"artifacts/shapes"', repr(str(compiled))).replace("budget=8", "budget=4")
    scope: dict = {}
    exec(code, scope)
    assert scope["images"].shape == (1, 16, 16, 3) and scope["latents"].shape == (1, 16, 16)


def test_results_are_replaced_between_the_marks():
    text = f"a\n{BEGIN}\nold\n{END}\nb"
    assert rewrite(text, "new") == f"a\n{BEGIN}\nnew\n{END}\nb"
    with pytest.raises(ValueError, match="no section"):
        rewrite("nothing", "new")


def test_comparisons_are_those_that_are_kept():
    written = README.partition(MARKS[0])[2].partition(MARKS[1])[0].strip()
    assert written == section(kept())


def test_further_comparisons_of_a_model_are_tables_below_its_picture():
    first = kept()[0]
    apart = dataclasses.replace(first, budgets=first.budgets[:1], verdicts=first.verdicts[:1])
    text = section([first, apart])
    assert text.count("### ") == text.count("![") == 1
    below = text.partition("apart, for information")[2]
    assert f"--budgets {apart.budgets[0]} " in below and f"B = {apart.budgets[0]} |" in below


def test_a_folder_without_a_comparison_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["comparisons", str(tmp_path), "README.md"])
    with pytest.raises(SystemExit, match=r"has no comparison\.json: expected a folder that"):
        write_comparisons()


@pytest.mark.parametrize("comparison", kept(), ids=lambda comparison: f"{comparison.model}-{len(comparison.budgets)}")
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
    Image = pytest.importorskip("PIL.Image")
    copy_pictures(compiled / "report", "shapes", tmp_path)
    named = {Path(path).name for path in re.findall(r"!\[[^]]*\]\(artifacts/pictures/([^)]+)\)", README)}
    others = {"shapes-samples.png", *(f"{Path(comparison.model).name}-comparison.png" for comparison in kept())}
    assert named - others == {path.name for path in tmp_path.iterdir()}
    with Image.open(tmp_path / "shapes-quality.png") as whole, Image.open(compiled / "report" / "ssim.png") as part:
        right = whole.crop((whole.width - part.width, 0, whole.width, part.height))
        assert whole.width == 2 * part.width and right.tobytes() == part.convert("RGB").tobytes()


def test_pictures_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[1] / path).is_file(), path


def test_every_command_has_help_with_examples():
    context = click.Context(main)
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        assert command.help and "otc " + name in (command.help + (command.epilog or "")), name
