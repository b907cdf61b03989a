"""influence mislabels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.labels.decided import (
    ReviewedOption,
    SampleOption,
    decided_options,
    note_decided,
    read_decided,
    say_next,
)
from influence_cli.commands.labels.mislabels_messages import describe, score
from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    All,
    ConfigFile,
    DampingSweep,
    LabelFormat,
    OnTheFly,
    Output,
    PageSize,
    Plot,
    Precision,
    Quiet,
    Report,
    Set,
    SkipUnreadable,
    Strict,
    Verbose,
    refuse_mislabels,
    rows_to_show,
    with_precision,
)
from influence_cli.errors import InfluenceError
from influence_cli.report.dialects import COLUMNS as DIALECT_COLUMNS
from influence_cli.report.dialects import DIALECTS, in_dialect
from influence_cli.results.mislabel_rows import COLUMNS, mislabel_rows, noted_neighbours, signal_column

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from influence_cli.data.split import Split
    from influence_cli.mislabels.find import Mislabels
    from influence_cli.model.task import Task
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.results.run import Session


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    on: Annotated[str, typer.Option("--on", metavar="train|test", help="Which labels to judge.")] = "train",
    signal: Annotated[
        str,
        typer.Option(
            "--signal",
            metavar="NAME",
            help="What to rank by: combined, readout, neighbours, logistic, pred-probs, loss, margin, trajectory, "
            "self-influence, gradient-norm, tracin or test-influence; of --features readout:NAME or neighbours:NAME.",
        ),
    ] = "combined",
    signals: Annotated[bool, typer.Option("--signals", help="Add one column per signal.")] = False,
    explain: Annotated[
        int | None,
        typer.Option(
            "--explain",
            min=0,
            metavar="INDEX",
            help="Show the signals and the neighbours of one example; those of gradients with --signals.",
        ),
    ] = None,
    pred_probs: Annotated[
        Path | None,
        typer.Option(
            "--pred-probs",
            metavar="FILE",
            help="Use the probabilities of another model as a signal: one row per example (.npy, .csv).",
        ),
    ] = None,
    features: Annotated[
        list[Path] | None,
        typer.Option(
            "--features",
            metavar="FILE",
            help="Use the features of another network as well: one row per example (.npy, .npz, .parquet, .h5); "
            "repeatable. evidence.features of the config has them computed.",
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth",
            metavar="FILE",
            help="Known wrong labels (.csv, .npy): measure how well each signal finds them, those of gradients "
            "with --signals only.",
        ),
    ] = None,
    reviewed: ReviewedOption = None,
    sample: SampleOption = None,
    fail_above: Annotated[
        int | None,
        typer.Option("--fail-above", min=0, metavar="N", help="Exit 1 if more than N labels are probably wrong."),
    ] = None,
    top: Annotated[
        str, typer.Option("--top", metavar="K|auto", help="Rows to show; auto: as many as are probably wrong.")
    ] = "10",
    all_: All = False,
    format: LabelFormat = None,
    output: Output = None,
    report: Report = None,
    page_size: PageSize = 25.0,
    plot: Plot = None,
    damping_sweep: DampingSweep = False,
    on_the_fly: OnTheFly = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    strict: Strict = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the examples whose labels are probably wrong.

    By default this takes one forward pass and no retraining. score is 1 − the probability of the label, judged by a
    leave-one-out readout of all layers, by the nearest neighbours and, if it has not memorised its labels, by the
    model. suggested is the likeliest class, judged without the given label. self_influence is the rise of an example's
    own loss if it were removed from training. It is given if a store exists or the signal is asked for.

    Examples:

      influence mislabels

      influence mislabels --top auto --report mislabels.html

      influence mislabels --format jsonl --top 50 | jq -r .path

      influence mislabels --explain 17

      influence mislabels --reviewed decisions.csv --report mislabels.html

      influence mislabels --signals --truth truth.csv

      influence mislabels --fail-above 100 -q > /dev/null || echo "too many suspicious labels"
    """
    from influence_cli.results.session import begin, emit, load

    if on not in ("train", "test"):
        raise InfluenceError(f"--on {on}: there is no such set", "known: train, test")
    shown = rows_to_show(top)
    refuse_mislabels(
        on,
        explain,
        format=format,
        plot=plot,
        report=report,
        damping_sweep=damping_sweep,
        on_the_fly=on_the_fly,
    )
    session = begin(
        config,
        with_precision(set_, precision),
        quiet=quiet,
        verbose=verbose,
        format=format,
        output=output,
        files=(report, plot),
        dialects=DIALECTS,
    )
    from influence_cli.commands.labels.features import load_features
    from influence_cli.curvature.choice import SOLVERS
    from influence_cli.data.label_files import read_truth
    from influence_cli.evidence.feature_files import read_probabilities
    from influence_cli.mislabels.explain import COLUMNS as EXPLAINED
    from influence_cli.mislabels.explain import explain_rows, row_among
    from influence_cli.mislabels.find import find_mislabels
    from influence_cli.mislabels.signals import SignalChoice, wanted_signals

    _check_method(session, signal, damping_sweep=damping_sweep)
    options = decided_options(reviewed, sample, signal, output=output, report=report, truth=truth)
    tasks = load(session)
    split = tasks[0].train if on == "train" else tasks[0].labelled_tests()
    classes = tasks[0].classes
    _check_images(session, split, on)
    if explain is not None:
        row_among(split.indices, explain, split)
    known = read_truth(truth, split.labels, classes) if truth is not None else None
    probabilities = read_probabilities(pred_probs, len(split.labels), classes) if pred_probs is not None else None
    given = load_features(session.config, tasks[0], split, features or (), session.terminal, skip=skip_unreadable)
    decided = read_decided(session, options, split, classes, on)
    wanted = wanted_signals(
        signal,
        extent="all" if signals else "one" if known is None and explain is None else "free",
        on=on,
        checkpoints=len(tasks),
        tests=tasks[0].test is not None and not tasks[0].test.is_unlabelled,
        solves=session.config.curvature.method in (*SOLVERS, "replay") or session.config.model.ensemble == "source",
        probabilities=probabilities is not None,
        features=given,
    )
    wanted = tuple(dict.fromkeys((*wanted, *(["self-influence"] if damping_sweep else []))))
    stores = _stores(session, tasks, wanted, skip=skip_unreadable, on_the_fly=on_the_fly)
    result = find_mislabels(
        tasks,
        stores,
        on=on,
        choice=SignalChoice(signal, wanted, probabilities, given, decided.taught),
        terminal=session.terminal,
        skip_unreadable=skip_unreadable,
        strict=strict,
        store=session.config.gradients.store,
    )
    result = note_decided(session, result, decided, split, classes)
    if explain is not None:
        emit(session, explain_rows(result, split, classes, explain), EXPLAINED)
        return
    _require_count(
        result,
        {"--top auto": shown is None, "--fail-above": fail_above is not None, "--format": format in DIALECTS},
    )
    describe(session, result, split, classes)
    if known is not None:
        score(session, result, known)
    if damping_sweep:
        _sweep(session, stores, shown or len(result.flagged) or 10)
    count = len(result.order) if all_ else len(result.flagged) if shown is None else shown
    _emit(
        session,
        result,
        split,
        classes,
        count,
        [signal_column(name) for name in result.signals if signals],
        brief=report is not None,
    )
    if plot is not None:
        _plot(session, result, classes, plot, signal)
    if report is not None:
        _write_report(session, tasks, stores, result, split, count, signal, (report, page_size))
    else:
        _say_report(session, result)
    if fail_above is not None:
        _fail_above(session, len(result.flagged), fail_above)


def _say_report(session: Session, result: Mislabels) -> None:
    top = "" if result.count is None else "--top auto "  # which an estimate is needed for
    session.terminal.say(f"next: influence mislabels {top}--report mislabels.html shows the images")


def _emit(
    session: Session,
    result: Mislabels,
    split: Split,
    classes: tuple[str, ...],
    count: int,
    extra: Sequence[str],
    *,
    brief: bool,
) -> None:
    """Write the first rows, in the dialect that was asked for or with extra columns."""
    from influence_cli.results.session import emit

    if session.output is not None:
        session.run.neighbours = noted_neighbours(result, count)
    rows = mislabel_rows(result, split, classes, count)
    if session.format in DIALECTS:
        emit(session, in_dialect(rows, session.format), DIALECT_COLUMNS[session.format])
    else:
        emit(session, rows, (*COLUMNS, *extra), brief=brief)


def _write_report(
    session: Session,
    tasks: list[Task],
    stores: Sequence[Prepared],
    result: Mislabels,
    split: Split,
    count: int,
    signal: str,
    report: tuple[Path, float],
) -> None:
    """Write the page into a file of at most so many MB."""
    report_file, page_size = report
    from influence_cli.pages.mislabels import mislabels_page
    from influence_cli.results.session import write_report

    most = int(page_size * 1e6)
    page = mislabels_page(session, tasks, stores, result, split, count, signal, most)
    write_report(session, page, report_file, most)
    shown = len(page.sections[0].rows[0].cards)
    if shown < count:
        session.terminal.say(
            f"the page shows the first {shown:,} of {count:,} with their images, which is what {page_size:g} MB hold "
            "(--page-size)"
        )
        where = "" if split.name == "train" else f" --on {split.name}"
        session.terminal.say(f"next: influence review{where} shows them all")
    say_next(session, result)


def _fail_above(session: Session, findings: int, most: int) -> None:
    """Exit 1 if more labels are probably wrong than are allowed."""
    if findings > most:
        session.terminal.say(f"{findings:,} labels are probably wrong, more than --fail-above {most} allows")
        raise typer.Exit(1)


def _stores(
    session: Session, tasks: Sequence[Task], wanted: Collection[str], *, skip: bool, on_the_fly: bool
) -> Sequence[Prepared]:
    """Prepare the stores that a signal needs. If no signal needs one, take those that are already complete."""
    from influence_cli.mislabels.signals import GRADIENTS
    from influence_cli.replay.prepare import prepare_scores, stores_complete
    from influence_cli.runtime.terminal import Terminal

    if on_the_fly or set(wanted) & set(GRADIENTS):
        return prepare_scores(session.config, tasks, session.terminal, skip_unreadable=skip, on_the_fly=on_the_fly)
    try:
        if stores_complete(session.config):
            return prepare_scores(session.config, tasks, Terminal(quiet=True), skip_unreadable=skip)
    except InfluenceError as error:
        session.terminal.warn(f"no self_influence: {error.message}")
    return []


def _sweep(session: Session, stores: Sequence[Prepared], top: int) -> None:
    """Rank by self-influence at other λ. Signals without gradients do not depend on λ."""
    from influence_cli.influence.ensemble import make_divisions
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.pages.damping_sweep import note_sweep
    from influence_cli.ranking.damping_sweep import sweep_self_influence
    from influence_cli.runtime.terminal import Terminal

    inverses = make_divisions(stores, Terminal(quiet=True))
    rows = sweep_self_influence(stores, inverses, training_facts(stores).read, top, session.terminal)
    note_sweep(session, rows, top, "self-influence")


def _plot(session: Session, result: Mislabels, classes: Sequence[str], path: Path, signal: str) -> None:
    """Draw the scores by label, next to the share of wrong labels that the ranking, the loss and random order find."""
    import numpy as np

    from influence_cli.report.plot import plot_scores

    curves, known = None, session.run.recovery
    if known is not None:
        curves = {"checked": known.checked, **{name: known.recovered[name] for name in dict.fromkeys((signal, "loss"))}}
    scored = ~np.isnan(result.score)  # flagged labels are numbered among these
    flagged = (np.cumsum(scored) - 1)[result.flagged[scored[result.flagged]]]
    plot_scores(path, result.score[scored], result.facts.labels[scored], classes, flagged, signal, curves)
    session.terminal.say(f"wrote {path}")


def _check_method(session: Session, signal: str, *, damping_sweep: bool) -> None:
    """Refuse a curvature from which what is asked for cannot be computed."""
    from influence_cli.influence.ensemble import refuse_source

    if signal == "self-influence" or damping_sweep:
        option = "--damping-sweep" if damping_sweep else "--signal self-influence"
        refuse_source(session.config.model.ensemble, option, "there is no self-influence")
    if damping_sweep:
        from influence_cli.ranking.damping_sweep import check_method

        check_method(session.config.curvature.method)


def _require_count(result: Mislabels, counting: dict[str, bool]) -> None:
    """Refuse options that need the number of wrong labels, where it cannot be estimated."""
    if result.count is None and any(counting.values()):
        obstacle = result.evidence.obstacle
        raise InfluenceError(
            f"{next(option for option, given in counting.items() if given)}: the number of wrong labels cannot be "
            f"estimated here: {result.doubt or (obstacle.message if obstacle else 'there is no readout')}"
        )


def _check_images(session: Session, split: Split, on: str) -> None:
    """Refuse --format fiftyone for examples that are not image files."""
    if session.format == "fiftyone" and (split.paths is None or split.files is not None):
        raise InfluenceError(
            f"--format fiftyone: the {on} examples are not image files, and FiftyOne needs image files",
            "--format cleanlab names examples by position",
        )
