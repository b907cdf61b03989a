"""Draws plots from arrays, as .png or .svg. matplotlib is imported only when it is needed.

The same arrays give the same bytes: no date, fixed ids, the style and font of matplotlib whatever the user's settings.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.errors import InfluenceError, did_you_mean, printable, require_extra
from influence_cli.runtime.outputs import open_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

SUFFIXES = (".png", ".svg")
# Labels that get their own histogram; the rest share one.
SHOWN = 12
BINS = 40

# Blue and orange differ with every kind of colour vision and in grey. The two effects have the colours of the page.
_PLAIN, _MARKED = "#8fb3d9", "#d1570a"
_HELPFUL, _HARMFUL = "#08705f", "#b3361b"
_CURVES = (("#0b57a4", "-", 2.0), ("#d1570a", "--", 1.6), ("#08705f", "-.", 1.6), ("#59616b", ":", 1.4))


def check_plot(path: Path | None) -> None:
    """Refuse a plot that cannot be made, before any work.

    Args:
        path: the file of ``--plot``; None for no plot.

    Raises:
        InfluenceError: the suffix is neither .png nor .svg, or matplotlib is not installed.
    """
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise InfluenceError(f"--plot {path}: a plot must be .png or .svg", did_you_mean(path.suffix.lower(), SUFFIXES))
    require_extra("matplotlib", "plot", "--plot")


def plot_scores(
    path: Path,
    scores: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    flagged: np.ndarray,
    signal: str,
    recovery: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw how suspicious the labels are: one histogram of scores per label, and what the ranking finds.

    If there are more labels than `SHOWN`, those with the most flagged examples get their own histogram. The rest share
    one.

    Args:
        path: a .png or .svg; it appears when it is complete.
        scores: [n] in [0, 1], high is suspicious.
        labels: int [n], the given ones.
        classes: names by number.
        flagged: positions of the labels that are probably wrong.
        signal: the signal of the scores.
        recovery: curves by name over the shares ``checked``, the strongest first; None if the truth is not known.

    Raises:
        InfluenceError: the file cannot be written.
    """
    wrong = np.zeros(len(labels), dtype=bool)
    wrong[flagged] = True
    present = np.unique(labels)
    counts = {int(label): int((wrong & (labels == label)).sum()) for label in present}
    means = {int(label): float(scores[labels == label].mean()) for label in present}
    order = sorted(counts, key=lambda label: (-counts[label], -means[label], label))
    groups = _groups(labels, order, classes)
    with _drawing(path) as (figure, names):
        grid = _grid(figure, len(groups), 1 if recovery is None else 2)
        bins = np.linspace(0.0, 1.0, BINS + 1)
        parts = [
            (names(name), f"{int((wrong & own).sum()):,} of {int(own.sum()):,} flagged", own) for name, own in groups
        ]
        layers = [("all examples", _PLAIN, np.ones(len(scores), dtype=bool))]
        if wrong.any():
            layers.append(("probably wrong", _MARKED, wrong))
        bottom = _histograms(figure, grid, scores, bins, parts, layers)
        bottom.set_xlabel(f"score ({signal}), higher is more suspicious")
        figure.suptitle(
            f"{int(wrong.sum()):,} of {len(scores):,} labels are probably wrong"
            if wrong.any()
            else f"How suspicious {len(scores):,} labels are"
        )
        if recovery is not None:
            _recovery(figure.add_subplot(grid[:, 1]), recovery)


def plot_influence(
    path: Path, influence: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str, unit: str
) -> None:
    """Draw the influence of all training examples on one test example: one histogram per training label.

    If there are more labels than `SHOWN`, those with the largest sum of absolute influence get their own histogram.

    Args:
        path: a .png or .svg; it appears when it is complete.
        influence: [n], > 0 helpful; NaN for examples without a value.
        labels: int [n], of the training examples.
        classes: names by number.
        title: which test example.
        unit: of the influence, such as ``nats``; empty for none.

    Raises:
        InfluenceError: the file cannot be written.
    """
    known = np.isfinite(influence)
    values, labels = influence[known], labels[known]
    weights = np.bincount(labels, np.abs(values), minlength=len(classes))
    order = sorted(map(int, np.unique(labels)), key=lambda label: (-weights[label], label))
    groups = _groups(labels, order, classes)
    largest = float(np.abs(values).max(initial=0.0)) or 1.0
    with _drawing(path) as (figure, names):
        grid = _grid(figure, len(groups), 1)
        # Zero is an edge, so that no bar has both effects.
        bins = np.linspace(-largest, largest, 2 * (BINS // 2) + 1)
        parts = [(names(name), f"sum {values[own].sum():+.2g}", own) for name, own in groups]
        layers = [
            ("helpful: removing it raises the loss", _HELPFUL, values > 0),
            ("harmful: removing it lowers the loss", _HARMFUL, values < 0),
        ]
        bottom = _histograms(figure, grid, values, bins, parts, layers)
        bottom.set_xlabel(f"influence of all {len(values):,} training examples" + (f", {unit}" if unit else ""))
        bottom.locator_params(axis="x", nbins=7)
        figure.suptitle(names(title, 80))


def scatter(path: Path, estimated: np.ndarray, actual: np.ndarray, r: float, slope: float) -> None:
    """Draw estimated against actual effects of leaving examples out, with the line where both are equal.

    Args:
        path: a .png or .svg; it appears when it is complete.
        estimated: [k], influence in nats.
        actual: [k], the rise of the loss by retraining.
        r: their linear correlation.
        slope: of actual on estimated.

    Raises:
        InfluenceError: the file cannot be written.
    """
    with _drawing(path) as (figure, _):
        figure.set_size_inches(5.2, 5.2)
        axes = figure.add_axes((0.17, 0.13, 0.78, 0.78))
        both = np.concatenate([estimated, actual, [0.0]])
        low, high = float(both.min()), float(both.max())
        room = 0.06 * (high - low) or 1.0
        ends = (low - room, high + room)
        axes.plot(ends, ends, color="#59616b", linewidth=1, label="actual = estimated", zorder=1)
        axes.scatter(estimated, actual, s=18, color="#0b57a4", alpha=0.6, linewidths=0, zorder=2)
        axes.set(xlim=ends, ylim=ends, xlabel="estimated by influence, nats", ylabel="actual by retraining, nats")
        axes.set_title(f"{len(estimated):,} training examples left out")
        axes.text(0.04, 0.9, f"r = {r:.4g}\nslope = {slope:.4g}", transform=axes.transAxes, va="top")
        axes.legend(loc="upper left", frameon=False)
        axes.grid(color="#d9dce0", linewidth=0.6)
        axes.locator_params(nbins=6)


class _Names:
    """Writes class names so that none breaks a plot or disappears from it."""

    def __init__(self, path: Path) -> None:
        from matplotlib import font_manager

        font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
        # The viewer of an .svg has its own fonts; a .png has only the letters of the plot's font.
        self._known = None if path.suffix.lower() == ".svg" else frozenset(font.get_charmap())

    def __call__(self, name: str, limit: int = 24) -> str:
        spelt = "".join(
            letter if letter.isprintable() and (self._known is None or ord(letter) in self._known) else _code(letter)
            for letter in printable(name)
        )
        return spelt if len(spelt) <= limit else spelt[: limit - 1] + "…"


def _code(letter: str) -> str:
    return letter.encode("unicode_escape").decode("ascii")


@contextmanager
def _drawing(path: Path) -> Iterator[tuple[Figure, _Names]]:
    """Give an empty figure, and write the file after the block has drawn on it."""
    from matplotlib import style
    from matplotlib.figure import Figure

    kind = path.suffix.lower().removeprefix(".")
    settings = {
        # A dollar sign in a class name does not begin a formula.
        "text.parse_math": False,
        "svg.hashsalt": "influence",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "figure.titlesize": 11,
        "font.size": 9,
    }
    drawn = io.BytesIO()
    with style.context(["default", settings]), warnings.catch_warnings():
        # Letters that only the viewer of an .svg has are measured without a glyph.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure = Figure()
        yield figure, _Names(path)
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    with open_output(path) as stream:
        stream.buffer.write(drawn.getvalue())


def _groups(labels: np.ndarray, order: Sequence[int], classes: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """Split examples by label: one group per label for the first labels, and one group for the rest."""
    first = order if len(order) <= SHOWN + 1 else order[:SHOWN]
    groups = [(classes[label], np.asarray(labels == label)) for label in first]
    if len(order) > len(first):
        groups.append((f"{len(order) - len(first)} others", ~np.isin(labels, first)))
    return groups


def _grid(figure: Figure, rows: int, columns: int) -> GridSpec:
    """Lay out the figure in inches: one row per label, and a second column for a chart next to them."""
    width, height = (7.5 if columns == 1 else 11.5), max(3.4, 1.5 + 0.46 * rows)
    figure.set_size_inches(width, height)
    return figure.add_gridspec(
        rows,
        columns,
        width_ratios=(1.0, 0.9)[:columns],
        left=2.3 / width,
        right=1 - 0.3 / width,
        bottom=0.6 / height,
        top=1 - 0.8 / height,
        hspace=0.18,
        wspace=0.22,
    )


def _histograms(
    figure: Figure,
    grid: GridSpec,
    values: np.ndarray,
    bins: np.ndarray,
    parts: Sequence[tuple[str, str, np.ndarray]],
    layers: Sequence[tuple[str, str, np.ndarray]],
) -> Axes:
    """Draw one histogram per part, above each other on the same axes. Counts are on a log scale, so that few show.

    Args:
        figure: to draw on.
        grid: with one row per part.
        values: [n].
        bins: edges.
        parts: (name, note, which values) per row.
        layers: (name, colour, which values), each drawn over the previous one, from the base.

    Returns:
        The lowest axes.
    """
    from matplotlib.patches import Patch

    counts = [[np.histogram(values[own & chosen], bins)[0] for _, _, chosen in layers] for _, _, own in parts]
    top = max(int(count.max()) for row in counts for count in row)
    powers = range(len(str(max(top, 1))))
    ticks = [10**power for power in powers if power % 2 == 0 or len(powers) <= 3]
    for number, ((name, note, _), row) in enumerate(zip(parts, counts, strict=True)):
        axes = figure.add_subplot(grid[number, 0])
        for (_, colour, _), count in zip(layers, row, strict=True):
            # The base is 0.5, so that a single example has a height.
            axes.stairs(np.maximum(count, 0.5), bins, baseline=0.5, fill=True, color=colour, linewidth=0)
        axes.set_yscale("log")
        axes.set(xlim=(bins[0], bins[-1]), ylim=(0.5, 2.0 * max(top, 1)))
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks] if number == 0 else [""] * len(ticks), fontsize=6)
        axes.minorticks_off()
        axes.grid(axis="y", color="#d9dce0", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=number == len(parts) - 1, length=3 if number == len(parts) - 1 else 0)
        axes.spines["left"].set_visible(False)
        axes.text(-0.075, 0.62, name, transform=axes.transAxes, ha="right", va="center")
        axes.text(-0.075, 0.16, note, transform=axes.transAxes, ha="right", va="center", fontsize=7, color="#59616b")
    figure.legend(
        handles=[Patch(color=colour, label=name) for name, colour, _ in layers],
        loc="upper left",
        bbox_to_anchor=(grid.left, 1 - 0.4 / figure.get_figheight()),
        ncols=len(layers),
        frameon=False,
        borderaxespad=0,
        fontsize=8,
    )
    return axes


def _recovery(axes: Axes, recovery: Mapping[str, Sequence[float]]) -> None:
    """Draw the share of the wrong labels found by the share of examples checked."""
    checked = recovery["checked"]
    curves = [(name, found) for name, found in recovery.items() if name != "checked"]
    for (name, found), (colour, line, width) in zip([*curves, ("random", checked)], _styles(len(curves)), strict=True):
        axes.plot(checked, found, line, color=colour, linewidth=width, label=name)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    shares = np.linspace(0.0, max(checked), 5)
    axes.set_xticks(shares, [f"{share:.3g}%" for share in 100 * shares])
    axes.set(
        xlim=(0, max(checked)), ylim=(0, 1.02), xlabel="share of examples checked", ylabel="share of wrong labels found"
    )
    axes.set_title("Wrong labels found")
    axes.set_box_aspect(0.75)
    axes.set_anchor("N")
    axes.grid(color="#d9dce0", linewidth=0.6)
    axes.legend(loc="lower right", frameon=False)


def _styles(curves: int) -> list[tuple[str, str, float]]:
    """Give each curve a style; the last style is for random order."""
    return [*(_CURVES[min(number, 2)] for number in range(curves)), _CURVES[3]]
