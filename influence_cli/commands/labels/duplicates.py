"""influence duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    ConfigFile,
    Format,
    Output,
    Quiet,
    Report,
    Set,
    SkipUnreadable,
    Verbose,
)
from influence_cli.errors import InfluenceError, counted, near_path, typed_path
from influence_cli.results.duplicate_rows import COLUMNS, duplicate_rows, kind_of
from influence_cli.results.label_records import DuplicatesRecord, LeakRecord

if TYPE_CHECKING:
    from influence_cli.inspection.duplicates import Duplicates
    from influence_cli.results.run import Session


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            "--exclude", metavar="FILE.csv", help="Write an exclusion file that keeps one image of each group."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing exclusion file.")] = False,
    fail_above: Annotated[
        int | None,
        typer.Option("--fail-above", min=0, metavar="N", help="Exit 1 if there are more than N groups of copies."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="Groups to show.")] = 10,
    all_: Annotated[bool, typer.Option("--all", help="Show all groups.")] = False,
    format: Format = None,
    output: Output = None,
    report: Report = None,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find copies of images inside the training set, inside the test set, and between the two.

    Copies have the same pixels, or are one picture after a crop, a flip, another light or compression, whatever their
    labels. They are listed as groups: first those across splits (a leak), then those with different labels. If there
    is a leak, the test accuracy with and without the leaked images is printed.

    --exclude writes a file for train.exclude. Of a group in the training set one image stays. Of a group with test
    images no training image stays. The test set is not touched.

    Examples:

      influence duplicates

      influence duplicates --report duplicates.html

      influence duplicates --exclude copies.csv

      influence duplicates --fail-above 0 -q > /dev/null || echo "there are copies"
    """
    from influence_cli.report.html import check_page
    from influence_cli.results.session import begin, emit, load, write_report

    if exclude is not None and exclude.suffix != ".csv":
        raise InfluenceError(f"--exclude {exclude}: the file must be .csv", "for example --exclude copies.csv")
    if exclude is not None and exclude.exists() and not force:
        raise InfluenceError(f"{near_path(exclude)} exists already", "--force replaces it, or name another file")
    check_page(report)
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output, files=(report, exclude))
    from influence_cli.inspection.duplicates import find_duplicates

    tasks = load(session)
    result = find_duplicates(tasks[-1], session.terminal, skip_unreadable=skip_unreadable)
    session.run.duplicates = _record(result)
    emit(session, duplicate_rows(result, tasks[0].classes, None if all_ else top), COLUMNS)
    _describe(session, result)
    if exclude is not None:
        _write(session, result, exclude)
    if report is not None:
        from influence_cli.pages.duplicates import duplicates_page

        write_report(session, duplicates_page(session, tasks, result), report)
    elif result.groups:
        session.terminal.say("next: influence duplicates --report duplicates.html shows the images")
    if fail_above is not None and len(result.groups) > fail_above:
        session.terminal.say(
            f"{counted(len(result.groups), 'group')} of copies, more than --fail-above {fail_above} allows"
        )
        raise typer.Exit(1)


def _describe(session: Session, result: Duplicates) -> None:
    """Say on stderr how many groups there are of each kind, and what the leak is worth."""
    from influence_cli.pages.duplicates import leak_text

    say = session.terminal.say
    if not result.pictured:
        session.terminal.warn("some examples are no pictures: of them only exact copies are known")
    total = sum(result.compared)
    kinds = [kind_of(group) for group in result.groups]
    if not kinds:
        say(f"no copies among {total:,} images")
        return
    parts = ", ".join(f"{kinds.count(kind):,} {kind}" for kind in dict.fromkeys(kinds))
    say(f"{counted(len(kinds), 'group')} of copies among {total:,} images: {parts}")
    if leak := leak_text(result):
        say(leak)


def _write(session: Session, result: Duplicates, path: Path) -> None:
    """Write the exclusion file; examples that the config already excludes stay out."""
    import numpy as np

    from influence_cli.relabel.labels import exclusion_file
    from influence_cli.runtime.transaction import write_together

    split = result.splits[0]
    before = np.setdiff1d(np.arange(len(split.labels)), split.indices)
    write_together([exclusion_file(path, split, np.union1d(before, result.superfluous))])
    also = f", and {len(before):,} that were already excluded" if len(before) else ""
    session.terminal.say(f"wrote {near_path(path)} ({counted(len(result.superfluous), 'training image')}{also})")
    session.terminal.say(f"next: influence check -s train.exclude={typed_path(path)}")


def _record(result: Duplicates) -> DuplicatesRecord:
    kinds = [kind_of(group) for group in result.groups]
    leak = result.leak
    return DuplicatesRecord(
        compared=result.compared,
        groups=len(kinds),
        across_splits=kinds.count("across splits"),
        different_labels=kinds.count("different labels"),
        same_label=kinds.count("same label"),
        superfluous=len(result.superfluous),
        leak=None
        if leak is None or not len(leak.indices)
        else LeakRecord(tuple(leak.indices.tolist()), *leak.accuracies),
    )
