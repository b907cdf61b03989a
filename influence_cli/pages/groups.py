"""From groups to a page: one bar and one table row per group, and the most harmful images of the worst group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.influence.example_facts import TrainingFacts
from influence_cli.influence.scores import strongest
from influence_cli.pages.parts import IMAGES, capitalised, config_text, sentence, training_cards
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.groups import GroupInfluence
from influence_cli.report.charts import class_bars, histogram
from influence_cli.report.html import CardRow, Page, PageTable, Section
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session


def groups_page(
    session: Session,
    stores: Sequence[Prepared],
    influence: GroupInfluence,
    facts: TrainingFacts,
    first: np.ndarray | None,
    answer: tuple[str, str],
    actual: Mapping[int, np.ndarray],
    count: int | None,
) -> Page:
    """Lay out the groups' influence on the mean loss of the test examples.

    Args:
        session: of the command.
        stores: what was prepared for each checkpoint.
        influence: the sums.
        facts: of the training examples.
        first: how often each group comes first, of `GroupInfluence.doubt`.
        answer: which group drives the errors, and what speaks for it, of `verdict_parts`.
        actual: per group, the rise of each test loss without it, if that was trained.
        count: groups that the result lists, None for all; as many images per effect, up to `IMAGES`.
    """
    names, total = influence.grouping.names, influence.total()
    read = np.isfinite(influence.mean)
    worst, images = int(total.order[0]), min(count or IMAGES, IMAGES)
    # Only the worst group: NaN is ignored.
    within = strongest(np.where(influence.grouping.members == worst, influence.mean, np.nan), images)
    values, members = influence.mean[read], influence.grouping.members[read]
    what = f"{influence.grouping.by}: {names[worst]}"
    rows = (
        CardRow(
            f"Most harmful in {what}",
            "removing one of these would lower the loss",
            training_cards(stores[0], facts, within, "harmful", images),
        ),
        CardRow(
            f"Most helpful in {what}",
            "removing one of these would raise the loss",
            training_cards(stores[0], facts, within, "helpful", images),
        ),
    )
    bars = class_bars("Influence by group", "sums over all training examples", values, members, names)
    heading = f"Mean over {len(influence.tests):,} test example{'s' if len(influence.tests) > 1 else ''}"
    most = float(np.abs(values).max(initial=0.0))
    return Page(
        title="influence groups",
        sentence=sentence(session, [prepared.task for prepared in stores], stores),
        meaning=(
            "The influence of a group is the sum over its members: the estimated rise of the mean loss if the group "
            "were removed and the model trained again. Below zero the group is harmful. For large groups, trust the "
            "ranking, not the number.",
        ),
        classes=_table(influence, first, actual, count),
        sections=(Section(heading, None, rows, bars),),
        histogram=histogram(
            f"Distribution of influence by {influence.grouping.by}",
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
        answer=answer[0] if answer[0].startswith(names[worst]) else capitalised(answer[0]),
        lead=f"{capitalised(answer[1])}.",
    )


def _table(
    influence: GroupInfluence, first: np.ndarray | None, actual: Mapping[int, np.ndarray], count: int | None
) -> PageTable:
    total = influence.total()
    rows = []
    for group in total.order[:count].tolist():
        rises = actual.get(group)
        rows.append(
            (
                influence.grouping.names[group],
                f"{int(total.examples[group]):,}",
                f"{total.influence[group]:+.3g}",
                f"{total.mean[group]:+.3g}",
                f"{total.share[group]:.1%}",
                "–" if first is None else f"{first[group]:.0%}",
                *(() if not actual else ("–" if rises is None else f"{rises.mean():+.3g}",)),
            )
        )
    columns = (influence.grouping.by, "examples", "influence", "per example", "share of harmful influence", "first")
    note = "first: how often the group is the most harmful one in 1,000 bootstrap samples of the test examples"
    return PageTable("Groups", (*columns, "actual") if actual else columns, tuple(rows), note)
