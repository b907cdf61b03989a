"""Draws charts as .png or .svg. matplotlib is imported only when it is needed.

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
from influence_cli.report.charts import Chart, Histogram, recovery_chart
from influence_cli.report.plot_charts import estimated_and_actual, helpful_and_harmful, suspicion
from influence_cli.runtime.outputs import open_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec

SUFFIXES = (".png", ".svg")
# Labels that get their own histogram; the rest share one.
SHOWN = 12

# Blue and orange differ with every kind of colour vision and in grey. The two effects have the colours of the page.
_TONES = {"plain": "#8fb3d9", "marked": "#d1570a", "helpful": "#08705f", "harmful": "#b3361b"}
_LINES = (("#0b57a4", "-", 2.0), ("#d1570a", "--", 1.6), ("#08705f", "-.", 1.6), ("#59616b", ":", 1.4))


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
        scores: [n] in [0, 1], higher is more suspicious.
        labels: int [n], the given ones.
        classes: names by number.
        flagged: positions of the labels that are probably wrong.
        signal: the signal of the scores.
        recovery: curves by name over the shares ``checked``, the strongest first; None if the truth is not known.

    Raises:
        InfluenceError: the file cannot be written.
    """
    chart = suspicion(scores, labels, classes, flagged, signal, SHOWN)
    with _drawing(path) as (figure, names):
        grid = _grid(figure, len(chart.lines), 1 if recovery is None else 2)
        _histograms(figure, grid, chart, names)
        if recovery is not None:
            curves = {name: shares for name, shares in recovery.items() if name != "checked"}
            recovered = recovery_chart("Wrong labels found", curves, recovery["checked"])
            _curves(figure.add_subplot(grid[:, 1]), recovered)


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
    chart = helpful_and_harmful(influence, labels, classes, title, unit, SHOWN)
    with _drawing(path) as (figure, names):
        bottom = _histograms(figure, _grid(figure, len(chart.lines), 1), chart, names)
        bottom.locator_params(axis="x", nbins=7)


def scatter(
    path: Path, estimated: np.ndarray, actual: np.ndarray, r: float, slope: float, *, heading: str | None = None
) -> None:
    """Draw estimated against actual effects of leaving examples out, with the line where both are equal.

    Args:
        path: a .png or .svg; it appears when it is complete.
        estimated: [k], influence in nats.
        actual: [k], the rise of the loss by retraining.
        r: their linear correlation.
        slope: of actual on estimated.
        heading: what was left out; by default as many examples as there are points.

    Raises:
        InfluenceError: the file cannot be written.
    """
    chart = estimated_and_actual(estimated, actual, r, slope)
    ((_, points),) = chart.kinds
    with _drawing(path) as (figure, _):
        figure.set_size_inches(5.2, 5.2)
        axes = figure.add_axes((0.17, 0.13, 0.78, 0.78))
        axes.plot(chart.across, chart.up, color="#59616b", linewidth=1, label=chart.equal, zorder=1)
        across, up = zip(*points, strict=True)
        axes.scatter(across, up, s=18, color="#0b57a4", alpha=0.6, linewidths=0, zorder=2)
        axes.set(xlim=chart.across, ylim=chart.up, xlabel=chart.x, ylabel=chart.y)
        axes.set_title(chart.heading if heading is None else heading)
        axes.text(0.04, 0.9, chart.note, transform=axes.transAxes, va="top")
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


def _histograms(figure: Figure, grid: GridSpec, chart: Histogram, names: _Names) -> Axes:
    """Draw the lines of a histogram above each other on the same axes. Counts are on a log scale, so that few show.

    Args:
        figure: to draw on.
        grid: with one row per line.
        chart: its layers are drawn over one another, from the base.
        names: spells what it says.

    Returns:
        The lowest axes.
    """
    from matplotlib.patches import Patch

    bins = np.linspace(chart.low, chart.high, len(chart.lines[0][1]) + 1)
    top = max(max(counts) for layer in chart.layers for counts in layer.counts)
    powers = range(len(str(max(top, 1))))
    ticks = [10**power for power in powers if power % 2 == 0 or len(powers) <= 3]
    last = len(chart.lines) - 1
    for number, ((name, _, _), note) in enumerate(zip(chart.lines, chart.notes, strict=True)):
        axes = figure.add_subplot(grid[number, 0])
        for layer in chart.layers:
            # The base is 0.5, so that a single example has a height.
            heights = np.maximum(layer.counts[number], 0.5)
            axes.stairs(heights, bins, baseline=0.5, fill=True, color=_TONES[layer.tone], linewidth=0)
        axes.set_yscale("log")
        axes.set(xlim=(bins[0], bins[-1]), ylim=(0.5, 2.0 * max(top, 1)))
        axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks] if number == 0 else [""] * len(ticks), fontsize=6)
        axes.minorticks_off()
        axes.grid(axis="y", color="#d9dce0", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelbottom=number == last, length=3 if number == last else 0)
        axes.spines["left"].set_visible(False)
        axes.text(-0.075, 0.62, names(name), transform=axes.transAxes, ha="right", va="center")
        axes.text(-0.075, 0.16, note, transform=axes.transAxes, ha="right", va="center", fontsize=7, color="#59616b")
    figure.legend(
        handles=[Patch(color=_TONES[layer.tone], label=layer.name) for layer in chart.layers],
        loc="upper left",
        bbox_to_anchor=(grid.left, 1 - 0.4 / figure.get_figheight()),
        ncols=len(chart.layers),
        frameon=False,
        borderaxespad=0,
        fontsize=8,
    )
    axes.set_xlabel(chart.x)
    figure.suptitle(names(chart.heading, 80))
    return axes


def _curves(axes: Axes, chart: Chart) -> None:
    """Draw curves over shares, the last one as what random order finds."""
    for (name, points), (colour, line, width) in zip(chart.curves, _styles(len(chart.curves) - 1), strict=True):
        axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=width, label=name)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set_yticks(ticks, [f"{tick:.0%}" for tick in ticks])
    shares = np.linspace(0.0, chart.span, 5)
    axes.set_xticks(shares, [f"{share:.3g}%" for share in 100 * shares])
    axes.set(xlim=(0, chart.span), ylim=(0, 1.02), xlabel=chart.x, ylabel=chart.y)
    axes.set_title(chart.heading)
    axes.set_box_aspect(0.75)
    axes.set_anchor("N")
    axes.grid(color="#d9dce0", linewidth=0.6)
    axes.legend(loc="lower right", frameon=False)


def _styles(curves: int) -> list[tuple[str, str, float]]:
    """Give each curve a style; the last style is for random order."""
    return [*(_LINES[min(number, 2)] for number in range(curves)), _LINES[3]]
