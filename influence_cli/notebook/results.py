"""What a `Debugger` returns: rows, arrays, a table of pandas, cards in the notebook, and a page."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_cli.errors import InfluenceError, counted
from influence_cli.mislabels.find import Mislabels
from influence_cli.notebook.cards import gallery
from influence_cli.report.html import Page, check_page, write_page
from influence_cli.results.mislabel_rows import COLUMNS as MISLABEL_COLUMNS
from influence_cli.results.mislabel_rows import signal_column
from influence_cli.results.rank_rows import COLUMNS as RANK_COLUMNS
from influence_cli.runtime.outputs import check_output

if TYPE_CHECKING:
    import pandas

Row = dict[str, object]
# Pictures that a notebook shows of each list, and test examples; the page has more.
SHOWN, TESTS = 12, 3


@dataclass(frozen=True)
class LabelSuspects:
    """Labels that are probably wrong, most suspicious first.

    Attributes:
        rows: the columns of ``influence mislabels``, a row for every example.
        summary: how many labels are wrong by the estimate, or why that is not known.
        labels: the same as arrays, and the evidence.
        page: lays out a page of so many suspects.
    """

    rows: tuple[Row, ...] = field(repr=False)
    summary: str
    labels: Mislabels = field(repr=False)
    page: Callable[[int], Page] = field(repr=False)

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.rows)

    @property
    def flagged(self) -> tuple[Row, ...]:
        """Give the first rows: as many as the estimate says are wrong."""
        return self.rows[: len(self.labels.flagged)]

    def to_pandas(self) -> pandas.DataFrame:
        """Give the rows as a DataFrame: columns of ``influence mislabels``, ``flagged``, and one per signal.

        Raises:
            InfluenceError: pandas is not installed.
        """
        signals = [signal_column(name) for name in self.labels.signals]
        return _frame(self.rows, (*MISLABEL_COLUMNS, "flagged", *signals))

    def report(self, path: str | Path, *, top: int = 500) -> Path:
        """Write the page of ``influence mislabels --report``.

        Args:
            path: a file that ends in .html.
            top: how many suspects are on it.

        Returns:
            The path.

        Raises:
            InfluenceError: the name is not that of a page, or the file cannot be written.
        """
        return _written(path, lambda: self.page(min(top, len(self.rows))))

    def _repr_html_(self) -> str:
        shown = min(SHOWN, len(self.rows))
        more = f"The first {shown} of {len(self.rows):,}; .to_pandas() has all, .report('labels.html') is a page."
        return gallery(self.summary or "Labels by suspicion", (more,), self.page(shown).sections[:1])


@dataclass(frozen=True)
class Ranking:
    """The training images that help and hurt a prediction most.

    Attributes:
        rows: the columns of ``influence rank``: for each test example the helpful ones, then the harmful ones.
        tests: how many test examples are explained.
        indices: int64 [n], position in the data set of each column of ``influence``.
        influence: float32 [m, n], of every training example on the first test examples, 20 at most, or on their mean:
            the estimated rise of the loss if it were removed. NaN where it could not be read.
        page: lays out a page of so many images per list and so many test examples.
    """

    rows: tuple[Row, ...] = field(repr=False)
    tests: int
    indices: np.ndarray = field(repr=False)
    influence: np.ndarray = field(repr=False)
    page: Callable[[int, int], Page] = field(repr=False)

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.rows)

    @property
    def helpful(self) -> tuple[Row, ...]:
        """Give the rows whose removal would raise the loss."""
        return tuple(row for row in self.rows if row["effect"] == "helpful")

    @property
    def harmful(self) -> tuple[Row, ...]:
        """Give the rows whose removal would lower the loss."""
        return tuple(row for row in self.rows if row["effect"] == "harmful")

    def to_pandas(self) -> pandas.DataFrame:
        """Give the rows as a DataFrame: the columns of ``influence rank``.

        Raises:
            InfluenceError: pandas is not installed.
        """
        return _frame(self.rows, RANK_COLUMNS)

    def report(self, path: str | Path, *, top: int = 10) -> Path:
        """Write the page of ``influence rank --report``.

        Args:
            path: a file that ends in .html.
            top: images per list.

        Returns:
            The path.

        Raises:
            InfluenceError: the name is not that of a page, or the file cannot be written.
        """
        return _written(path, lambda: self.page(top, self.tests))

    def _repr_html_(self) -> str:
        note = "Helpful: without it the loss would rise. Harmful: without it the loss would fall."
        more = ""
        if len(self.influence) > TESTS:
            more = f"The first {TESTS} of {counted(self.tests, 'test example')}; .to_pandas() has all."
        return gallery("Influence on the loss", (note, more), self.page(SHOWN // 2, TESTS).sections)


def _frame(rows: Sequence[Row], columns: Sequence[str]) -> Any:
    if importlib.util.find_spec("pandas") is None:
        raise InfluenceError("to_pandas needs pandas, which is not installed", "pip install pandas; or use .rows")
    import pandas

    return pandas.DataFrame.from_records(list(rows), columns=list(columns))


def _written(path: str | Path, page: Callable[[], Page]) -> Path:
    file = Path(path)
    check_page(file)
    check_output(file)  # before the pictures are read
    write_page(page(), file)
    return file
