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

    Rows list what was measured. Warnings go to stderr, each with its remedy. With training.recipe the record of the run
    is looked at too, and under curvature.method replay its verdict is measured.

    Examples:

      influence check

      influence check -s curvature.method=identity --format json
    """
    from influence_cli.results.session import begin, emit

    session = begin(config, with_precision(set_, precision), quiet=quiet, verbose=verbose, format=format, output=output)
    from influence_cli.model.task import load_tasks
    from influence_cli.precompute.check import check_run
    from influence_cli.replay.prepare import REPLAY, run_findings

    terminal, loaded = session.terminal, session.config
    with terminal.status("loading model and data"):
        tasks = load_tasks(loaded, terminal)
    findings = check_run(loaded, full=full, terminal=terminal, skip_unreadable=skip_unreadable, tasks=tasks)
    findings += run_findings(loaded, tasks, terminal)
    emit(session, (vars(finding) for finding in findings), ("item", "value", "unit"))
    warnings = len(terminal.warnings)
    if loaded.curvature.method == REPLAY:
        one, more = "influence rank misclassified", ""
    else:
        one, more = "influence gradients", ", or directly influence rank or mislabels"
    terminal.say(
        f"{warnings} warning{'s' if warnings > 1 else ''} (see above); next: {one}"
        if warnings
        else f"nothing looks wrong; next: {one}{more}"
    )
