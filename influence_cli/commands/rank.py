"""influence rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    All,
    ConfigFile,
    DampingSweep,
    Format,
    OnTheFly,
    Output,
    Plot,
    Precision,
    Quiet,
    Report,
    Set,
    SkipUnreadable,
    Strict,
    Top,
    Verbose,
    with_precision,
)
from influence_cli.errors import InfluenceError, require_extra
from influence_cli.results.rank_rows import COLUMNS, rank_rows, test_rows
from influence_cli.runtime import distributed
from influence_cli.runtime.stdio import stdin_lines

if TYPE_CHECKING:
    from influence_cli.influence.example_facts import TrainingFacts
    from influence_cli.influence.test_selection import Selected
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.ranking.rank import Group
    from influence_cli.results.run import Session


def command(
    tests: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEST...", help="An index, a slice a:b, an image file, misclassified, or - for stdin."),
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            metavar="label|predicted|NAME",
            help="Whose loss is explained: the label's, the predicted class's, or a class's.",
        ),
    ] = "label",
    aggregate: Annotated[bool, typer.Option("--aggregate", help="Explain the mean loss of all TESTs.")] = False,
    train: Annotated[
        int | None,
        typer.Option(
            "--train",
            min=0,
            metavar="I",
            help="The other way round: the test examples that training example I helps and hurts.",
        ),
    ] = None,
    matrix: Annotated[
        Path | None, typer.Option("--matrix", metavar="FILE.h5", help="Also write all of influence[t, i].")
    ] = None,
    top: Top = 10,
    all_: All = False,
    format: Format = None,
    output: Output = None,
    report: Report = None,
    plot: Plot = None,
    attribution: Annotated[
        str | None,
        typer.Option(
            "--attribution",
            metavar="NAME",
            help="With --report: colour the pixels of the test images by integrated-gradients, grad-cam or occlusion.",
        ),
    ] = None,
    normalise: Annotated[
        str,
        typer.Option(
            "--normalise",
            metavar="none|relatif|relatif-loss|cosine",
            help="Against outliers that lead every list, rank by influence per change that removing the example makes: "
            "relatif: of the parameters; relatif-loss: of the losses; cosine: the same of the test example too.",
        ),
    ] = "none",
    damping_sweep: DampingSweep = False,
    on_the_fly: OnTheFly = False,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Search the index that influence index made, instead of scanning all rows."),
    ] = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    strict: Strict = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rank the training examples by their influence on a prediction.

    influence is the estimated rise of the test example's loss (nats) if the training example were removed:
    above zero helpful (removing it hurts), below zero harmful.

    Examples:

      influence rank 17

      influence rank misclassified --format csv | head -1

      ls bad/*.png | influence rank - --format tsv

      influence rank 0:100 --aggregate --report why.html

      influence rank 17 --normalise relatif

      influence rank --train 4211

      influence index && influence rank 17 --approximate
    """
    from influence_cli.commands.session import begin
    from influence_cli.report.html import check_page
    from influence_cli.report.plot import check_plot

    if (train is None) == (not tests):
        raise InfluenceError(
            "rank needs TEST examples, or --train I, not both", "influence rank 17, or influence rank --train 4211"
        )
    if train is not None and (aggregate or matrix or report or plot or on_the_fly):
        raise InfluenceError(
            "--train does not go with --aggregate, --matrix, --on-the-fly, --plot or --report", "leave one of them out"
        )
    if attribution is not None and (report is None or aggregate):
        raise InfluenceError(
            "--attribution colours the pixels of each test image in the page of --report"
            + (", and --aggregate has none" if aggregate else ""),
            "influence rank 17 --attribution integrated-gradients --report why.html",
        )
    if damping_sweep and (train is not None or on_the_fly):
        raise InfluenceError("--damping-sweep goes with neither --train nor --on-the-fly", "leave one of them out")
    if normalise != "none" and (train is not None or damping_sweep):
        raise InfluenceError(
            "--normalise goes neither with --train (of one training example, whose norm is always the same) nor with "
            "--damping-sweep",
            "leave one of them out",
        )
    if approximate:
        _check_approximate(
            {
                "--all": all_,
                "--matrix": matrix is not None,
                "--report": report is not None,
                "--plot": plot is not None,
                "--normalise": normalise != "none",
                "--damping-sweep": damping_sweep,
                "--on-the-fly": on_the_fly,
                "--train": train is not None,
            }
        )
    check_plot(plot)
    check_page(report)
    session = begin(
        config,
        with_precision(set_, precision),
        quiet=quiet,
        verbose=verbose,
        format=format,
        output=output,
        files=(matrix, report, plot),
    )
    from influence_cli.influence.ensemble import refuse_source

    if normalise != "none":
        from influence_cli.influence.normalise import check_normalise

        check_normalise(normalise, session.config.curvature.method)
        refuse_source(session.config, f"--normalise {normalise}", "there is no inverse curvature to measure a norm by")
        session.run.normalise = normalise
    if damping_sweep:
        from influence_cli.ranking.damping_sweep import check_method

        check_method(session.config.curvature.method)
        refuse_source(session.config, "--damping-sweep", "there is no λ")
    if approximate:
        from influence_cli.ranking.index_search import check_index

        check_index(session.config)
    count = None if all_ else top
    if train is not None:
        _rank_tests(session, train, target, count, skip_unreadable, strict)
    else:
        drawn = (report, plot, attribution)
        options = _Options(
            target,
            aggregate,
            matrix,
            count,
            *drawn,
            normalise,
            damping_sweep,
            skip_unreadable,
            on_the_fly,
            approximate,
            strict,
        )
        _rank(session, tests or [], options)


@dataclass(frozen=True)
class _Options:
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


def _check_approximate(given: Mapping[str, bool]) -> None:
    """Refuse what an index cannot give, before any work.

    Args:
        given: options that need more than an index has, and whether they were.
    """
    named = [name for name, is_given in given.items() if is_given]
    if named:
        raise InfluenceError(
            f"--approximate finds the strongest influences alone: it does not go with {' or '.join(named)}",
            "leave one of them out",
        )
    require_extra("faiss", "index", "--approximate")


def _rank(session: Session, tests: list[str], options: _Options) -> None:
    from influence_cli.commands.session import emit, load
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.test_gradients import check_target
    from influence_cli.influence.test_selection import select
    from influence_cli.model.task import misclassified
    from influence_cli.pages.parts import SHOWN
    from influence_cli.pages.rank import plot_title, rank_page
    from influence_cli.perturb.attribution import check_attribution, check_model
    from influence_cli.precompute.prepare import prepare_all
    from influence_cli.ranking.index_search import rank_approximate
    from influence_cli.ranking.rank import rank_training
    from influence_cli.ranking.sinks import KeptInfluence, matrix_file
    from influence_cli.report.html import write_page
    from influence_cli.report.plot import plot_influence

    check_attribution(options.attribution)
    tasks = load(session)
    check_target(options.target, tasks[0].classes)
    if options.attribution is not None:
        check_model(tasks[0], options.attribution)
    wrong = partial(misclassified, tasks, session.terminal, options.skip)
    selected = select(tests, tasks[0].test, tasks[0].classes, wrong, _stdin(tests))
    stores = prepare_all(
        session.config, tasks, session.terminal, skip_unreadable=options.skip, on_the_fly=options.on_the_fly
    )
    facts = training_facts(stores)
    kept: list[Group] = []
    drawn = options.report is not None or options.plot is not None
    shown = 1 if options.aggregate or options.report is None else min(len(selected), SHOWN)
    held = KeptInfluence(shown, len(facts.indices)) if drawn else None

    common: dict[str, Any] = {
        "config": session.config,
        "facts": facts,
        "count": options.count,
        "target": options.target,
        "aggregate": options.aggregate,
        "terminal": session.terminal,
        "skip_unreadable": options.skip,
    }

    def ranked(how: dict[str, Any]) -> Iterator[Group]:
        if options.approximate:
            session.run.scores, session.run.approximate = yield from rank_approximate(stores, selected, **common)
        else:
            session.run.scores = yield from rank_training(stores, selected, **common, **how)

    def rows() -> Iterator[dict[str, object]]:
        with matrix_file(options.matrix if distributed.is_first() else None, facts.indices) as matrix:
            sinks = [sink for sink in (matrix, held) if sink is not None]
            how: dict[str, Any] = {"sinks": sinks, "strict": options.strict, "normalise": options.normalise}
            for group in ranked(how):
                if drawn and not kept:
                    kept.append(group)
                yield from rank_rows(stores[0], group, facts, options.aggregate)

    if options.sweep:
        _sweep(session, stores, selected, facts, options)
    emit(session, rows(), COLUMNS if options.normalise == "none" else (*COLUMNS, "normalised"))
    if any(item.file is not None and item.label is None for item in selected) and options.target == "label":
        session.terminal.say("an image file without a label: the loss of the predicted class is explained")
    if options.matrix is not None:
        session.terminal.say(f"wrote {options.matrix}")
    if options.plot is not None and held is not None:
        classes, unit = tasks[0].classes, "nats" if session.config.has_unit else ""
        title = plot_title(kept[0], classes, options.aggregate)
        plot_influence(options.plot, held.values[0], facts.labels, classes, title, unit)
        session.terminal.say(f"wrote {options.plot}")
    if options.report is not None and held is not None:
        count = options.count or len(facts.indices)
        page = rank_page(
            session, stores, kept[0], held.values, facts, selected, count, options.aggregate, options.attribution
        )
        session.terminal.say(f"wrote {options.report} ({write_page(page, options.report):,} bytes)")
    else:
        instead = " instead of --approximate" if options.approximate else ""
        session.terminal.say(f"next: --report why.html{instead} shows the images")


def _stdin(tests: Sequence[str]) -> Iterator[str]:
    """Give the lines of stdin; only the first of several processes can read it, for all of them."""
    if distributed.size() == 1:
        return stdin_lines()
    return iter(distributed.from_first(lambda: list(stdin_lines()) if "-" in tests else []))


def _sweep(
    session: Session, stores: Sequence[Prepared], selected: Sequence[Selected], facts: TrainingFacts, options: _Options
) -> None:
    """Rank the same for the first few test examples (or the mean) at other λ."""
    from influence_cli.influence.ensemble import make_divisions
    from influence_cli.influence.test_gradients import group_size, mean_gradients, test_gradients
    from influence_cli.pages.damping_sweep import note_sweep
    from influence_cli.ranking.damping_sweep import COMPARED, sweep_influence
    from influence_cli.runtime.terminal import Terminal

    quiet, top = Terminal(quiet=True), options.count or 10
    if options.aggregate:
        size = group_size(stores, None)
        groups = [selected[start : start + size] for start in range(0, len(selected), size)]
        tests, gradients = mean_gradients(stores, groups, options.target, quiet, options.skip)
        what = f"the mean of {len(tests):,} test examples"
    else:
        tests, gradients = test_gradients(stores, selected[:COMPARED], options.target, quiet, options.skip)
        what = "the test example" if len(tests) == 1 else f"mean over the first {len(tests)} test examples"
    inverses = make_divisions(stores, session.config, quiet)
    rows = sweep_influence(stores, inverses, gradients, facts.read, top, session.terminal)
    note_sweep(session, rows, top, f"influence on {what}" if options.aggregate else f"influence, {what}")


def _rank_tests(session: Session, train: int, target: str, count: int | None, skip: bool, strict: bool) -> None:
    from influence_cli.commands.session import emit, load
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.test_gradients import check_target
    from influence_cli.precompute.prepare import prepare_all
    from influence_cli.ranking.rank import rank_tests, row_of

    tasks = load(session)
    check_target(target, tasks[0].classes)
    row_of(tasks[0].train, train)
    stores = prepare_all(session.config, tasks, session.terminal, skip_unreadable=skip)
    ranked = rank_tests(
        stores,
        train,
        config=session.config,
        target=target,
        terminal=session.terminal,
        skip_unreadable=skip,
        strict=strict,
    )
    session.run.scores = ranked.scores
    emit(session, test_rows(stores[0], ranked.tests, ranked.influence, training_facts(stores), train, count), COLUMNS)
