"""Plots: readable by any number of labels, any class name, the same bytes each time, refused before any work."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from influence_cli.errors import InfluenceError
from influence_cli.report.plot import SHOWN, check_plot, plot_influence, plot_scores, scatter
from tests.conftest import Command

HOSTILE = ("$x^2$", "$ \\frac{", "_hidden", "漢字 \U0001f600", "a\nb\x1b[2J", "<b>&", "\ud800", "x" * 80, "\uffff", "")


def words(path: Path) -> list[str]:
    """Read the text of an .svg, which keeps it as text."""
    return ["".join(node.itertext()) for node in ET.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def draw(path: Path, classes: int, names: tuple[str, ...] = (), **more: object) -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, classes, 40 * classes)
    scores = generator.beta(0.3, 6, len(labels))
    # The larger the number of the class, the more of it are flagged.
    flagged = np.flatnonzero(generator.random(len(labels)) < labels / classes / 4)
    scores[flagged] = 1 - scores[flagged]
    known = (*names, *(f"class {number}" for number in range(len(names), classes)))
    plot_scores(path, scores, labels, known, flagged, "combined", **more)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_file_of_its_kind_that_appears_when_complete(tmp_path: Path, suffix: str) -> None:
    draw(tmp_path / f"a.{suffix}", 3)
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]
    if suffix == "png":
        with Image.open(tmp_path / "a.png") as image:
            assert image.format == "PNG"
            assert image.width > 1000
    else:
        assert {"class 0", "class 1", "class 2"} <= set(words(tmp_path / "a.svg"))


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.quick("svg")
@pytest.mark.slow
def test_the_same_numbers_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    draw(tmp_path / f"a.{suffix}", 5)
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})\n"
    code += "from pathlib import Path\nfrom tests.report.test_plot import draw\n"
    code += f"draw(Path({str(tmp_path / f'b.{suffix}')!r}), 5)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize(
    ("classes", "rows"), [(2, 2), (SHOWN + 1, SHOWN + 1), (SHOWN + 2, SHOWN + 1), (100, SHOWN + 1)]
)
def test_many_labels_share_a_row(tmp_path: Path, classes: int, rows: int) -> None:
    draw(tmp_path / "a.svg", classes)
    text = words(tmp_path / "a.svg")
    named = [word for word in text if word.startswith("class ")]
    others = [word for word in text if word.endswith("others")]
    assert len(named) + len(others) == rows
    assert others == ([f"{classes - SHOWN} others"] if classes > SHOWN + 1 else [])
    # The most flagged come first, and are the ones that are named.
    assert f"class {classes - 1}" in named
    assert ("class 0" in named) == (classes <= SHOWN + 1)
    counts = [int(word.split()[0].replace(",", "")) for word in text if word.endswith("flagged")]
    assert len(counts) == rows
    assert counts[:SHOWN] == sorted(counts[:SHOWN], reverse=True)


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.quick("svg")
def test_no_class_name_breaks_a_plot_or_vanishes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(path, len(HOSTILE), HOSTILE)
        plot_influence(path.with_stem("i"), np.linspace(-1, 1, 50), np.arange(50) % 10, HOSTILE, "loss of $x", "nats")
    if suffix == "svg":
        shown = set(words(path))
        assert {"$x^2$", "$ \\frac{", "_hidden", "漢字 \U0001f600", "a\\nb\\x1b[2J", "<b>&", "\\ud800"} <= shown
        assert {"x" * 23 + "…", "\\uffff"} <= shown
        assert "loss of $x" in words(tmp_path / "i.svg")


def test_without_anything_flagged_and_with_one_label(tmp_path: Path) -> None:
    none, labels = np.empty(0, dtype=np.int64), np.zeros(3, dtype=np.int64)
    plot_scores(tmp_path / "a.svg", np.array([0.0, 0.5, 1.0]), labels, ("only", "never"), none, "loss")
    text = words(tmp_path / "a.svg")
    assert "How suspicious 3 labels are" in text
    assert "probably wrong" not in text
    assert "never" not in text


def test_the_recovery_stands_beside_loss_and_random(tmp_path: Path) -> None:
    recovery = {"checked": [0.0, 0.1, 0.4], "combined": [0.0, 0.8, 1.0], "loss": [0.0, 0.6, 1.0]}
    draw(tmp_path / "a.svg", 3, recovery=recovery)
    assert {"combined", "loss", "random", "share of wrong labels found", "40%"} <= set(words(tmp_path / "a.svg"))


def test_influence_of_all_examples_by_label(tmp_path: Path) -> None:
    influence = np.array([3e-3, -1e-3, np.nan, 0.0, 1e-5])
    plot_influence(tmp_path / "a.svg", influence, np.array([0, 1, 1, 1, 2]), ("a", "b", "c"), "Test example 3", "nats")
    text = words(tmp_path / "a.svg")
    assert {"Test example 3", "influence of all 4 training examples, nats"} <= set(text)
    assert text.index("a") < text.index("b") < text.index("c")
    assert {"sum +0.003", "sum -0.001", "sum +1e-05", "harmful: removing it lowers the loss"} <= set(text)
    plot_influence(tmp_path / "zero.png", np.zeros(3), np.zeros(3, dtype=np.int64), ("a",), "t", "")


def test_scatter_has_the_line_of_equality_r_and_slope(tmp_path: Path) -> None:
    estimated = np.linspace(-1e-3, 2e-3, 30)
    scatter(tmp_path / "a.svg", estimated, 1.1 * estimated, 1.0, 1.1)
    text = words(tmp_path / "a.svg")
    assert {"actual = estimated", "30 training examples left out"} <= set(text)
    assert any("r = 1" in word for word in text)
    assert any("slope = 1.1" in word for word in text)
    scatter(tmp_path / "one.png", np.zeros(1), np.zeros(1), float("nan"), float("nan"))


def test_a_plot_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plot(None)
    check_plot(Path("a.PNG"))
    with pytest.raises(InfluenceError, match=r"a plot must be \.png or \.svg"):
        check_plot(Path("a.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InfluenceError, match="--plot needs matplotlib") as caught:
        check_plot(Path("a.svg"))
    assert caught.value.hint == "pip install 'influence-cli[plot]'"


@pytest.mark.slow
def test_mislabels_draws_scores_and_recovery(influence: Command, project: Path) -> None:
    (project / "truth.csv").write_text("index\n" + "\n".join(map(str, range(40))))
    done = influence("mislabels", "--plot", "a.svg", "--truth", "truth.csv", cwd=project)
    assert "wrote a.svg" in done.err
    text = words(project / "a.svg")
    assert {"combined", "loss", "random", "score (combined), higher is more suspicious"} <= set(text)
    assert sum(word.endswith("flagged") for word in text) == 10
    assert "a plot must be .png" in influence("mislabels", "--plot", "a.pdf", cwd=project, code=2).err
    assert (
        "--explain cannot be combined"
        in influence("mislabels", "--explain", 3, "--plot", "a.svg", cwd=project, code=2).err
    )


@pytest.mark.slow
def test_rank_draws_all_training_examples(influence: Command, stored: Path, tmp_path: Path) -> None:
    influence("rank", 3, "--top", 2, "--plot", tmp_path / "one.svg", cwd=stored)
    assert any(re.fullmatch(r"#3: .+, predicted .+ \(\d+%\)", word) for word in words(tmp_path / "one.svg"))
    influence("rank", 3, 5, "--plot", tmp_path / "two.svg", cwd=stored)
    assert any(word.endswith("(the first test example)") for word in words(tmp_path / "two.svg"))
    influence("rank", 3, 5, "--aggregate", "--plot", tmp_path / "mean.svg", cwd=stored)
    assert {"Mean over 2 test examples", "influence of all 320 training examples, nats"} <= set(
        words(tmp_path / "mean.svg")
    )
    assert "--train cannot be combined" in influence("rank", "--train", 3, "--plot", "a.svg", cwd=stored, code=2).err
