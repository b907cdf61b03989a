"""From a sweep over λ to lines, a table and a chart: how much the ranking depends on λ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from influence_cli.ranking.damping_sweep import AtDamping, verdict
from influence_cli.report.charts import Chart
from influence_cli.report.html import PageTable
from influence_cli.results.record import SweepRecord

if TYPE_CHECKING:
    from influence_cli.results.run import Session

COLUMNS = ("λ ×", "λ", "effective dimension kept", "same top", "Spearman", "correlation with identity")


def note_sweep(session: Session, rows: Sequence[AtDamping], top: int, what: str) -> None:
    """Print the sweep on stderr, one line per λ and the verdict, and note it for the run file and the page.

    Args:
        session: of the command.
        rows: of `sweep_influence` or `sweep_self_influence`.
        top: how many of the first examples are compared.
        what: which ranking it is.
    """
    say, sentence = session.terminal.say, verdict(rows, top)
    lines = [(*COLUMNS[:3], f"same of top {top:,}", "Spearman", "with identity"), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    say(f"the ranking at other λ ({what}):")
    for line, row in zip(lines, [None, *rows], strict=True):
        text = "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        say(text if row is None or row.obstacle is None else f"{text}  invalid: {row.obstacle}")
    say(sentence)
    session.run.damping_sweep = SweepRecord(what, top, sentence, tuple(rows))


def sweep_parts(session: Session) -> tuple[tuple[PageTable, ...], tuple[Chart, ...]]:
    """Give the table and the chart of the noted sweep; nothing if there was none."""
    noted = session.run.damping_sweep
    if noted is None:
        return (), ()
    rows = noted.rows
    table = PageTable(
        f"The ranking is {noted.verdict}",
        COLUMNS,
        tuple((*_cells(row)[:-1], "invalid" if row.obstacle else _cells(row)[-1]) for row in rows),
        f"{noted.ranking}; compared with the first {noted.top:,} at the chosen λ",
    )
    places = [number / (len(rows) - 1) for number in range(len(rows))]
    curves = []
    for name, values in (
        ("same top", [row.overlap for row in rows]),
        ("Spearman", [row.correlation for row in rows]),
        ("correlation with identity", [row.identity for row in rows]),
    ):
        known = [(place, max(0.0, value)) for place, value in zip(places, values, strict=True) if value is not None]
        curves.append((name, tuple(known)))
    ticks = tuple(f"{row.multiple:g}" for row in rows)
    chart = Chart("The ranking at other λ", "× λ", "similarity to the ranking at λ", tuple(curves), ticks)
    return (table,), (chart,)


def _cells(row: AtDamping) -> tuple[str, ...]:
    shares = (row.correlation, row.identity)
    return (
        f"{row.multiple:g}",
        row.damping,
        "–" if row.effective_dimension is None else f"{row.effective_dimension:,.1f}",
        "–" if row.overlap is None else f"{row.overlap:.0%}",
        *("–" if share is None else f"{share:.3f}" for share in shares),
    )
