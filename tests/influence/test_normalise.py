"""rank --normalise: against the formulas in float64, what it does to outliers, and what it does not go with."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import ImageFolder

from influence_cli.influence.normalise import MEANING, Norms
from influence_cli.influence.scores import Running, relative
from tests.conftest import Command, edit, save_minimum

KINDS = tuple(MEANING)


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def by_index(rows: list[dict[str, object]], column: str) -> np.ndarray:
    found = np.full(320, np.nan)
    for row in rows:
        found[int(str(row["index"]))] = float(str(row[column]))
    return found


def gradients(project: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the gradients of all training and test examples and the GGN + l2, in float64 by the formulas of softmax."""

    def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        data = ImageFolder(project / part)
        x = torch.stack([torch.tensor(np.array(image.convert("L"))).float() / 255 for image, _ in data])
        x = nn.functional.avg_pool2d(x[:, None], 4).flatten(1).double()
        return torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1), torch.tensor(data.targets)

    (x, y), (x_test, y_test) = read("train"), read("test")
    state = torch.load(project / "model.pt")
    w = torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1).double()

    def slopes(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bc,bd->bcd", (x @ w.T).softmax(dim=1) - nn.functional.one_hot(y, 10), x).flatten(1)

    p = (x @ w.T).softmax(dim=1)
    bend = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    h = torch.einsum("bce,bd,bf->cdef", bend, x, x).reshape(500, 500) / len(x)
    return slopes(x, y), slopes(x_test, y_test), h + 0.01 * torch.eye(500, dtype=torch.float64)


def dense(project: Path, test: int, kind: str, identity: bool = False) -> np.ndarray:
    g, g_test, h = gradients(project)
    h = torch.eye(500, dtype=torch.float64) if identity else h
    solved, s = torch.linalg.solve(h, g.T).T, torch.linalg.solve(h, g_test[test])
    product, own = g @ s, (g * solved).sum(dim=1)
    size = {
        "relatif": solved.norm(dim=1),
        "relatif-loss": own.sqrt(),
        "cosine": own.sqrt() * (g_test[test] @ s).sqrt(),
    }[kind]
    return (product / size).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_dense_formulas(influence: Command, project: Path, kind: str) -> None:
    plain = rows_of(influence("rank", 3, "--all", cwd=project).out)
    rows = rows_of(influence("rank", 3, "--all", "--normalise", kind, cwd=project).out)
    assert list(rows[0]) == [*plain[0], "normalised"]
    # Influence stays in nats, and the order is that of the score.
    assert np.allclose(by_index(rows, "influence"), by_index(plain, "influence"), rtol=1e-5, atol=1e-9)
    expected, found = dense(project, 3, kind), by_index(rows, "normalised")
    assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)
    for effect, sign in (("helpful", 1), ("harmful", -1)):
        own = [row for row in rows if row["effect"] == effect]
        values = [sign * float(str(row["normalised"])) for row in own]
        assert values == sorted(values, reverse=True)
        assert min(values) > 0
        assert all(sign * float(str(row["influence"])) > 0 for row in own)
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
    if kind == "cosine":
        assert np.abs(found).max() <= 1 + 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["explicit", "identity"])
@pytest.mark.quick("ekfac*")
def test_on_the_fly_gives_the_same(influence: Command, project: Path, method: str, kind: str) -> None:
    words = ("rank", 3, "--all", "--normalise", kind, "-s", f"curvature.method={method}", "-s", "curvature.damping=0.0")
    stored = rows_of(influence(*words, cwd=project).out)
    direct = rows_of(influence(*words, "--on-the-fly", "-s", "gradients.store=other.h5", cwd=project).out)
    for column in ("influence", "normalised"):
        a, b = by_index(stored, column), by_index(direct, column)
        assert np.linalg.norm(a - b) <= 1e-3 * np.linalg.norm(a)


def test_norms_layer_by_layer_are_those_of_the_coordinates(project: Path) -> None:
    """On the fly EK-FAC has every coordinate, where a store keeps some: the two ways to a norm, of the same."""
    from influence_cli import Terminal, load_config, load_tasks, prepare_all
    from influence_cli.data.batches import read_batches
    from influence_cli.influence.inverse import make_inverse
    from influence_cli.influence.streams import direct_norms

    config, terminal = load_config(project / "influence.yaml", ["curvature.method=ekfac"]), Terminal(quiet=True)
    (prepared,) = prepare_all(config, load_tasks(config), terminal, on_the_fly=True)
    inverse = make_inverse(prepared, 0.01, terminal)
    batch = next(read_batches(prepared.task.train, prepared.task.train.indices, 50))
    rows = prepared.coordinates(batch.inputs, batch.targets)[0]
    for kind in KINDS:
        norms = Norms(kind, inverse)
        assert torch.allclose(direct_norms(prepared, norms)(batch).float(), norms.of_rows(rows), rtol=1e-4)


@pytest.mark.quick("ekfac-relatif", "fisher-relatif-loss", "identity-cosine")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ekfac", "fisher", "identity"])
def test_every_method_with_coordinates_has_them(influence: Command, project: Path, method: str, kind: str) -> None:
    words = ("--all", "--normalise", kind, "-s", f"curvature.method={method}")
    rows = rows_of(influence("rank", 3, *words, cwd=project).out)
    assert len(rows) == 320
    found = by_index(rows, "normalised")
    assert np.isfinite(found).all()
    if method == "identity":
        expected = dense(project, 3, kind, identity=True)
        assert np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected)


def test_a_training_example_has_cosine_one_with_itself(influence: Command, project: Path) -> None:
    edit(project, "  args: {root: test}", "  args: {root: train}")
    for test in (0, 200):
        rows = rows_of(influence("rank", test, "--top", 1, "--normalise", "cosine", cwd=project).out)
        assert rows[0]["index"] == test
        assert rows[0]["normalised"] == pytest.approx(1, abs=1e-4)


def test_the_aggregate_is_normalised_as_a_whole(influence: Command, project: Path) -> None:
    words = ("rank", "0:20", "--aggregate", "--all")
    plain = by_index(rows_of(influence(*words, cwd=project).out), "influence")
    own = by_index(rows_of(influence(*words, "--normalise", "relatif", cwd=project).out), "normalised")
    solved = torch.linalg.solve(gradients(project)[2], gradients(project)[0].T).T
    expected = 320 * plain / solved.norm(dim=1).numpy()
    assert np.linalg.norm(own - expected) <= 1e-3 * np.linalg.norm(expected)


@pytest.mark.slow
def test_outliers_lead_fewer_lists(influence: Command, project: Path) -> None:
    """Barshan et al. 2020: a few examples of large loss are the most influential on many; relatively, others are."""
    edit(project, "  args: {root: train}", "  args: {root: train}\n  labels: labels.csv")
    labels = np.array(ImageFolder(project / "train").targets)
    outliers = set(range(0, 320, 40))
    for index in outliers:
        labels[index] = (labels[index] + 5) % 10
    with (project / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("index", "label"), *enumerate(labels.tolist())])
    save_minimum(project, labels=labels)

    def leading(*words: str) -> tuple[int, int]:
        rows = rows_of(influence("rank", "0:80", "--top", 5, *words, cwd=project).out)
        found = [int(str(row["index"])) for row in rows]
        return len(set(found)), sum(index in outliers for index in found)

    different, planted = leading()
    for kind in KINDS:
        more, fewer = leading("--normalise", kind)
        assert more > different, kind
        assert fewer < planted, kind


@pytest.mark.slow
def test_of_several_checkpoints_the_means_are_divided(influence: Command, project: Path) -> None:
    (project / "one.pt").write_bytes((project / "model.pt").read_bytes())
    save_minimum(project, l2=0.1)
    (project / "two.pt").write_bytes((project / "model.pt").read_bytes())
    words = ("--all", "--normalise", "relatif-loss")
    both = ("-s", "model.checkpoint=[one.pt, two.pt]")
    rows = rows_of(influence("rank", 3, *words, *both, cwd=project).out)
    alone = []
    for name in ("one", "two"):
        own = ("-s", f"model.checkpoint={name}.pt", "-s", f"gradients.store={name}.h5")
        found = rows_of(influence("rank", 3, *words, *own, cwd=project).out)
        alone.append(320 * by_index(found, "influence") / by_index(found, "normalised"))
    expected = 320 * by_index(rows, "influence") / np.mean(alone, axis=0)
    assert np.allclose(by_index(rows, "normalised"), expected, rtol=1e-3)


def test_page_and_run_file_say_what_was_ranked_by(influence: Command, project: Path) -> None:
    words = ("--normalise", "relatif", "--report", "why.html", "--matrix", "m.h5", "-o", "out.csv")
    influence("rank", 3, *words, cwd=project)
    page = (project / "why.html").read_text()
    assert "θ-relative influence" in page
    assert page.count("normalised") > 20
    assert json.loads((project / "out.csv.run.json").read_text())["normalise"] == "relatif"
    import h5py

    plain = by_index(rows_of(influence("rank", 3, "--all", cwd=project).out), "influence")
    with h5py.File(project / "m.h5") as file:
        assert np.allclose(file["influence"][0], plain, rtol=1e-5, atol=1e-9)


def test_what_it_does_not_go_with_is_said_in_a_line(influence: Command, project: Path) -> None:
    for words, message in (
        (("3", "--normalise", "relative"), "did you mean 'relatif'?"),
        (("3", "--normalise", "cosine", "-s", "curvature.method=cg"), "would need its own solve"),
        (("3", "--normalise", "cosine", "--damping-sweep"), "--damping-sweep"),
        (("--train", "3", "--normalise", "cosine"), "--train (one training example"),
    ):
        done = influence("rank", *words, cwd=project, code=2)
        assert message in done.err
        assert done.out == ""
        assert not (project / "influence.h5").exists()


def test_an_example_that_changes_nothing_scores_nothing() -> None:
    values, norms = np.array([[2.0, 0.0, -3.0]], dtype=np.float32), np.array([4.0, 0.0, 2.0])
    assert relative(values, norms, None, 10).tolist() == [[5.0, 0.0, -15.0]]
    assert relative(values, norms, np.array([0.0]), 10).tolist() == [[0.0, 0.0, 0.0]]


def test_running_keeps_influence_beside_the_score_whatever_the_pieces() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(size=(3, 200)).astype(np.float32)
    scores = values.astype(np.float64) * generator.random(200)
    whole, parts = Running(3, 7), Running(3, 7)
    whole.add(np.arange(200), values, scores)
    for start in range(0, 200, 13):
        where = slice(start, min(200, start + 13))
        parts.add(np.arange(where.start, where.stop), values[:, where], scores[:, where])
    for test, (a, b) in enumerate(zip(whole.results(), parts.results(), strict=True)):
        for effect in ("helpful", "harmful"):
            order, own, ranked = a.of(effect)
            assert all(np.array_equal(x, y) for x, y in zip(a.of(effect), b.of(effect), strict=True))
            assert np.array_equal(own, values[test, order])
            assert ranked is not None
            assert np.array_equal(ranked, scores[test, order])
        assert np.array_equal(a.helpful, np.argsort(-scores[test], kind="stable")[:7])
