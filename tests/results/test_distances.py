"""Influence beside pixel distance: against plain NumPy on the files, the numbers in words, the page, every refusal."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import spearmanr

from influence_cli.commands.compare import COLUMNS, DISTANCE_COLUMNS
from influence_cli.report.table import Row
from influence_cli.report.writer import write_rows
from influence_cli.results.distances import Spread, in_words, mean_numbers
from tests.conftest import Command
from tests.results.test_compare import without

TESTS = (3, 17)
RANK = ("test", "test_path", "test_label", "test_predicted", "effect", "rank", "index", "path", "label", "influence")


@pytest.fixture
def pair(stored: Path, influence: Command, tmp_path: Path) -> Path:
    """Two results on the same test examples: another λ is another model to `compare`."""
    for name, lam in (("a.csv", "0.01"), ("b.csv", "10")):
        influence("rank", *TESTS, "--all", "-s", f"curvature.damping={lam}", "-o", tmp_path / name, cwd=stored)
    return tmp_path


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def plain_distance(path: str, test: str) -> float:
    a, b = (np.asarray(Image.open(name).convert("RGB"), dtype=np.float64) / 255 for name in (path, test))
    return float(np.sqrt(((a - b) ** 2).sum()))


def test_distance_and_class_are_those_of_the_files(pair: Path, influence: Command) -> None:
    influence("compare", "a.csv", "b.csv", "--distance", "-o", "c.csv", cwd=pair)
    rows = read(pair / "c.csv")
    assert tuple(rows[0]) == (*COLUMNS, *DISTANCE_COLUMNS)
    assert {row["test"] for row in rows} == set(map(str, TESTS))
    for row in rows[::7]:
        assert float(row["distance"]) == pytest.approx(plain_distance(row["path"], row["test_path"]), rel=1e-12)
    labels = {row["test"]: row["test_label"] for row in read(pair / "a.csv")}
    assert all(row["same_class"] == str(row["label_b"] == labels[row["test"]]).lower() for row in rows)
    assert len({row["same_class"] for row in rows}) == 2


def test_without_distance_the_columns_are_as_before(pair: Path, influence: Command) -> None:
    influence("compare", "a.csv", "b.csv", "-o", "c.csv", cwd=pair)
    assert tuple(read(pair / "c.csv")[0]) == COLUMNS


def test_the_line_and_the_run_file_have_the_numbers_of_all_rows(pair: Path, influence: Command) -> None:
    done = influence("compare", "a.csv", "b.csv", "--distance", "--top", 5, "-o", "c.csv", cwd=pair)
    facts = json.loads((pair / "c.csv.run.json").read_text())["distances"]
    assert [(one["result"], one["test"]) for one in facts] == [(n, t) for t in TESTS for n in ("a.csv", "b.csv")]
    for one in facts:
        rows = [row for row in read(pair / one["result"]) if row["test"] == str(one["test"])]
        distance = np.array([plain_distance(row["path"], row["test_path"]) for row in rows])
        values = np.array([float(row["influence"]) for row in rows])
        same = np.array([row["label"] == row["test_label"] for row in rows])
        near = distance <= np.quantile(distance, 0.1)
        for side, own in (("same", same), ("other", ~same)):
            assert one[side] == own.sum()
            assert one[f"correlation_{side}"] == pytest.approx(spearmanr(values[own], distance[own]).statistic)
            assert one[f"helpful_{side}"] == pytest.approx(np.mean(values[own] > 0))
            assert one[f"helpful_near_{side}"] == pytest.approx(np.mean(values[own & near] > 0))
        words = f"test {one['test']}, {'A' if one['result'] == 'a.csv' else 'B'} ({one['result']}): rank correlation"
        assert words in done.err
        assert f"pixel distance {one['correlation_same']:+.2f} in the same class" in done.err
    assert "mean over 2 test examples, A (a.csv): " in done.err
    # Of the lists five each, of the scatters all that were ranked.
    assert len(read(pair / "c.csv")) < sum(one["same"] + one["other"] for one in facts) / 10


def spread(distance: list[float], influence: list[float], same: list[bool]) -> Spread:
    return Spread({}, np.array(distance), np.array(influence), np.array(same))


def test_what_cannot_be_said_is_a_dash() -> None:
    few = spread([1.0, 2.0], [0.5, -0.5], [True, True])
    assert few.numbers() == {
        "same": 2,
        "correlation_same": None,
        "helpful_same": 0.5,
        "helpful_near_same": 1.0,
        "other": 0,
        "correlation_other": None,
        "helpful_other": None,
        "helpful_near_other": None,
    }
    assert "distance – in the same class, – in the others; helpful images: 50% of 2 in the same" in in_words(
        few.numbers()
    )
    constant = spread([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], [False] * 3)
    assert constant.correlation(same=False) is None
    both = mean_numbers([few, spread([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], [True] * 3)])
    assert (both["correlation_same"], both["same"], both["helpful_same"]) == (pytest.approx(-1), 2.5, 0.75)
    assert both["correlation_other"] is None


def test_a_model_that_compares_pixels_is_told_from_one_that_does_not() -> None:
    random = np.random.default_rng(0)
    distance, same = random.uniform(1, 2, 400), random.random(400) < 0.5
    near = Spread({}, distance, np.where(same, 1, -1) / distance, same).numbers()
    assert (near["correlation_same"], near["correlation_other"]) == (pytest.approx(-1), pytest.approx(1))
    assert (near["helpful_near_same"], near["helpful_near_other"]) == (1, 0)
    deep = Spread({}, distance, random.normal(size=400), same).numbers()
    assert abs(deep["correlation_same"] or 0) < 0.2
    assert 0.2 < (deep["helpful_near_other"] or 0) < 0.8


@pytest.mark.parametrize("held", [1, 2**28])
def test_images_of_any_size_and_mode_are_compared_at_the_size_of_the_test_image(
    tmp_path: Path, influence: Command, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr("influence_cli.results.distances.HELD", held)
    random = np.random.default_rng(1)
    images = {
        "a": Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8)),
        "b": Image.fromarray(random.integers(0, 256, (12, 5), dtype=np.uint8)),
        "c": Image.fromarray(random.integers(0, 256, (6, 9, 4), dtype=np.uint8)),
        "d": Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8)).quantize(8),
        "t": Image.fromarray(random.integers(0, 256, (6, 9, 3), dtype=np.uint8)),
        "u": Image.fromarray(random.integers(0, 256, (3, 4), dtype=np.uint8)),
    }
    for name, image in images.items():
        image.save(tmp_path / f"{name}.png")
    rows = ranked(tmp_path, ["t", "u"], ["a", "b", "c", "d"])
    save(tmp_path / "r.csv", rows)
    influence("compare", "r.csv", "r.csv", "--distance", "-o", "c.csv", cwd=tmp_path)
    found = {(Path(row["test_path"]).stem, Path(row["path"]).stem): row["distance"] for row in read(tmp_path / "c.csv")}
    assert len(found) == 8
    for (test, name), distance in found.items():
        other = images[test].convert("RGB")
        own = images[name].convert("RGBA").convert("RGB") if name in "cd" else images[name].convert("RGB")
        own = own if own.size == other.size else own.resize(other.size, Image.Resampling.BILINEAR)
        a, b = (np.asarray(image, dtype=np.float64) / 255 for image in (own, other))
        assert float(distance) == pytest.approx(float(np.linalg.norm(a - b)), rel=1e-12)


def ranked(folder: Path, tests: list[str], names: list[str], **changed: object) -> list[Row]:
    """Make rows of rank on files: the first half of the training images helpful, the others harmful."""
    rows: list[Row] = []
    for number, test in enumerate(tests):
        for place, name in enumerate(names):
            effect = "helpful" if place < len(names) / 2 else "harmful"
            row: Row = {
                "test": number,
                "test_path": str(folder / f"{test}.png"),
                "test_label": "ant",
                "test_predicted": "ant",
                "effect": effect,
                "rank": place % 2 + 1,
                "index": place,
                "path": str(folder / f"{name}.png"),
                "label": ("ant", "bee")[place % 2],
                "influence": 0.5 - place / len(names),
            }
            rows.append({**row, **changed})  # type: ignore[dict-item]
    return rows


def save(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        write_rows(rows, RANK, "csv", stream)


@pytest.mark.slow
def test_without_files_the_images_come_from_the_configs_data_sets(pair: Path, stored: Path, influence: Command) -> None:
    influence("compare", "a.csv", "b.csv", "--distance", "-o", "files.csv", cwd=pair)
    for name in ("a.csv", "b.csv"):
        without(pair / name, "path", "test_path")
    refused = influence("compare", "a.csv", "b.csv", "--distance", "-o", "c.csv", cwd=pair, code=2)
    assert "these results name no files, so --distance needs the data set" in refused.err
    words = ("compare", "a.csv", "b.csv", "--distance", "-c", stored / "influence.yaml", "-o", "c.csv")
    influence(*words, "--report", "c.html", cwd=pair)
    assert [row["distance"] for row in read(pair / "c.csv")] == [row["distance"] for row in read(pair / "files.csv")]
    assert (pair / "c.html").read_text().count('class="chart scatter"') == 2 * len(TESTS)


def test_the_page_draws_every_image_of_either_result(pair: Path, influence: Command) -> None:
    influence("compare", "a.csv", "b.csv", "--distance", "--top", 3, "--report", "c.html", cwd=pair)
    page = (pair / "c.html").read_text()
    drawn = re.findall(r'<path class="kind-(\d)" d="([^"]*)"/>\s*\n', page)
    scatters = [{kind: path.count("M") for kind, path in drawn[at : at + 2]} for at in range(0, len(drawn), 2)]
    expected = []
    for test in TESTS:
        for name in ("a.csv", "b.csv"):
            rows = [row for row in read(pair / name) if row["test"] == str(test)]
            same = sum(row["label"] == row["test_label"] for row in rows)
            expected.append({"0": same, "1": len(rows) - same})
    assert scatters == expected
    for test in TESTS:
        assert page.index(f"Test example {test}: influence by pixel distance") < page.index(
            f"Test example {test}: most"
        )
    assert page.count("pixel distance from the test image (RGB in [0, 1])") == 4 * len(TESTS)
    assert "Both images are RGB in [0, 1], and the training image is scaled to the size of the test image." in page
    assert "Influence and pixel distance</h2>" in page


def test_a_scatter_of_many_draws_some_and_says_so(
    pair: Path, influence: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_cli.pages.distances.DRAWN", 50)
    influence("compare", "a.csv", "b.csv", "--distance", "--top", 3, "--report", "c.html", cwd=pair)
    page = (pair / "c.html").read_text()
    drawn = re.findall(r'<path class="kind-\d" d="([^"]*)"/>\s*\n', page)
    assert all(sum(path.count("M") for path in drawn[at : at + 2]) <= 52 for at in range(0, len(drawn), 2))
    assert re.search(r"Each plot draws 50 of up to \d+ images, evenly from the most helpful", page)


def test_the_ends_of_a_ranking_are_no_scatter(stored: Path, influence: Command, tmp_path: Path) -> None:
    influence("rank", 3, "--top", 6, "-o", tmp_path / "a.csv", cwd=stored)
    done = influence("compare", "a.csv", "a.csv", "--distance", cwd=tmp_path)
    assert "warning: a.csv lists only the 6 strongest examples per effect" in done.err
    assert "the correlation lacks the middle: use rank with --all" in done.err


def test_what_no_test_image_belongs_to_is_refused(stored: Path, influence: Command, tmp_path: Path) -> None:
    influence("mislabels", "--top", 5, "-o", tmp_path / "labels.csv", cwd=stored)
    influence("rank", "--train", 5, "-o", tmp_path / "train.csv", cwd=stored)
    influence("rank", "0:4", "--aggregate", "-o", tmp_path / "mean.csv", cwd=stored)
    for name, message in (
        ("labels.csv", "labels.csv is a result of influence mislabels: --distance needs a test image and training"),
        ("train.csv", "train.csv is about one training example (rank --train): --distance needs one test image"),
        ("mean.csv", "mean.csv is about a mean over test examples (rank --aggregate): --distance needs one test image"),
    ):
        done = influence("compare", name, name, "--distance", "-o", "c.csv", cwd=tmp_path, code=2)
        assert done.err.startswith("error: ")
        assert message in done.err
        assert len(done.err.splitlines()) == 2  # what, and what to do instead
        assert not (tmp_path / "c.csv").exists()


def test_images_that_cannot_be_read_are_refused_and_nothing_is_written(tmp_path: Path, influence: Command) -> None:
    for name in "abt":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    for names, message in (
        (["a", "gone"], r"r\.csv:3: the image .*gone\.png is missing"),
        (["a", "torn"], r"torn\.png cannot be decoded as an image"),
        (["a", "deep"], r"deep\.png is not an image with 8 bits per colour, and --distance compares only those"),
    ):
        save(tmp_path / "r.csv", ranked(tmp_path, ["t"], names))
        done = influence("compare", "r.csv", "r.csv", "--distance", "-o", "c.csv", cwd=tmp_path, code=2)
        assert re.search(f"error: .*{message}", done.err)
        assert not (tmp_path / "c.csv").exists()
    save(tmp_path / "r.csv", ranked(tmp_path, ["t"], ["a", "b"], test_label=None))
    done = influence("compare", "r.csv", "r.csv", "--distance", cwd=tmp_path, code=2)
    assert "error: r.csv:2: there is no test_label, and --distance needs it to tell the classes apart" in done.err


def test_tensors_of_a_data_set_are_no_images_of_bytes(pair: Path, stored: Path, influence: Command) -> None:
    for name in ("a.csv", "b.csv"):
        without(pair / name, "path", "test_path")
    (pair / "sets.py").write_text(
        "from torchvision.datasets import ImageFolder\n"
        "from torchvision.transforms.functional import to_tensor\n\n"
        "class Tensors(ImageFolder):\n"
        "    def __getitem__(self, index):\n"
        "        image, label = super().__getitem__(index)\n"
        "        return to_tensor(image), label\n"
    )
    config = (stored / "influence.yaml").read_text()
    config = config.replace("torchvision.datasets.ImageFolder", "./sets.py:Tensors")
    for part in ("train", "test"):
        config = config.replace(f"root: {part}", f"root: {stored / part}")
    (pair / "influence.yaml").write_text(config)
    done = influence("compare", "a.csv", "b.csv", "--distance", cwd=pair, code=2)
    assert re.search(r"error: (test )?example \d+ is not an image with 8 bits per colour", done.err)


def test_the_columns_are_typed_in_parquet(pair: Path, influence: Command) -> None:
    from pyarrow import parquet

    influence("compare", "a.csv", "b.csv", "--distance", "-o", "c.parquet", cwd=pair)
    schema = parquet.read_schema(pair / "c.parquet")
    assert [str(schema.field(name).type) for name in DISTANCE_COLUMNS] == ["double", "bool"]
