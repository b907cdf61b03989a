"""`influence demo`: a real project with known wrong labels, every command run on it, and what to try next."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from influence_cli.demo.project import CLASSES, read_images, write_project
from tests.conftest import Command, Demo, run_influence, shared
from tests.support.fork_hooks import DEMO


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The whole demo, as a user would type it."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_influence("demo", "project", cwd=folder)
    return Demo(folder / "project", done.stdout, done.stderr)


@pytest.fixture(params=["demo", pytest.param("whole", marks=pytest.mark.slow)])
def made(request: pytest.FixtureRequest) -> Demo:
    """The demo: with a quarter of its images, or whole."""
    result: Demo = request.getfixturevalue(request.param)
    return result


def sizes(made: Demo) -> tuple[int, int]:
    return DEMO if "whole" not in made.folder.parent.name else (5000, 1000)


def test_it_writes_a_whole_project(made: Demo) -> None:
    train, test = sizes(made)
    assert len(list(made.folder.glob("train/*/*.png"))) == train
    assert len(list(made.folder.glob("test/*/*.png"))) == test
    names = {path.name for path in made.folder.iterdir()}
    assert {"truth.csv", "model.py", "influence.yaml", "model.pt", "influence.h5", "LICENSE.fashion-mnist"} <= names
    assert "MIT" in (made.folder / "LICENSE.fashion-mnist").read_text()


def test_truth_names_the_moved_images_by_their_position(made: Demo) -> None:
    from torchvision.datasets import ImageFolder

    data = ImageFolder(made.folder / "train")
    rows = list(csv.DictReader((made.folder / "truth.csv").read_text().splitlines()))
    assert len({row["index"] for row in rows}) == sizes(made)[0] // 10
    for row in rows:
        path, label = data.samples[int(row["index"])]
        assert path == str(made.folder / row["path"])
        assert data.classes[label] == row["label"] != row["true_label"]
        assert row["true_label"] in CLASSES


def test_it_runs_the_commands_and_says_what_is_next(made: Demo) -> None:
    shown = [line for line in made.err.splitlines() if line.startswith("$ influence ")]
    assert [line.split()[2] for line in shown] == ["check", "gradients", "rank", "mislabels"]
    *_, cd, pipeline, relabel, aggregate, train = made.err.splitlines()
    assert cd == "  cd project"
    assert all(line.startswith("  influence ") for line in (pipeline, relabel, aggregate, train))
    assert " | " in pipeline
    assert "decisions.csv" in relabel
    assert (made.folder / "rank.html").stat().st_size > 10_000
    assert "influence rank" in (made.folder / "rank.html").read_text()
    assert "misclassified" not in made.out
    assert "Traceback" not in made.err


def found_at_a_tenth(err: str) -> dict[str, float]:
    """Read the share of moved images found at 10% checked, by signal."""
    tables = {line.split()[0]: line.split()[1:] for line in err.splitlines() if line[:1].isalpha()}
    return {signal: float(tables[signal][5]) for signal in ("combined", "self-influence", "loss", "margin", "random")}


@pytest.mark.slow
def test_self_influence_finds_the_moved_images_far_above_chance(whole: Demo) -> None:
    """EK-FAC's at small λ ranks rare images beside wrong labels, so it finds fewer than the exact one of the head."""
    found = found_at_a_tenth(whole.err)
    assert found["random"] == 0.1
    assert found["self-influence"] > 0.7
    assert found["loss"] > 0.8
    assert found["combined"] > 0.85
    words = ("-s", "curvature.method=explicit", "-s", "gradients.layers=['9']", "-s", "gradients.store=head.h5")
    done = run_influence("mislabels", "--truth", "truth.csv", *words, cwd=whole.folder)
    (whole.folder / "head.h5").unlink()
    assert found_at_a_tenth(done.stderr)["self-influence"] > 0.8


def test_the_images_are_those_of_fashion_mnist(tmp_path: Path) -> None:
    import gzip

    raw = gzip.decompress(
        (shared("fashion-mnist") / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz").read_bytes()
    )
    known = {image.tobytes() for image in np.frombuffer(raw, dtype=np.uint8, offset=16).reshape(-1, 28, 28)}
    images, labels = read_images()
    assert all(image.tobytes() in known for image in images[:5000])
    assert np.bincount(labels).min() > 500


@pytest.mark.slow
def test_the_same_seed_writes_the_same_project(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_project(tmp_path / name)
    first = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*"))
    assert first == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*"))
    assert (tmp_path / "a" / "truth.csv").read_bytes() == (tmp_path / "b" / "truth.csv").read_bytes()
    path = next(path for path in first if path.suffix == ".png")
    assert np.array_equal(Image.open(tmp_path / "a" / path), Image.open(tmp_path / "b" / path))


@pytest.mark.parametrize("what", ["file", "full"])
def test_a_folder_in_use_is_left_alone(influence: Command, tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    done = influence("demo", what, cwd=tmp_path, code=2)
    assert f"error: {what} exists and is not an empty folder" in done.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]
