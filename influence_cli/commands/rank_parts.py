"""The options of `influence rank`, and what it writes besides its rows: a plot and a page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np

    from influence_cli.influence.example_facts import TrainingFacts
    from influence_cli.influence.test_selection import Selected
    from influence_cli.pages.rank import FirstGroup
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.ranking.rank import Group
    from influence_cli.results.run import Session


@dataclass(frozen=True)
class Options:
    """What is ranked, how, and what is written of it."""

    target: str
    aggregate: bool
    matrix: Path | None
    count: int | None
    report: Path | None
    plot: Path | None
    attribution: str | None
    normalise: str
    sweep: bool
    skip: bool
    on_the_fly: bool
    approximate: bool
    strict: bool


def draw_plot(
    session: Session,
    classes: Sequence[str],
    group: Group,
    values: np.ndarray,
    facts: TrainingFacts,
    options: Options,
    file: Path,
) -> None:
    """Draw the influences on the first test example, or on the mean of all."""
    from influence_cli.pages.rank import plot_title
    from influence_cli.report.plot import plot_influence

    unit = "nats" if session.config.has_unit else ""
    title = plot_title(group, classes, aggregate=options.aggregate)
    plot_influence(file, values, facts.labels, classes, title, unit)
    session.terminal.say(f"wrote {file}")


def write_report(
    session: Session,
    stores: Sequence[Prepared],
    first: FirstGroup,
    facts: TrainingFacts,
    selected: Sequence[Selected],
    options: Options,
    file: Path,
) -> None:
    """Write the page of a ranking."""
    from influence_cli.pages.rank import rank_page
    from influence_cli.report.html import write_page

    count = options.count or len(facts.indices)
    page = rank_page(
        session,
        stores,
        first,
        facts,
        selected,
        count,
        aggregate=options.aggregate,
        attribution=options.attribution,
    )
    session.terminal.say(f"wrote {file} ({write_page(page, file):,} bytes)")
