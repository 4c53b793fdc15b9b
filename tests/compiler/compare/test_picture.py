"""A comparison's picture: who is drawn, and how."""

from __future__ import annotations

import json

from PIL import Image

from otcache.artifacts.comparisons import draw_pictures, model_name, picture_name, read_comparisons
from otcache.compiler.compare.cells import DEFAULT, peers_at
from otcache.compiler.compare.picture import BEST, draw_comparison, ranked_rivals


def test_who_leads_the_others_at_a_budget_is_among_the_named():
    for comparison in read_comparisons():
        rivals = ranked_rivals(comparison)
        assert sorted(rivals) == sorted({cell.method for cell in comparison.cells} - {DEFAULT})
        for budget in comparison.budgets:
            best = max(peers_at(comparison.cells, budget), key=lambda cell: cell.psnr_db.mean)
            assert best.method in rivals[:BEST]


def test_every_model_has_its_picture(tmp_path):
    comparison = read_comparisons()[0]
    draw_comparison(comparison, tmp_path / "one.png")
    assert Image.open(tmp_path / "one.png").size == (1680, 700)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "some.json").write_text(json.dumps(comparison.json()))
    draw_pictures(tmp_path)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [picture_name(model_name(comparison))]
