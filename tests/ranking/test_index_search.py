"""rank --approximate: the rows and numbers of the exact ranking, by any kind of index, or one line that says why."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.config.load import load_config
from influence_cli.model.task import load_tasks
from influence_cli.precompute.prepare import prepare_all
from influence_cli.ranking import index_build
from influence_cli.ranking.index_search import Spent, pair_products
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.store import Store
from tests.conftest import Command, edit
from tests.support.copies import copied
from tests.support.small_project import flip, place_of, refusal

Row = dict[str, str]


def ranked(influence: Command, project: Path, *words: object) -> list[Row]:
    """Give the rows of rank."""
    return list(csv.DictReader(influence("rank", *words, "--format", "csv", cwd=project).out.splitlines()))


def check_same(found: list[Row], exact: list[Row]) -> None:
    """Compare two rankings: the same examples in the same order, and the same numbers to float32's rounding."""
    assert found
    assert [list(row) for row in found] == [list(row) for row in exact]
    assert [row | {"influence": ""} for row in found] == [row | {"influence": ""} for row in exact]
    a, b = (np.array([float(row["influence"]) for row in rows]) for rows in (found, exact))
    assert np.allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())


@pytest.fixture
def indexed(stored: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the project with a complete store, for an index."""
    with copied(stored, tmp_path / "project") as folder:
        yield folder


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 320 rows be many."""
    monkeypatch.setattr(index_build, "FLAT_BELOW", 100)


def test_by_a_flat_index_the_ranking_is_the_exact_one(influence: Command, indexed: Path) -> None:
    done = influence("index", cwd=indexed)
    assert done.out == ""
    assert "flat (float32 rows, exact)" in done.err
    assert "recall@10 1.000 ± 0.000 against the exact scan for 32 test examples" in done.err
    assert done.err.splitlines()[-1] == "next: influence rank 17 --approximate"
    for words in ((3, "40:44", "--target", "predicted"), ("0:20", "--aggregate", "--top", 3)):
        check_same(ranked(influence, indexed, *words, "--approximate"), ranked(influence, indexed, *words))
    file = next((indexed / "test").rglob("*.png"))
    check_same(ranked(influence, indexed, file, "--approximate"), ranked(influence, indexed, file))


@pytest.mark.parametrize(
    "settings",
    [
        ("curvature.method=fisher", "curvature.damping=0.01"),
        ("curvature.method=identity",),
        ("curvature.method=ekfac", "gradients.store_dtype=int8"),
    ],
)
def test_so_it_is_for_every_curvature_with_coordinates(
    influence: Command, tiny: Path, settings: tuple[str, ...]
) -> None:
    words = [word for setting in settings for word in ("-s", setting)]
    influence("index", *words, cwd=tiny)
    check_same(ranked(influence, tiny, 3, 5, "--approximate", *words), ranked(influence, tiny, 3, 5, *words))


@pytest.mark.parametrize("kind", ["float16", "product codes"])
def test_by_lists_nearly_all_are_found_and_their_influence_is_exact(
    influence: Command, indexed: Path, lists: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "product codes":
        monkeypatch.setattr(index_build, "HALF_BYTES", 0)
    assert f"{kind}" in influence("index", cwd=indexed).err
    done = influence("rank", "0:80", "--approximate", "-o", "found.csv", cwd=indexed)
    found = list(csv.DictReader((indexed / "found.csv").read_text().splitlines()))
    exact = {
        (row["test"], row["effect"], row["index"]): float(row["influence"])
        for row in ranked(influence, indexed, "0:80")
    }
    rows = {(row["test"], row["effect"], row["index"]): float(row["influence"]) for row in found}
    assert len(rows) == len(exact)
    both = exact.keys() & rows.keys()
    said = json.loads((indexed / "found.csv.run.json").read_text())["approximate"]
    (index,) = said["indexes"]
    assert index["kind"] == kind
    assert 1 <= index["probes"] <= index["lists"] == 36
    at10 = index["recall"][0]
    assert at10["tests"] == 32
    # 1,600 rows; the interval is of the mean of 32 test examples.
    assert len(both) / len(exact) >= at10["mean"] - 2 * at10["interval"] - 0.01
    assert len(both) / len(exact) >= 0.95
    assert all(rows[key] == pytest.approx(exact[key], rel=1e-4, abs=1e-9) for key in both)
    assert f"recall@10 {at10['mean']:.3f}" in done.err
    assert said["blocks_read"] <= said["blocks"] == 5
    assert said["queries"] == 80
    slow = said["search_seconds"] + said["scoring_seconds"] > index["exact_seconds"] * 80 / index["exact_tests"]
    assert ("without --approximate this many test examples are faster" in done.err) == slow


def test_where_the_lists_hold_too_few_more_are_looked_into(influence: Command, indexed: Path, lists: None) -> None:
    influence("index", cwd=indexed)
    words = (3, 4, "--top", 200)
    done = influence("rank", *words, "--approximate", "--format", "csv", cwd=indexed)
    check_same(list(csv.DictReader(done.out.splitlines())), ranked(influence, indexed, *words))
    assert "it was not measured for more, but 200 are requested" in done.err


def test_of_several_checkpoints_the_mean_is_ranked(influence: Command, tiny: Path) -> None:
    state = torch.load(tiny / "model.pt", weights_only=True)
    torch.save({name: value * 0.5 for name, value in state.items()}, tiny / "two.pt")
    edit(tiny, "checkpoint: model.pt", "checkpoint: [model.pt, two.pt]")
    assert influence("index", cwd=tiny).err.count(".h5.index (") == 2
    check_same(ranked(influence, tiny, 3, 5, "--approximate"), ranked(influence, tiny, 3, 5))
    (tiny / "influence.1.h5.index").unlink()
    assert "there is no index influence.1.h5.index" in refusal(influence, tiny, "rank", 3, "--approximate")


def test_without_test_examples_recall_is_of_training_examples(influence: Command, tiny: Path) -> None:
    text = (tiny / "influence.yaml").read_text()
    (tiny / "influence.yaml").write_text(text[: text.index("test:")] + text[text.index("gradients:") :])
    assert "training examples drawn at random" in influence("index", cwd=tiny).err
    file = next((tiny / "test").rglob("*.png"))
    check_same(ranked(influence, tiny, file, "--approximate"), ranked(influence, tiny, file))


def test_what_cannot_be_read_is_no_candidate(influence: Command, tiny: Path) -> None:
    next((tiny / "train").rglob("*.png")).write_bytes(b"no image")
    influence("index", "--skip-unreadable", cwd=tiny)
    words = (0, 3, "--top", 24, "--skip-unreadable")
    found = ranked(influence, tiny, *words, "--approximate")
    assert len(found) == 2 * 23
    check_same(found, ranked(influence, tiny, *words))


def test_products_of_pairs_are_those_of_the_rows(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stored)
    config = load_config(Path("influence.yaml"), ())
    (prepared,) = prepare_all(config, load_tasks(config), Terminal(quiet=True))
    with Store.open(prepared.path) as store:
        rows = torch.cat([torch.from_numpy(part) for _, part in store.scan()])
    left = torch.randn(7, rows.shape[1], generator=torch.Generator().manual_seed(0))
    generator = np.random.default_rng(0)
    chosen = np.sort(generator.choice([*range(64), *range(200, 250)], 60))
    tests = generator.integers(0, 7, 60)
    spent = Spent()
    found = pair_products(prepared, left, tests, chosen, spent)
    expected = (left[tests].double() * rows[chosen].double()).sum(dim=1).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert spent.blocks_read == 2


def test_a_damaged_block_is_told_before_a_number_of_it_is_printed(influence: Command, tiny: Path) -> None:
    influence("index", cwd=tiny)
    flip(tiny / "influence.h5", place_of(tiny, "coordinates", 20))
    message = refusal(influence, tiny, "rank", 0, "--top", 24, "--approximate")
    assert "influence.h5 is damaged: the checksum of block 2 does not match" in message
    assert "influence gradients --repair" in message


@pytest.mark.parametrize(
    "words",
    [
        (3, "--all"),
        (3, "--matrix", "m.h5"),
        (3, "--report", "r.html"),
        (3, "--plot", "p.svg"),
        (3, "--normalise", "relatif"),
        (3, "--damping-sweep"),
        (3, "--on-the-fly"),
        ("--train", 3),
    ],
)
def test_what_it_does_not_go_with_is_refused(influence: Command, tiny: Path, words: tuple[object, ...]) -> None:
    before = sorted(tiny.iterdir())
    option = next(str(word) for word in words if str(word).startswith("--"))
    message = refusal(influence, tiny, "rank", *words, "--approximate")
    assert message == (
        f"error: --approximate finds only the strongest influences: it cannot be combined with {option}\n"
        "  leave one of them out"
    )
    assert sorted(tiny.iterdir()) == before


def test_a_solver_has_no_index(influence: Command, tiny: Path) -> None:
    before = sorted(tiny.iterdir())
    for words in (("index",), ("rank", 3, "--approximate")):
        message = refusal(influence, tiny, *words, "-s", "curvature.method=cg")
        assert "cg has no spectrum to precondition index rows with" in message
    assert sorted(tiny.iterdir()) == before


def test_without_an_index_the_command_that_makes_it_is_named(influence: Command, tiny: Path) -> None:
    message = refusal(influence, tiny, "rank", 3, "--approximate")
    assert message == "error: there is no index influence.h5.index\n  influence index creates it"
    assert not (tiny / "influence.h5").exists()


def test_without_faiss_the_extra_is_named(influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "faiss" else real(name, *rest))
    for words, what in ((("index",), "influence index"), (("rank", 3, "--approximate"), "--approximate")):
        assert refusal(influence, tiny, *words) == (
            f"error: {what} needs faiss, which is not installed\n  pip install 'influence-cli[index]'"
        )
