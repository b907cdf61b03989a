"""The proxy: a small smooth network that answers in the place of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from influence_cli import load_config, load_tasks
from influence_cli.demo.project import CLASSES, TRAIN, read_images
from influence_cli.errors import InfluenceError
from influence_cli.replay.proxy import build, proxy_config, proxy_recipe
from influence_cli.replay.trained import prepare_proxy
from tests.conftest import CONFIG, MODEL, Command, edit


@pytest.fixture
def thirty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of 30 + 20 images whose network was never recorded, and proxies of few steps."""
    monkeypatch.setattr("influence_cli.replay.proxy.EPOCHS", 3)
    monkeypatch.setattr("influence_cli.replay.proxy.STEPS", 3)
    images, labels = read_images()
    folder = tmp_path / "project"
    for part, start, each in (("train", 0, 3), ("test", TRAIN, 2)):
        for label, name in enumerate(CLASSES):
            (folder / part / name).mkdir(parents=True)
            for position in start + np.flatnonzero(labels[start : start + 500] == label)[:each]:
                Image.fromarray(images[position]).save(folder / part / name / f"{position:05d}.png")
    (folder / "influence.yaml").write_text(CONFIG)
    (folder / "model.py").write_text(MODEL)
    layer = torch.nn.Linear(49, 10)
    torch.save({f"2.{name}": value for name, value in layer.state_dict().items()}, folder / "model.pt")
    return folder


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 96), (1, 56)])
def test_it_takes_the_sizes_that_it_says(channels: int, size: int) -> None:
    assert build(channels, size, 5)(torch.zeros(2, channels, size, size - 1 if size > 28 else size)).shape == (2, 5)


def test_fewer_images_have_as_many_steps() -> None:
    for examples, epochs in ((30, 160), (2_000, 20), (300, 80), (50_000, 20)):
        assert proxy_recipe(examples, 0).epochs == epochs


def test_select_groups_and_rank_by_a_proxy(influence: Command, thirty: Path) -> None:
    done = influence("select", "--keep", "0.8", "--proxy", "-o", "rows.csv", cwd=thirty)
    network = "a smooth proxy network of 55,338 parameters (influence.proxy.run)"
    assert f"these numbers are of {network}, trained on the same images: test accuracy" in done.err
    assert "the proxy: this run " in done.err
    assert "left out 6 of 30 training examples by replay" in done.err
    facts = json.loads((thirty / "rows.csv.run.json").read_text())
    assert (facts["proxy"], facts["selection"]["by"]) == (network, "replay")
    # The record is kept: nothing is trained or replayed again.
    before = {path: path.stat().st_mtime_ns for path in (thirty / "influence.proxy.run").rglob("*") if path.is_file()}
    done = influence("rank", "0:20", "--aggregate", "--proxy", "--all", "--report", "why.html", cwd=thirty)
    assert "training the proxy" not in done.err
    page = (thirty / "why.html").read_text()
    assert f"{network} in the place of ./model.py:build" in page
    rows = [json.loads(line) for line in done.out.splitlines()]
    config = load_config(thirty / "influence.yaml")
    (task,) = load_tasks(config)
    effects = prepare_proxy(config, task).effects
    assert effects is not None
    kept = [np.load(path) for path in (thirty / "influence.proxy.run" / "replays").glob("*.npy")]
    assert len(kept) == 1
    influences = {row["index"]: row["influence"] for row in rows}
    np.testing.assert_allclose([influences[i] for i in range(30)], -kept[0], rtol=1e-5)
    done = influence("groups", "0:20", "--proxy", cwd=thirty)
    sums = {row["group"]: row["influence"] for row in map(json.loads, done.out.splitlines())}
    labels = np.array([task.classes[label] for label in task.train.labels])
    for name, value in sums.items():
        assert value == pytest.approx(-kept[0][labels == name].sum(), rel=1e-4, abs=1e-7)
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


@pytest.mark.slow
def test_other_images_have_another_proxy(influence: Command, thirty: Path) -> None:
    influence("rank", "0:20", "--aggregate", "--proxy", "-q", cwd=thirty)
    (thirty / "out.csv").write_text("index\n3\n")
    words = ("rank", "0:20", "--aggregate", "--proxy", "--all", "-s", "train.exclude=out.csv")
    done = influence(*words, cwd=thirty)
    assert "influence.proxy.run is of other images or another recipe; it is trained again" in done.err
    assert len({json.loads(line)["index"] for line in done.out.splitlines()}) == 29


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rank", "3", "--proxy"), "--proxy answers for the mean of test images, not for single predictions"),
        (("rank", "3", "--proxy", "--aggregate", "--strict"), "--proxy replays a run of its own"),
        (("groups", "--proxy", "--retrain"), "--proxy replays a run of its own"),
        (("select", "--proxy", "--on-the-fly"), "--proxy replays a run: it cannot be combined with --on-the-fly"),
    ],
)
def test_what_a_proxy_cannot_do_is_refused(
    influence: Command, thirty: Path, words: tuple[str, ...], message: str
) -> None:
    done = influence(*words, cwd=thirty, code=2)
    assert message in done.err
    assert not (thirty / "influence.proxy.run").exists()


def test_images_of_another_size_are_refused(influence: Command, thirty: Path) -> None:
    edit(thirty, "transform: [{", "transform: [{Resize: {size: [20, 20]}}, {Resize: {size: [128, 128]}}, {")
    edit(thirty, "build", "large")
    (thirty / "model.py").write_text(
        "from torch import nn\ndef large():\n    return nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(), "
        "nn.Linear(49, 10))\n"
    )
    done = influence("select", "--proxy", cwd=thirty, code=2)
    assert "grey or colour images of 28 to 96 pixels, but train.transform gives 1 × 128 × 128" in done.err


def test_labels_that_are_no_class_are_refused(thirty: Path) -> None:
    config = load_config(thirty / "influence.yaml")
    (task,) = load_tasks(config)
    task.train.labels[:2] = -100
    with pytest.raises(InfluenceError, match="labels of 2 training images are none"):
        proxy_config(config, task)
