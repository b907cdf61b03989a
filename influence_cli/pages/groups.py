"""From groups to a page: one bar and one table row per group, and the most harmful images of the worst group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.scores import strongest
from influence_cli.pages.parts import IMAGES, config_text, sentence, training_cards
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.groups import GroupInfluence
from influence_cli.report.charts import class_bars, histogram
from influence_cli.report.html import Page, Row, Section, Table
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session


def groups_page(
    session: Session,
    stores: Sequence[Prepared],
    found: GroupInfluence,
    facts: TrainingFacts,
    first: np.ndarray | None,
    verdict: str,
    actual: Mapping[int, np.ndarray],
    count: int | None,
) -> Page:
    """Lay out the groups' influence on the mean loss of the test examples.

    Args:
        session: of the command.
        stores: what was prepared for each checkpoint.
        found: the sums.
        facts: of the training examples.
        first: how often each group comes first, of `GroupInfluence.doubt`.
        verdict: which group drives the errors.
        actual: per group, the rise of each test loss without it, if that was trained.
        count: groups that the result lists, None for all; as many images per effect, up to `IMAGES`.
    """
    names, total = found.grouping.names, found.total()
    read = np.isfinite(found.mean)
    worst, images = int(total.order[0]), min(count or IMAGES, IMAGES)
    # Only the worst group: NaN is ignored.
    own = strongest(np.where(found.grouping.members == worst, found.mean, np.nan), images)
    values, members = found.mean[read], found.grouping.members[read]
    what = f"{found.grouping.by}: {names[worst]}"
    rows = (
        Row(
            f"Most harmful in {what}",
            "removing one of these would lower the loss",
            training_cards(stores[0], facts, own, "harmful", images),
        ),
        Row(
            f"Most helpful in {what}",
            "removing one of these would raise the loss",
            training_cards(stores[0], facts, own, "helpful", images),
        ),
    )
    bars = class_bars("Influence by group", "sums over all training examples", values, members, names)
    heading = f"Mean over {len(found.tests):,} test example{'s' if len(found.tests) > 1 else ''}"
    most = float(np.abs(values).max(initial=0.0))
    return Page(
        title="influence groups",
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=(
            f"{verdict[0].upper()}{verdict[1:]}.",
            "The influence of a group is the sum over its members: the estimated rise of the mean loss if the group "
            "were removed and the model trained again. Below zero the group is harmful. For large groups, trust the "
            "ranking, not the number.",
        ),
        classes=_table(found, first, actual, count),
        sections=(Section(heading, None, rows, bars),),
        histogram=histogram(
            f"Distribution of influence by {found.grouping.by}",
            "influence of single training examples",
            values,
            members,
            names,
            (-most, most),
            bins=41,
        ),
        charts=(),
        tables=(),
        notes=(),
        command=command_line(),
        config=config_text(session),
    )


def _table(
    found: GroupInfluence, first: np.ndarray | None, actual: Mapping[int, np.ndarray], count: int | None
) -> Table:
    total = found.total()
    rows = []
    for group in total.order[:count].tolist():
        own = actual.get(group)
        rows.append(
            (
                found.grouping.names[group],
                f"{int(total.examples[group]):,}",
                f"{total.influence[group]:+.3g}",
                f"{total.mean[group]:+.3g}",
                f"{total.share[group]:.1%}",
                "–" if first is None else f"{first[group]:.0%}",
                *(() if not actual else ("–" if own is None else f"{own.mean():+.3g}",)),
            )
        )
    columns = (found.grouping.by, "examples", "influence", "per example", "share of harmful influence", "first")
    note = "first: how often the group is the most harmful one in 1,000 bootstrap samples of the test examples"
    return Table("Groups", (*columns, "actual") if actual else columns, tuple(rows), note)
