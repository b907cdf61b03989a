"""Checkpoints of one run, against gradient descent followed step by step and dense formulas in float64."""

from __future__ import annotations

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from influence_cli import Terminal, load_config, load_tasks, prepare_all, rank_training
from influence_cli.curvature.spectrum import relaxation
from influence_cli.influence.ensemble import segments_of
from influence_cli.influence.example_facts import training_facts
from influence_cli.influence.test_selection import select_tests
from influence_cli.metrics import pearson, slope
from influence_cli.ranking.rank import RankOptions
from influence_cli.ranking.sinks import KeptInfluence
from tests.conftest import Command, Ended, edit
from tests.support.small_project import N, refusal, with_training

L2, TESTS = 0.01, 6
# η and the steps up to each checkpoint; the first steps change most.
RATE, STEPS = 0.3, (3, 5, 8, 14)
RUN = (
    "model.checkpoint=[e0.pt, e1.pt, e2.pt, e3.pt]",
    f"model.learning_rates={RATE}",
    f"model.steps={list(STEPS)}",
)
SOURCE, TRACIN = ("model.ensemble=source", "curvature.method=explicit"), ("model.ensemble=tracin",)
DEEP = """
from torch import nn


def build():
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 2, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
"""


def read(project: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read the images as the model takes them, and the labels."""
    data = ImageFolder(project / part)
    images = [torch.tensor(np.asarray(image.convert("L"))).double()[None] / 255 for image, _ in data]
    return torch.stack(images), torch.tensor(data.targets)


def features(project: Path, part: str) -> tuple[Tensor, Tensor]:
    """Give the 16 numbers and the one that the linear model multiplies, and the labels."""
    x, y = read(project, part)
    pooled = nn.functional.avg_pool2d(x, 2).flatten(1)
    return torch.cat([pooled, torch.ones(len(x), 1)], dim=1), y


def example_losses(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(x @ w.view(3, -1).T, y, reduction="none")


def gradients(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Give the gradient of every example, [b, 51], by autograd."""
    return torch.autograd.functional.jacobian(lambda v: example_losses(v, x, y), w)  # type: ignore[no-any-return,no-untyped-call]


def hessian(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    own = torch.autograd.functional.hessian(lambda v: example_losses(v, x, y).mean(), w)  # type: ignore[no-untyped-call]
    return own + L2 * torch.eye(len(w))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def followed(small_made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A run of gradient descent with its checkpoints, and dL_t/dε of every example by differentiating through it."""
    torch.set_default_dtype(torch.float64)
    folder = Path(shutil.copytree(small_made, tmp_path_factory.mktemp("run") / "project"))
    x, y = features(folder, "train")
    w = torch.zeros(51)
    change = torch.zeros(51, N)
    for number, steps in enumerate(STEPS):
        for _ in range(steps):
            g, h = gradients(w, x, y), hessian(w, x, y)
            change = change - RATE * h @ change + RATE / N * g.T
            w = w - RATE * (g.mean(dim=0) + L2 * w)
        save(folder, number, w)
    found = gradients(w, *features(folder, "test")) @ change
    torch.set_default_dtype(torch.float32)
    return folder, found.numpy()


def save(folder: Path, number: int, w: Tensor) -> None:
    table = w.view(3, 17).float()
    torch.save({"2.weight": table[:, :16], "2.bias": table[:, 16]}, folder / f"e{number}.pt")


def load(folder: Path, number: int) -> Tensor:
    state = torch.load(folder / f"e{number}.pt")
    return torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1).double().flatten()


def scores(folder: Path, *values: str, store: str = "own.h5") -> np.ndarray:
    """Give influence [t, i] of the command's own functions."""
    config = load_config(folder / "influence.yaml", [f"gradients.store={folder / store}", *values])
    tasks, terminal = load_tasks(config), Terminal(quiet=True)
    stores = prepare_all(config, tasks, terminal)
    chosen = select_tests([f"0:{TESTS}"], tasks[0].test, tasks[0].classes, lambda: np.empty(0, np.int64), [])
    kept = KeptInfluence(TESTS, N)
    facts = training_facts(stores)
    for _ in rank_training(stores, chosen, facts=facts, terminal=terminal, options=RankOptions(sinks=[kept])):
        pass
    return kept.values.astype(np.float64)


def run_of(folder: Path, *values: str) -> list[str]:
    return [value.replace("[e", f"[{folder}/e").replace(", e", f", {folder}/e") for value in (*RUN, *values)]


# What it is


def test_source_is_the_derivative_through_training(followed: tuple[Path, np.ndarray]) -> None:
    folder, truth = followed
    found = scores(folder, *run_of(folder, *SOURCE), store="source.h5")
    assert pearson(found.ravel(), truth.ravel()) > 0.99
    assert slope(found.ravel(), truth.ravel()) == pytest.approx(1, abs=0.03)
    plain = scores(folder, f"model.checkpoint={folder}/e3.pt", "curvature.method=explicit", store="plain.h5")
    # Far from its minimum: ordinary influence answers another question.
    assert slope(plain.ravel(), truth.ravel()) < 0.8
    assert np.abs(found - truth).mean() < 0.1 * np.abs(plain - truth).mean()


@pytest.mark.parametrize("segments", [None, 2, 1])
@pytest.mark.quick("None", "2")
def test_source_is_its_formula(followed: tuple[Path, np.ndarray], segments: int | None) -> None:
    folder, _ = followed
    values = [*run_of(folder, *SOURCE), *([f"model.segments={segments}"] if segments else [])]
    x, y = features(folder, "train")
    v = gradients(load(folder, 3), *features(folder, "test"))
    owner, expected, at_end = segments_of(4, segments), torch.zeros(TESTS, N, dtype=torch.float64), v
    for number in (3, 2, 1, 0):
        if number == 3 or owner[number] != owner[number + 1]:
            at_end = v
        w, same = load(folder, number), [c for c in range(4) if owner[c] == owner[number]]
        h, time = hessian(w, x, y), RATE * sum(STEPS[c] for c in same)
        r = torch.linalg.solve(h, (torch.eye(51) - torch.linalg.matrix_exp(-time * h)) @ gradients(w, x, y).T)
        expected += at_end @ r / N / len(same)
        v = v @ torch.linalg.matrix_exp(-RATE * STEPS[number] * h)
    assert np.allclose(scores(folder, *values, store="source.h5"), expected.numpy(), rtol=1e-3, atol=1e-6)


def test_one_segment_of_endless_training_is_influence_without_damping(tiny: Path) -> None:
    one = f"model.checkpoint={tiny}/model.pt"
    endless = ("model.learning_rates=1.0", "model.steps=1e12")
    found = scores(tiny, one, *endless, *SOURCE)
    assert np.allclose(found, scores(tiny, one, "curvature.method=explicit", "curvature.damping=0.0"), rtol=1e-4)


def test_pixels_too_are_followed_through_the_run(tiny: Path, influence: Command) -> None:
    """In the limit that is ordinary influence perturb must give what it gives there."""
    run = ("model.ensemble=source", "model.learning_rates=1.0", "model.steps=1e12")
    words = ("perturb", 3, "--test", 1)
    found = influence(*words, *(part for value in run for part in ("-s", value)), cwd=tiny)
    plain = influence(*words, "-s", "curvature.damping=0.0", cwd=tiny)
    for row, expected in zip(rows_of(found.out), rows_of(plain.out), strict=True):
        assert row.keys() == expected.keys()
        assert row["slope"] == pytest.approx(expected["slope"], rel=1e-3)


def test_tracin_is_a_sum_over_checkpoints_in_nats(followed: tuple[Path, np.ndarray]) -> None:
    folder, _ = followed
    x, y = features(folder, "train")
    expected = torch.zeros(TESTS, N, dtype=torch.float64)
    for number, steps in enumerate(STEPS):
        w = load(folder, number)
        expected += RATE * steps / N * gradients(w, *features(folder, "test")) @ gradients(w, x, y).T
    found = scores(folder, *run_of(folder, *TRACIN), store="tracin.h5")
    assert np.allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_tracin_of_few_steps_is_the_derivative_through_training(small_made: Path, tmp_path: Path) -> None:
    """Over a short time curvature plays no part yet, and the size is right too: it is in nats."""
    folder = Path(shutil.copytree(small_made, tmp_path / "project"))
    x, y = features(folder, "train")
    w, change = torch.zeros(51, dtype=torch.float64), torch.zeros(51, N, dtype=torch.float64)
    for _ in range(3):
        g = gradients(w, x, y)
        change = change - 0.01 * hessian(w, x, y).double() @ change + 0.01 / N * g.T
        w = w - 0.01 * (g.mean(dim=0) + L2 * w)
    truth = (gradients(w, *features(folder, "test")) @ change).numpy()
    save(folder, 0, w)
    run = (f"model.checkpoint={folder}/e0.pt", "model.learning_rates=0.01", "model.steps=3", *TRACIN)
    found = scores(folder, *run)
    assert np.allclose(found, truth, rtol=0.03, atol=0.03 * np.abs(truth).max())


@pytest.mark.slow
def test_blocks_carry_a_vector_from_one_basis_to_the_next(tiny: Path) -> None:
    """EK-FAC of two layers, a part of the coordinates kept: the same through dense matrices PΛPᵀ."""
    from influence_cli.curvature.coordinates import Blocks, full_vectors
    from influence_cli.passes.gradients import example_gradients

    (tiny / "model.py").write_text(DEEP)
    torch.manual_seed(0)
    for number in range(3):
        model = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 2, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
        torch.save(model.state_dict(), tiny / f"d{number}.pt")
    run = (
        f"model.checkpoint=[{', '.join(f'{tiny}/d{number}.pt' for number in range(3))}]",
        "model.learning_rates=[2.0, 1.0, 0.5]", "model.steps=[3, 4, 10]", "model.segments=2", "model.ensemble=source",
        "curvature.method=ekfac", "gradients.budget=3kB",
    )  # fmt: skip
    found = scores(tiny, *run)
    config = load_config(tiny / "influence.yaml", [f"gradients.store={tiny / 'own.h5'}", *run])
    stores = prepare_all(config, load_tasks(config), Terminal(quiet=True))
    assert stores[0].width < stores[0].choice.network.size
    x, y = (value.float() if value.is_floating_point() else value for value in read(tiny, "train"))
    x_test, y_test = read(tiny, "test")
    v = example_gradients(stores[2].choice.network, x_test.float(), y_test)[0].double()
    times, owner = [6.0, 4.0, 5.0], [0, 0, 1]
    whole, at_end = [10.0, 10.0, 5.0], [v, v, v]
    expected = torch.zeros(TESTS, N, dtype=torch.float64)
    for number in (2, 1, 0):
        prepared = stores[number]
        assert isinstance(prepared.basis, Blocks)
        assert prepared.spectrum is not None
        if number == 1:
            at_end[1] = at_end[0] = v
        p = full_vectors(prepared.choice.network, prepared.basis, torch.eye(prepared.width)).double().T
        h = p @ torch.diag(prepared.spectrum.values) @ p.T + L2 * torch.eye(len(p))
        rows = example_gradients(prepared.choice.network, x, y)[0].double() @ p @ p.T
        r = torch.linalg.solve(h, (torch.eye(len(p)) - torch.linalg.matrix_exp(-whole[number] * h)) @ rows.T)
        expected += at_end[number] @ r / N / owner.count(owner[number])
        v = v @ torch.linalg.matrix_exp(-times[number] * h)
    assert np.allclose(found, expected.numpy(), rtol=1e-3, atol=1e-7)


def test_what_a_gradient_has_been_followed_of() -> None:
    sigma = torch.tensor([0.0, 1e-12, 0.5, 1e6], dtype=torch.float64)
    assert relaxation(sigma, 3.0).tolist() == pytest.approx([3.0, 3.0, (1 - np.exp(-1.5)) / 0.5, 1e-6])


def test_the_directions_that_training_decides_are_counted_whole_or_bounded() -> None:
    from influence_cli.curvature.spectrum import Group, Spectrum, joint

    values = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
    counts = [value * (1 - np.exp(-2 * (value + 0.1))) / (value + 0.1) for value in values.tolist()]
    assert joint(values, size=9, trace=5.25, smallest=0.0).decided(0.1, 2.0) == pytest.approx([sum(counts)] * 2)
    # What is not known of a spectrum counts at most η·steps times its trace.
    assert joint(values, size=9, trace=6.0, smallest=0.0).decided(0.1, 2.0)[1] == pytest.approx(sum(counts) + 1.5)
    group = Group("layer", 3, 5.25, values.float())
    part = Spectrum(values[:2], torch.zeros(2, dtype=torch.int64), (group,), 0.0)
    assert part.decided(0.1, 2.0) == pytest.approx((sum(counts[:2]), sum(counts)))


def test_segments_are_consecutive_and_even() -> None:
    assert segments_of(5, None) == [0, 1, 2, 3, 4]
    assert segments_of(5, 2) == [0, 0, 0, 1, 1]
    assert segments_of(1, 3) == [0]


# What a user sees


def configured(folder: Path, kind: str, to: Path) -> Path:
    """Make a project of the run as a user would write it down, its stores complete."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.h5"))
    lines = f"learning_rates: {RATE}, steps: {list(STEPS)}, ensemble: {kind}"
    edit(to, "checkpoint: model.pt", f"checkpoint: [e0.pt, e1.pt, e2.pt, e3.pt], {lines}")
    with_training(to)
    scores(to, store="influence.h5")
    return to


@pytest.fixture(scope="module")
def by_source(followed: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of the run under SOURCE."""
    return configured(followed[0], "source", tmp_path_factory.mktemp("source") / "project")


@pytest.fixture(scope="module")
def by_tracin(followed: tuple[Path, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project of the run under TracIn."""
    return configured(followed[0], "tracin", tmp_path_factory.mktemp("tracin") / "project")


def rows_of(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_rank_both_ways_and_on_the_fly_is_the_same(by_source: Path, influence: Command) -> None:
    done = influence("rank", 2, "--all", cwd=by_source)
    stored = {int(str(row["index"])): float(str(row["influence"])) for row in rows_of(done.out)}
    assert len(stored) == N
    fly = rows_of(influence("rank", 2, "--all", "--on-the-fly", cwd=by_source).out)
    assert {int(str(row["index"])): row["influence"] for row in fly} == pytest.approx(stored, rel=1e-4, abs=1e-7)
    row = next(row for row in rows_of(influence("rank", "--train", 7, "--all", cwd=by_source).out) if row["test"] == 2)
    assert row["influence"] == pytest.approx(stored[7], rel=1e-4)
    mean = rows_of(influence("rank", 2, 2, "--aggregate", "--all", cwd=by_source).out)
    assert {int(str(row["index"])): row["influence"] for row in mean} == pytest.approx(stored, rel=1e-4, abs=1e-7)
    # Of a run the last checkpoint is the model: its losses and predictions, not the mean of four.
    last = rows_of(influence("rank", 2, "--all", *alone_words(), cwd=by_source).out)
    known = {row["index"]: row for row in last}
    for row in [*rows_of(done.out), *fly]:
        assert row["loss"] == pytest.approx(known[row["index"]]["loss"], rel=1e-5)
        assert row["predicted"] == known[row["index"]]["predicted"]
        assert row["test_predicted"] == known[row["index"]]["test_predicted"]
    assert "SOURCE: 4 checkpoints in 4 segments, η·steps 0.9, 1.5, 2.4, 4.2; λ is not used" in done.err
    assert "damping" not in done.err
    # Neither an early checkpoint nor the last one has to be a minimum.
    assert "minimum" not in influence("check", cwd=by_source).err


def alone_words() -> tuple[str, ...]:
    words = ("model.checkpoint=e3.pt", "model.ensemble=mean", "model.steps=null", "gradients.store=last.h5")
    return tuple(part for word in words for part in ("-s", word))


@pytest.mark.slow
def test_groups_and_select_are_sums_of_the_same_influence(by_source: Path, influence: Command) -> None:
    found = scores(by_source, store="influence.h5")
    rows = rows_of(influence("groups", "0:", cwd=by_source).out)
    labels = np.array(ImageFolder(by_source / "train").targets)
    for row in rows:
        expected = found[:, labels == "abc".index(str(row["group"]))].sum(axis=1).mean()
        assert row["influence"] == pytest.approx(expected, rel=1e-4)
    least = rows_of(influence("select", "--keep", 0.5, cwd=by_source).out)
    for row in least:
        assert row["usefulness"] == pytest.approx(found[:, int(str(row["index"]))].mean(), rel=1e-3)


@pytest.mark.slow
def test_self_influence_of_tracin_is_a_sum_over_checkpoints(by_tracin: Path, influence: Command) -> None:
    x, y = features(by_tracin, "train")
    squares = [gradients(load(by_tracin, number), x, y).square().sum(dim=1) for number in range(4)]
    expected = sum(RATE * steps * own / N for steps, own in zip(STEPS, squares, strict=True))
    rows = rows_of(influence("mislabels", "--signal", "tracin", "--all", cwd=by_tracin).out)
    order = [int(str(row["index"])) for row in rows]
    assert [row["self_influence"] for row in rows] == pytest.approx(expected[order].tolist(), rel=1e-4)
    assert order == expected.argsort(descending=True).tolist()


@pytest.mark.slow
def test_mislabels_goes_by_the_last_checkpoint_under_source(by_source: Path, influence: Command) -> None:
    harm = -scores(by_source, store="influence.h5").mean(axis=0)
    rows = rows_of(influence("mislabels", "--signal", "test-influence", "--all", cwd=by_source).out)
    assert [row["index"] for row in rows] == np.argsort(-harm).tolist()
    assert all(row["self_influence"] is None for row in rows)
    losses = example_losses(load(by_source, 3), *features(by_source, "train"))
    assert [row["loss"] for row in rows] == pytest.approx(losses[np.argsort(-harm)].tolist(), rel=1e-4)


@pytest.mark.parametrize("kind", ["mean", "tracin", "source"])
@pytest.mark.quick("mean")
@pytest.mark.slow
def test_lds_has_a_row_for_every_number_of_checkpoints(
    kind: str, request: pytest.FixtureRequest, influence: Command
) -> None:
    """Each is what a config with these checkpoints alone gives: the first of a mean, the last of a run."""
    tiny: Path = request.getfixturevalue("by_tracin" if kind == "tracin" else "by_source")

    def scored(*values: str) -> Ended:
        words = ("verify", "--lds", "--subsets", 6, "--repeats", 1, "--tests", 6)
        return influence(*words, *(part for value in (f"model.ensemble={kind}", *values) for part in ("-s", value)),
                         cwd=tiny)  # fmt: skip

    done = scored()
    rows = rows_of(done.out)
    assert [row["checkpoints"] for row in rows] == [1, 2, 3, 4]
    assert {row["method"] for row in rows} == {"auto" if kind == "mean" else kind}
    assert rows[0]["gain"] is None
    for before, row in pairwise(rows):
        assert float(str(row["lds"])) - float(str(before["lds"])) == pytest.approx(float(str(row["gain"])), abs=1e-9)
        assert float(str(row["gain_low"])) <= float(str(row["gain_high"]))
    assert re.search(r"checkpoint 4 (improves|worsens|does not measurably change) the score: [+-]", done.err)
    files, store = ("[e0.pt, e1.pt]", "first") if kind == "mean" else ("[e2.pt, e3.pt]", "last")
    for number in (0, 1):
        shutil.copy(tiny / f"influence.{number if kind == 'mean' else number + 2}.h5", tiny / f"{store}.{number}.h5")
    shutil.rmtree(tiny / f"{store}.retrained", ignore_errors=True)
    shutil.copytree(tiny / "influence.retrained", tiny / f"{store}.retrained")
    steps = f"model.steps=[{sum(STEPS[:3])}, {STEPS[3]}]"
    two = rows_of(scored(f"model.checkpoint={files}", steps, f"gradients.store={store}.h5").out)
    assert [row["lds"] for row in two] == pytest.approx([row["lds"] for row in rows[:2]], abs=1e-9)


# Bad input

THREE = "model.checkpoint=[model.pt, model.pt, model.pt]"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("model.learning_rates=0.1",), "model.learning_rates is given without model.ensemble"),
        (("model.segments=2",), "model.segments is given without model.ensemble"),
        (("model.ensemble=tracin",), "model.ensemble tracin needs model.learning_rates"),
        (("model.ensemble=source", "model.learning_rates=0.1"), "model.ensemble source needs model.steps"),
        (("model.ensemble=sauce",), "model.ensemble is 'sauce': expected 'mean', 'tracin' or 'source'"),
        (("model.ensemble=tracin", "model.learning_rates=[0.1, 0.2]"), "has 2 numbers, but there are 3 checkpoints"),
        (("model.ensemble=tracin", "model.learning_rates=[1, -1, 1]"), "learning_rates.1 is -1: expected a number"),
        (("model.ensemble=tracin", "model.learning_rates=fast"), "learning_rates is 'fast': expected a number"),
        (("model.ensemble=source", "model.segments=0"), "model.segments is 0: expected a number ≥ 1"),
        (("model.ensemble=source", "model.segments=4"), "model.segments is 4, but model.checkpoint has 3 files"),
        (
            ("model.ensemble=tracin", "model.learning_rates=1", "curvature.method=ekfac"),
            "curvature.method=ekfac: model.ensemble tracin has no curvature",
        ),
        (
            ("model.ensemble=source", "model.learning_rates=1", "model.steps=1", "curvature.method=cg"),
            "curvature.method=cg: model.ensemble source needs a spectrum, but cg has none",
        ),
        (
            ("model.ensemble=source", "model.learning_rates=1", "model.steps=1", "curvature.matrix=hessian"),
            "curvature.matrix=hessian: model.ensemble source cannot use the Hessian",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_refused(
    influence: Command, tiny: Path, values: tuple[str, ...], message: str
) -> None:
    words = [part for value in (THREE, *values) for part in ("-s", value)]
    assert message in refusal(influence, tiny, "rank", 0, *words)
    assert not list(tiny.glob("*.h5"))


def test_a_mistake_names_the_line(influence: Command, tiny: Path) -> None:
    edit(tiny, "model: {factory: ./model.py:build, checkpoint: model.pt}", (
        "model:\n  factory: ./model.py:build\n  checkpoint: [model.pt, model.pt]\n  ensemble: tracin\n"
        "  learning_rates: [0.1, 0.1, 0.1]"
    ))  # fmt: skip
    found = refusal(influence, tiny, "rank", 0)
    assert found.startswith("error: influence.yaml:6: model.learning_rates has 3 numbers")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rank", 0, "--normalise", "relatif"), "--normalise relatif: there is no inverse curvature"),
        (("rank", 0, "--damping-sweep"), "--damping-sweep: there is no λ under model.ensemble source"),
        (("verify",), "verify without --lds: there is no s_test"),
        (("mislabels", "--signal", "self-influence"), "--signal self-influence: there is no self-influence"),
        (("mislabels", "--damping-sweep"), "--damping-sweep: there is no self-influence"),
    ],
)
def test_what_takes_an_inverse_is_refused_under_source(
    influence: Command, tiny: Path, words: tuple[object, ...], message: str
) -> None:
    run = ("model.ensemble=source", "model.learning_rates=1", "model.steps=1")
    assert message in refusal(influence, tiny, *words, *(part for value in run for part in ("-s", value)))
    assert not list(tiny.glob("*.h5"))
