"""What every command does around its one call: config, terminal, rows, run file."""

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
from influence_cli.runtime import distributed, locks, stdout
from influence_cli.runtime.outputs import check_output, open_output, run_file
from influence_cli.runtime.stdio import stdin_lines
from influence_cli.runtime.terminal import Terminal

# Lines of a table that a run with a page shows on a terminal.
BRIEF = 10

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.influence.test_selection import Selected
    from influence_cli.model.task import Task
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.report.html import Page


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
    """Read the config, check that the results can be written, then load torch with a status line.

    Args:
        config: the YAML file.
        overrides: ``--set``.
        quiet: ``-q``.
        verbose: ``-v``.
        format: ``--format``.
        output: ``-o``.
        files: other files that the command will write.
        dialects: formats of other tools that its rows can be written in.
        rows: whether it has rows to write at all.

    Raises:
        InfluenceError: the config or the format is wrong, or a file or stdout cannot be written.
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
    """Check that the results can be written, for a command that works on files alone.

    Raises:
        InfluenceError: the format is wrong, or a file or stdout cannot be written.
    """
    chosen = choose_format(format, output, terminal=stdout.rows().isatty(), dialects=dialects)
    if rows and output is None and not stdout.rows().writable():
        raise InfluenceError("stdout is closed, so the rows cannot be written", "name a file for them: -o rows.csv")
    for path in (output, *files):
        if path is not None and distributed.is_first():
            check_output(path)
    terminal = Terminal(quiet=quiet, verbose=verbose)
    locks.tell = terminal.detail
    return Session(None, terminal, chosen, output)


def load(session: Session) -> list[Task]:
    """Load model and data: one task per checkpoint."""
    from influence_cli.model.task import load_tasks

    with session.terminal.status("loading model and data"):
        tasks = load_tasks(session.config, session.terminal)
        if distributed.size() > 1:
            from influence_cli.model.fingerprint import agree_on

            agree_on(tasks, {"command": " ".join(sys.argv[1:]), "config": json.dumps(session.config.resolved())})
            session.run.processes = distributed.size()
    return tasks


def selected_tests(
    session: Session, tasks: Sequence[Task], words: Sequence[str], *, target: str = "label", skip: bool = False
) -> list[Selected]:
    """Resolve the TEST arguments of a command, a list on stdin included.

    Args:
        session: the command's.
        tasks: from ``load``.
        words: the arguments.
        target: whose loss is explained.
        skip: go on without test examples that cannot be read.

    Raises:
        InfluenceError: a word of another form, an index out of range, a label that does not exist, nothing selected,
            or a test example without the label that is to be explained.
    """
    from influence_cli.influence.test_selection import refuse_without_label, select_tests
    from influence_cli.model.predictions import predict_tests

    test, classes = tasks[0].test, tasks[0].classes

    def misclassified() -> np.ndarray:
        predicted = predict_tests(tasks, session.terminal, skip=skip)
        session.run.predicted = predicted
        return predicted.wrong

    selected = select_tests(words, test, classes, misclassified, stdin_lines())
    refuse_without_label(selected, test, target)
    return selected


def prepare(
    session: Session,
    tasks: Sequence[Task],
    *,
    proxy: bool = False,
    skip: bool = False,
    on_the_fly: bool = False,
) -> list[Prepared]:
    """Give what a command scores with, and note a proxy in the run.

    Args:
        session: the command's.
        tasks: from ``load``.
        proxy: of ``--proxy``.
        skip: go on without unreadable examples.
        on_the_fly: store no gradients.
    """
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.replay.trained import prepare_proxy, proxy_words

    if not proxy:
        return prepare_scores(session.config, tasks, session.terminal, skip_unreadable=skip, on_the_fly=on_the_fly)
    prepared = prepare_proxy(session.config, tasks[0], session.terminal)
    session.run.proxy = proxy_words(prepared)
    return [prepared]


def emit(
    session: Session, rows: Iterable[Mapping[str, object]], columns: Sequence[str], *, brief: bool = False
) -> None:
    """Write rows to stdout or to a file, and the facts of the run next to the file.

    Args:
        session: the command's.
        rows: all of them are computed, whatever is shown.
        columns: of the rows.
        brief: show the first lines of a table on a terminal, because a page shows the rest. Files and pipes get all.
    """
    output = session.output
    if not distributed.is_first():
        for _ in rows:  # asking for the rows does this process's part of the work
            pass
        distributed.dissolve()
    # Rows on stdout show the progress themselves.
    with open_output(output) as stream, nullcontext() if output is None else session.terminal.status("writing rows"):
        shown = BRIEF if brief and stream.isatty() and session.format == "table" else None
        count = write_rows(rows, columns, session.format, stream, lines=shown)
    distributed.dissolve()
    session.terminal.detail(f"done in {session.seconds:.1f} s")
    if output is not None:
        record = run_facts(session) | {"rows": count}
        path = run_file(output)
        with open_output(path) as stream:
            json.dump(record, stream, indent=2, ensure_ascii=False, default=str, allow_nan=False)
            stream.write("\n")
        session.terminal.say(f"wrote {output} ({count:,} rows) and {path.name}")


def write_report(session: Session, page: Page, file: Path, most: int | None = None) -> None:
    """Write the page of ``--report``, of at most so many bytes."""
    from influence_cli.report.html import write_page

    session.terminal.say(f"wrote {file} ({write_page(page, file, most):,} bytes)")
