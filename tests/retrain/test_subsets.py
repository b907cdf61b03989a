"""`influence select`: what is left out against a dense computation, the file that a config takes, and retraining."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from influence_cli import load_config, load_tasks
from influence_cli.errors import InfluenceError
from influence_cli.metrics import spearman
from influence_cli.replay.open import Replayed, open_run
from influence_cli.replay.outcomes import outcomes
from influence_cli.retrain.subsets import Kept, compare_kept, kept_rows, leave_out_in_rounds, order_by
from influence_cli.steps.forward import run_again
from tests.commands.test_verify import with_training
from tests.conftest import Command, edit


def dense_usefulness(project: Path) -> np.ndarray:
    """Compute (1/n) · mean_t ∇L(z_t)ᵀ (H + l2·I)⁻¹ gᵢ of the softmax regression, float64 [n]."""
    state = torch.load(project / "model.pt")
    weights = torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1).double()

    def parts(name: str) -> tuple[Tensor, Tensor, Tensor]:
        data = ImageFolder(project / name)
        x = torch.stack([torch.tensor(np.array(image.convert("L"))).double() / 255 for image, _ in data])
        a = nn.functional.pad(nn.functional.avg_pool2d(x[:, None], 4).flatten(1), (0, 1), value=1.0)
        soft = (a @ weights.T).softmax(dim=1)
        slope = soft - nn.functional.one_hot(torch.tensor(data.targets), 10)
        return a, soft, torch.einsum("nc,nd->ncd", slope, a).flatten(1)

    a, soft, rows = parts("train")
    curvature = torch.diag_embed(soft) - soft[:, :, None] * soft[:, None, :]
    hessian = torch.einsum("nck,nd,ne->cdke", curvature, a, a).reshape(500, 500) / len(a) + 0.01 * torch.eye(500)
    tests = parts("test")[2].mean(dim=0)
    return (rows @ torch.linalg.solve(hessian, tests) / len(a)).numpy()


def test_the_least_useful_by_a_dense_computation_are_left_out(influence: Command, project: Path) -> None:
    done = influence("select", "--keep", "0.9", cwd=project)
    rows = [json.loads(line) for line in done.out.splitlines()]
    expected = dense_usefulness(project)
    labels = np.array(ImageFolder(project / "train").targets)
    assert [row["rank"] for row in rows] == list(range(1, 33))
    np.testing.assert_allclose([row["usefulness"] for row in rows], expected[[row["index"] for row in rows]], rtol=1e-3)
    for label in range(10):
        own = np.flatnonzero(labels == label)
        least = own[np.argsort(expected[own])]
        found = [row["index"] for row in rows if labels[row["index"]] == label]
        assert found == least[: len(found)].tolist()
        assert abs(len(found) - len(own) / 10) <= 1
    with (project / "selected.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert sorted(int(row["index"]) for row in written) == sorted(row["index"] for row in rows)
    assert all(Path(row["path"]).is_file() for row in written)
    harmful = sum(row["usefulness"] < 0 for row in rows)
    assert 0 < harmful <= 32
    assert (
        "leaving out by influence: the config has no training.recipe; --proxy asks a small smooth network" in done.err
    )
    assert f"left out 32 of 320 training examples by influence; {harmful} of them are harmful" in done.err
    assert "wrote selected.csv (32 examples)" in done.err


def test_the_file_is_what_a_config_takes_and_holds_what_was_left_out_before(influence: Command, project: Path) -> None:
    influence("select", "--keep", "0.9", "-q", cwd=project)
    first = {line.split(",")[0] for line in (project / "selected.csv").read_text().splitlines()[1:]}
    edit(project, "  transform:", "  exclude: selected.csv\n  transform:")
    done = influence("select", "--keep", "0.5", "--exclude", "more.csv", "-s", "gradients.store=b.h5", cwd=project)
    second = {line.split(",")[0] for line in (project / "more.csv").read_text().splitlines()[1:]}
    assert first < second
    assert len(second) == 32 + 144
    assert "wrote more.csv (176 examples, including 32 that were already excluded)" in done.err
    done = influence("check", "-s", "train.exclude=more.csv", "--format", "csv", cwd=project)
    assert "144" in done.out


@pytest.mark.slow
def test_on_the_fly_gives_the_same(influence: Command, project: Path) -> None:
    stored = influence("select", "-q", "--format", "csv", cwd=project).out
    (project / "influence.h5").unlink()
    flying = influence("select", "-q", "--format", "csv", "--on-the-fly", "--force", cwd=project).out
    assert [line.split(",")[1] for line in stored.splitlines()] == [line.split(",")[1] for line in flying.splitlines()]
    assert len(stored.splitlines()) == 1 + 64


def test_an_unreadable_example_is_left_out(influence: Command, project: Path) -> None:
    path = sorted((project / "train").rglob("*.png"))[5]
    path.write_bytes(b"no image")
    done = influence("select", "--skip-unreadable", cwd=project)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["index"] for row in rows if row["usefulness"] is None and row["loss"] is None] == [5]


def test_the_ways_to_choose() -> None:
    usefulness, losses, one = np.array([0.2, -0.1, 0.0, 0.2]), np.array([1.0, 1.0, 3.0, 0.5]), np.zeros(4, dtype=int)
    assert order_by("influence", usefulness, losses, one, 0).tolist() == [1, 2, 0, 3]
    assert order_by("loss", usefulness, losses, one, 0).tolist() == [2, 0, 1, 3]
    draws = [order_by("random", usefulness, losses, one, seed).tolist() for seed in range(9)]
    assert len(set(map(tuple, draws))) > 1
    assert draws[3] == order_by("random", -usefulness, -losses, one, 3).tolist()
    # A class each for the second half of 20: both lose the same share, however useful the other is.
    labels = np.repeat([0, 1], 10)
    assert np.bincount(labels[order_by("influence", np.arange(20.0), np.zeros(20), labels, 0)[:6]]).tolist() == [3, 3]
    assert kept_rows(np.array([1, 2, 0, 3]), 0.5).tolist() == [0, 3]
    for keep in (0.01, 0.99):
        with pytest.raises(InfluenceError, match=r"--keep 0\.\d+ of 4 training examples keeps (none|all)"):
            kept_rows(np.arange(4), keep)


@pytest.mark.slow
def test_retraining_compares_all_ways_on_the_other_half_of_the_test_set(
    influence: Command, trained: Path, tmp_path: Path
) -> None:
    folder = with_training(Path(shutil.copytree(trained, tmp_path / "select-retrain")))
    done = influence("select", "--keep", "0.6", "--retrain", "--repeats", "2", cwd=folder)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [(row["by"], row["keep"], row["examples"], row["repeats"]) for row in rows] == [
        ("all", 1.0, 320, 2), ("influence", 0.6, 192, 2), ("loss", 0.6, 192, 2), ("random", 0.6, 192, 2)
    ]  # fmt: skip
    assert "images are chosen on 40 test examples, accuracy is measured on the other 40" in done.err
    assert not (folder / "selected.csv").exists()
    for row in rows:
        assert 0.3 < row["lowest"] <= row["accuracy"] <= row["highest"] <= 1
        assert row["accuracy"] * 80 == pytest.approx(round(row["accuracy"] * 80))
        assert row["difference"] == pytest.approx(row["accuracy"] - rows[0]["accuracy"])
    # Each way trains on other examples.
    assert len({row["loss"] for row in rows}) == 4
    again = influence("select", "--keep", "0.6", "--retrain", "--repeats", "2", cwd=folder)
    assert "8 of 8 retrainings are already in" in again.err
    assert again.out == done.out


def test_the_verdict_names_who_chose_better() -> None:
    found = [
        Kept(by, 8, np.array([mean, mean]), np.array([1.0]))
        for by, mean in (("all", 0.5), ("influence", 0.6), ("loss", 0.7), ("random", 0.4))
    ]
    assert compare_kept(found) == (
        "loss chooses better than influence here: test accuracy all 50.0% (loss 1.000), influence 60.0% (loss 1.000), "
        "loss 70.0% (loss 1.000), random 40.0% (loss 1.000)"
    )
    assert compare_kept([*found[:2], Kept("loss", 8, np.array([0.1]), np.array([1.0])), found[3]]).startswith(
        "influence chooses best here"
    )


BAD = [
    (("--keep", "1"), "--keep 1: not a share above 0 and below 1"),
    (("--keep", "nan"), "--keep nan: not a share above 0 and below 1"),
    (("--keep", "0.999"), "--keep 0.999 of 320 training examples keeps all"),
    (("--by", "margin"), "--by margin: no such way to select"),
    (("--exclude", "out.npy"), "the file must be .csv"),
    (("--retrain", "--by", "loss"), "--retrain compares all ways"),
    (("--proxy", "--by", "loss"), "--proxy is by replay: it cannot be combined with --by loss"),
    (("--rounds", "2", "--by", "random"), "--rounds 2 is by replay: it cannot be combined with --by random"),
    (("--rounds", "2"), "--rounds 2 needs a run to replay: the config has no training.recipe"),
    (("--by", "replay"), "there is no training.recipe"),
    (("--by", "replay", "--on-the-fly"), "--by replay replays a run: it cannot be combined with --on-the-fly"),
    (("--proxy", "--rounds", "99", "--keep", "0.9"), "--rounds 99: --keep 0.9 leaves out 32 training examples"),
    (("--retrain",), "retraining needs a training function, but the config names none"),
    (("-s", "test=null"), "the config has no test data set"),
    (("--exclude", "influence.yaml.csv"), "influence.yaml.csv exists"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_told_in_a_line_and_writes_nothing(
    influence: Command, project: Path, words: tuple[str, ...], message: str
) -> None:
    (project / "influence.yaml.csv").write_text("kept\n")
    done = influence("select", *words, cwd=project, code=2)
    assert done.out == ""
    assert message in done.err
    assert not (project / "selected.csv").exists()
    assert (project / "influence.yaml.csv").read_text() == "kept\n"


RECIPE = "training: {recipe: {optimizer: sgd, lr: 0.002, momentum: 0.9, batch: 12, epochs: 8, schedule: cosine}}\n"


@pytest.fixture
def recorded(influence: Command, tiny: Path) -> Path:
    """The tiny project with a recipe whose run is recorded, and smooth: 24 images of three classes."""
    config = tiny / "influence.yaml"
    config.write_text(config.read_text().replace("l2: 0.01", "l2: 0.0") + RECIPE)
    influence("train", "--overwrite", "-q", cwd=tiny)
    return tiny


def opened(project: Path) -> Replayed:
    config = load_config(project / "influence.yaml")
    return open_run(config, load_tasks(config)[0])


def mean_loss_without(replayed: Replayed, rows: list[int]) -> float:
    """Run the whole training again without some rows, and give the mean loss of the test examples."""
    weights = np.ones(replayed.run.examples)
    weights[rows] = 0
    last = run_again(replayed.network, replayed.run, weights)
    losses, _ = outcomes(replayed.task, replayed.network, last, replayed.task.labelled_tests().indices)
    return float(losses.mean())


def test_a_smooth_recorded_run_chooses_as_running_it_again_without_each_image(
    influence: Command, recorded: Path
) -> None:
    done = influence("select", "--keep", "0.05", "-o", "rows.jsonl", cwd=recorded)
    assert "leaving out by replay: this run answers to its data (r 1.00" in done.err
    assert "left out 23 of 24 training examples by replay" in done.err
    facts = json.loads((recorded / "rows.jsonl.run.json").read_text())
    assert (facts["selection"]["by"], facts["selection"]["rounds"]) == ("replay", 1)
    rows = [json.loads(line) for line in (recorded / "rows.jsonl").read_text().splitlines()]

    replayed = opened(recorded)
    base = mean_loss_without(replayed, [])
    actual = np.array([mean_loss_without(replayed, [row]) - base for row in range(24)])

    assert spearman(np.array([row["usefulness"] for row in rows]), actual[[row["index"] for row in rows]]) > 0.99
    # Nothing is trained again, and no store was made.
    assert not (recorded / "influence.h5").exists()
    again = influence("select", "--keep", "0.05", "--by", "replay", "--force", cwd=recorded)
    assert [json.loads(line) for line in again.out.splitlines()] == rows
    assert "measuring once" not in again.err


def test_in_rounds_the_recipe_trains_on_what_is_left(influence: Command, recorded: Path) -> None:
    first = influence("select", "--keep", "0.75", cwd=recorded).out.splitlines()
    done = influence("select", "--keep", "0.5", "--rounds", 2, "--force", cwd=recorded).out.splitlines()
    assert done[:6] == first
    rest = sorted({*range(24)} - {json.loads(line)["index"] for line in first})
    influence("select", "--keep", "0.75", "--force", "--exclude", "first.csv", "-q", cwd=recorded)
    # The second round is the first one of a run that was trained on the rest.
    words = ("-s", "train.exclude=first.csv", "-s", "gradients.store=rest.h5", "-s", "model.checkpoint=rest.pt")
    influence("train", "-q", *words, cwd=recorded)
    second = influence("select", "--keep", "0.67", "--by", "replay", "--exclude", "b.csv", *words, cwd=recorded)
    rows = [json.loads(line) for line in second.out.splitlines()]
    assert [row["index"] for row in rows] == [json.loads(line)["index"] for line in done[6:]]
    assert {row["index"] for row in rows} < set(rest)
    for row, line in zip(rows, done[6:], strict=True):
        assert row["usefulness"] == pytest.approx(json.loads(line)["usefulness"], rel=1e-5)


def test_parts_are_left_out_one_after_another() -> None:
    asked: list[list[int]] = []

    def again(rows: np.ndarray) -> np.ndarray:
        asked.append(rows.tolist())
        return -rows.astype(float)  # now the last ones are the least useful

    usefulness = np.arange(10.0)
    found = leave_out_in_rounds(usefulness, np.zeros(10, dtype=int), 0.5, 3, again)
    assert found.order.tolist() == [0, 1, 9, 8, 7, 6, 5, 4, 3, 2][:10]
    assert asked == [[2, 3, 4, 5, 6, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8]]
    assert found.usefulness[:2].tolist() == [0.0, 1.0]
    assert found.usefulness[2:].tolist() == [-2, -3, -4, -5, -6, -7, -8, -9]
    assert usefulness.tolist() == list(range(10))


def test_a_run_that_is_not_recorded_or_chaotic_is_not_asked_by_default(influence: Command, recorded: Path) -> None:
    words = ("select", "--keep", "0.5", "--force", "-s", "curvature.damping=0.01")
    done = influence(*words, "-s", "training.recipe.epochs=9", cwd=recorded)
    assert "leaving out by influence: influence.run records another run; what differs: training.recipe" in done.err
    influence(*words, cwd=recorded)
    for part in (recorded / "influence.run").glob("verdict-*/without_*.npz"):
        with np.load(part) as file:
            arrays = dict(file)
        np.savez(part, **{**arrays, "losses": np.random.default_rng(0).random(len(arrays["losses"]))})
    done = influence(*words, cwd=recorded)
    assert "leaving out by influence: this run is chaotic (r " in done.err
    assert "left out 12 of 24 training examples by influence" in done.err


def test_retraining_compares_replay_too(influence: Command, recorded: Path) -> None:
    words = ("select", "--keep", "0.5", "--retrain", "--repeats", 1, "-s", "curvature.damping=0.01")
    done = influence(*words, cwd=recorded)
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["by"] for row in rows] == ["all", "replay", "influence", "loss", "random"]
    assert [row["examples"] for row in rows] == [24, 12, 12, 12, 12]
    assert "(loss" in done.err.splitlines()[-1].split("replay ")[-1]
