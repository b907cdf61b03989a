"""The example notebook runs, cell by cell, and shows what its text says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_example_notebook_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(codes) == 8
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(codes):
        exec(compile(code, f"cell {number}", "exec"), names)
    told = capsys.readouterr().out
    found = int(told.partition(" of the first 60")[0])
    assert found >= 30  # 6 by chance
    for name in ("suspects", "ranking"):
        html = names[name]._repr_html_()  # type: ignore[attr-defined]
        assert "<img" in html
        assert "no picture" not in html
        assert "<script" not in html
    for page in ("labels.html", "why.html"):
        assert (tmp_path / page).stat().st_size > 50_000


def test_the_example_notebook_is_stored_without_outputs() -> None:
    book = json.loads(NOTEBOOK.read_text())
    codes = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in codes)
