"""`influence demo`: a real project with known wrong labels, every command run on it, and what to try next."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from influence_cli.demo.project import CLASSES, read_images, write_project
from tests.conftest import Command, Demo, run_influence, shared


def test_it_writes_a_whole_project(demo: Demo) -> None:
    assert len(list(demo.folder.glob("train/*/*.png"))) == 5000
    assert len(list(demo.folder.glob("test/*/*.png"))) == 1000
    names = {path.name for path in demo.folder.iterdir()}
    assert {"truth.csv", "model.py", "influence.yaml", "model.pt", "influence.h5", "LICENSE.fashion-mnist"} <= names
    assert "MIT" in (demo.folder / "LICENSE.fashion-mnist").read_text()


def test_truth_names_the_moved_images_by_their_position(demo: Demo) -> None:
    from torchvision.datasets import ImageFolder

    data = ImageFolder(demo.folder / "train")
    rows = list(csv.DictReader((demo.folder / "truth.csv").read_text().splitlines()))
    assert len({row["index"] for row in rows}) == 500
    for row in rows:
        path, label = data.samples[int(row["index"])]
        assert path == str(demo.folder / row["path"])
        assert data.classes[label] == row["label"] != row["true_label"]
        assert row["true_label"] in CLASSES


def test_it_runs_the_commands_and_says_what_is_next(demo: Demo) -> None:
    shown = [line for line in demo.err.splitlines() if line.startswith("$ influence ")]
    assert [line.split()[2] for line in shown] == ["check", "gradients", "rank", "mislabels"]
    *_, cd, pipeline, relabel, aggregate, train = demo.err.splitlines()
    assert cd == "  cd project"
    assert all(line.startswith("  influence ") for line in (pipeline, relabel, aggregate, train))
    assert " | " in pipeline
    assert "decisions.csv" in relabel
    assert (demo.folder / "rank.html").stat().st_size > 10_000
    assert "influence rank" in (demo.folder / "rank.html").read_text()
    assert "misclassified" not in demo.out
    assert "Traceback" not in demo.err


def found_at_a_tenth(err: str) -> dict[str, float]:
    """Read the share of moved images found at 10% checked, by signal."""
    tables = {line.split()[0]: line.split()[1:] for line in err.splitlines() if line[:1].isalpha()}
    return {signal: float(tables[signal][5]) for signal in ("combined", "self-influence", "loss", "margin", "random")}


@pytest.mark.slow
def test_self_influence_finds_the_moved_images_far_above_chance(demo: Demo) -> None:
    """EK-FAC's at small λ ranks rare images beside wrong labels, so it finds fewer than the exact one of the head."""
    found = found_at_a_tenth(demo.err)
    assert found["random"] == 0.1
    assert found["self-influence"] > 0.7
    assert found["loss"] > 0.8
    assert found["combined"] > 0.85
    words = ("-s", "curvature.method=explicit", "-s", "gradients.layers=['9']", "-s", "gradients.store=head.h5")
    done = run_influence("mislabels", "--truth", "truth.csv", *words, cwd=demo.folder)
    (demo.folder / "head.h5").unlink()
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
