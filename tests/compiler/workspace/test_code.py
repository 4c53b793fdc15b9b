"""What one state of our code has computed is not taken for another's."""

from __future__ import annotations

import shutil
from pathlib import Path

import otcache.compiler
from otcache.compiler.workspace.code import ROOMS, code_digest, digest_of_code

COMPILER = Path(otcache.compiler.__file__).resolve().parent


def test_a_changed_fit_is_seen(tmp_path):
    shutil.copytree(COMPILER, tmp_path / "compiler", ignore=shutil.ignore_patterns("__pycache__"))
    before = digest_of_code(tmp_path / "compiler")
    assert before == code_digest() == digest_of_code(COMPILER)
    seen = {before}
    for room in ROOMS:
        path = sorted((tmp_path / "compiler" / room).glob("*.py"))[-1]
        path.write_text(path.read_text() + "# changed\n")
        seen.add(digest_of_code(tmp_path / "compiler"))
    assert len(seen) == 1 + len(ROOMS)
    (tmp_path / "compiler" / "cli" / "compile.py").write_text("")
    assert digest_of_code(tmp_path / "compiler") in seen, "the command line computes nothing"
