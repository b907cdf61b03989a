"""influence mislabels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    All,
    ConfigFile,
    DampingSweep,
    LabelFormat,
    OnTheFly,
    Output,
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
from influence_cli.errors import InfluenceError, counted
from influence_cli.report.dialects import COLUMNS as DIALECT_COLUMNS
from influence_cli.report.dialects import DIALECTS, in_dialect
from influence_cli.results.mislabel_rows import COLUMNS, mislabel_rows, signal_column
from influence_cli.results.record import EvidenceRecord

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from influence_cli.data.label_files import Truth
    from influence_cli.data.split import Split
    from influence_cli.mislabels.data_issues import DataIssues
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
            help="What to rank by: combined, readout, neighbours, logistic, pred-probs, loss, margin, self-influence, "
            "gradient-norm, tracin or test-influence.",
        ),
    ] = "combined",
    signals: Annotated[bool, typer.Option("--signals", help="Add one column per signal.")] = False,
    explain: Annotated[
        int | None,
        typer.Option("--explain", min=0, metavar="INDEX", help="Show all signals and the neighbours of one example."),
    ] = None,
    pred_probs: Annotated[
        Path | None,
        typer.Option(
            "--pred-probs",
            metavar="FILE",
            help="Use the probabilities of another model as a signal: one row per example (.npy, .csv).",
        ),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(
            "--truth", metavar="FILE", help="Known wrong labels (.csv, .npy): measure how well every signal finds them."
        ),
    ] = None,
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
    from influence_cli.curvature.choice import SOLVERS
    from influence_cli.data.label_files import read_truth
    from influence_cli.mislabels.explain import COLUMNS as EXPLAINED
    from influence_cli.mislabels.explain import explain_rows, row_among
    from influence_cli.mislabels.find import SignalChoice, find_mislabels, wanted_signals
    from influence_cli.mislabels.pred_probs import read_probabilities

    _check_method(session, signal, damping_sweep=damping_sweep)
    tasks = load(session)
    split = tasks[0].train if on == "train" else tasks[0].labelled_tests()
    classes = tasks[0].classes
    _check_images(session, split, on)
    if explain is not None:
        row_among(split.indices, explain, split)
    known = read_truth(truth, split.labels, classes) if truth is not None else None
    probabilities = read_probabilities(pred_probs, len(split.labels), classes) if pred_probs is not None else None
    wanted = wanted_signals(
        signal,
        every=signals or known is not None or explain is not None,
        on=on,
        checkpoints=len(tasks),
        tests=tasks[0].test is not None and not tasks[0].test.is_unlabelled,
        solves=session.config.curvature.method in (*SOLVERS, "replay") or session.config.model.ensemble == "source",
        probabilities=probabilities is not None,
    )
    if damping_sweep:
        wanted = tuple(dict.fromkeys((*wanted, "self-influence")))
    stores = _stores(session, tasks, wanted, skip=skip_unreadable, on_the_fly=on_the_fly)
    result = find_mislabels(
        tasks,
        stores,
        on=on,
        choice=SignalChoice(signal, wanted, probabilities),
        terminal=session.terminal,
        skip_unreadable=skip_unreadable,
        strict=strict,
        store=session.config.gradients.store,
    )
    session.run.scores = result.scores
    session.run.evidence = EvidenceRecord(result.evidence.summary, result.evidence.memorised)
    if explain is not None:
        emit(session, explain_rows(result, split, classes, explain), EXPLAINED)
        return
    counting = {"--top auto": shown is None, "--fail-above": fail_above is not None, "--format": format in DIALECTS}
    _require_count(result, counting)
    _describe(session, result, split, classes)
    if known is not None:
        _score(session, result, known)
    if damping_sweep:
        _sweep(session, stores, shown or len(result.flagged) or 10)
    count = len(result.order) if all_ else len(result.flagged) if shown is None else shown
    _emit(
        session,
        mislabel_rows(result, split, classes, count),
        [signal_column(name) for name in result.signals if signals],
    )
    if plot is not None:
        _plot(session, result, classes, plot, signal)
    if report is not None:
        _write_report(session, tasks, stores, result, split, count, signal, report)
    else:
        top = "" if result.noise is None else "--top auto "  # which an estimate is needed for
        session.terminal.say(f"next: influence mislabels {top}--report mislabels.html shows the images")
    if fail_above is not None:
        _fail_above(session, len(result.flagged), fail_above)


def _emit(session: Session, rows: Iterator[dict[str, object]], extra: Sequence[str]) -> None:
    """Write the rows, in the dialect that was asked for or with extra columns."""
    from influence_cli.results.session import emit

    if session.format in DIALECTS:
        emit(session, in_dialect(rows, session.format), DIALECT_COLUMNS[session.format])
    else:
        emit(session, rows, (*COLUMNS, *extra))


def _write_report(
    session: Session,
    tasks: list[Task],
    stores: Sequence[Prepared],
    result: Mislabels,
    split: Split,
    count: int,
    signal: str,
    report: Path,
) -> None:
    from influence_cli.pages.mislabels import PAGE, mislabels_page
    from influence_cli.results.session import write_report

    page = mislabels_page(session, tasks, stores, result, split, min(count, PAGE), signal)
    write_report(session, page, report)


def _fail_above(session: Session, findings: int, most: int) -> None:
    """Exit 1 if more labels are probably wrong than are allowed."""
    if findings > most:
        session.terminal.say(f"{findings:,} labels are probably wrong, more than --fail-above {most} allows")
        raise typer.Exit(1)


def _stores(
    session: Session, tasks: Sequence[Task], wanted: Collection[str], *, skip: bool, on_the_fly: bool
) -> Sequence[Prepared]:
    """Prepare the stores that a signal needs. If no signal needs one, take those that are already complete."""
    from influence_cli.mislabels.find import GRADIENTS
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


def _describe(session: Session, result: Mislabels, split: Split, classes: Sequence[str]) -> None:
    """Say on stderr how many labels are wrong, and which data issues there are beyond single labels."""
    from influence_cli.pages.mislabels import issues_record, noise_record

    session.run.issues = issues_record(result, split, classes)
    if result.doubt:
        session.terminal.say(f"no estimate of wrong labels: {result.doubt}")
    if result.noise is None:
        return
    session.run.noise = noise_record(result, result.noise, classes)
    say, n, noise = session.terminal.say, len(result.order), result.noise
    if noise.count:
        expected = noise.expected_precision(result.order)
        steps = sorted({step for step in (noise.count // 10, noise.count // 3, noise.count) if step})
        shares = ", ".join(f"{expected[step - 1] * step:,.0f} of the first {step:,}" for step in steps)
        verb = "is" if noise.count == 1 else "are"
        say(f"about {noise.count:,} of {n:,} labels {verb} wrong ({noise.rate:.1%})")
        say(f"if the estimate holds, about {shares} are wrong")
        pairs = session.run.noise.pairs
        total = sum(p.count for p in pairs)
        if total:
            most = ", ".join(f"{p.label} but really {p.true} ({p.count / total:.0%})" for p in pairs[:3])
            say(f"most often labelled {most}")
    else:
        say(f"almost none of the {n:,} labels is wrong by the estimate; the most suspicious come first")
    issues = _data_issues(result.issues, classes)
    if issues:
        say(f"also: {'; '.join(issues)}")


def _data_issues(issues: DataIssues, classes: Sequence[str]) -> list[str]:
    """Name the data issues beyond single labels; kinds of which there are none are left out."""
    texts = [
        counted(len(rows), word) + more
        for rows, word, more in (
            (issues.duplicates, "duplicate pair", " with different labels"),
            (issues.alike, "near-duplicate pair", " with different labels"),
            (issues.outliers, "unusual image", ""),
        )
        if len(rows)
    ]
    if issues.confused:
        named = ", ".join(f"{classes[a]} and {classes[b]}" for a, b, _, _ in issues.confused[:3])
        others = f" (and {counted(len(issues.confused) - 3, 'other pair')})" if len(issues.confused) > 3 else ""
        texts.append(f"{named} are mixed up in both directions{others}")
    return texts


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


def _score(session: Session, result: Mislabels, known: Truth) -> None:
    """Say on stderr, and note in the run file, how well each signal finds the wrong labels."""
    import numpy as np

    from influence_cli.mislabels.evaluation import CHECKED, qualities, recovery
    from influence_cli.mislabels.find import likeliest

    facts = result.facts
    wrong = known.wrong[facts.indices]
    right: dict[str, float] = {}
    if known.true is not None and wrong.any():
        true = known.true[facts.indices][wrong]
        shares = {**result.log_probabilities, "loss": facts.probabilities}
        right = {name: float((likeliest(values)[wrong] == true).mean()) for name, values in shares.items()}
        session.run.memorised_share = float((facts.predicted[wrong] == facts.labels[wrong]).mean())
    # A label that is not judged comes last.
    signals = {name: np.where(np.isnan(values), -np.inf, values) for name, values in result.signals.items()}
    table, say = qualities(signals, wrong, right), session.terminal.say
    session.run.truth = tuple(table)
    session.run.recovery = recovery(signals, wrong)
    say(f"{int(wrong.sum()):,} of {len(wrong):,} labels are wrong according to --truth")
    shares_checked = "".join(f"{f'{share:.0%}':>7}" for share in CHECKED)
    say(f"{'':15}{'AP':>6}{'95%':>13}{'AUROC':>7}   found at … checked{'':16}suggested")
    say(f"{'signal':15}{'':26}{shares_checked}{'right':>10}")
    for q in table:
        interval = f"{q.interval[0]:.3f}–{q.interval[1]:.3f}"
        shares_found = "".join(f"{share:7.3f}" for share in q.found)
        suggested = "" if q.suggested is None else f"{q.suggested:10.3f}"
        say(f"{q.signal:15}{q.average_precision:6.3f}{interval:>13}{q.auroc:7.3f}{shares_found}{suggested}")


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
    if result.noise is None and any(counting.values()):
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
