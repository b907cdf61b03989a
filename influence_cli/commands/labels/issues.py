"""influence issues."""

from __future__ import annotations

from typing import Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    All,
    ConfigFile,
    Format,
    Output,
    Quiet,
    Report,
    Set,
    Top,
    Verbose,
)
from influence_cli.errors import InfluenceError, counted, did_you_mean
from influence_cli.results.issue_rows import COLUMNS, KIND_COLUMNS, counted_in, issue_rows, kind_rows


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help="List the issues of one kind, the worst first.")
    ] = None,
    top: Top = 10,
    all_: All = False,
    format: Format = None,
    output: Output = None,
    report: Report = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Count what is wrong with the data set, kind by kind.

    Kinds: mislabel; leak and duplicate; off topic (far from every class in the network's features); broken, blank,
    dark, bright, blurred, odd size, odd shape, odd mode; shortcut (a property of the files that tells the label, such
    as brightness, size, folder or date); weak slice (images of a class that the model gets wrong more often).

    An image that cannot be read is an issue and no error.

    Examples:

      influence issues

      influence issues --report issues.html

      influence issues --kind blurred --format jsonl | jq -r .path
    """
    from influence_cli.report.html import check_page
    from influence_cli.results.session import begin, emit, load, write_report

    check_page(report)
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output, files=(report,))
    from influence_cli.inspection.issues import KINDS, find_issues

    if kind is not None and kind not in KINDS:
        raise InfluenceError(f"--kind {kind}: there is no such kind", did_you_mean(kind, KINDS))
    tasks = load(session)
    result = find_issues(tasks[-1], session.terminal)
    session.run.kinds = {
        name: {split: number for split in ("train", "test") if (number := counted_in(result, name, split)) is not None}
        for name in KINDS
    }
    if kind is None:
        emit(session, kind_rows(result), KIND_COLUMNS)
        kinds = sum(map(bool, result.by_kind.values()))
        session.terminal.say(f"{counted(kinds, 'kind')} of issues; influence issues --kind KIND lists the images")
    else:
        emit(session, issue_rows(result, kind, tasks[0].classes, None if all_ else top), COLUMNS)
        if kind in result.missing:
            session.terminal.say(f"{kind} was not looked for: {result.missing[kind]}")
    if report is not None:
        from influence_cli.pages.issues import issues_page

        write_report(session, issues_page(session, tasks, result), report)
    else:
        session.terminal.say("next: influence issues --report issues.html shows the images")
