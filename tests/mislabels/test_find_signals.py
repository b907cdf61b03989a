"""The signals beside each other: each against its formula, what there is of them, and one example explained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.metrics import average_precision, bootstrap_precision
from influence_cli.mislabels.evaluation import qualities
from tests.conftest import Command
from tests.mislabels.test_find import Exact, by_index, exact, ranked, rows_of


@pytest.fixture(scope="module")
def folder(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(trained, tmp_path_factory.mktemp("signals") / "project"))


@pytest.fixture(scope="module")
def truth(folder: Path) -> Exact:
    return exact(folder)


@pytest.mark.slow
def test_the_default_needs_no_store_and_takes_one_that_is_there(
    influence: Command, trained: Path, truth: Exact, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    for store in project.glob("*.h5"):
        store.unlink()
    without = ranked(influence, project)
    assert set(without["self_influence"]) == {None}
    assert not list(project.glob("*.h5"))
    influence("gradients", cwd=project)
    done = ranked(influence, project)
    assert by_index(done, "self_influence") == pytest.approx(truth.self_influence(0.0), rel=1e-3)
    assert done["index"].tolist() == without["index"].tolist()


@pytest.mark.slow
def test_a_store_of_something_else_is_left_alone_with_a_warning(
    influence: Command, trained: Path, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    influence("gradients", "--overwrite", cwd=project)
    before = (project / "influence.h5").read_bytes()
    state = torch.load(project / "model.pt")
    torch.save({name: value * 1.1 for name, value in state.items()}, project / "model.pt")
    done = influence("mislabels", cwd=project)
    assert {row["self_influence"] for row in rows_of(done.out)} == {None}
    assert "warning: no self_influence: " in done.err
    assert (project / "influence.h5").read_bytes() == before


@pytest.mark.slow
def test_gradient_norm_is_that_of_the_example_gradient(influence: Command, folder: Path, truth: Exact) -> None:
    for on, wanted in (("train", truth), ("test", exact(folder, "test"))):
        table = ranked(influence, folder, "--on", on, "--signal", "gradient-norm", "--signals")
        norms = wanted.gradients.norm(dim=1).numpy()
        assert by_index(table, "signal_gradient_norm") == pytest.approx(norms, rel=1e-4)


def test_test_influence_is_the_mean_fall_of_the_test_losses(influence: Command, folder: Path, truth: Exact) -> None:
    table = ranked(influence, folder, "--signal", "test-influence", "--signals")
    matrix = truth.hessian + 0.01 * torch.eye(500, dtype=torch.float64)
    mean = exact(folder, "test").gradients.mean(dim=0)
    influence_of_each = (truth.gradients @ torch.linalg.solve(matrix, mean) / 320).numpy()
    assert by_index(table, "signal_test_influence") == pytest.approx(-influence_of_each, rel=1e-3, abs=1e-8)
    assert table["index"][0] == influence_of_each.argmin()


@pytest.mark.slow
def test_tracin_is_the_mean_square_of_the_norm_over_checkpoints(
    influence: Command, folder: Path, truth: Exact, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(folder, tmp_path / "project"))
    state = torch.load(project / "model.pt")
    torch.save({name: value * 0.5 for name, value in state.items()}, project / "early.pt")
    words = ("-s", "model.checkpoint=[early.pt, model.pt]", "--signals", "--signal", "tracin")
    table = ranked(influence, project, *words)
    early = exact(project, checkpoint="early.pt")
    squares = (truth.gradients.square().sum(dim=1) + early.gradients.square().sum(dim=1)).numpy() / 2
    assert by_index(table, "signal_tracin") == pytest.approx(squares, rel=1e-4)
    norms = (truth.gradients.norm(dim=1) + early.gradients.norm(dim=1)).numpy() / 2
    assert by_index(table, "signal_gradient_norm") == pytest.approx(norms, rel=1e-4)
    assert by_index(table, "signal_loss") == pytest.approx((truth.losses + early.losses) / 2, abs=1e-5)


@pytest.mark.slow
def test_probabilities_from_elsewhere_are_a_signal(influence: Command, folder: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    soft = generator.dirichlet(np.ones(10), 320)
    soft[7, :] = 0.1
    np.save(tmp_path / "p.npy", soft)
    table = ranked(influence, folder, "--pred-probs", tmp_path / "p.npy", "--signal", "pred-probs")
    labels = exact(folder).labels
    assert by_index(table, "score") == pytest.approx(1 - soft[np.arange(320), labels], abs=1e-9)
    assert by_index(table, "confidence") == pytest.approx(soft.max(axis=1), abs=1e-9)
    done = influence("mislabels", "--signals", "--pred-probs", tmp_path / "p.npy", "--top", 1, cwd=folder)
    assert "signal_pred_probs" in rows_of(done.out)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--signal", "nonsense"), "there is no such signal"),
        (("--signal", "tracin"), "it needs several checkpoints"),
        (("--signal", "pred-probs"), "it needs --pred-probs FILE"),
        (("--signal", "test-influence", "--on", "test"), "it scores training examples"),
        (("--signal", "self-influence", "-s", "curvature.method=cg"), "it would need one solve per example"),
        (("--top", "some"), "--top some: not a number from 1 and not auto"),
        (("--top", "0"), "--top 0: not a number from 1 and not auto"),
        (("--explain", "320"), "--explain 320: there is no such train example in use"),
        (("--pred-probs", "none.npy"), "--pred-probs: there is no file none.npy"),
    ],
)
def test_what_cannot_be_had_is_refused(influence: Command, folder: Path, words: tuple[str, ...], message: str) -> None:
    done = influence("mislabels", *words, cwd=folder, code=2)
    assert done.out == ""
    assert f"error: {message}" in done.err.replace(f"--signal {words[1]}: ", "")


def relabelled(folder: Path, labels: np.ndarray) -> tuple[str, ...]:
    np.save(folder / "labels.npy", labels)
    return ("-s", "train.labels=labels.npy", "-s", "gradients.store=other.h5")


@pytest.mark.slow
def test_a_rare_class_and_a_single_one_are_named(
    influence: Command, trained: Path, truth: Exact, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    labels = truth.labels.copy()
    own = np.flatnonzero(labels == 3)
    labels[own[2:]] = 4
    words = relabelled(project, labels)
    done = influence("mislabels", "--all", "--format", "json", "--signals", *words, cwd=project)
    rows = json.loads(done.out)
    assert "these have fewer and are not judged, they come last without a score: Dress (2)" in done.err
    assert [row["index"] for row in rows[-2:]] == own[:2].tolist()
    for row in rows:
        rare = row["index"] in own[:2]
        assert (row["label"] == "Dress") == rare
        for name in ("score", "suggested", "confidence", "signal_combined", "signal_readout"):
            assert (row[name] is None) == rare
        assert row["loss"] == pytest.approx(row["signal_loss"])
    last = influence("mislabels", "--all", "--format", "csv", *words, cwd=project).out.splitlines()[-1]
    assert last.split(",")[3:7] == ["Dress", "", "", ""]
    options = ("--report", "page.html", "--plot", "plot.png", "--top", "auto")
    influence("mislabels", "--signal", "loss", *options, *words, cwd=project)
    done = influence("mislabels", *relabelled(project, np.full(320, 5)), cwd=project, code=2)
    assert "all 320 labels are" in done.err


def test_one_example_is_explained(influence: Command, folder: Path, truth: Exact) -> None:
    rows = rows_of(influence("mislabels", "--explain", 42, cwd=folder).out)
    signals = {row["name"]: row for row in rows if row["kind"] == "signal"}
    neighbours = [row for row in rows if row["kind"] == "neighbour"]
    assert {"combined", "readout", "neighbours", "logistic", "loss", "margin", "self-influence"} <= set(signals)
    assert signals["loss"]["value"] == pytest.approx(truth.losses[42], abs=1e-5)
    assert signals["loss"]["percentile"] == pytest.approx(np.mean(truth.losses < truth.losses[42]), abs=0.01)
    assert all(row["index"] == 42 for row in signals.values())
    assert len(neighbours) == 10
    assert all(row["index"] != 42 for row in neighbours)
    near = [row["value"] for row in neighbours]
    assert near == sorted(near, reverse=True)
    labels = truth.labels.tolist()
    names = sorted({path.parent.name for path in (folder / "train").glob("*/*")})
    assert [row["label"] for row in neighbours] == [names[labels[int(str(row["index"]))]] for row in neighbours]


def test_duplicates_with_two_labels_are_found_and_shown(influence: Command, trained: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    first, second = sorted((project / "train").iterdir())[:2]
    image = sorted(first.iterdir())[0]
    shutil.copy(image, second / "copy.png")
    done = influence("mislabels", "-o", "rows.csv", "--report", "page.html", cwd=project)
    assert "also: 1 duplicate pair with different labels" in done.err
    pair = json.loads((project / "rows.csv.run.json").read_text())["besides"]["duplicates"]
    assert [sorted(Path(one["path"]).name for one in two) for two in pair] == [sorted((image.name, "copy.png"))]
    assert {one["label"] for one in pair[0]} == {first.name, second.name}
    page = (project / "page.html").read_text()
    assert "Duplicates with different labels" in page
    assert "Which classes are mixed up" in page


def test_the_run_file_holds_the_estimate_of_the_noise(influence: Command, folder: Path, tmp_path: Path) -> None:
    done = influence("mislabels", "--top", "auto", "-o", tmp_path / "rows.csv", cwd=folder)
    noise = json.loads((tmp_path / "rows.csv.run.json").read_text())["noise"]
    assert noise["count"] == round(noise["rate"] * 320)
    assert f"between {noise['low']} and {noise['high']} of 320 labels are wrong" in done.err
    assert noise["low"] == min(noise["ways"].values()) <= noise["count"] == noise["ways"]["combined"] <= noise["high"]
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + noise["count"]
    assert np.sum(noise["joint"]) == pytest.approx(1)
    pairs = [pair["count"] for pair in noise["pairs"]]
    assert pairs == sorted(pairs, reverse=True)
    assert any(cut["first"] == noise["count"] for cut in noise["expected_precision"])


def test_the_bootstrap_draws_examples_with_replacement() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(300) < 0.2
    scores = np.round(truth + generator.normal(size=300), 1)  # with ties
    low, high = bootstrap_precision(scores, truth, samples=400)
    values = []
    for _ in range(400):
        drawn = generator.integers(0, 300, 300)
        values.append(average_precision(scores[drawn], truth[drawn]))
    assert (low, high) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))), abs=0.03)
    assert low < average_precision(scores, truth) < high


def test_the_best_signal_comes_first_and_random_last() -> None:
    truth = np.arange(50) < 10
    table = qualities({"bad": np.arange(50.0), "good": -np.arange(50.0)}, truth, {"good": 0.5})
    assert [quality.signal for quality in table] == ["good", "bad", "random"]
    assert [quality.suggested for quality in table] == [0.5, None, None]
    assert table[0].average_precision == 1
    assert table[0].interval == (1, 1)
