"""influence compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import DEFAULT_CONFIG, ConfigFile, Format, Output, Quiet, Report

if TYPE_CHECKING:
    from influence_cli.results.compare import Comparison
    from influence_cli.results.distances import Distances
    from influence_cli.results.reader import Result
    from influence_cli.results.run import Session

COLUMNS = (
    "test",
    "test_path",
    "effect",
    "change",
    "index",
    "path",
    "label_a",
    "label_b",
    "rank_a",
    "rank_b",
    "value_a",
    "value_b",
)
DISTANCE_COLUMNS = ("distance", "same_class")
# Comparisons that get their own line on stderr.
SAID = 6


def command(
    a: Annotated[Path, typer.Argument(metavar="A", help="A result file of rank or mislabels (-o FILE).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another result file of the same command.")],
    config: ConfigFile = DEFAULT_CONFIG,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            min=1,
            metavar="K",
            help="Compare the first K of each list. Default: as many as the shorter list has.",
        ),
    ] = None,
    distance: Annotated[
        bool,
        typer.Option(
            "--distance",
            help="Also measure how far each training image is from the test image in pixels, and how influence changes "
            "with the distance. Needs two results of rank, best with --all.",
        ),
    ] = False,
    format: Format = None,
    output: Output = None,
    report: Report = None,
    quiet: Quiet = False,
) -> None:
    """Compare two results: what stayed at the top, entered and left.

    The results can come from two models, from two checkpoints, or from before and after cleaning. value is the
    influence of rank or the score of mislabels. Neither the model nor the data set is loaded. With --report or
    --distance the images are read from the files that the results name. If the results name no files, the images come
    from the data set of the config.

    --distance shows whether a model merely compares pixels: does influence fall with the distance, and are images of
    other classes helpful too? With --report it draws influence against distance.

    Examples:

      influence compare before.csv after.csv

      influence compare before.csv after.csv --top 50 --report changes.html

      influence compare a.jsonl b.jsonl --format csv | grep entered

      influence compare svm.csv deep.csv --distance --report pair.html
    """
    from influence_cli.results.compare import compare_results, comparison_rows, quality_change
    from influence_cli.results.reader import read_result
    from influence_cli.results.session import begin_without_config, emit
    from influence_cli.runtime.outputs import refuse_clashes, run_file

    used = [
        (named, word)
        for path in (a, b)
        for named, word in ((path, "an input"), (run_file(path), "the run file of an input"))
    ]
    refuse_clashes(used, output, [] if report is None else [(report, "the page of --report")])
    if report is not None:
        from influence_cli.report.html import check_page

        check_page(report)
    session = begin_without_config(quiet=quiet, format=format, output=output, files=(report,))
    first, second = read_result(a), read_result(b)
    comparisons, notes = compare_results(first, second, top)
    for note in notes:
        session.terminal.warn(note)
    session.run.comparisons = tuple(comparisons)
    distances = None
    if distance:
        from influence_cli.results.distances import measure_distances

        distances = measure_distances((first, second), comparisons, config, session.terminal)
    _describe(session, comparisons)
    change = quality_change(first, second)
    if change is not None:
        session.terminal.say(f"from A to B, {change}")
    if distances is not None:
        _describe_distances(session, (first, second), distances)
    page = None
    if report is not None:
        # Before the rows: an image that has moved is an error, and then nothing is written.
        from influence_cli.pages.compare import compare_page

        page = compare_page(session, (first, second), comparisons, config, distances)
    rows = comparison_rows(comparisons, first.kind, None if distances is None else distances.columns)
    columns = COLUMNS if distances is None else (*COLUMNS, *DISTANCE_COLUMNS)
    emit(session, rows, columns, brief=report is not None)
    if report is not None and page is not None:
        from influence_cli.results.session import write_report

        write_report(session, page, report)


def _describe(session: Session, comparisons: list[Comparison]) -> None:
    """Say on stderr how much of the lists is the same: one line per list for the first few, then the mean."""
    say = session.terminal.say
    for comparison in comparisons[:SAID]:
        test = comparison.test_path if comparison.test is None else comparison.test
        name = "" if test is None else f"test {test}, "
        kind = "suspicious" if comparison.effect is None else comparison.effect
        changes = "".join(
            f", {comparison.count(change):,} {words} {kind}"
            for change, words in (("entered", "newly"), ("left", "no longer"))
            if comparison.count(change)
        )
        correlation = (
            ""
            if comparison.correlation is None
            else f"; rank correlation {comparison.correlation:.3f} over the {comparison.common:,} examples that "
            "both list"
        )
        say(
            f"{name}{comparison.effect + ', ' if comparison.effect else ''}first {comparison.top:,}: "
            f"{comparison.overlap:.0%} in both{changes}{correlation}"
        )
    if len(comparisons) > SAID:
        mean = sum(comparison.overlap for comparison in comparisons) / len(comparisons)
        say(f"… mean over all {len(comparisons):,} lists: {mean:.0%} in both")


def _describe_distances(session: Session, results: tuple[Result, Result], distances: Distances) -> None:
    """Say on stderr how influence depends on the distance: one line per test example and result, then the mean."""
    from influence_cli.errors import near_path
    from influence_cli.results.distances import in_words, mean_numbers
    from influence_cli.results.record import DistanceRecord

    names = [f"{letter} ({near_path(result.path)})" for letter, result in zip("AB", results, strict=True)]
    session.run.distances = tuple(
        DistanceRecord(str(result.path), spread.row["test"], spread.row["test_path"], spread.numbers())
        for pair in distances.spreads.values()
        for result, spread in zip(results, pair, strict=True)
    )
    for test, pair in list(distances.spreads.items())[: SAID // 2]:
        for name, spread in zip(names, pair, strict=True):
            session.terminal.say(f"test {test}, {name}: {in_words(spread.numbers())}")
    if len(distances.spreads) > 1:
        for side, name in enumerate(names):
            mean = mean_numbers(pair[side] for pair in distances.spreads.values())
            session.terminal.say(f"mean over {len(distances.spreads):,} test examples, {name}: {in_words(mean)}")
