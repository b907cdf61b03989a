"""mislabels: wrong labels come first, the numbers are those of a dense computation, and CI can act on them."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from influence_cli.cli import app
from tests.conftest import Command, save_minimum

SIGNALS = ("self-influence", "loss", "margin")
OPINIONS = ("combined", "readout", "neighbours", "logistic")
GRADIENTS = ("gradient-norm", "test-influence")
CHECKED = (0.01, 0.05, 0.10, 0.20, 0.30)
COLUMNS = ["rank", "index", "path", "label", "suggested", "confidence", "score", "loss", "self_influence"]
L2 = 0.01


@dataclass
class Noisy:
    """A project in which some images lie in a wrong class folder, with its store; do not change it.

    Attributes:
        folder: the project, with truth.csv.
        wrong: positions of the wrong labels, rising.
    """

    folder: Path
    wrong: np.ndarray


@pytest.fixture(scope="module")
def noisy(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Noisy:
    """Move 32 of 320 images to a wrong folder, train on that, and fill the store."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("noisy") / "project"))
    data = ImageFolder(folder / "train")
    generator = np.random.default_rng(0)
    true = {}
    for index in generator.choice(len(data), 32, replace=False):
        path, label = data.samples[index]
        other = data.classes[(label + generator.integers(1, 10)) % 10]
        moved = Path(path).rename(folder / "train" / other / Path(path).name)
        true[str(moved)] = data.classes[label]
    save_minimum(folder)
    rows = [
        (index, true[path]) for index, (path, _) in enumerate(ImageFolder(folder / "train").samples) if path in true
    ]
    lines = "".join(f"{index},{label}\n" for index, label in rows)
    (folder / "truth.csv").write_text(f"index,true_label\n{lines}")
    with contextlib.chdir(folder), pytest.raises(SystemExit) as ended:
        app(["gradients", "-q"])
    assert not ended.value.code
    return Noisy(folder, np.array([index for index, _ in rows]))


@dataclass
class Exact:
    """The softmax regression by its formulas, in float64: what a part of the project has in truth."""

    gradients: torch.Tensor
    hessian: torch.Tensor
    losses: np.ndarray
    probabilities: np.ndarray
    labels: np.ndarray

    def self_influence(self, damping: float, of: torch.Tensor | None = None) -> np.ndarray:
        """Give gᵀ(H + (l2 + λ)I)⁻¹g/n, by a dense solve."""
        g = self.gradients if of is None else of
        matrix = self.hessian + (L2 + damping) * torch.eye(500, dtype=torch.float64)
        return ((g * torch.linalg.solve(matrix, g.T).T).sum(dim=1) / len(self.gradients)).numpy()


def exact(folder: Path, part: str = "train", checkpoint: str = "model.pt") -> Exact:
    data = ImageFolder(folder / part)
    x = torch.stack([torch.tensor(np.array(image.convert("L"))).double() / 255 for image, _ in data])
    x = torch.nn.functional.avg_pool2d(x[:, None], 4).flatten(1)
    y = torch.tensor(data.targets)
    state = torch.load(folder / checkpoint)
    weights = torch.cat([state["2.weight"].flatten(), state["2.bias"]]).double()

    def outputs(theta: torch.Tensor) -> torch.Tensor:
        return x @ theta[:490].view(10, 49).T + theta[490:]

    def mean_loss(theta: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs(theta), y)

    p = outputs(weights).softmax(dim=1)
    delta = p - torch.nn.functional.one_hot(y, 10)
    gradients = torch.cat([(delta[:, :, None] * x[:, None, :]).flatten(1), delta], dim=1)
    hessian = torch.autograd.functional.hessian(mean_loss, weights)
    losses = -p[torch.arange(len(y)), y].log()
    return Exact(gradients, hessian, losses.numpy(), p.numpy(), y.numpy())


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def ranked(influence: Command, folder: Path, *words: object) -> dict[str, np.ndarray]:
    """Run mislabels over all examples and give its columns, in the order of the ranking."""
    rows = rows_of(influence("mislabels", "--all", "-q", *words, cwd=folder).out)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def by_index(table: dict[str, np.ndarray], name: str) -> np.ndarray:
    return table[name][np.argsort(table["index"])]


def measured(order: np.ndarray, wrong: np.ndarray) -> tuple[float, float, list[float]]:
    """Count AP, AUROC and the shares found of a ranking without ties, from its definition."""
    hit = np.isin(order, wrong)
    precision = [hit[: k + 1].sum() / (k + 1) for k in np.flatnonzero(hit)]
    above = [(~hit[k:]).sum() for k in np.flatnonzero(hit)]
    found = [hit[: int(np.ceil(share * len(order)))].sum() / hit.sum() for share in CHECKED]
    return float(np.mean(precision)), float(np.sum(above) / (hit.sum() * (~hit).sum())), found


@pytest.mark.parametrize("words", [(), *(("--signal", name) for name in (*SIGNALS, *OPINIONS))])
@pytest.mark.quick("words0", "words4")
def test_wrong_labels_are_found_better_than_at_random(influence: Command, noisy: Noisy, words: tuple[str, ...]) -> None:
    table = ranked(influence, noisy.folder, *words)
    precision, area, found = measured(table["index"], noisy.wrong)
    # At random: a precision of 0.1, an area of 0.5, and a fifth found in a fifth.
    # 32 images a class are few for neighbours and a logistic readout.
    weak = {"neighbours", "logistic"} & set(words)
    assert precision > (0.3 if weak else 0.5)
    assert area > (0.75 if weak else 0.85)
    assert found[3] > (0.5 if weak else 0.6)
    # Of those that are found, most have the right label suggested.
    top = [row for row in range(32) if table["index"][row] in noisy.wrong]
    with (noisy.folder / "truth.csv").open() as file:
        true = {int(row["index"]): row["true_label"] for row in csv.DictReader(file)}
    assert np.mean([true[int(table["index"][row])] == table["suggested"][row] for row in top]) > 0.5


@pytest.mark.parametrize("damping", [None, 0.05])
def test_self_influence_is_that_of_a_dense_solve(influence: Command, noisy: Noisy, damping: float | None) -> None:
    words = () if damping is None else ("-s", f"curvature.damping={damping}")
    table = ranked(influence, noisy.folder, "--signal", "self-influence", *words)
    wanted = exact(noisy.folder).self_influence(damping or 0.0)
    assert np.allclose(by_index(table, "self_influence"), wanted, rtol=1e-3)
    assert table["index"].tolist() == np.argsort(-by_index(table, "self_influence"), kind="stable").tolist()


def test_the_other_columns_are_those_of_the_model(influence: Command, noisy: Noisy) -> None:
    table = ranked(influence, noisy.folder, "--signal", "loss")
    true = exact(noisy.folder)
    data = ImageFolder(noisy.folder / "train")
    assert np.allclose(by_index(table, "loss"), true.losses, atol=1e-5)
    assert by_index(table, "path").tolist() == [path for path, _ in data.samples]
    assert by_index(table, "label").tolist() == [data.classes[label] for label in data.targets]
    assert by_index(table, "suggested").tolist() == [data.classes[c] for c in true.probabilities.argmax(axis=1)]
    assert np.allclose(by_index(table, "confidence"), true.probabilities.max(axis=1), atol=1e-5)
    assert table["rank"].tolist() == list(range(1, 321))


def test_the_test_set_is_ranked_as_if_its_examples_were_added(influence: Command, noisy: Noisy) -> None:
    table = ranked(influence, noisy.folder, "--on", "test", "--signal", "self-influence")
    train, test = exact(noisy.folder), exact(noisy.folder, "test")
    assert np.allclose(by_index(table, "self_influence"), train.self_influence(0.0, test.gradients), rtol=1e-3)
    assert np.allclose(by_index(table, "loss"), test.losses, atol=1e-5)
    assert by_index(table, "path").tolist() == [path for path, _ in ImageFolder(noisy.folder / "test").samples]


@pytest.mark.parametrize("on", ["train", "test"])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.quick("margin-train", "self-influence-test")
def test_a_signal_orders_the_examples_and_its_score_is_a_share(
    influence: Command, noisy: Noisy, signal: str, on: str
) -> None:
    table = ranked(influence, noisy.folder, "--signal", signal, "--on", on)
    true = exact(noisy.folder, on)
    rows = np.arange(len(true.labels))
    given = true.probabilities[rows, true.labels]
    others = true.probabilities.copy()
    others[rows, true.labels] = -1
    values = {
        "self-influence": exact(noisy.folder).self_influence(0.0, true.gradients),
        "loss": true.losses,
        "margin": others.max(axis=1) - given,
    }[signal]
    # Up to rounding, where two are next to equal, the order is that of the exact values.
    assert (np.diff(values[table["index"]]) < 1e-4).all()
    percentile = np.array([np.mean(value > np.delete(values, row)) for row, value in enumerate(values)])
    wanted = 1 - given if signal == "loss" else percentile
    assert np.allclose(by_index(table, "score"), wanted, atol=0.01 if signal != "loss" else 1e-5)
    assert (np.diff(table["score"]) <= 0).all()
    assert table["score"].min() >= 0
    assert table["score"].max() <= 1


@pytest.mark.parametrize("signal", ["loss", "margin"])
def test_equal_scores_are_listed_by_index(influence: Command, project: Path, signal: str) -> None:
    state = torch.load(project / "model.pt")
    torch.save({name: torch.zeros_like(value) for name, value in state.items()}, project / "model.pt")
    table = ranked(influence, project, "--signal", signal)
    assert np.allclose(table["loss"], np.log(10))
    assert len(set(table["score"])) == 1
    assert table["index"].tolist() == list(range(320))


@pytest.mark.slow
def test_identity_takes_the_norm_of_the_gradient(influence: Command, noisy: Noisy) -> None:
    words = ("-s", "curvature.method=identity", "-s", "gradients.store=raw.h5", "--signal", "self-influence")
    table = ranked(influence, noisy.folder, *words)
    wanted = exact(noisy.folder).gradients.square().sum(dim=1).numpy() / 320
    assert np.allclose(by_index(table, "self_influence"), wanted, rtol=1e-4)
    assert (np.diff(table["self_influence"]) <= 0).all()


def test_without_a_spectrum_there_is_no_self_influence(influence: Command, noisy: Noisy) -> None:
    words = ("-s", "curvature.method=cg", "-s", "gradients.store=raw.h5", "--signal", "loss")
    table = ranked(influence, noisy.folder, *words)
    assert set(table["self_influence"]) == {None}
    assert np.allclose(by_index(table, "loss"), exact(noisy.folder).losses, atol=1e-5)
    text = influence("mislabels", *words, "--format", "csv", cwd=noisy.folder).out
    assert {row["self_influence"] for row in csv.DictReader(io.StringIO(text))} == {""}


@pytest.mark.slow
def test_several_checkpoints_are_averaged(influence: Command, noisy: Noisy, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(noisy.folder, tmp_path / "project"))
    state = torch.load(folder / "model.pt")
    torch.save({name: value * 0.8 for name, value in state.items()}, folder / "other.pt")
    words = ("-s", "model.checkpoint=[model.pt, other.pt]", "--signal", "self-influence")
    table = ranked(influence, folder, *words)
    one, two = exact(folder), exact(folder, checkpoint="other.pt")
    assert np.allclose(by_index(table, "loss"), (one.losses + two.losses) / 2, atol=1e-5)
    wanted = (one.self_influence(0.0) + two.self_influence(0.0)) / 2
    assert np.allclose(by_index(table, "self_influence"), wanted, rtol=1e-3)


def right_share(table: dict[str, np.ndarray], noisy: Noisy, form: str) -> list[float]:
    """Count the wrong labels whose suggested label is the true one, where the truth says what that is."""
    data = ImageFolder(noisy.folder / "train")
    true = {int(index): data.classes[(data.targets[index] + 1) % 10] for index in noisy.wrong}
    if form == "true_label":
        with (noisy.folder / "truth.csv").open() as file:
            true = {int(row["index"]): row["true_label"] for row in csv.DictReader(file)}
    elif form != "true.npy":
        return []
    suggested = by_index(table, "suggested")
    return [float(np.mean([suggested[index] == label for index, label in true.items()]))]


@pytest.mark.parametrize("form", ["true_label", "index", "true.npy", "index.npy"])
@pytest.mark.quick("true_label")
def test_truth_measures_every_signal(influence: Command, noisy: Noisy, tmp_path: Path, form: str) -> None:
    file = noisy.folder / "truth.csv"
    data = ImageFolder(noisy.folder / "train")
    if form == "index":
        file = tmp_path / "truth.csv"
        file.write_text("index\n" + "".join(f"{index}\n" for index in noisy.wrong))
    elif form == "true.npy":
        file = tmp_path / "truth.npy"
        labels = np.array(data.targets)
        labels[noisy.wrong] = (labels[noisy.wrong] + 1) % 10
        np.save(file, labels)
    elif form == "index.npy":
        file = tmp_path / "truth.npy"
        np.save(file, noisy.wrong)
    output = tmp_path / "rows.csv"
    done = influence("mislabels", "--truth", file, "-o", output, cwd=noisy.folder)
    printed = {}
    suggested, intervals = {}, {}
    for line in done.err.splitlines():
        name, *numbers = line.split()
        if name in (*SIGNALS, *OPINIONS, *GRADIENTS, "random"):
            intervals[name] = [float(number) for number in numbers.pop(1).split("–")]
            suggested[name] = [float(number) for number in numbers[7:]]
            printed[name] = [float(number) for number in numbers[:7]]
    assert "AUROC" in done.err
    assert done.err.count("1%     5%    10%    20%    30%     right") == 1
    # All of them once; the other forms of the same truth differ in nothing but how it is read.
    for signal in (*SIGNALS, *OPINIONS, *GRADIENTS) if form == "true_label" else ("combined", "loss"):
        table = ranked(influence, noisy.folder, "--signal", signal)
        precision, area, found = measured(table["index"], noisy.wrong)
        assert printed[signal] == pytest.approx([precision, area, *found], abs=6e-4), signal
        assert intervals[signal][0] < precision < intervals[signal][1]
        assert suggested[signal] == pytest.approx(
            right_share(table, noisy, form) if signal in (*OPINIONS, "loss") else [], abs=6e-4
        )
    assert printed["random"] == pytest.approx([0.1, 0.5, *CHECKED])
    # The same goes to the run file, unrounded.
    run = {entry["signal"]: entry for entry in json.loads((tmp_path / "rows.csv.run.json").read_text())["truth"]}
    assert run["loss"]["average_precision"] == pytest.approx(printed["loss"][0], abs=6e-4)
    assert run["loss"]["found"] == pytest.approx(printed["loss"][2:], abs=6e-4)


@pytest.mark.parametrize("content", ["index\n", "index\n" + "".join(f"{index}\n" for index in range(320))])
def test_a_truth_of_one_kind_is_refused(influence: Command, noisy: Noisy, tmp_path: Path, content: str) -> None:
    (tmp_path / "truth.csv").write_text(content)
    done = influence("mislabels", "--truth", tmp_path / "truth.csv", cwd=noisy.folder, code=2)
    assert done.out == ""
    assert f"--truth says that {content.count(chr(10)) - 1} of 320 labels are wrong" in done.err
    assert "both correct and wrong labels" in done.err


@pytest.mark.parametrize("on", ["train", "test"])
def test_fail_above_ends_with_1_only_above_the_number_of_findings(influence: Command, noisy: Noisy, on: str) -> None:
    findings = len(rows_of(influence("mislabels", "--on", on, "--top", "auto", cwd=noisy.folder).out))
    size = {"train": 320, "test": 80}[on]
    assert 5 < findings < size / 3
    for limit, code in ((0, 1), (findings - 1, 1), (findings, 0), (10**6, 0)):
        done = influence("mislabels", "--on", on, "--fail-above", limit, cwd=noisy.folder, code=code)
        # The findings are listed either way.
        assert len(done.out.splitlines()) == 10
        low, high = map(int, re.findall(rf"between (\d+) and (\d+) of {size} labels are wrong", done.err)[0])
        assert low <= findings <= high
        assert (f"{findings} labels are probably wrong, more than --fail-above {limit} allows" in done.err) == bool(
            code
        )


def test_fail_above_takes_no_negative_number(influence: Command, noisy: Noisy) -> None:
    assert influence("mislabels", "--fail-above", "-1", cwd=noisy.folder, code=2).out == ""


@pytest.mark.parametrize(("words", "count"), [((), 10), (("--top", 3), 3), (("--top", 1000), 320), (("--all",), 320)])
@pytest.mark.quick("words0*", "words3*")
def test_top_and_all_say_how_many(influence: Command, noisy: Noisy, words: tuple[object, ...], count: int) -> None:
    rows = rows_of(influence("mislabels", *words, cwd=noisy.folder).out)
    assert len(rows) == count
    assert rows == rows_of(influence("mislabels", "--all", cwd=noisy.folder).out)[:count]
    assert list(rows[0]) == COLUMNS


@pytest.mark.slow
def test_formats_hold_the_same_rows(influence: Command, noisy: Noisy) -> None:
    rows = rows_of(influence("mislabels", cwd=noisy.folder).out)
    assert json.loads(influence("mislabels", "--format", "json", cwd=noisy.folder).out) == rows
    for format, delimiter in (("csv", ","), ("tsv", "\t")):
        text = influence("mislabels", "--format", format, cwd=noisy.folder).out
        read = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
        assert [list(row) for row in read] == [COLUMNS] * 10
        for name in ("confidence", "score", "loss", "self_influence"):
            assert [float(row[name]) for row in read] == [row[name] for row in rows]
        for name in ("path", "label", "suggested"):
            assert [row[name] for row in read] == [row[name] for row in rows]
    table = influence("mislabels", "--format", "table", cwd=noisy.folder).out.splitlines()
    assert all(name in table[0] for name in ("rank", "label", "suggested", "score"))
    for row in rows:
        assert any(str(row["label"]) in line and Path(str(row["path"])).name in line for line in table)


def test_excluded_examples_are_not_listed(influence: Command, noisy: Noisy, tmp_path: Path) -> None:
    np.save(tmp_path / "out.npy", noisy.wrong)
    words = ("-s", f"train.exclude={tmp_path / 'out.npy'}", "-s", f"gradients.store={tmp_path / 'other.h5'}")
    table = ranked(influence, noisy.folder, *words)
    assert sorted(table["index"]) == np.setdiff1d(np.arange(320), noisy.wrong).tolist()


def test_labels_from_a_file_are_those_that_are_judged(influence: Command, noisy: Noisy, tmp_path: Path) -> None:
    data = ImageFolder(noisy.folder / "train")
    with (noisy.folder / "truth.csv").open() as file:
        true = {int(row["index"]): row["true_label"] for row in csv.DictReader(file)}
    (tmp_path / "labels.csv").write_text("index,label\n" + "".join(f"{i},{name}\n" for i, name in true.items()))
    words = ("-s", f"train.labels={tmp_path / 'labels.csv'}", "-s", f"gradients.store={tmp_path / 'other.h5'}")
    labels = by_index(ranked(influence, noisy.folder, *words), "label")
    assert labels.tolist() == [true.get(i, data.classes[label]) for i, label in enumerate(data.targets)]
