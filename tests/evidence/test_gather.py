"""Opinions on labels: when the model is heard, what is said of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.config.load import load_config
from influence_cli.data.batches import read_batches
from influence_cli.data.split import take
from influence_cli.errors import InfluenceError
from influence_cli.evidence.gather import WITH_MODEL, WITHOUT, Evidence, gather_evidence
from influence_cli.evidence.pooling import pool
from influence_cli.model.task import Task, load_tasks
from influence_cli.runtime.terminal import Terminal
from tests.conftest import Command


class Memory(nn.Module):
    """Knows some images by heart, beside a layer whose input can be read."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(49, 10)
        self.inputs, self.labels = inputs.flatten(1), labels

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x.flatten(1), self.inputs)
        known = distance.min(dim=1)
        outputs = 20 * nn.functional.one_hot(self.labels[known.indices], 10).float()
        return outputs + 0 * self.head(nn.functional.avg_pool2d(x, 4).flatten(1))


@pytest.fixture
def task(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.chdir(trained)
    return load_tasks(load_config(trained / "influence.yaml"))[0]


def gathered(task: Task, part: str = "train") -> Evidence:
    split = task.train if part == "train" else task.test_split()
    return gather_evidence([task], split, Terminal(quiet=True), skip=False)


def refusal(task: Task) -> InfluenceError:
    """Give the reason why there is no readout; the rest of the evidence is there all the same."""
    found = gathered(task)
    assert found.obstacle is not None
    assert found.log_probabilities == {}
    assert found.nearest.shape == (len(task.train), 0)
    assert np.isfinite(found.facts.losses).all()
    return found.obstacle


def test_opinions_are_probabilities_of_every_example(task: Task) -> None:
    found = gathered(task)
    assert found.facts.indices.tolist() == task.train.indices.tolist()
    assert list(found.log_probabilities) == ["combined", "readout", "neighbours"]
    for own in found.log_probabilities.values():
        assert own.shape == (len(task.train), 10)
        assert np.exp(own).sum(axis=1) == pytest.approx(1, abs=1e-4)


def test_the_model_is_heard_unless_it_has_memorised(task: Task) -> None:
    """Combined is the weighted sum of log-probabilities, normalised, of three or of two."""
    heard = gathered(task)
    assert not heard.memorised
    batch = next(read_batches(task.train, task.train.indices, len(task.train)))
    with torch.no_grad():
        model = task.model(batch.inputs).log_softmax(dim=1)
    parts = [torch.from_numpy(heard.log_probabilities[name]) for name in ("readout", "neighbours")]
    total = WITH_MODEL * (sum(parts) + model)
    assert heard.log_probabilities["combined"] == pytest.approx(total.log_softmax(dim=1).numpy(), abs=1e-4)

    by_heart = replace(task, model=Memory(batch.inputs, batch.targets).eval())
    silenced = gathered(by_heart)
    assert silenced.memorised
    assert silenced.summary["model_accuracy"] == 1
    assert silenced.summary["model_loss"] < 1e-3 < silenced.summary["readout_loss"]
    parts = [torch.from_numpy(silenced.log_probabilities[name]) for name in ("readout", "neighbours")]
    assert silenced.log_probabilities["combined"] == pytest.approx(
        (WITHOUT * sum(parts)).log_softmax(dim=1).numpy(), abs=1e-4
    )


def test_a_test_set_is_never_memorised(task: Task) -> None:
    split = task.test_split()
    batch = next(read_batches(split, split.indices, len(split)))
    assert not gathered(replace(task, model=Memory(batch.inputs, batch.targets).eval()), "test").memorised


def test_the_weights_of_a_test_set_make_its_labels_likeliest(task: Task) -> None:
    found = gathered(task, "test")
    weights = [found.summary[f"{name}_weight"] for name in ("readout", "neighbours", "model")]
    assert min(weights) >= 0
    model = torch.from_numpy(np.log(found.facts.probabilities))
    parts = torch.stack(
        [torch.from_numpy(found.log_probabilities[name]) for name in ("readout", "neighbours")] + [model]
    )
    targets = torch.from_numpy(found.facts.labels)

    def loss(w: list[float]) -> float:
        return float(nn.functional.cross_entropy(torch.einsum("k,knc->nc", torch.tensor(w), parts), targets))

    for k in range(3):
        for step in (-0.05, 0.05):
            other = [w + step * (j == k) for j, w in enumerate(weights)]
            assert min(other) < 0 or loss(other) > loss(weights) - 1e-6
    combined = torch.from_numpy(found.log_probabilities["combined"])
    assert float(nn.functional.nll_loss(combined, targets)) == pytest.approx(loss(weights), abs=1e-4)


def test_an_opinion_that_misleads_gets_no_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (300,), generator=generator)
    good = (torch.randn(300, 3, generator=generator) + 2 * nn.functional.one_hot(targets, 3)).log_softmax(dim=1)
    bad = (torch.randn(300, 3, generator=generator) - 2 * nn.functional.one_hot(targets, 3)).log_softmax(dim=1)
    weights = pool(torch.stack([good, bad, bad + 1e-3]), targets)
    assert weights[0] > 0.3
    assert float(pool(torch.stack([good, torch.zeros(300, 3)]), targets)[0]) == pytest.approx(
        float(pool(good[None], targets)[0]), abs=1e-3
    )
    assert float(weights.min()) >= 0


@pytest.mark.parametrize(
    ("model", "word"),
    [("its own", "The model has not memorised its labels, so"), ("by heart", "The model has memorised its labels; ")],
)
def test_the_diagnosis_says_what_to_trust(
    task: Task, model: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if model == "by heart":
        batch = next(read_batches(task.train, task.train.indices, len(task.train)))
        task = replace(task, model=Memory(batch.inputs, batch.targets).eval())
    gather_evidence([task], task.train, Terminal(verbose=True), skip=False)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(word) for line in lines)
    assert any(line.startswith("given labels: the model has accuracy") for line in lines)
    assert any("the readout without the label" in line for line in lines)


def test_opinions_are_averaged_over_checkpoints(task: Task) -> None:
    batch = next(read_batches(task.train, task.train.indices, len(task.train)))
    other = replace(task, model=Memory(batch.inputs, batch.targets).eval())
    one, two = gathered(task), gathered(other)
    both = gather_evidence([task, other], task.train, Terminal(quiet=True), skip=False)
    for name in ("readout", "neighbours"):
        mean = torch.from_numpy(one.log_probabilities[name] + two.log_probabilities[name]) / 2
        assert both.log_probabilities[name] == pytest.approx(mean.log_softmax(dim=1).numpy(), abs=1e-4)


def relabelled(task: Task, labels: np.ndarray) -> Task:
    return replace(task, train=replace(task.train, labels=labels))


def test_a_class_of_two_examples_is_left_out_as_if_they_were_excluded(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = task.train.labels.copy()
    few = np.flatnonzero(labels == 3)
    labels[few[2:]] = 4
    rare = relabelled(task, labels)
    found = gather_evidence([rare], rare.train, Terminal(), skip=False)
    assert found is not None
    assert f"come last without a score: {task.classes[3]} (2)" in capsys.readouterr().err
    assert np.flatnonzero(~found.judged).tolist() == few[:2].tolist()
    others = take(rare.train, np.setdiff1d(rare.train.indices, few[:2]))
    without = gathered(replace(rare, train=others))
    for name, values in found.log_probabilities.items():
        assert np.isnan(values[~found.judged]).all()
        assert values[found.judged] == pytest.approx(without.log_probabilities[name], abs=1e-4)
    assert found.summary == pytest.approx(without.summary, rel=1e-3)
    # Neighbours are numbered among all rows.
    assert (found.nearest[~found.judged] == -1).all()
    assert found.nearest.max() == len(labels) - 1
    same = np.flatnonzero(found.judged)[without.nearest[:, 0]] == found.nearest[found.judged][:, 0]
    assert same.mean() > 0.99


def test_classes_that_are_all_too_small_are_refused(task: Task) -> None:
    some = take(task.train, np.concatenate([np.flatnonzero(task.train.labels == c)[:2] for c in range(10)]))
    found = gathered(replace(task, train=some))
    assert found.obstacle is not None
    assert f"these have fewer: {task.classes[0]} (2), " in found.obstacle.message


def test_a_readout_that_guesses_makes_no_diagnosis(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    """The model knows random labels by heart, and nothing else says anything of them."""
    labels = np.random.default_rng(0).permutation(task.train.labels)
    batch = next(read_batches(task.train, task.train.indices, len(task.train)))
    by_heart = replace(relabelled(task, labels), model=Memory(batch.inputs, torch.from_numpy(labels)).eval())
    found = gather_evidence([by_heart], by_heart.train, Terminal(), skip=False)
    assert found is not None
    assert (found.informed, found.memorised) == (False, False)
    assert "it is not known whether the model has memorised its labels" in capsys.readouterr().err


def test_one_class_alone_is_refused(task: Task) -> None:
    found = refusal(relabelled(task, np.full_like(task.train.labels, 5)))
    assert f"labels are {task.classes[5]}: no label can be suspected" in found.message


def test_the_command_ranks_suggests_and_writes_the_facts(influence: Command, trained: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(trained, tmp_path / "project"))
    done = influence("mislabels", "--all", "-o", "rows.jsonl", cwd=project)
    rows = [json.loads(line) for line in (project / "rows.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    for row in rows:
        if row["suggested"] == row["label"]:
            assert row["confidence"] == pytest.approx(1 - row["score"], abs=1e-5)
        else:
            assert row["confidence"] >= 1 - row["score"] - 1e-5
    facts = json.loads((project / "rows.jsonl.run.json").read_text())["evidence"]
    assert facts["memorised"] is False
    assert {"ridge", "temperature", "dimension", "model_loss", "readout_loss"} <= set(facts)
    assert "The model has not memorised its labels, so its loss counts as evidence." in done.err
