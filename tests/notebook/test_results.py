"""Results of a `Debugger`: frozen, as a table of pandas, as cards, as pages."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from influence_cli import InfluenceError
from influence_cli.notebook.results import LabelSuspects, Ranking
from tests.notebook.test_debugger import debugger_of


@pytest.fixture
def results(tiny: Path) -> tuple[LabelSuspects, Ranking]:
    debugger = debugger_of(tiny)
    return debugger.mislabels(), debugger.rank(0, 2, top=3)


def test_a_result_is_frozen_and_short_to_print(results: tuple[LabelSuspects, Ranking]) -> None:
    suspects, ranking = results
    for result in results:
        with pytest.raises(dataclasses.FrozenInstanceError):
            result.rows = ()  # type: ignore[misc]
        assert len(repr(result)) < 300
    assert len(suspects) == 24
    assert len(ranking) == len(ranking.helpful) + len(ranking.harmful)
    assert suspects.flagged == suspects.rows[: len(suspects.flagged)]
    assert ranking.influence.shape == (2, 24)


def test_a_table_has_the_columns_of_the_command(results: tuple[LabelSuspects, Ranking]) -> None:
    pytest.importorskip("pandas")
    suspects, ranking = results
    table = suspects.to_pandas()
    assert list(table.columns)[:5] == ["rank", "index", "path", "label", "suggested"]
    assert table["index"].tolist() == [row["index"] for row in suspects.rows]
    assert table["flagged"].sum() == len(suspects.flagged)
    effects = ranking.to_pandas()
    assert list(effects.columns)[-1] == "influence"
    assert ((effects.influence > 0) == (effects.effect == "helpful")).all()


def test_without_pandas_it_is_said(results: tuple[LabelSuspects, Ranking], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pandas" else find_spec(name))
    for result in results:
        with pytest.raises(InfluenceError, match="needs pandas, which is not installed") as error:
            result.to_pandas()
        assert error.value.hint == "pip install pandas; or use .rows"


def test_cards_show_pictures_and_no_more_than_a_notebook_bears(results: tuple[LabelSuspects, Ranking]) -> None:
    suspects, ranking = (result._repr_html_() for result in results)
    assert suspects.count("<img") == 12
    assert "The first 12 of 24" in suspects
    # Two test examples, and three helpful and three harmful images of each.
    assert ranking.count("<img") == 2 + len(results[1].rows)
    assert "Most harmful" in ranking
    for html in (suspects, ranking):
        assert not re.search(r"<(script|link|style)|http", html)


def test_pages_are_those_of_the_commands(results: tuple[LabelSuspects, Ranking], tmp_path: Path) -> None:
    suspects, ranking = results
    labels = suspects.report(tmp_path / "labels.html").read_text()
    why = ranking.report(str(tmp_path / "why.html"), top=2).read_text()
    assert "influence mislabels" in labels
    assert "Debugger(model, train, test).rank(0, 2)" in why
    for page in (labels, why):
        assert "Sequential" in page
        assert "pytest" not in page.partition("<code>")[2].partition("</code>")[0]
    with pytest.raises(InfluenceError, match=r"a page must be \.html"):
        suspects.report(tmp_path / "labels.pdf")
    with pytest.raises(InfluenceError, match="none"):
        suspects.report(tmp_path / "none" / "labels.html")
