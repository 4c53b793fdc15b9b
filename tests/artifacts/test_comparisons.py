"""What the results page says of peers that were mended, computed from two comparisons."""

from __future__ import annotations

from dataclasses import replace

from otcache.artifacts.comparisons import comparison_sections, mended_parts, model_name, read_before, read_comparisons
from otcache.compiler.compare.cells import DEFAULT


def better(cell, by):
    return replace(cell, psnr_db=replace(cell.psnr_db, mean=cell.psnr_db.mean + by))


def test_before_and_after_are_told_of_the_peers_that_changed():
    before = read_comparisons()[0]
    peers = list(dict.fromkeys(cell.method for cell in before.cells if cell.method != DEFAULT))
    budget, mended = before.budgets[0], peers[0]
    changes = {mended: 2.0, peers[1]: 0.01, DEFAULT: 5.0}
    cells = [better(cell, changes.get(cell.method, 0.0) if cell.budget == budget else 0.0) for cell in before.cells]
    added = replace(before.cells[-1], method="another", budget=budget)
    lead, table = mended_parts(before, replace(before, cells=(*cells, added)))
    assert "new since are another:" in lead
    rows = table.splitlines()
    assert rows[0].count("B = ") == len(before.budgets) and len(rows) == 3
    old = before.cell(mended, budget).psnr_db.mean
    assert rows[2].startswith(f"| {mended} | {old:.1f} → {old + 2:.1f} (+2.0) |")
    assert mended_parts(before, before) == []


def test_the_first_audits_comparisons_are_kept_for_every_model():
    kept, before = read_comparisons(), read_before()
    assert before.keys() == {model_name(each) for each in kept}
    now = [replace(each, cells=tuple(better(cell, 1.0) for cell in each.cells)) for each in kept]
    assert comparison_sections(now, before).count("Peers before and after") == len(before)
