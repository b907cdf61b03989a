"""influence rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    Proxy,
    Quiet,
    Report,
    Set,
    SkipUnreadable,
    Strict,
    Top,
    Verbose,
    given,
    refuse_approximate,
    refuse_proxy,
    refuse_together,
    with_precision,
)
from influence_cli.errors import InfluenceError
from influence_cli.results.rank_rows import COLUMNS, rank_rows, test_rows
from influence_cli.runtime import distributed

if TYPE_CHECKING:
    from influence_cli.influence.example_facts import TrainingFacts
    from influence_cli.influence.test_selection import Selected
    from influence_cli.pages.rank import FirstGroup
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.ranking.rank import RankedGroup, Sink
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
            help="The class whose loss is explained: the label, the predicted class, or a class by name.",
        ),
    ] = "label",
    aggregate: Annotated[bool, typer.Option("--aggregate", help="Explain the mean loss of all TESTs.")] = False,
    train: Annotated[
        int | None,
        typer.Option(
            "--train",
            min=0,
            metavar="I",
            help="Instead of TEST: rank the test examples that training example I helps and hurts.",
        ),
    ] = None,
    matrix: Annotated[
        Path | None, typer.Option("--matrix", metavar="FILE.h5", help="Save the full test × train matrix (HDF5).")
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
            help="With --report: colour the pixels that matter in the test images: integrated-gradients, grad-cam or "
            "occlusion.",
        ),
    ] = None,
    normalise: Annotated[
        str,
        typer.Option(
            "--normalise",
            metavar="none|relatif|relatif-loss|cosine",
            help="Keep outliers from leading every list: divide influence by the change of the parameters (relatif) or "
            "of the losses (relatif-loss) that removing the example makes; cosine also divides by that of the test "
            "example.",
        ),
    ] = "none",
    damping_sweep: DampingSweep = False,
    proxy: Proxy = False,
    on_the_fly: OnTheFly = False,
    approximate: Annotated[
        bool,
        typer.Option("--approximate", help="Search the index made by influence index instead of scanning all rows."),
    ] = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    strict: Strict = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Rank training examples by their influence on a prediction.

    influence is the estimated rise of the test example's loss (nats) if the training example were removed. Above zero
    the example is helpful (removing it hurts), below zero it is harmful.

    Examples:

      influence rank 17

      influence rank misclassified --format csv | head -1

      ls bad/*.png | influence rank - --format tsv

      influence rank 0:100 --aggregate --report why.html

      influence rank misclassified --aggregate --proxy

      influence rank 17 --normalise relatif

      influence rank --train 4211 --report what_it_does.html

      influence index && influence rank 17 --approximate
    """
    from influence_cli.report.html import check_page
    from influence_cli.report.plot import check_plot
    from influence_cli.results.session import begin

    if (train is None) == (not tests):
        raise InfluenceError(
            "rank takes TEST or --train I, not both" if tests else "say which test images to explain",
            "influence rank misclassified, influence rank 17, or influence rank --train 4211",
        )
    refuse_together(
        train,
        given(aggregate, matrix, plot, on_the_fly),
        message="--train cannot be combined with --aggregate, --matrix, --on-the-fly or --plot",
        hint="leave one of them out",
    )
    if attribution is not None and (report is None or aggregate or train is not None):
        raise InfluenceError(
            "--attribution colours the pixels of each test image on the page of --report"
            + (", and --aggregate shows no single test image" if aggregate else "")
            + (", and --train shows a training image" if train is not None else ""),
            "influence rank 17 --attribution integrated-gradients --report why.html",
        )
    refuse_together(
        damping_sweep,
        given(train, on_the_fly),
        message="--damping-sweep cannot be combined with --train or --on-the-fly",
        hint="leave one of them out",
    )
    refuse_together(
        normalise != "none",
        given(train, damping_sweep),
        message="--normalise cannot be combined with --train (one training example has one norm) or with "
        "--damping-sweep",
        hint="leave one of them out",
    )
    beside = {
        "--all": all_,
        "--matrix": matrix is not None,
        "--report": report is not None,
        "--plot": plot is not None,
        "--normalise": normalise != "none",
        "--damping-sweep": damping_sweep,
        "--on-the-fly": on_the_fly,
        "--train": train is not None,
    }
    if approximate:
        refuse_approximate(beside)
    refuse_proxy(
        proxy=proxy,
        aggregate=aggregate,
        others=(on_the_fly, damping_sweep, normalise != "none", approximate, strict, skip_unreadable),
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
    from influence_cli.replay.prepare import check_options

    check_options(session.config, session.terminal, skip=skip_unreadable, on_the_fly=on_the_fly, strict=strict)
    method, ensemble = session.config.curvature.method, session.config.model.ensemble
    if normalise != "none":
        from influence_cli.influence.normalise import check_normalise

        check_normalise(normalise, method)
        refuse_source(ensemble, f"--normalise {normalise}", "there is no inverse curvature to measure a norm by")
        session.run.normalise = normalise
    if damping_sweep:
        from influence_cli.ranking.damping_sweep import check_method

        check_method(method)
        refuse_source(ensemble, "--damping-sweep", "there is no λ")
    if approximate:
        from influence_cli.precompute.prepared import store_paths
        from influence_cli.ranking.index_search import check_index

        check_index(method, ensemble, store_paths(session.config))
    count = None if all_ else top
    if train is not None:
        _rank_tests(session, train, target, count, report, skip=skip_unreadable, strict=strict)
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
            proxy,
            on_the_fly,
            approximate,
            strict,
        )
        _rank(session, tests or [], options)


@dataclass(frozen=True)
class _Options:
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
    proxy: bool
    on_the_fly: bool
    approximate: bool
    strict: bool


def _rank(session: Session, tests: list[str], options: _Options) -> None:
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.test_gradients import check_target
    from influence_cli.pages.parts import SHOWN
    from influence_cli.pages.rank import FirstGroup
    from influence_cli.perturb.attribution import check_attribution, check_model
    from influence_cli.ranking.copies import warn_of_copies
    from influence_cli.ranking.index_search import rank_approximate
    from influence_cli.ranking.rank import RankOptions, rank_training
    from influence_cli.ranking.sinks import KeptInfluence, matrix_file
    from influence_cli.results.session import emit, load, prepare, selected_tests

    check_attribution(options.attribution)
    tasks = load(session)
    check_target(options.target, tasks[0].classes)
    if options.attribution is not None:
        check_model(tasks[0], options.attribution)
    selected = selected_tests(session, tasks, tests, target=options.target, skip=options.skip)
    stores = prepare(session, tasks, proxy=options.proxy, skip=options.skip, on_the_fly=options.on_the_fly)
    warn_of_copies(stores, selected, session.terminal)
    facts = training_facts(stores)
    kept: list[RankedGroup] = []
    drawn = options.report is not None or options.plot is not None
    shown = 1 if options.aggregate or options.report is None else min(len(selected), SHOWN)
    held = KeptInfluence(shown, len(facts.indices)) if drawn else None

    common: dict[str, Any] = {"count": options.count, "target": options.target, "aggregate": options.aggregate}
    common |= {"facts": facts, "terminal": session.terminal}

    def ranked(sinks: Sequence[Sink]) -> Iterator[RankedGroup]:
        if options.approximate:
            session.run.scores, session.run.approximate = yield from rank_approximate(
                stores, selected, **common, skip_unreadable=options.skip
            )
        else:
            how = RankOptions(
                skip_unreadable=options.skip, sinks=sinks, strict=options.strict, normalise=options.normalise
            )
            session.run.scores = yield from rank_training(stores, selected, **common, options=how)

    def rows() -> Iterator[dict[str, object]]:
        with matrix_file(options.matrix if distributed.is_first() else None, facts.indices) as matrix:
            sinks = [sink for sink in (matrix, held) if sink is not None]
            for group in ranked(sinks):
                if drawn and not kept:
                    kept.append(group)
                yield from rank_rows(stores[0], group, facts, aggregate=options.aggregate)

    if options.sweep:
        _sweep(session, stores, selected, facts, options)
    emit(session, rows(), COLUMNS if options.normalise == "none" else (*COLUMNS, "normalised"))
    if any(item.file is not None and item.label is None for item in selected) and options.target == "label":
        session.terminal.say("for an image file without a label, the loss of the predicted class is explained")
    if options.matrix is not None:
        session.terminal.say(f"wrote {options.matrix}")
    if held is not None:
        _draw(session, stores, selected, facts, FirstGroup(kept[0], held.values), options)
    if options.report is None:
        instead = " instead of --approximate" if options.approximate else ""
        session.terminal.say(f"next: --report why.html{instead} shows the images")


def _draw(
    session: Session,
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    facts: TrainingFacts,
    first: FirstGroup,
    options: _Options,
) -> None:
    """Draw the plot and the page that were asked for."""
    from influence_cli.pages.rank import plot_title, rank_page
    from influence_cli.report.plot import plot_influence
    from influence_cli.results.session import write_report

    classes, aggregate = stores[0].task.classes, options.aggregate
    if options.plot is not None:
        title, unit = plot_title(first.group, classes, aggregate=aggregate), "nats" if session.config.has_unit else ""
        plot_influence(options.plot, first.kept[0], facts.labels, classes, title, unit)
        session.terminal.say(f"wrote {options.plot}")
    if options.report is not None:
        count, marks = options.count or len(facts.indices), options.attribution
        page = rank_page(session, stores, first, facts, selected, count, aggregate=aggregate, attribution=marks)
        write_report(session, page, options.report)


def _sweep(
    session: Session, stores: Sequence[Prepared], selected: Sequence[Selected], facts: TrainingFacts, options: _Options
) -> None:
    """Rank again at other λ, for the first few test examples or for the mean."""
    from influence_cli.influence.ensemble import make_divisions
    from influence_cli.influence.test_gradients import group_size, mean_gradients, test_gradients
    from influence_cli.pages.damping_sweep import note_sweep
    from influence_cli.ranking.damping_sweep import COMPARED, sweep_influence
    from influence_cli.runtime.terminal import Terminal

    quiet, top = Terminal(quiet=True), options.count or 10
    if options.aggregate:
        size = group_size(stores, None)
        groups = [selected[start : start + size] for start in range(0, len(selected), size)]
        tests, gradients = mean_gradients(stores, groups, options.target, quiet, skip=options.skip)
        what = f"the mean of {len(tests):,} test examples"
    else:
        tests, gradients = test_gradients(stores, selected[:COMPARED], options.target, quiet, skip=options.skip)
        what = "the test example" if len(tests) == 1 else f"mean over the first {len(tests)} test examples"
    inverses = make_divisions(stores, quiet)
    rows = sweep_influence(stores, inverses, gradients, facts.read, top, session.terminal)
    note_sweep(session, rows, top, f"influence on {what}" if options.aggregate else f"influence, {what}")


def _rank_tests(
    session: Session, train: int, target: str, count: int | None, report: Path | None, *, skip: bool, strict: bool
) -> None:
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.test_gradients import check_target
    from influence_cli.pages.rank_train import train_page
    from influence_cli.ranking.rank import check_train, rank_tests
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.results.session import emit, load, write_report

    tasks = load(session)
    check_target(target, tasks[0].classes)
    check_train(tasks[0].train, train)
    stores = prepare_scores(session.config, tasks, session.terminal, skip_unreadable=skip)
    ranked = rank_tests(stores, train, target=target, terminal=session.terminal, skip_unreadable=skip, strict=strict)
    session.run.scores, facts = ranked.scores, training_facts(stores)
    emit(session, test_rows(stores[0], ranked.tests, ranked.influence, facts, train, count), COLUMNS)
    if report is not None:
        write_report(session, train_page(session, stores, ranked, facts, train, count or len(ranked.tests)), report)
