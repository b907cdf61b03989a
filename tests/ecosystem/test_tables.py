"""docs/bring-your-own.md says what the tests try, no more and no less."""

from __future__ import annotations

from tests.ecosystem.combinations import COMBINATIONS, INIT
from tests.ecosystem.networks import NETWORKS
from tests.ecosystem.tables import PAGE, fill, make_tables


def test_the_page_has_the_tables_of_today() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == fill(text, make_tables()), "python -m tests.ecosystem.tables writes them"
    assert f"{len(COMBINATIONS)} combinations" in text


def test_there_are_as_many_combinations_as_promised() -> None:
    names = [combination.name for combination in COMBINATIONS]
    assert len(names) >= 40
    assert len(set(names)) == len(names)
    assert names == list(INIT)
    assert {combination.network for combination in COMBINATIONS} == set(NETWORKS)


def test_each_library_has_a_combination_that_the_usual_tests_run() -> None:
    quick = {combination.name for combination in COMBINATIONS if combination.quick}
    assert quick == {"timm", "lightning-objects", "hf-folder", "fastai", "medmnist"}
