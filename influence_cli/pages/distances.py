"""From pixel distances to the parts of the page of `compare --distance`. report/html.py draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from influence_cli.errors import near_path
from influence_cli.report.charts import scatter
from influence_cli.report.html import Card, PageTable, Section
from influence_cli.report.table import Row, Scalar
from influence_cli.results.distances import Distances, Spread, in_words
from influence_cli.results.reader import Result

MEANING = (
    "Pixel distance: the root of the summed squared differences of all pixels and colours. Both images are RGB in "
    "[0, 1], and the training image is scaled to the size of the test image.",
    "A model that compares pixels relies on near images: near images of the same class help, near images of other "
    "classes harm, and distant images do little. A model that has learned more does not follow the distance (Koh & "
    "Liang 2017, figure 4). An image without any influence is in no list of rank and is not drawn.",
)
AXES = ("pixel distance from the test image (RGB in [0, 1])", "influence: estimated rise of the test loss")
# Points in one scatter plot. A page of 20 test examples has 40 of them and at most 5 MB.
DRAWN = 2000


def distance_section(
    results: tuple[Result, Result], spreads: tuple[Spread, Spread], picture: Callable[[Row], str | None]
) -> Section:
    """Lay out a test image above the scatter plots of both results, which share one axis of distances.

    Args:
        results: A and B.
        spreads: theirs, of the same test example.
        picture: gives the small picture of a row's test image.
    """
    a, b = spreads
    everywhere = np.concatenate([a.distance, b.distance])
    across = (float(everywhere.min()), float(everywhere.max()))
    row = b.row
    name = row["test"] if row["test"] is not None else near_path(Path(str(row["test_path"])))
    predicted = [
        f"{spread.row.get('test_predicted')} by {letter}" for letter, spread in zip("AB", spreads, strict=True)
    ]
    lead = Card(
        image=picture(row),
        alt=f"test example {name}, labelled {row['test_label']}",
        title="",
        facts=(
            ("label", str(row["test_label"])),
            ("predicted", ", ".join(predicted)),
            *((("path", str(near_path(Path(str(row["test_path"]))))),) if row["test_path"] is not None else ()),
        ),
        tone="plain",
    )
    scatters = []
    for letter, result, spread in zip("AB", results, spreads, strict=True):
        label = spread.row["test_label"]
        kinds = ((f"same class: {label}", spread.same), ("other classes", ~spread.same))
        words = in_words(spread.numbers())
        scatters.append(
            scatter(
                f"{letter}: {near_path(result.path)}",
                f"{words[0].upper()}{words[1:]}.",
                AXES,
                spread.distance,
                spread.influence,
                kinds,
                across,
                drawn=DRAWN,
            )
        )
    return Section(f"Test example {name}: influence by pixel distance", lead, (), scatters=tuple(scatters))


def drawn_note(distances: Distances) -> tuple[str, ...]:
    """Say so if a scatter plot has fewer points than there are images."""
    most = max(len(spread.distance) for pair in distances.spreads.values() for spread in pair)
    if most <= DRAWN:
        return ()
    return (
        f"Each plot draws {DRAWN:,} of up to {most:,} images, evenly from the most helpful to the most harmful. "
        "The numbers below it are over all images.",
    )


def distance_table(distances: Distances) -> PageTable:
    """List the numbers of every scatter plot."""

    def cell(numbers: Mapping[str, float | int | None], name: str, form: str) -> str:
        value = numbers[name]
        return "–" if value is None else format(value, form)

    def line(test: Scalar, letter: str, spread: Spread) -> tuple[str, ...]:
        numbers = spread.numbers()
        return (
            str(near_path(Path(test)) if isinstance(test, str) else test),
            letter,
            *(cell(numbers, f"correlation_{side}", "+.3f") for side in ("same", "other")),
            *(cell(numbers, f"helpful_{side}", ".0%") for side in ("same", "other", "near_same", "near_other")),
            *(cell(numbers, side, ",") for side in ("same", "other")),
        )

    columns = (
        *("test", "result", "correlation, same class", "other classes", "helpful, same class", "other classes"),
        *("same class, near", "other classes, near", "images, same class", "other classes"),
    )
    rows = [
        line(test, letter, spread)
        for test, pair in distances.spreads.items()
        for letter, spread in zip("AB", pair, strict=True)
    ]
    note = "rank correlations, and shares of helpful images; near: among the nearest tenth of all listed images"
    return PageTable("Influence and pixel distance", columns, tuple(rows), note)
