"""`influence verify --top` on a small project, beside the same trainings done by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import ImageFolder

from influence_cli import load_config, load_tasks
from influence_cli.retrain.strongest import drawn_over_classes
from influence_cli.runtime.seeds import seed_of
from tests.conftest import Command
from tests.support.small_project import with_training

TOP = ("verify", "--top", 2, "--tests", 3, "--repeats", 2, "-s", "curvature.damping=0.1")


def inputs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    data = ImageFolder(folder)
    images = [torch.tensor(np.asarray(image.convert("L"))).float()[None] / 255 for image, _ in data]
    return torch.stack(images), torch.tensor(data.targets)


def losses_by_hand(project: Path, without: list[int], seed: int, *, margin: bool) -> np.ndarray:
    """Train as the project's function does, from the seed's start, and measure all test images."""
    spec = importlib.util.spec_from_file_location("by_hand", project / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (x, y), (test_x, test_y) = inputs(project / "train"), inputs(project / "test")
    kept = [row for row in range(len(x)) if row not in without]
    torch.manual_seed(seed)
    model = module.build()
    pairs = [(x[row], int(y[row])) for row in kept]
    trained = module.train(model, pairs, l2=0.0, seed=seed, progress=lambda *_: None)
    with torch.no_grad():
        outputs = trained(test_x).double()
    if not margin:
        return nn.functional.cross_entropy(outputs, test_y, reduction="none").numpy()
    p = outputs.softmax(1).gather(1, test_y[:, None])[:, 0]
    return -torch.log(p / (1 - p)).numpy()


@pytest.mark.parametrize("measure", ["loss", "margin"])
@pytest.mark.quick("margin")
def test_both_arms_have_the_seed_and_the_start_of_the_training_with_all(
    influence: Command, tiny: Path, tmp_path: Path, measure: str
) -> None:
    with_training(tiny)
    done = influence(*TOP, "--measure", measure, "-o", "top.jsonl", cwd=tiny)
    rows = [json.loads(line) for line in (tiny / "top.jsonl").read_text().splitlines()]
    assert list(rows[0]) == [
        "test", "test_path", "test_label", "test_predicted", "left_out", "estimated", "actual", "random", "repeats",
        "measure",
    ]  # fmt: skip
    assert [row["test_label"] for row in rows] == ["a", "b", "c"]
    influence("rank", *[row["test"] for row in rows], "--matrix", tmp_path / "m.h5", *TOP[-2:], "-q", cwd=tiny)
    with h5py.File(tmp_path / "m.h5") as file:
        scores = file["influence"][:].astype(np.float64)
    random = [np.sort(np.random.default_rng([seed_of(0, 7, 2), t]).choice(24, 2, replace=False)) for t in range(3)]
    strongest = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    is_margin = measure == "margin"
    for number, row in enumerate(rows):
        actual, by_chance = [], []
        for seed in (seed_of(0, 6, repeat) for repeat in range(2)):
            base = losses_by_hand(tiny, [], seed, margin=is_margin)[row["test"]]
            without = losses_by_hand(tiny, strongest[number].tolist(), seed, margin=is_margin)
            actual.append(without[row["test"]] - base)
            drawn = [losses_by_hand(tiny, rows_.tolist(), seed, margin=is_margin)[row["test"]] for rows_ in random]
            by_chance.append(np.mean(drawn) - base)
        assert row["actual"] == pytest.approx(np.mean(actual), abs=1e-6)
        assert row["random"] == pytest.approx(np.mean(by_chance), abs=1e-6)
        if not is_margin:
            assert row["estimated"] == pytest.approx(scores[number, strongest[number]].sum(), rel=1e-5)
    facts = json.loads((tiny / "top.jsonl.run.json").read_text())["top"]
    assert facts["actual"][0] == pytest.approx(np.mean([row["actual"] for row in rows]))
    assert facts["actual"][0] - facts["random"][0] == pytest.approx(facts["difference"][0])
    assert facts["difference"][1] <= facts["difference"][0] <= facts["difference"][2]
    assert ("a test example's loss rises by" in done.err) != is_margin
    assert f"{facts['difference'][0]:+.3g} (95%" in done.err
    again = influence(*TOP, "--measure", "loss", cwd=tiny)
    assert "14 of 14 retrainings are already in influence.retrained/from-start" in again.err


def test_the_classes_take_turns(tiny: Path) -> None:
    split = load_tasks(load_config(tiny / "influence.yaml"))[0].test_split()
    labels = [item.label for item in drawn_over_classes(split, 4, 0)]
    assert sorted(labels)[:1] == [0]
    assert set(labels) == {0, 1, 2}
    assert len(drawn_over_classes(split, 100, 0)) == len(split)
    assert drawn_over_classes(split, 4, 0) == drawn_over_classes(split, 4, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--top", "2", "--loo", "3"), "--loo and --top are two commands"),
        (("--top", "2", "--lds"), "--lds and --top are two commands"),
        (("3", "--top", "2", "--tests", "2"), "--tests draws test examples, but TEST names them"),
        (("--top", "0%"), "--top 0%: not a share above 0 and below 1, and not a count"),
        (("--top", "1.5"), "--top 1.5: not a share"),
        (("--top", "nan"), "--top nan: not a share"),
        (("--top", "24"), "--top 24: that is all of 24 training examples"),
        (("--top", "1%"), "--top 1%: that is none of 24 training examples"),
        (("--top", "23"), "--top 23: only "),
        (("--top", "2", "--measure", "margins"), "--measure margins: not loss and not margin"),
        (("--measure", "margin"), "--measure margin needs --lds or --top"),
        (("--loo", "2", "--measure", "margin"), "--measure margin needs --lds or --top"),
        (("--repeats", "2"), "--repeats needs --loo, --lds or --top"),
        (("--top", "2", "--drop", "1%"), "--drop needs --lds"),
        (("--same-run",), "--same-run needs --lds"),
        (("--subsets", "4"), "--subsets needs --lds"),
        (("--lds", "--same-run", "--repeats", "2"), "--same-run has one seed, so it takes no --repeats"),
        (("--lds", "--same-run"), "the batches that they were in, which needs training.recipe"),
        (("--lds", "--drop", "100%"), "--drop 100%: not a share"),
        (("--lds", "--drop", "0.001"), "--drop 0.001: that is none of 24"),
        (("--lds", "--measure", "margin", "-s", "loss=hinge", "-s", "curvature.method=identity"), "reads no softmax"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_refused_before_any_training(
    influence: Command, tiny: Path, words: tuple[str, ...], message: str
) -> None:
    with_training(tiny)
    done = influence("verify", *words, cwd=tiny, code=2)
    assert message in done.err
    assert done.out == ""
    assert not list((tiny / "influence.retrained").glob("*/*.npz"))


def test_an_image_file_is_refused(influence: Command, tiny: Path) -> None:
    with_training(tiny)
    file = next((tiny / "test" / "a").glob("*.png"))
    assert "not image files" in influence("verify", file, "--top", 2, cwd=tiny, code=2).err
