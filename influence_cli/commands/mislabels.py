"""influence mislabels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    All,
    ConfigFile,
    Format,
    OnTheFly,
    Output,
    Precision,
    Quiet,
    Report,
    Set,
    SkipUnreadable,
    Top,
    Verbose,
    with_precision,
)
from influence_cli.errors import InfluenceError

if TYPE_CHECKING:
    from influence_cli.data import Split
    from influence_cli.mislabels import Mislabels

COLUMNS = ("rank", "index", "path", "label", "suggested", "confidence", "score", "loss", "self_influence")


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    on: Annotated[str, typer.Option("--on", metavar="train|test", help="Whose labels.")] = "train",
    signal: Annotated[
        str, typer.Option("--signal", metavar="NAME", help="self-influence, loss or margin.")
    ] = "self-influence",
    signals: Annotated[bool, typer.Option("--signals", help="Append a column for each signal.")] = False,
    truth: Annotated[
        Path | None,
        typer.Option("--truth", metavar="FILE", help="Which labels are wrong (.csv, .npy): scores the ranking."),
    ] = None,
    fail_above: Annotated[
        int | None,
        typer.Option(
            "--fail-above", min=0, metavar="N", help="Exit 1 if more than N labels differ from the suggested one."
        ),
    ] = None,
    top: Top = 10,
    all_: All = False,
    format: Format = None,
    output: Output = None,
    report: Report = None,
    on_the_fly: OnTheFly = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the examples that are probably mislabeled.

    suggested is the label that the model would give. score is in [0, 1], higher is more suspicious: the percentile of
    the signal (for loss: 1 − the probability of the given label). self_influence is the rise of an example's own loss
    if it were removed from training.

    Examples:

      influence mislabels

      influence mislabels --format jsonl --top 50 | jq -r .path

      influence mislabels --truth truth.csv --report mislabels.html

      influence mislabels --fail-above 100 -q > /dev/null || echo "too many suspicious labels"
    """
    from influence_cli.commands.session import begin, emit, load

    if on not in ("train", "test"):
        raise InfluenceError(f"--on {on}: there is no such set", "known: train, test")
    session = begin(
        config,
        with_precision(set_, precision),
        quiet=quiet,
        verbose=verbose,
        format=format,
        output=output,
        files=(report,),
    )
    from influence_cli.label_files import read_truth
    from influence_cli.mislabels import check_method, find_mislabels
    from influence_cli.precompute import prepare_all

    check_method(session.config.curvature.method, signal)
    tasks = load(session)
    split = tasks[0].train if on == "train" else tasks[0].test_split()
    classes = tasks[0].classes
    wrong = read_truth(truth, split.labels, classes) if truth is not None else None
    stores = prepare_all(
        session.config, tasks, session.terminal, skip_unreadable=skip_unreadable, on_the_fly=on_the_fly
    )
    result = find_mislabels(
        stores,
        config=session.config,
        on=on,
        signal=signal,
        terminal=session.terminal,
        skip_unreadable=skip_unreadable,
        run=session.run,
    )
    count = len(result.order) if all_ else top
    if wrong is not None:
        _print_truth(session, result, wrong)
    extra = [signal_column(name) for name in result.signals] if signals else []
    emit(session, mislabel_rows(result, split, classes, count), (*COLUMNS, *extra))
    if report is not None:
        from influence_cli.report.html import write_page
        from influence_cli.report_pages import mislabels_page

        page = mislabels_page(session, stores, result, split, min(count, 200), signal)
        session.terminal.say(f"wrote {report} ({write_page(page, report):,} bytes)")
    findings = int((result.suggested[result.order] != result.facts.labels[result.order]).sum())
    session.terminal.say(
        f"{findings:,} of {len(result.order):,} labels differ from the suggested one"
        + ("" if report else "; next: influence mislabels --report mislabels.html shows the images")
    )
    if fail_above is not None and findings > fail_above:
        session.terminal.say(f"that is above --fail-above {fail_above}")
        raise typer.Exit(1)


def mislabel_rows(result: Mislabels, split: Split, classes: tuple[str, ...], count: int) -> Iterator[dict[str, object]]:
    """Give the rows of the ranking, most suspicious first, every signal included."""
    facts = result.facts
    for number, row in enumerate(result.order[:count], start=1):
        index, suggested = int(facts.indices[row]), int(result.suggested[row])
        yield {
            "rank": number,
            "index": index,
            "path": split.path(index),
            "label": classes[int(facts.labels[row])],
            "suggested": classes[suggested],
            "confidence": float(facts.probabilities[row, suggested]),
            "score": float(result.score[row]),
            "loss": float(facts.losses[row]),
            "self_influence": None if result.self_influence is None else float(result.self_influence[row]),
            **{signal_column(name): float(values[row]) for name, values in result.signals.items()},
        }


def signal_column(name: str) -> str:
    """Name the column of a signal: ``signal_self_influence``."""
    return "signal_" + name.replace("-", "_")


def _print_truth(session: Any, result: Mislabels, wrong: Any) -> None:
    """Say on stderr how well each signal finds the wrong labels; the same goes to the run file."""
    from influence_cli.mislabels import CHECKED, qualities

    table = qualities(result, wrong)
    session.run["truth"] = [vars(quality) for quality in table]
    shares = "".join(f"{f'{share:.0%}':>8}" for share in CHECKED)
    session.terminal.say(f"{'':16}{'AP':>8}{'AUROC':>8}   share of the wrong labels found at … checked")
    session.terminal.say(f"{'signal':16}{'':16}{shares}")
    for quality in table:
        found = "".join(f"{share:8.3f}" for share in quality.found)
        session.terminal.say(f"{quality.signal:16}{quality.average_precision:8.3f}{quality.auroc:8.3f}{found}")
