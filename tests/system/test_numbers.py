"""Numbers: one that is not finite stops with its example's name; the same command gives the same numbers."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from influence_cli.data.batches import Loading
from influence_cli.model.task import Task
from tests.conftest import Command, edit

CONFIG = """
model: {factory: ./project.py:build, checkpoint: model.pt}
l2: 0.01
train: {dataset: ./project.py:Arrays, args: {root: train}}
test: {dataset: ./project.py:Arrays, args: {root: test}}
gradients: {block: 8}
"""
PROJECT = """
import numpy as np
import torch
from torch import nn
from torchvision.datasets import DatasetFolder


def read(path):
    return torch.from_numpy(np.load(path))


class Arrays(DatasetFolder):
    def __init__(self, root):
        super().__init__(root, read, extensions=(".npy",))


def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def steep(outputs, targets):
    own = torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
    far = outputs.abs().amax(dim=1) > 1e6
    # Zero, a number, whose slope is none.
    return torch.where(far, torch.where(far, outputs[:, 0] * 0, 1.0).abs().sqrt(), own)
"""
SOLVERS = ("cg", "nystrom")
METHODS = ("explicit", "ekfac", "kfac", "arnoldi", "fisher", "identity", *SOLVERS)
VALUES = (np.nan, np.inf, 1e38, 1e25)
SMALLER = ("float16", "int8")


@pytest.fixture(scope="module")
def small(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of 24 + 6 arrays in files and a trained network of 235 parameters; do not change it."""
    folder = tmp_path_factory.mktemp("arrays") / "project"
    generator = np.random.default_rng(0)
    arrays: list[np.ndarray] = []
    for part, count in (("train", 24), ("test", 6)):
        for number in range(count):
            kind = 3 * number // count
            path = folder / part / "abc"[kind] / f"{number:03d}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            array = (generator.random((1, 6, 6)) + 0.3 * kind).astype(np.float32)
            np.save(path, array)
            arrays += [array] if part == "train" else []
    (folder / "influence.yaml").write_text(CONFIG)
    (folder / "project.py").write_text(PROJECT)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = sum((parameter.square().sum() for parameter in model.parameters()), torch.zeros(()))
        outputs = model(torch.from_numpy(np.stack(arrays)))
        loss = nn.functional.cross_entropy(outputs, torch.arange(24) // 8) + 0.005 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.save(model.state_dict(), folder / "model.pt")
    return folder


@pytest.fixture
def project(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "project"))


def put(path: Path, value: float) -> None:
    array = np.load(path)
    array[0, 1, 1] = value
    np.save(path, array)


# --- not finite


HARMFUL = [(method, value, "float32") for method in METHODS for value in VALUES]
HARMFUL += [(method, value, dtype) for method in ("explicit", "ekfac") for value in (np.inf, 1e38) for dtype in SMALLER]


@pytest.mark.quick("*-nan-*", "explicit-*", "ekfac-1e+25-*")
@pytest.mark.parametrize(("method", "value", "dtype"), HARMFUL)
def test_a_training_example_whose_numbers_are_not_finite_is_named(
    influence: Command, project: Path, method: str, value: float, dtype: str
) -> None:
    """NaN, infinity, and a gradient that is finite while its square is no number of float32."""
    put(project / "train" / "b" / "013.npy", value)
    for command in (("gradients",), ("rank", 0), ("mislabels", "--signal", "self-influence")):
        if command[0] == "mislabels" and method in SOLVERS:
            continue
        words = ("-s", f"curvature.method={method}", "-s", f"gradients.store_dtype={dtype}")
        done = influence(*command, *words, cwd=project, code=2)
        assert done.out == ""
        said = done.err[done.err.index("error: ") :].splitlines()
        assert "training example 13 (" in said[0]
        assert "train/b/013.npy) " in said[0]
        assert "list it under exclude" in said[1]


@pytest.mark.quick("explicit-*", "ekfac-*", "cg-nan")
@pytest.mark.parametrize("value", [np.nan, 1e38], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_test_example_whose_numbers_are_not_finite_is_named(
    influence: Command, project: Path, method: str, value: float
) -> None:
    put(project / "test" / "b" / "003.npy", value)
    for words in (("rank", "0:6"), ("rank", "0:6", "--on-the-fly"), ("rank", "0:6", "--aggregate")):
        done = influence(*words, "-q", "-s", f"curvature.method={method}", cwd=project, code=2)
        assert done.out == ""
        assert "test example 3 (" in done.err
        assert "test/b/003.npy) is NaN or infinite\n" in done.err


@pytest.mark.parametrize("method", ["identity", "explicit", "fisher"])
def test_a_gradient_that_is_not_finite_under_a_loss_that_is_names_its_example(
    influence: Command, project: Path, method: str
) -> None:
    edit(project, "l2: 0.01", "l2: 0.01\nloss: {factory: ./project.py:steep}")
    put(project / "train" / "b" / "013.npy", 1e9)
    done = influence("gradients", "-s", f"curvature.method={method}", cwd=project, code=2)
    assert "training example 13 (" in done.err
    assert "train/b/013.npy) is NaN or infinite\n" in done.err


def test_what_overflows_only_in_the_scores_is_named_as_a_pair(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence("gradients", "-q", "-s", "curvature.method=identity", cwd=project)
    from influence_cli.influence import streams
    from influence_cli.ranking import rank

    own = streams.averaged

    def overflow(streams: list[Iterator[tuple[slice, np.ndarray]]]) -> Iterator[tuple[slice, np.ndarray]]:
        for where, values in own(streams):
            if where.start <= 13 < where.stop:
                values = values.copy()
                values[1, 13 - where.start] = np.inf
            yield where, values

    monkeypatch.setattr(rank, "averaged", overflow)
    done = influence("rank", "2:4", "-s", "curvature.method=identity", cwd=project, code=2)
    assert done.out == ""
    assert "the influence of training example 13 (" in done.err
    assert "train/b/013.npy) on test example 3 (" in done.err


# --- the same


def scores(influence: Command, folder: Path, *words: str) -> np.ndarray:
    """Give all influence on all test examples and all self-influence, as the rows say it: [7, 24]."""
    rows = list(
        csv.DictReader(io.StringIO(influence("rank", "0:6", "--all", "--format", "csv", "-q", *words, cwd=folder).out))
    )
    found = np.full((7, 24), np.nan)
    for row in rows:
        found[int(row["test"]), int(row["index"])] = float(row["influence"])
    if not {f"curvature.method={method}" for method in SOLVERS} & set(words):
        table = influence(
            "mislabels", "--signal", "self-influence", "--all", "--format", "csv", "-q", *words, cwd=folder
        )
        for row in csv.DictReader(io.StringIO(table.out)):
            found[6, int(row["index"])] = float(row["self_influence"])
    return found


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """To 1e-5 of the largest score of a test example: smaller ones are differences of such numbers."""
    for own, wanted in zip(found, expected, strict=True):
        assert np.array_equal(np.isnan(own), np.isnan(wanted))
        known = ~np.isnan(wanted)
        assert np.abs(own - wanted)[known].max(initial=0) <= 1e-5 * np.abs(wanted)[known].max(initial=0)


@pytest.mark.quick("explicit")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=pytest.mark.slow) if method in ("arnoldi", "cg") else method
        for method in METHODS
        if method != "nystrom"
    ],
)
@pytest.mark.slow
def test_block_size_loader_processes_and_threads_change_nothing(
    influence: Command, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    words = ("-s", f"curvature.method={method}")

    def run(name: str, *more: str) -> np.ndarray:
        return scores(influence, Path(shutil.copytree(small, tmp_path / name)), *words, *more)

    expected = run("plain")
    assert np.nanmax(np.abs(expected)) > 0
    for block in (1, 5, 64) if method != "arnoldi" else (5, 64):
        assert_same(run(f"block-{block}", "-s", f"gradients.block={block}"), expected)
    torch.set_num_threads(2)
    try:
        assert_same(run("threads"), expected)
    finally:
        torch.set_num_threads(1)
    # Two loader processes, whatever they would save.
    monkeypatch.setattr(Task, "loading", property(lambda _task: Loading(2)))
    assert_same(run("workers", "-s", "gradients.block=5"), expected)


@pytest.mark.parametrize(("method", "threads"), [*((method, 1) for method in METHODS), ("explicit", 2), ("ekfac", 2)])
@pytest.mark.quick("ekfac-2")
def test_the_same_command_twice_gives_the_same_bytes(
    influence: Command, small: Path, tmp_path: Path, method: str, threads: int
) -> None:
    found: list[tuple[bytes, str, str]] = []
    torch.set_num_threads(threads)
    try:
        for name in ("first", "second"):
            folder = Path(shutil.copytree(small, tmp_path / name))
            words = ("-q", "-s", f"curvature.method={method}")
            ranked = influence("rank", "0:6", "--all", "--format", "jsonl", *words, cwd=folder).out
            suspects = ""
            if method not in SOLVERS:
                suspects = influence("mislabels", "--signal", "self-influence", "--all", *words, cwd=folder).out
            found.append(((folder / "influence.h5").read_bytes(), ranked, suspects))
    finally:
        torch.set_num_threads(1)
    first, second = found
    assert first[0] == second[0]
    assert first[1].replace("first/", "second/") == second[1]
    assert first[2].replace("first/", "second/") == second[2]
