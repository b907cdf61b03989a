"""influence groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    All,
    ConfigFile,
    Format,
    OnTheFly,
    Output,
    Precision,
    Proxy,
    Quiet,
    Report,
    Set,
    SkipUnreadable,
    Strict,
    Top,
    Verbose,
    given,
    refuse_together,
    with_precision,
)
from influence_cli.errors import InfluenceError, did_you_mean
from influence_cli.results.group_rows import COLUMNS, group_rows
from influence_cli.results.record import GroupRetrainRecord, GroupsRecord

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.influence.test_selection import Selected
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.ranking.groups import GroupInfluence
    from influence_cli.results.run import Session


def command(
    tests: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEST]...", help="Test images, as for rank. Default: misclassified."),
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    by: Annotated[
        str | None,
        typer.Option("--by", metavar="class|COLUMN", help="Group by label (default), or by a column of the metadata."),
    ] = None,
    metadata: Annotated[
        Path | None,
        typer.Option(
            "--metadata",
            metavar="FILE.csv",
            help="One row per training example: its index (from 0) or path, and columns to group by.",
        ),
    ] = None,
    of: Annotated[
        str | None, typer.Option("--of", metavar="CLASS", help="Use only the test examples with this label.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="label|predicted|NAME", help="The class whose loss is explained, as for rank."
        ),
    ] = "label",
    each: Annotated[bool, typer.Option("--each", help="Rows per TEST instead of for their mean loss.")] = False,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also train without each group that is shown. Adds the column actual.")
    ] = False,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, metavar="R", help="With --retrain: trainings per group.")
    ] = 1,
    top: Top = 10,
    all_: All = False,
    format: Format = None,
    output: Output = None,
    report: Report = None,
    proxy: Proxy = False,
    on_the_fly: OnTheFly = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    strict: Strict = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find the group of training examples that drives the errors.

    A group is a class, or a value of a metadata column. The influence of a group is the estimated rise of the mean loss
    of all TESTs (nats) if the whole group were removed. The most harmful group comes first. harmful_share is its share
    of all harmful influence. first is how often it comes first in bootstrap samples of the test examples.

    Examples:

      influence groups

      influence groups misclassified --of cat --report groups.html

      influence groups --metadata sites.csv --by site --retrain

      influence groups 17 24 --each --format csv

      influence groups --proxy
    """
    from influence_cli.report.html import check_page
    from influence_cli.results.session import begin

    if metadata is None and by not in (None, "class"):
        raise InfluenceError(
            f"--by {by}: without --metadata the groups are classes",
            f"{did_you_mean(str(by), ['class'])}; or name the file with that column: --metadata FILE.csv --by {by}",
        )
    refuse_together(
        retrain,
        skip_unreadable,
        message="--retrain trains on every example, so it cannot be combined with --skip-unreadable",
        hint="list the unreadable examples under train.exclude",
    )
    refuse_together(
        proxy,
        given(on_the_fly, retrain, skip_unreadable, strict),
        message="--proxy replays a run of its own: it cannot be combined with --on-the-fly, --retrain, --strict or "
        "--skip-unreadable",
        hint="leave one of them out",
    )
    check_page(report)
    session = begin(
        config,
        with_precision(set_, precision),
        quiet=quiet,
        verbose=verbose,
        format=format,
        output=output,
        files=(report,),
    )
    from influence_cli.replay.prepare import check_options

    check_options(session.config, session.terminal, skip=skip_unreadable, on_the_fly=on_the_fly, strict=strict)
    options = _Options(
        by, metadata, of, target, each, retrain, repeats, None if all_ else top, report, proxy, on_the_fly,
        skip_unreadable, strict,
    )  # fmt: skip
    _groups(session, tests or ["misclassified"], options)


@dataclass(frozen=True)
class _Options:
    by: str | None
    metadata: Path | None
    of: str | None
    target: str
    each: bool
    retrain: bool
    repeats: int
    count: int | None
    report: Path | None
    proxy: bool
    on_the_fly: bool
    skip: bool
    strict: bool


def _groups(session: Session, words: list[str], options: _Options) -> None:
    from influence_cli.data.label_files import class_number
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.test_gradients import check_target
    from influence_cli.ranking.group_files import group_by_class, read_groups
    from influence_cli.ranking.groups import group_influence, labelled, verdict_parts
    from influence_cli.results.session import emit, load, prepare, selected_tests
    from influence_cli.retrain.leave_groups_out import check_retrain
    from influence_cli.retrain.retraining import Retraining

    tasks = load(session)
    classes, train = tasks[0].classes, tasks[0].train
    check_target(options.target, classes)
    if options.of is not None:
        class_number(options.of, classes, "--of")
    if options.metadata is None:
        grouping = group_by_class(train, classes)
    else:
        grouping = read_groups(options.metadata, options.by, train)
    selected = labelled(selected_tests(session, tasks, words, target=options.target), options.of, classes)
    stores = prepare(session, tasks, proxy=options.proxy, skip=options.skip, on_the_fly=options.on_the_fly)
    if options.retrain:
        check_retrain(stores, selected, grouping, Retraining(session.config))
    facts = training_facts(stores)
    influence = group_influence(
        stores,
        selected,
        grouping,
        facts=facts,
        target=options.target,
        terminal=session.terminal,
        skip_unreadable=options.skip,
        strict=options.strict,
    )
    session.run.scores = influence.scores
    actual = _retrain(session, stores, selected, influence, options) if options.retrain else {}
    doubt = influence.doubt(session.config.seed)
    session.run.groups = GroupsRecord(grouping.by, len(grouping.names), len(influence.tests), doubt.by_chance)
    answer = verdict_parts(influence, doubt, " nats" if session.config.has_unit else "")
    sentence = ": ".join(answer)
    session.run.verdict = sentence
    truth = session.run.retrain.verdict if session.run.retrain else None
    columns = (*COLUMNS, "actual") if options.retrain else COLUMNS
    emit(
        session,
        group_rows(stores[0], influence, doubt.first, each=options.each, count=options.count, actual=actual),
        columns,
        brief=options.report is not None,
    )
    session.terminal.say(sentence)
    if truth:
        session.terminal.say(truth)
    if options.report is not None:
        from influence_cli.pages.groups import groups_page
        from influence_cli.results.session import write_report

        page = groups_page(session, stores, influence, facts, doubt.first, answer, actual, options.count)
        write_report(session, page, options.report)
    elif not options.retrain:
        session.terminal.say("next: --report groups.html shows the images, --retrain trains without the groups")


def _retrain(
    session: Session,
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    influence: GroupInfluence,
    options: _Options,
) -> dict[int, np.ndarray]:
    """Train again without each group that is shown, and give the rise of each test loss per group."""
    from influence_cli.metrics import pearson, slope
    from influence_cli.ranking.groups import retrained
    from influence_cli.retrain.leave_groups_out import leave_groups_out
    from influence_cli.retrain.retraining import Retraining

    sums = [influence.on(test) for test in range(len(influence.tests))] if options.each else [influence.total()]
    shown = sorted({int(group) for one in sums for group in one.order[: options.count] if one.examples[group]})
    left_out = leave_groups_out(
        stores[0],
        selected,
        influence.tests,
        influence.grouping,
        shown,
        retraining=Retraining(session.config),
        repeats=options.repeats,
        terminal=session.terminal,
    )
    changes, fit = left_out.changes, None
    if len(shown) > 2:
        estimated, actual = influence.sums[:, shown].mean(axis=0), changes.mean(axis=1)
        r, b = pearson(estimated, actual), slope(estimated, actual)
        fit = (_finite(r), _finite(b))
        session.terminal.say(f"estimated and actual effect of {len(shown):,} groups: r = {r:.3f}, slope {b:.2f}")
    by_group = dict(zip(shown, changes, strict=True))
    session.run.newton = left_out.newton
    session.run.retrain = GroupRetrainRecord(len(shown), fit, retrained(influence, by_group) if by_group else None)
    return by_group


def _finite(value: float) -> float | None:
    import math

    return value if math.isfinite(value) else None
