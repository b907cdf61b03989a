"""rank: the same numbers by every method, the sign against retraining, and what its options write."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from influence_cli.metrics import pearson, slope
from tests.conftest import Command, save_minimum


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def scores(influence: Command, cwd: Path, *words: object) -> np.ndarray:
    """Give influence[t, i] of some test images as rank --matrix writes it."""
    influence("rank", *words, "--matrix", "m.h5", "-q", cwd=cwd)
    with h5py.File(cwd / "m.h5") as file:
        return np.asarray(file["influence"])


@pytest.mark.slow
def test_every_method_gives_the_same_numbers(influence: Command, project: Path) -> None:
    tests = ("3", "17", "40:44")
    exact = scores(influence, project, *tests)
    assert exact.shape == (6, 320)
    for method, tolerance in (("cg", 1e-4), ("nystrom", 1e-4), ("lissa", 1e-2), ("neumann", 1e-2)):
        other = scores(
            influence, project, *tests, "-s", f"curvature.method={method}", "-s", f"gradients.store={project}/raw.h5"
        )
        assert np.linalg.norm(other - exact) / np.linalg.norm(exact) <= tolerance, method


def test_influence_is_the_rise_of_the_loss_when_an_example_is_removed(influence: Command, project: Path) -> None:
    """Leave out the four most helpful and harmful examples for real; the class weights of n stay as they are."""
    import yaml

    test = 5
    estimated = scores(influence, project, test)[0]
    order = np.argsort(estimated)
    chosen = [*order[:4], *order[-4:]]
    actual = [retrained_loss(project, test, int(i)) - retrained_loss(project, test, None) for i in chosen]
    # One of 320 examples is a large step: first order, so the sign, the order and roughly the size.
    assert np.sign(actual).tolist() == np.sign(estimated[chosen]).tolist()
    assert pearson(estimated[chosen], np.array(actual)) > 0.98
    assert 0.8 < slope(estimated[chosen], np.array(actual)) < 1.3
    assert yaml.safe_load((project / "influence.yaml").read_text())["l2"] == 0.01


def retrained_loss(project: Path, test: int, without: int | None) -> float:
    """Minimise (1/n) Σ_{j≠i} L_j + l2/2‖θ‖² with the same n, in float64, and give the loss of a test image."""
    from torchvision.datasets import ImageFolder

    def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        data = ImageFolder(project / part)
        x = torch.stack([torch.tensor(np.array(image.convert("L"))).double() / 255 for image, _ in data])
        return torch.nn.functional.avg_pool2d(x[:, None], 4).flatten(1), torch.tensor(data.targets)

    x, y = read("train")
    keep = torch.ones(len(y), dtype=torch.float64)
    if without is not None:
        keep[without] = 0
    w = torch.zeros(50, 10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [w], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y, reduction="none")
        loss = (keep * losses).sum() / len(y) + 0.005 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    x_test, y_test = read("test")
    outputs = (x_test[test] @ w[:-1] + w[-1]).detach()
    return float(torch.nn.functional.cross_entropy(outputs[None], y_test[test][None]))


def test_rows(influence: Command, project: Path) -> None:
    done = influence("rank", 3, "--top", 4, cwd=project)
    rows = rows_of(done.out)
    assert [row["effect"] for row in rows] == ["helpful"] * 4 + ["harmful"] * 4
    assert [row["rank"] for row in rows] == [1, 2, 3, 4] * 2
    assert list(rows[0]) == [
        "test", "test_path", "test_label", "test_predicted", "effect", "rank",
        "index", "path", "label", "predicted", "loss", "influence",
    ]  # fmt: skip
    values = [float(str(row["influence"])) for row in rows]
    assert values[:4] == sorted(values[:4], reverse=True)
    assert values[4:] == sorted(values[4:])
    assert values[3] > 0 > values[4]
    assert rows[0]["test"] == 3
    assert Path(str(rows[0]["path"])).parent.name == rows[0]["label"]
    assert "damping λ = 0" in done.err


def test_all_lists_every_example_once(influence: Command, project: Path) -> None:
    rows = rows_of(influence("rank", 3, "--all", cwd=project).out)
    assert sorted(int(str(row["index"])) for row in rows) == list(range(320))


def test_formats_hold_the_same_numbers(influence: Command, project: Path) -> None:
    lines = rows_of(influence("rank", 3, cwd=project).out)
    assert json.loads(influence("rank", 3, "--format", "json", cwd=project).out) == lines
    for format, delimiter in (("csv", ","), ("tsv", "\t")):
        text = influence("rank", 3, "--format", format, cwd=project).out
        read = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
        assert [float(row["influence"]) for row in read] == [row["influence"] for row in lines]
    assert "helpful" in influence("rank", 3, "--format", "table", cwd=project).out


def test_output_file_sets_the_format_and_leaves_a_run_file(influence: Command, project: Path) -> None:
    done = influence("rank", 3, "-o", "out.csv", cwd=project)
    assert done.out == ""
    assert (project / "out.csv").read_text().startswith("test,test_path,")
    run = json.loads((project / "out.csv.run.json").read_text())
    assert run["config"]["l2"] == 0.01
    assert run["stores"][0]["damping"] == 0
    assert run["rows"] == 20
    assert 0 < run["stores"][0]["effective_dimension"] < 500
    assert abs(run["identity_correlation"]) <= 1


def test_target_changes_whose_loss_is_explained(influence: Command, project: Path) -> None:
    label = scores(influence, project, 3)
    named = scores(influence, project, 3, "--target", "Bag")
    assert not np.allclose(label, named)
    predicted = rows_of(influence("rank", 3, "--top", 1, cwd=project).out)[0]["test_predicted"]
    assert np.allclose(
        scores(influence, project, 3, "--target", "predicted"), scores(influence, project, 3, "--target", predicted)
    )


def test_aggregate_is_the_mean(influence: Command, project: Path) -> None:
    each = scores(influence, project, "0:5")
    mean = scores(influence, project, "0:5", "--aggregate")
    assert np.allclose(mean, each.mean(axis=0, keepdims=True), rtol=1e-3, atol=1e-7)
    rows = rows_of(influence("rank", "0:5", "--aggregate", "--top", 1, cwd=project).out)
    assert rows[0]["test"] is None
    assert len(rows) == 2


def test_train_is_the_same_matrix_read_the_other_way(influence: Command, project: Path) -> None:
    whole = scores(influence, project, "0:80")
    rows = rows_of(influence("rank", "--train", 12, "--all", cwd=project).out)
    assert len(rows) == 80
    for row in rows:
        assert row["index"] == 12
        assert float(str(row["influence"])) == pytest.approx(whole[int(str(row["test"])), 12], rel=1e-2, abs=1e-7)


def test_files_and_stdin(influence: Command, project: Path) -> None:
    picture = next((project / "test" / "Bag").iterdir())
    rows = rows_of(influence("rank", picture, "--top", 1, cwd=project).out)
    assert rows[0]["test"] is None
    assert rows[0]["test_path"] == str(picture)
    assert rows[0]["test_label"] is None
    stdin = f"{picture}\tBag\n7\n"
    rows = rows_of(influence("rank", "-", "--top", 1, cwd=project, stdin=stdin).out)
    assert [row["test"] for row in rows] == [None, None, 7, 7]
    assert rows[0]["test_label"] == "Bag"


def test_file_of_the_test_set_scores_as_its_index(influence: Command, project: Path) -> None:
    from torchvision.datasets import ImageFolder

    path, label = ImageFolder(project / "test").samples[11]
    name = ImageFolder(project / "test").classes[label]
    (project / "list").write_text(f"{path}\t{name}\n")
    influence("rank", "-", "--matrix", "m.h5", "-q", cwd=project, stdin=f"{path}\t{name}\n")
    with h5py.File(project / "m.h5") as file:
        assert np.allclose(file["influence"][0], scores(influence, project, 11)[0], rtol=1e-4, atol=1e-8)


def test_misclassified_are_those_that_the_model_gets_wrong(influence: Command, project: Path) -> None:
    rows = rows_of(influence("rank", "misclassified", "--top", 1, cwd=project).out)
    assert rows
    assert all(row["test_label"] != row["test_predicted"] for row in rows)


@pytest.mark.slow
def test_a_list_of_checkpoints_is_averaged(influence: Command, project: Path) -> None:
    (project / "one.pt").write_bytes((project / "model.pt").read_bytes())
    save_minimum(project, l2=0.1)
    (project / "two.pt").write_bytes((project / "model.pt").read_bytes())
    one = scores(influence, project, 3, "-s", "model.checkpoint=one.pt", "-s", "gradients.store=one.h5")
    two = scores(influence, project, 3, "-s", "model.checkpoint=two.pt", "-s", "gradients.store=two.h5")
    both = scores(influence, project, 3, "-s", "model.checkpoint=[one.pt, two.pt]", "-s", "gradients.store=both.h5")
    assert not np.allclose(one, two)
    assert np.allclose(both, (one + two) / 2, rtol=1e-4, atol=1e-8)
    assert (project / "both.0.h5").exists()
    assert (project / "both.1.h5").exists()


def test_identity_is_the_gradient_product(influence: Command, project: Path) -> None:
    done = scores(influence, project, 3, "-s", "curvature.method=identity")
    from influence_cli.config.load import load_config
    from influence_cli.data.batches import read_batches
    from influence_cli.model.task import load_tasks
    from influence_cli.passes.gradients import example_gradients
    from influence_cli.precompute.decide import decide
    from influence_cli.runtime.terminal import Terminal

    config = load_config(Path("influence.yaml"))
    task = load_tasks(config)[0]
    choice, _ = decide(config, task, Terminal(quiet=True))
    train = next(read_batches(task.train, task.train.indices, 320))
    test = next(read_batches(task.test_split(), np.array([3]), 1))
    g_train = example_gradients(choice.network, train.inputs, train.targets)[0]
    g_test = example_gradients(choice.network, test.inputs, test.targets)[0]
    assert np.allclose(done, (g_test @ g_train.T / 320).numpy(), rtol=1e-4, atol=1e-8)


def test_excluded_examples_do_not_appear(influence: Command, project: Path) -> None:
    np.save(project / "out.npy", np.array([0, 5, 319]))
    rows = rows_of(influence("rank", 3, "--all", "-s", "train.exclude=out.npy", cwd=project).out)
    assert len(rows) == 317
    assert not {0, 5, 319} & {row["index"] for row in rows}


@pytest.mark.slow
def test_float16_rows_keep_the_scores(influence: Command, project: Path) -> None:
    exact = scores(influence, project, "0:4")
    half = scores(influence, project, "0:4", "-s", "gradients.store_dtype=float16", "-s", "gradients.store=half.h5")
    assert np.linalg.norm(half - exact) / np.linalg.norm(exact) < 2e-3


def test_report_is_a_page(influence: Command, project: Path) -> None:
    influence("rank", 3, "--report", "why.html", cwd=project)
    page = (project / "why.html").read_text()
    assert page.count("<img") == 21
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")


def test_the_page_shows_the_images_of_the_rows_in_their_order(influence: Command, project: Path) -> None:
    words = ("--top", 4, "--report", "why.html", "--format", "csv")
    rows = list(csv.DictReader(influence("rank", 3, *words, cwd=project).out.splitlines()))
    assert [row["effect"] for row in rows] == ["helpful"] * 4 + ["harmful"] * 4
    page = (project / "why.html").read_text()
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
        for data in re.findall(r'<img[^>]*src="data:image/[a-z]+;base64,([^"]+)"', page)
    ]
    # The rows begin with the helpful ones, the page with the harmful ones.
    files = [rows[0]["test_path"], *(row["path"] for row in (*rows[4:], *rows[:4]))]
    assert len(shown) == len(files)
    for image, file in zip(shown, files, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(project / file).convert("L")))


@pytest.mark.slow
def test_a_solver_leaves_out_only_what_the_store_left_out(influence: Command, project: Path) -> None:
    bad = sorted((project / "train" / "Bag").iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:90])
    exact = influence("rank", 3, "--all", "--skip-unreadable", "-s", "gradients.store=a.h5", cwd=project)
    words = ("rank", 3, "--all", "-s", "gradients.store=b.h5", "-s", "curvature.method=cg")
    influence("gradients", "--skip-unreadable", *words[3:], cwd=project)
    solved = influence(*words, cwd=project)  # the store knows which; not asked for again

    def by_index(text: str) -> dict[int, float]:
        return {row["index"]: row["influence"] for row in map(json.loads, text.splitlines())}

    first, second = by_index(exact.out), by_index(solved.out)
    assert first.keys() == second.keys()
    assert len(first) == 319
    a, b = (np.array([part[index] for index in sorted(part)]) for part in (first, second))
    assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a)
