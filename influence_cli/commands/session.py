"""What every command does around its one call: config, terminal, rows out, run file."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.config.load import load_config
from influence_cli.errors import InfluenceError
from influence_cli.report.writer import choose_format, write_rows
from influence_cli.results.run import Session, run_facts
from influence_cli.runtime import distributed
from influence_cli.runtime.outputs import check_output, open_output, run_file
from influence_cli.runtime.terminal import Terminal

if TYPE_CHECKING:
    from influence_cli.model.task import Task


def begin(
    config: Path,
    overrides: Sequence[str] | None,
    *,
    quiet: bool,
    verbose: bool,
    format: str | None = None,
    output: Path | None = None,
    files: Sequence[Path | None] = (),
    dialects: Sequence[str] = (),
    rows: bool = True,
) -> Session:
    """Read the config, check where results are to go before any work, then load torch behind a line that says so.

    Args:
        config: the YAML file.
        overrides: ``--set``.
        quiet: ``-q``.
        verbose: ``-v``.
        format: ``--format``.
        output: ``-o``.
        files: other files that the command will write.
        dialects: formats of other tools that its rows can be put into.
        rows: whether it has rows to write at all.

    Raises:
        InfluenceError: in the config, the format, or a file or stdout that cannot be written.
    """
    distributed.join()
    loaded = load_config(config, overrides or ())
    session = begin_without_config(
        quiet=quiet, verbose=verbose, format=format, output=output, files=files, dialects=dialects, rows=rows
    )
    with session.terminal.status("loading torch"):
        import torch  # noqa: F401
    return replace(session, loaded=loaded)


def begin_without_config(
    *,
    quiet: bool,
    verbose: bool = False,
    format: str | None = None,
    output: Path | None = None,
    files: Sequence[Path | None] = (),
    dialects: Sequence[str] = (),
    rows: bool = True,
) -> Session:
    """Check where results are to go, for a command that works on files alone.

    Raises:
        InfluenceError: in the format, or a file or stdout that cannot be written.
    """
    chosen = choose_format(format, output, sys.stdout.isatty(), dialects)
    if rows and output is None and not sys.stdout.writable():
        raise InfluenceError("stdout is closed, and the rows would go there", "name a file for them: -o rows.csv")
    for path in (output, *files):
        if path is not None and distributed.is_first():
            check_output(path)
    return Session(None, Terminal(quiet=quiet, verbose=verbose), chosen, output)


def load(session: Session) -> list[Task]:
    """Load model and data, a task a checkpoint."""
    from influence_cli.model.task import load_tasks

    with session.terminal.status("loading model and data"):
        tasks = load_tasks(session.config, session.terminal)
        if distributed.size() > 1:
            from influence_cli.model.fingerprint import agree_on

            agree_on(tasks, {"command": " ".join(sys.argv[1:]), "config": json.dumps(session.config.resolved())})
            session.run.processes = distributed.size()
    return tasks


def emit(session: Session, rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write rows to stdout or to a file, and the run's facts beside the file."""
    output = session.output
    if not distributed.is_first():
        for _ in rows:  # its part of the work is done as they are asked for
            pass
        distributed.dissolve()
    # Rows on stdout are to be seen themselves.
    with open_output(output) as stream, nullcontext() if output is None else session.terminal.status("writing rows"):
        count = write_rows(rows, columns, session.format, stream)
    distributed.dissolve()
    session.terminal.detail(f"done in {session.seconds:.1f} s")
    if output is not None:
        facts = run_facts(session) | {"rows": count}
        path = run_file(output)
        with open_output(path) as stream:
            json.dump(facts, stream, indent=2, ensure_ascii=False, default=str, allow_nan=False)
            stream.write("\n")
        session.terminal.say(f"wrote {output} ({count:,} rows) and {path.name}")
