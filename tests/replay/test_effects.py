"""Influence by replay: against the exact Hessian, trainings without an image, and the commands against each other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from influence_cli.config.load import load_config
from influence_cli.data.batches import read_batches
from influence_cli.metrics import pearson, slope
from influence_cli.model.task import load_tasks
from influence_cli.replay import effects
from influence_cli.replay.effects import RunEffects
from influence_cli.replay.open import open_run
from influence_cli.replay.outcomes import losses_of
from influence_cli.steps.forward import WithImage, run_again
from tests.conftest import Command
from tests.support import ranks
from tests.support.copies import copied
from tests.support.recipe_project import SOFTMAX, TESTS, TO_MINIMUM, N, influences, make, rows
from tests.support.small_project import refusal


@pytest.fixture
def project(run_project: Path, tmp_path: Path) -> Iterator[Path]:
    with copied(run_project, tmp_path / "project") as folder:
        yield folder


def opened(project: Path) -> tuple[RunEffects, Tensor, Tensor]:
    """Open the run of a project without its verdict; with its test examples."""
    config = load_config(project / "influence.yaml")
    (task,) = load_tasks(config)
    (batch,) = read_batches(task.labelled_tests(), np.arange(TESTS), TESTS)
    return RunEffects(open_run(config, task), None), batch.inputs, batch.targets


def ignore(_count: float) -> None:
    """Show no progress."""


def test_at_a_minimum_it_is_influence_by_the_exact_hessian_and_leaving_one_out(
    influence: Command, tmp_path: Path
) -> None:
    project = make(tmp_path, TO_MINIMUM, model=SOFTMAX, l2=TO_MINIMUM["weight_decay"])
    influence("train", cwd=project)
    run, inputs, targets = opened(project)
    inputs, targets = inputs[:3], targets[:3]

    by_replay = influences(influence, project, "0:3", "-s", "curvature.method=replay")

    exact = influences(influence, project, "0:3", "-s", "curvature.method=explicit", "-s", "curvature.matrix=hessian")
    assert np.abs(by_replay - exact).max() < 0.01 * np.abs(exact).max()
    replayed, chosen = run.replayed, [1, 17, 42]
    actual = []
    for left_out in chosen:
        weights = np.ones(N)
        weights[left_out] = 0
        state = run_again(replayed.network, replayed.run, weights)
        actual.append(losses_of(replayed.task, replayed.network, state, inputs, targets))
    changes = (np.array(actual) - losses_of(replayed.task, replayed.network, run.last, inputs, targets)).T
    assert pearson(by_replay[:, chosen].ravel(), changes.ravel()) > 0.999
    assert abs(slope(by_replay[:, chosen].ravel(), changes.ravel()) - 1) < 0.1  # what is left is of second order


def test_a_training_image_and_a_test_image_agree_on_their_pair(influence: Command, project: Path) -> None:
    forwards = {row["test"]: row["influence"] for row in rows(influence, project, "rank", "--train", 7, "--all")}

    backwards = influences(influence, project, f"0:{TESTS}")

    assert list(forwards) != []
    for test, value in forwards.items():
        assert value == pytest.approx(backwards[test, 7], rel=1e-4)


def test_an_aggregate_is_the_mean(influence: Command, project: Path) -> None:
    single = influences(influence, project, "0:4")

    mean = influences(influence, project, "0:4", "--aggregate")

    assert np.allclose(mean[0], single.mean(axis=0), rtol=1e-4, atol=1e-7)


def test_what_is_replayed_once_is_read(influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = influences(influence, project, 3)

    monkeypatch.setattr(effects, "replay", lambda *_: pytest.fail("replayed again"))

    assert np.array_equal(influences(influence, project, 3), first)


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(project: Path, run_project: Path) -> None:
    alone = ranks.run(project, "rank", "0:4", "--format", "json", ranks=1)
    (project / "influence.run" / "replays").rename(project / "others")

    both = ranks.run(project, "rank", "0:4", "--format", "json")

    for one, other in zip(json.loads(alone.out[0]), json.loads(both.out[0]), strict=True):
        assert one.pop("influence") == pytest.approx(other.pop("influence"), rel=1e-5)
        assert one == other
    assert len(list((project / "influence.run" / "replays").iterdir())) == 4


def test_groups_are_sums_and_select_drops_the_least_useful(influence: Command, project: Path) -> None:
    mean = influences(influence, project, f"0:{TESTS}", "--aggregate")[0]
    single = influences(influence, project, "0:2")

    groups = {row["group"]: row["influence"] for row in rows(influence, project, "groups", "0:2")}
    dropped = rows(influence, project, "select", "--keep", 0.9, "--by", "influence")

    sums = single.mean(axis=0).reshape(3, 20).sum(axis=1)  # 20 images of each class, in their order
    assert [groups[name] for name in "abc"] == pytest.approx(sums.tolist(), rel=1e-3, abs=1e-6)
    assert [row["usefulness"] for row in dropped] == pytest.approx(
        [mean[row["index"]] for row in dropped], rel=1e-4, abs=1e-7
    )


def test_slopes_of_pixels_are_those_of_whole_trainings(tmp_path: Path, influence: Command) -> None:
    project = make(tmp_path, {"lr": 0.2, "momentum": 0.9, "batch": 20, "epochs": 3, "precision": "float64"})
    influence("train", cwd=project)
    run, inputs, targets = opened(project)
    network, own = run.replayed.network, run.replayed.run
    image = own.data.take(np.array([5]))[0][0]  # type: ignore[attr-defined]

    weights, pixels = run.image_slopes(5, inputs[:2], targets[:2], ignore)

    assert np.allclose(weights, run.slopes(inputs[:2], targets[:2], ignore)[:, 5], rtol=1e-9)
    for row, column in ((0, 0), (3, 6)):
        ends = []
        for sign in (1, -1):
            moved = image.clone()
            moved[0, row, column] += sign * 1e-5
            state = run_again(network, WithImage(own, 5, moved), np.ones(N))
            ends.append(losses_of(run.replayed.task, network, state, inputs[:2], targets[:2]))
        expected = (ends[0] - ends[1]) / 2e-5
        assert np.abs(pixels[:, 0, row, column] - expected).max() < 1e-5 * np.abs(expected).max()


def test_perturb_estimates_what_training_again_gives(influence: Command, project: Path) -> None:
    np.save(project / "delta.npy", np.full((1, 8, 8), 0.002, dtype=np.float32))

    table = rows(influence, project, "perturb", 4, "--test", 0, "--test", 1, "--delta", "delta.npy", "--retrain")

    assert [row["replaced"] for row in table] == [None, None]
    for row in table:
        assert row["actual"] == pytest.approx(row["estimated"], rel=0.1)
    ranked = influences(influence, project, "0:2")[:, 4]
    assert [row["influence"] for row in table] == pytest.approx(ranked.tolist(), rel=1e-4)


def test_the_page_and_the_run_file_name_the_run(influence: Command, project: Path) -> None:
    influence("rank", 2, "--report", "why.html", "-o", "why.csv", cwd=project)

    facts = json.loads((project / "why.csv.run.json").read_text())
    assert facts["run"]["steps"] == 30
    assert facts["run"]["agreement"] > 0.9
    page = (project / "why.html").read_text()
    assert "by replaying the run: 30 steps, 83 parameters; this run answers to its data" in page
    assert "λ" not in page.split("<table")[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rank 1 --normalise relatif", "--normalise relatif: a replay has no curvature"),
        ("rank 1 --damping-sweep", "--damping-sweep: replay has no λ"),
        ("rank 1 --on-the-fly", "--on-the-fly: a replay stores no gradients"),
        ("rank 1 --skip-unreadable", "--skip-unreadable: a replay takes the steps of the run"),
        ("groups 1 --on-the-fly", "--on-the-fly: a replay stores no gradients"),
        ("select --keep 0.5 --skip-unreadable", "--skip-unreadable: a replay"),
        ("mislabels --signal self-influence", "--signal self-influence: it would need one solve per"),
        ("mislabels --signal tracin", "--signal tracin: it needs several checkpoints"),
        ("mislabels --damping-sweep", "--damping-sweep: replay has no λ"),
        ("gradients", ": influence gradients fills a store"),
        ("verify", ": verify without --lds, --top or --loo checks the solution s_test"),
        ("rank 1 -s curvature.matrix=empirical", "curvature.method replay has no matrix empirical"),
        ("rank 1 -s curvature.matrix=ggn", "curvature.method replay has no matrix ggn"),
        ("rank 1 -s gradients.layers=['4']", "curvature.method replay differentiates the whole run"),
        ("rank 1 -s model.checkpoint=[model.pt,model.pt]", "model.checkpoint names 2 files"),
        (
            "perturb 1 --test 1 -s training.recipe.augment=[{RandomHorizontalFlip:{}}]",
            "--set training.recipe.augment=[{RandomHorizontalFlip:{}}]: the run trains on augmented images",
        ),
    ],
)
def test_what_a_replay_cannot_give_is_refused(words: str, said: str, influence: Command, run_project: Path) -> None:
    assert said in refusal(influence, run_project, *words.split())


def test_values_that_are_not_used_are_named(influence: Command, project: Path) -> None:
    done = influence("rank", 1, "-s", "curvature.damping=0.1", "--strict", cwd=project)

    assert "warning: curvature.damping is not used" in done.err
    assert "warning: --strict is not used" in done.err


def test_mislabels_by_the_harm_to_the_test_set(influence: Command, project: Path) -> None:
    table = rows(influence, project, "mislabels", "--signal", "test-influence", "--all")

    mean = influences(influence, project, f"0:{TESTS}", "--aggregate")[0]
    assert [row["index"] for row in table] == np.argsort(mean).tolist()
    assert all(row["self_influence"] is None for row in table)
