"""influence check."""

from __future__ import annotations

from typing import Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    ConfigFile,
    Format,
    Output,
    Precision,
    Quiet,
    Set,
    SkipUnreadable,
    Verbose,
    with_precision,
)


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    full: Annotated[bool, typer.Option("--full", help="Read all examples instead of a sample of 512.")] = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Load everything, measure a sample, and say what looks wrong.

    Rows list what was measured. Warnings go to stderr, each with its remedy.

    Examples:

      influence check

      influence check -s curvature.method=identity --format json
    """
    from influence_cli.results.session import begin, emit

    session = begin(config, with_precision(set_, precision), quiet=quiet, verbose=verbose, format=format, output=output)
    from influence_cli.precompute.check import check_run

    findings = check_run(session.config, full=full, terminal=session.terminal, skip_unreadable=skip_unreadable)
    emit(session, (vars(finding) for finding in findings), ("item", "value", "unit"))
    warnings = len(session.terminal.warnings)
    session.terminal.say(
        f"{warnings} warning{'s' if warnings > 1 else ''} (see above); next: influence gradients"
        if warnings
        else "nothing looks wrong; next: influence gradients, or directly influence rank or mislabels"
    )
