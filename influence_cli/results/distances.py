"""`influence compare --distance`: influence against the pixel distance between training and test image.

The pixel distance of two images is ‖a − b‖ over all pixels and colours. Both are RGB in [0, 1], and the training image
is scaled to the size of the test image. A model that compares pixels relies on near images: those of the test image's
class help, the others harm, and both effects fade with the distance. A model that has learned more does not follow the
distance (Koh & Liang, ICML 2017, section 5.1 and figure 4).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from influence_cli.errors import InfluenceError, counted
from influence_cli.metrics import spearman
from influence_cli.pictures import eight_bit
from influence_cli.report.table import Row, Scalar
from influence_cli.results.compare import Comparison, grouped, test_of
from influence_cli.results.images import TEST, TRAINING, Item, Reader, image_reader
from influence_cli.results.reader import Result
from influence_cli.runtime.terminal import Terminal, or_silent

# Bytes of test images that are held at one time. There is one pass over the training images per so many bytes.
HELD = 2**28
# The share of the listed training images that counts as near.
NEAR = 0.1


@dataclass(frozen=True)
class Spread:
    """Influence on one test example against the distance of the training images that a result lists.

    Attributes:
        row: one of the result's rows on that test example.
        distance: float64 [m], ≥ 0.
        influence: float64 [m], as the result has it.
        same: bool [m], True where the label is that of the test example.
    """

    row: Row
    distance: np.ndarray
    influence: np.ndarray
    same: np.ndarray

    def correlation(self, *, same: bool) -> float | None:
        """Correlate the ranks of influence and distance within a class; None for under three or constant values."""
        chosen = self.same == same
        if chosen.sum() < 3:
            return None
        correlation = spearman(self.influence[chosen], self.distance[chosen])
        return float(correlation) if np.isfinite(correlation) else None

    def helpful(self, *, same: bool, near: bool = False) -> float | None:
        """Give the share of helpful images within a class, of all or of the nearest; None if there are none."""
        chosen = self.same == same
        if near:
            # The nearest of all classes, because how many of them have the same class is informative too.
            chosen &= self.distance <= np.quantile(self.distance, NEAR)
        return float((self.influence[chosen] > 0).mean()) if chosen.any() else None

    def numbers(self) -> dict[str, float | int | None]:
        """Give the numbers of a scatter plot by name; ``same`` and ``other`` are the classes."""
        return {
            name.format(side): value
            for side, same in (("same", True), ("other", False))
            for name, value in (
                ("{}", int((self.same == same).sum())),
                ("correlation_{}", self.correlation(same=same)),
                ("helpful_{}", self.helpful(same=same)),
                ("helpful_near_{}", self.helpful(same=same, near=True)),
            )
        }


@dataclass(frozen=True)
class Distances:
    """The pixel distances of all pairs of a test and a training image that two results list.

    Attributes:
        by_test: per test example (its position or file), the distances by position of the training example.
        spreads: per test example, the spread of the first result and that of the second.
    """

    by_test: Mapping[Scalar, Mapping[Scalar, float]]
    spreads: Mapping[Scalar, tuple[Spread, Spread]]

    def columns(self, row: Row) -> Row:
        """Give the columns that a row of a result gets."""
        return {"distance": self.by_test[test_of(row)][row["index"]], "same_class": _is_same(row)}


def measure_distances(
    results: tuple[Result, Result], comparisons: Sequence[Comparison], config: Path, terminal: Terminal | None = None
) -> Distances:
    """Measure the distance of every training image that a result lists from the test image.

    Args:
        results: two of `rank`.
        comparisons: what `compare_results` made of them.
        config: names the data sets where the results name no files.
        terminal: progress, and a warning if only the ends of the rankings are there.

    Raises:
        InfluenceError: the results do not belong to single test images, a test example has no label, or an image
            cannot be read.
    """
    terminal = or_silent(terminal)
    tests = list(dict.fromkeys(comparison.key for comparison in comparisons))
    _refuse(results, comparisons, set(tests))
    a, b = (_by_test(result, tests) for result in results)
    training = {row["index"]: row for rows in (*a.values(), *b.values()) for row in rows}
    read_test = image_reader(results, [rows[0] for rows in b.values()], TEST, config, "--distance")
    read_training = image_reader(results, list(training.values()), TRAINING, config, "--distance")
    distances: dict[Scalar, dict[Scalar, float]] = {test: {} for test in tests}
    listed = {test: {row["index"] for row in (*a[test], *b[test])} for test in tests}
    with terminal.progress(len(tests) * len(training), "pixel distances") as advance:
        for images in _groups((test, _pixels(read_test, b[test][0], TEST)) for test in tests):
            stacks = _stacks(images)
            for index, row in training.items():
                image = _pixels(read_training, row, TRAINING)
                for size, (names, stack) in stacks.items():
                    for test, distance in zip(names, _distances(stack, image, size), strict=True):
                        if index in listed[test]:
                            distances[test][index] = distance
                advance(len(images))
    for result, by_test in zip(results, (a, b), strict=True):
        _warn_of_ends(result, by_test, terminal)
    spreads: dict[Scalar, tuple[Spread, Spread]] = {
        test: (_spread(a[test], distances[test]), _spread(b[test], distances[test])) for test in tests
    }
    return Distances(distances, spreads)


def mean_numbers(spreads: Iterable[Spread]) -> dict[str, float | None]:
    """Average the numbers of several scatter plots, each number over the plots that have it."""
    numbers = [spread.numbers() for spread in spreads]
    known = {key: [value for one in numbers if (value := one[key]) is not None] for key in numbers[0]}
    return {key: float(np.mean(values)) if values else None for key, values in known.items()}


def in_words(numbers: Mapping[str, float | int | None]) -> str:
    """Say what a scatter plot shows."""

    def signed(side: str) -> str:
        value = numbers[f"correlation_{side}"]
        return "–" if value is None else f"{value:+.2f}"

    def share(name: str) -> str:
        value = numbers[name]
        return "–" if value is None else f"{value:.0%}"

    return (
        f"rank correlation of influence and pixel distance {signed('same')} in the same class, {signed('other')} in "
        f"the others; helpful images: {share('helpful_same')} of {numbers['same']:,.0f} in the same class, "
        f"{share('helpful_other')} of {numbers['other']:,.0f} in the others; among the nearest tenth: "
        f"{share('helpful_near_same')} and {share('helpful_near_other')}"
    )


def _refuse(results: tuple[Result, Result], comparisons: Sequence[Comparison], tests: set[Scalar]) -> None:
    first = results[0].path
    if results[0].kind != "rank":
        raise InfluenceError(
            f"{first} is a result of influence {results[0].kind}: --distance needs a test image and training images",
            "compare two results of influence rank TEST --all",
        )
    if any(comparison.train is not None for comparison in comparisons):
        raise InfluenceError(
            f"{first} is about one training example (rank --train): --distance needs one test image per list",
            "compare two results of influence rank TEST --all",
        )
    if None in tests:
        raise InfluenceError(
            f"{first} is about a mean over test examples (rank --aggregate): --distance needs one test image per list",
            "rank without --aggregate",
        )
    for result in results:
        for row, place in zip(result.rows, result.places, strict=True):
            if test_of(row) in tests and (row.get("test_label") is None or row["label"] is None):
                raise InfluenceError(
                    f"{place}: there is no test_label, and --distance needs it to tell the classes apart",
                    "give the label of an image file: TEST<tab>LABEL lines on the stdin of influence rank -",
                )


def _by_test(result: Result, tests: Sequence[Scalar]) -> dict[Scalar, list[Row]]:
    """Give the rows per test example."""
    groups = grouped(result.rows, test_of)
    return {test: groups[test] for test in tests}


def _warn_of_ends(result: Result, rows: Mapping[Scalar, Sequence[Row]], terminal: Terminal) -> None:
    """Warn if a result lists only the strongest of each effect: the middle of the scatter plot is missing."""
    counts = [Counter(row["effect"] for row in of_test) for of_test in rows.values()]
    sizes = {size for of_test in counts for size in of_test.values()}
    # --top leaves as many helpful as harmful examples everywhere.
    if len(sizes) == 1 and all(len(of_test) == 2 for of_test in counts):
        terminal.warn(
            f"{result.path} lists only the {counted(sizes.pop(), 'strongest example')} per effect, so the correlation "
            "lacks the middle: use rank with --all"
        )


def _is_same(row: Row) -> bool:
    return row["label"] == row["test_label"]


def _spread(rows: Sequence[Row], distance: Mapping[Scalar, float]) -> Spread:
    return Spread(
        rows[0],
        np.array([distance[row["index"]] for row in rows]),
        np.array([row["influence"] for row in rows], dtype=np.float64),
        np.array([_is_same(row) for row in rows]),
    )


def _pixels(read: Reader, row: Row, item: Item) -> Image.Image:
    """Read an image as 8-bit RGB.

    Raises:
        InfluenceError: it cannot be read, or has more than 8 bits, so that its values in [0, 1] are not known.
    """
    from influence_cli.data.images import as_picture

    yielded: Any = read(row)
    # Other numbers would be stretched to make a picture, and would not be the image's own levels.
    is_eight_bit = isinstance(yielded, Image.Image) or str(getattr(yielded, "dtype", "")).rpartition(".")[2] == "uint8"
    image = as_picture(yielded) if is_eight_bit else None
    if image is None or image.mode.startswith(("I", "F")):
        name = row.get(item.path) or f"{item.word} {row[item.index]}"
        raise InfluenceError(
            f"{name} is not an image with 8 bits per colour, and --distance compares only those", "leave out --distance"
        )
    return eight_bit(image).convert("RGB")


def _groups(images: Iterable[tuple[Scalar, Image.Image]]) -> Iterator[list[tuple[Scalar, Image.Image]]]:
    """Group test images, as many as are held at one time."""
    group: list[tuple[Scalar, Image.Image]] = []
    held = 0
    for test, image in images:
        if group and held + 3 * image.width * image.height > HELD:
            yield group
            group, held = [], 0
        group.append((test, image))
        held += 3 * image.width * image.height
    if group:
        yield group


def _stacks(
    images: Sequence[tuple[Scalar, Image.Image]],
) -> dict[tuple[int, int], tuple[list[Scalar], np.ndarray]]:
    """Stack the test images of each size: their names, and uint8 [k, 3·w·h]."""
    by_size: dict[tuple[int, int], list[tuple[Scalar, Image.Image]]] = {}
    for test, image in images:
        by_size.setdefault(image.size, []).append((test, image))
    return {
        size: ([test for test, _ in of_size], np.stack([np.asarray(image).ravel() for _, image in of_size]))
        for size, of_size in by_size.items()
    }


def _distances(stack: np.ndarray, image: Image.Image, size: tuple[int, int]) -> Sequence[float]:
    """Measure the distance of one training image from test images of one size, uint8 [k, 3·w·h]."""
    if image.size != size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    difference = stack.astype(np.int16) - np.asarray(image).ravel()
    squares = np.einsum("kd,kd->k", difference, difference, dtype=np.float64)
    distances: list[float] = (np.sqrt(squares) / 255).tolist()
    return distances
