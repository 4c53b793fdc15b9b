"""The report: its numbers are the manifest's, its pictures the roll-out's, and its colours can be told apart."""

from __future__ import annotations

import html
import json
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("ot")
pytest.importorskip("skimage")

from command import otc
from PIL import Image
from report_samples import EXPLODING, EXTREME, FLOW, STEPS, sample, written
from skimage.color import deltaE_ciede2000, rgb2lab

from otcache.compiler.report import figures
from otcache.compiler.report.data import report_from_manifest
from otcache.compiler.report.evidence import Bench, Evidence, Recorder, read_evidence
from otcache.compiler.report.page import pictures_sheet, worst_sheet
from otcache.compiler.report.recommend import recommended
from otcache.compiler.report.sheets import AMPLIFICATION, COLOURS, Sheet, cell_of, difference_map
from otcache.compiler.workspace.progress import Reporter
from otcache.runtime.artifact.reader import Artifact
from otcache.runtime.serving.bench import save_latencies
from otcache.schemas import whole_files
from otcache.schemas.errors import ArtifactError
from otcache.schemas.manifest import FULL
from otcache.schemas.structure import Quality, Statistic

VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
"""Linear RGB as a reader sees it: Machado, Oliveira and Fernandes 2009, severity 1."""
NOTICED = 15.0
"""CIEDE2000 between line colours; 2 to 3 is what one notices side by side."""


def rgb(colours):
    return np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])


def linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def smallest_distance(colours, vision):
    seen = np.clip(linear(rgb(colours)) @ np.array(VISION[vision]).T, 0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen)
    distances = deltaE_ciede2000(lab[:, None], lab[None])
    return float(distances[np.triu_indices(len(colours), 1)].min())


@pytest.mark.parametrize("vision", VISION)
def test_line_colours_can_be_told_apart(vision):
    assert smallest_distance(figures.PALETTE, vision) > NOTICED
    used = {
        figures.OWN,
        figures.REFERENCE,
        figures.ANCHOR,
        *(c for c, _ in figures.BUDGETS),
        *(c for c, *_ in figures.PEERS),
    }
    assert used <= set(figures.PALETTE)
    luminance = linear(rgb(figures.PALETTE)) @ [0.2126, 0.7152, 0.0722]
    assert (1.05 / (luminance + 0.05)).min() >= 3.0, "contrast to white that WCAG asks of graphics"


def test_the_measure_finds_colours_that_cannot():
    red_and_green = ("#b5651d", "#6b8e23")
    assert smallest_distance(red_and_green, "normal") > NOTICED
    assert smallest_distance(red_and_green, "deuteranopia") < 12


def test_lines_differ_without_colour():
    budgets = [figures.budget_style(position) for position in range(10)]
    assert len({marker for _, marker, _ in budgets}) == 10
    assert len({marker for _, marker, _ in figures.PEERS}) == len(figures.PEERS)


def test_difference_maps_are_amplified_and_get_darker():
    reference = np.zeros((1, 4, 3), np.uint8)
    picture = reference.copy()
    picture[0, 1] = 13  # a twentieth of the range
    picture[0, 2] = 26  # a tenth and more
    picture[0, 3] = (39, 0, 0)  # the mean of the channels counts
    found = difference_map(picture, reference)
    half = round(255 * AMPLIFICATION * 13 / 255)
    assert (found[0] == COLOURS[[0, half, 255, half]]).all()
    luminance = linear(COLOURS / 255.0) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) <= 1e-3).all() and luminance[-1] < 0.01
    assert COLOURS[0].tolist() == [255, 255, 255], "no difference is white"


@pytest.mark.parametrize("height, width", [(8, 8), (48, 96), (144, 200), (1024, 512)])
def test_pictures_are_cut_out_of_the_sheet_again(height, width):
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (3, 2, height, width, 3), dtype=np.uint8)
    sheet = Sheet(cell=cell_of(height, width), groups=(2, 1), rows=2, margin=20)
    assert 144 <= max(sheet.cell) <= 256 and sheet.cell[0] / sheet.cell[1] == pytest.approx(width / height, rel=0.02)
    image = sheet.draw(list(pictures), ["a", "b", "c"], ["first", "second"], ["one", "two"])
    assert image.size == sheet.size
    for column in range(3):
        for row in range(2):
            cell = sheet.cut(image, row, column)
            resample = Image.Resampling.BICUBIC if width < sheet.cell[0] else Image.Resampling.LANCZOS
            expected = Image.fromarray(pictures[column, row]).resize(sheet.cell, resample)
            assert np.array_equal(np.asarray(cell), np.asarray(expected))


def test_noise_levels_are_drawn_on_their_axis():
    flow = report_from_manifest(*sample(sigmas=FLOW)[:2]).timeline
    assert flow.name == "sigma" and not flow.is_log and flow.at(10.5) == pytest.approx(1 - 10.5 / STEPS)
    exploding = report_from_manifest(*sample(sigmas=EXPLODING)[:2]).timeline
    assert (
        exploding.is_log
        and exploding.limits == pytest.approx((14.6, 0.03))
        and exploding.at(STEPS) == pytest.approx(0.03)
    )
    none = report_from_manifest(*sample()[:2]).timeline
    assert none.name == "timestep" and not none.is_log and none.at([0, STEPS]).tolist() == [1000, 0]


QUALITIES = {4: (26.7, 0.872, 17.0), 8: (39.5, 0.984, 29.0), 16: (57.6, 0.9996, 45.0)}


def qualities(values):
    return {
        budget: Quality(
            psnr_db=Statistic(mean=psnr, std=1.0, worst=worst),
            ssim=Statistic(mean=ssim, std=0.0, worst=ssim),
            relative_latent_error=Statistic(mean=0.1, std=0.0, worst=0.1),
        )
        for budget, (psnr, ssim, worst) in values.items()
    }


@pytest.mark.parametrize(
    ("targets", "budget", "why"),
    [
        ((), 8, "the knee of mean SSIM"),
        (("psnr>=35",), 8, "the smallest one that reaches what was asked for: psnr>=35"),
        (("psnr>=35", "worst psnr>=40"), 16, "psnr>=35; worst psnr>=40"),
        (("psnr>=90",), 8, "the knee"),
    ],
)
def test_a_budget_is_recommended(targets, budget, why):
    found, said = recommended(qualities(QUALITIES), 50, targets)
    assert found == budget and why in said


def test_a_budget_that_leaves_nothing_to_win_is_recommended():
    alike = {4: (60.0, 0.9996, 50.0), 8: (70.0, 0.9999, 60.0)}
    assert recommended(qualities(alike), 50, ()) == (4, "the smallest one, and its mean SSIM is 0.9996 already")
    assert recommended(qualities({8: QUALITIES[8]}), 50, ()) == (8, "the only one that was compiled")


def test_peers_are_ordered_by_how_close_they_come():
    assert report_from_manifest(*sample(peers=4)[:2]).peers == ("peer 0", "peer 1", "peer 2", "peer 3")


def test_seconds_are_those_of_passes_that_were_computed():
    report = report_from_manifest(*sample()[:2])
    assert [(c.name, c.evaluations, c.seconds) for c in report.costs] == [
        ("capture", 200, 2.0),
        ("interpolate and fit", 500, None),
    ]
    assert report.other_seconds == (("load", 1.0),)


def test_the_recorder_passes_everything_on():
    seen = []

    class Inner(Reporter):
        def report_reuse(self, name):
            seen.append(name)

        def note(self, text):
            seen.append(text)

    recorder = Recorder(Inner())
    with recorder.on("capture", "") as current:
        current.facts["evaluations"] = 3
    recorder.report_reuse("search")
    recorder.note("text")
    assert seen == ["search", "text"]
    assert [(p.name, p.evaluations, p.reused) for p in recorder.passes] == [("capture", 3, 0)]


def images_of(page):
    return re.findall(r'<img src="data:image/png;base64,[^"]+"[^>]* alt="([^"]*)"', page)


BENCH = Bench(
    command="otc bench artifacts/sample --repeat 20 --seconds 5",
    host="A CPU, 2 CPUs, Linux",
    backend="onnxruntime",
    versions={"onnxruntime": "1.0"},
    latency_s={"4": 0.5, "8": 0.75, "16": 1.5, "full": 3.0},
    requests=7,
)
CASES = {
    "bench": {"bench": BENCH, "targets": ("psnr>=26",), "peers": 2},
    "flow": {"sigmas": FLOW},
    "single": {"budgets": (8,), "peers": 0, "prompts": ("a ring",)},
    "latencies": {"latencies": True, "size": (144, 144)},
    "extreme": EXTREME,
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Folders with the reports of `CASES`."""
    found = {}
    for name, options in CASES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a figure whose layout fails only warns
            found[name] = written(tmp_path_factory.mktemp(name), **options)
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_page_is_whole_and_safe(name, reports):
    options, folder = CASES[name], reports[name]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "default-src 'none'" in page and "://" not in page.split("<body>")[1]
    alternatives = images_of(page)
    assert len(alternatives) == page.count("<img ") and all(len(text) > 8 for text in alternatives)
    assert page.count("<h1>") == 1 and page.index("<h1>") < page.index("<h2 ") < page.index("<h3>")
    ids = set(re.findall(r' id="([^"]+)"', page))
    assert set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r'aria-labelledby="([^"]+)"', page)) <= ids
    for prompt in options.get("prompts", ()):
        assert prompt.isalnum() or str(html.escape(prompt, quote=False)).replace('"', "&#34;") in page
    for figure in figures.FIGURES:
        with Image.open(folder / "report" / figure) as image:
            assert image.width == 1000 and len(np.unique(np.asarray(image.convert("L")))) > 10


def test_the_same_input_gives_the_same_bytes(reports, tmp_path):
    first, second = reports["flow"], written(tmp_path, **CASES["flow"])
    paths = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert len(paths) == 4 + len(figures.FIGURES)
    assert all((first / path).read_bytes() == (second / path).read_bytes() for path in paths)


def test_latency_is_shown_where_it_was_measured_and_cost_is_called_cost_elsewhere(reports):
    page = (reports["flow"] / "report.html").read_text()
    assert "Model cost" in page and "No latency was measured" in page and "Latency</b>" not in page
    page = (reports["latencies"] / "report.html").read_text()
    assert "Latency</b> of one picture" in page and "No latency" not in page
    assert "0.1 s, 4.0× as fast" in page and "0.4 s" in page


def words(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))


def test_the_page_serves_a_decision(reports):
    """A budget with its reason and its latency here, and where and how that was measured."""
    fields, evidence, _ = sample(**CASES["bench"])
    report = report_from_manifest(fields, evidence)
    page = (reports["bench"] / "report.html").read_text()
    text, choice = words(page), report.choice
    psnr = choice.quality.psnr_db
    assert choice.budget == 8 and "Recommended: 8 evaluations, the smallest one that reaches what was asked for" in text
    assert f"{psnr.mean:.1f} dB on average and {psnr.worst:.1f} dB for the worst prompt" in text
    assert "0.75 s a picture, 4.0× as fast as the full run" in text
    assert "median of 7 requests at each budget, on the host that compiled (A CPU, 2 CPUs, Linux)" in text
    assert "by “otc bench artifacts/sample --repeat 20 --seconds 5” with onnxruntime 1.0" in text
    cards = re.findall(r"<li(?: class=\"choice\")?><span class=\"name\">.*?</li>", page, re.DOTALL)
    for card, entry in zip(cards, report.budgets, strict=True):
        mean, worst = entry.quality.psnr_db.mean, entry.quality.psnr_db.worst
        assert f"<b>{mean:.1f} dB</b>" in card and f"{worst:.1f} dB, SSIM {entry.quality.ssim.worst:.4f}" in card
        assert 'class="choice"' not in card or entry is choice
    assert "the best first by mean SSIM, and by mean PSNR among those whose SSIM is 0.999 or more" in text
    assert "peers by how close their mean PSNR comes to otcache’s" in text


def test_the_best_peers_pictures_stand_beside_ours(reports):
    page = (reports["bench"] / "report.html").read_text()
    peers = re.findall(r'alt="a blue star, peer 0, (\d+) evaluations"', page)
    assert peers == ["16", "8", "4"] and page.count(">best peer</th>") == 4
    assert "Below stands the peer" not in (reports["single"] / "report.html").read_text(), "where there is none"


def test_why_there_is_no_latency_is_said(tmp_path):
    missing = Bench(command="otc bench a --seconds 5", missing="two rounds of all budgets would take about 26 min")
    page = words((written(tmp_path, bench=missing) / "report.html").read_text())
    assert "No latency was measured for this report (“otc bench a --seconds 5”: two rounds" in page


def test_tables_hold_the_manifests_numbers_and_name_the_worst_prompts(compiled):
    manifest = Artifact.open(compiled).manifest
    evidence = read_evidence(compiled / "report")
    page = (compiled / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "|", page))
    for entry in manifest.programs:
        if entry.budget == FULL:
            continue
        own = next(each for each in evidence.budgets if str(each.budget) == entry.budget)
        for values, statistic in (
            (own.psnr_db, entry.quality.psnr_db),
            (own.ssim, entry.quality.ssim),
            (own.errors[-1], entry.quality.relative_latent_error),
        ):
            assert np.mean(values) == pytest.approx(statistic.mean, rel=1e-5, abs=1e-9)
        assert min(own.psnr_db) == pytest.approx(entry.quality.psnr_db.worst, rel=1e-5)
        lowest = sorted(range(len(own.psnr_db)), key=lambda index: own.psnr_db[index])[:3]
        assert list(own.worst) == lowest
        for index in lowest:
            assert f"{own.psnr_db[index]:.1f} dB|, SSIM {own.ssim[index]:.4f}: {evidence.prompts[index]}" in text
        assert f"{entry.quality.psnr_db.mean:.1f}" in text and f"{entry.quality.ssim.mean:.4f}" in text
        for peer in entry.baselines:
            assert (
                f"{peer.quality.psnr_db.mean:.1f} ± {peer.quality.psnr_db.std:.1f} ({peer.quality.ssim.mean:.4f})"
                in text
            )
        assert (
            own.positions[:-1] == entry.program.schedule and own.positions[-1] == manifest.sampler.num_inference_steps
        )
        assert set(own.errors[0]) == {0.0} and min(own.errors[-1]) > 0
    for cost in manifest.costs:
        assert f"{cost.name}||{cost.full_runs:.2f}|" in text
    assert evidence.sigmas is not None and evidence.sigmas[0] == 1.0 and evidence.sigmas[-1] == 0.0
    assert {"capture", "evaluate"} <= evidence.seconds.keys()


def test_errors_along_the_way_are_those_of_the_latents(tmp_path):
    """Full runs halve their latents at each of two steps; a program takes six tenths."""
    torch = pytest.importorskip("torch")
    from equations import equation_evaluator, write_chunk

    from otcache.compiler.calibration.local import LocalSamples
    from otcache.compiler.calibration.micro_batch import MicroBatch
    from otcache.compiler.calibration.outcomes import outcome_arrays
    from otcache.compiler.calibration.runs import Runs
    from otcache.schemas.program import Program, Step

    def rate(x, step, k):
        return -x

    def decode(latents):
        return np.tile(np.clip(latents.numpy()[:, :1, None, None] / 10, 0, 1), (1, 12, 12, 3)).astype(np.float32)

    start = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    chunk = write_chunk(tmp_path / "runs", start, rate, total=2, decode=decode)
    evaluator = replace(equation_evaluator(rate, (2,), total=2), decode=decode)
    samples = LocalSamples(Runs([chunk]), evaluator, MicroBatch(1), tmp_path / "scratch")
    steps = tuple(Step(step_index=i, timestep=1.0, latent_coef=0.6, output_coefs=(0.0,)) for i in (0, 1))
    kept = outcome_arrays(samples, Program(payload="output", steps=steps), 2, shown=1, worst=3)
    assert kept["positions"].tolist() == [0, 1, 2]
    assert kept["errors"] == pytest.approx(np.array([[0, 0], [0.1 / 0.5] * 2, [0.11 / 0.25] * 2]), rel=1e-5)
    assert kept["latents"] == pytest.approx(0.36 * np.array([3.0, 4.0]))
    assert kept["worst"].tolist() == [1, 0] and kept["worst_pictures"].shape[0] == 2 and kept["pictures"].shape[0] == 1
    assert kept["pictures"][0, 0, 0, 0] == round(255 * 0.36 * 3 / 10)


def test_sheets_hold_the_pictures_that_were_rolled_out(reports):
    _, evidence, shown = sample(**CASES["latencies"])
    sheet = pictures_sheet(evidence)
    with Image.open(reports["latencies"] / "report" / "pictures.png") as image:
        cells = [np.asarray(sheet.cut(image, 1, column)) for column in range(10)]
    expected = [shown.full[1], *(shown.budgets[b][1] for b in (16, 8, 4))]
    expected += [difference_map(shown.budgets[b][1], shown.full[1]) for b in (16, 8, 4)]
    expected += [shown.peers[b][1] for b in (16, 8, 4)]
    assert all(np.array_equal(cell, picture) for cell, picture in zip(cells, expected, strict=True))
    with Image.open(reports["latencies"] / "report" / "worst.png") as image:
        cells = [np.asarray(worst_sheet(evidence).cut(image, 4, column)) for column in range(3)]
    full, own = (pictures[1] for pictures in shown.worst[8])
    assert all(np.array_equal(c, p) for c, p in zip(cells, (full, own, difference_map(own, full)), strict=True))


@pytest.fixture
def artifact(compiled, tmp_path):
    target = tmp_path / "artifact"
    shutil.copytree(compiled, target)
    return target


def test_a_report_is_drawn_again_with_latencies(artifact):
    before = Artifact.open(artifact).manifest
    save_latencies(Artifact.open(artifact), {"2": 0.25, "4": 0.5, "full": 1.0})
    result = otc("report", str(artifact), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"report": str(artifact / "report.html"), "latencies": ["2", "4", "full"]}
    page = (artifact / "report.html").read_text()
    assert "0.25 s, 4.0× as fast" in page and "No latency" not in page
    assert Artifact.open(artifact).verify().digest == before.digest
    assert Artifact.open(artifact).manifest.attachments != before.attachments
    assert not [path.name for path in artifact.parent.iterdir() if path.name != "artifact"], "nothing is left beside it"
    once = (artifact / "manifest.json").read_bytes()
    assert otc("report", str(artifact)).exit_code == 0 and (artifact / "manifest.json").read_bytes() == once


def test_a_redraw_that_is_cut_off_leaves_a_whole_artifact(artifact, monkeypatch):
    save_latencies(Artifact.open(artifact), {"2": 0.25})
    replace, calls = whole_files.os.replace, []

    def failing(source, target):
        calls.append(target)
        if Path(target).name == "report.html":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(whole_files.os, "replace", failing)
    result = otc("report", str(artifact))
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1 and calls
    monkeypatch.undo()
    Artifact.open(artifact).verify()
    assert otc("report", str(artifact)).exit_code == 0
    Artifact.open(artifact).verify()


def test_a_report_is_not_drawn_from_what_is_not_the_artifacts(artifact, tmp_path):
    def refused(folder, expected):
        result = otc("report", str(folder))
        assert result.exit_code == 4 and expected in result.stderr, result.output
        assert len(result.stderr.strip().splitlines()) == 1 and "Traceback" not in result.output

    refused(tmp_path, "is no artifact: found no manifest.json")
    path = artifact / "report" / "evidence.json"
    text = path.read_text()
    path.write_text(text.replace('"shown":', '"showm":'))
    refused(artifact, "does not match its digest")
    path.unlink()
    refused(artifact, "is missing")
    (artifact / "manifest.json").write_text("{")
    refused(artifact, "manifest.json: found Expecting")


@pytest.mark.parametrize(
    "change", [{"shown": 99}, {"sigmas": [1.0]}, {"timesteps": []}, {"budgets": [{"budget": 4}]}, {"prompts": {}}]
)
def test_damaged_evidence_is_named(change, tmp_path):
    value = json.loads(sample(sigmas=FLOW)[1].model_dump_json())
    (tmp_path / "evidence.json").write_text(json.dumps({**value, **change}))
    with pytest.raises(ArtifactError, match="is damaged"):
        read_evidence(tmp_path)
    (tmp_path / "evidence.json").write_text(json.dumps(value))
    assert read_evidence(tmp_path) == Evidence.model_validate(value)
