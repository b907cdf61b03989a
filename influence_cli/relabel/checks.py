"""What `influence relabel` refuses before any work: existing files, and moves that were interrupted or already made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from influence_cli.errors import InfluenceError, counted, near_path, typed_path
from influence_cli.relabel.labels import ConfiguredLabels
from influence_cli.relabel.move_log import LoggedBatch, last_open, read_log, refuse_held
from influence_cli.relabel.moves import file_hash
from influence_cli.runtime.outputs import check_output, refuse_clashes


def refuse_outputs(
    files: ConfiguredLabels, file: Path, log: Path, outputs: Sequence[Path], rows: Path | None, *, force: bool
) -> None:
    """Refuse outputs that are the same file, an input, or already exist.

    Args:
        files: that are in use.
        file: the decisions.
        log: of moves.
        outputs: labels, exclusions and moves.
        rows: the file of ``-o``.
        force: replace what is there.
    """
    words = ("the labels", "the exclusions", "the moves")
    for path in outputs:
        check_output(path)
    used = [(file, "the decisions"), (files.config, "the config"), (log, "the log of moves")]
    used += [(table, "the table of examples") for table in files.tables]
    refuse_clashes(used, rows, tuple(zip(outputs, words, strict=True)))
    for path, key in zip(outputs, ("labels", "exclude", ""), strict=True):
        if force or not os.path.lexists(path):
            continue
        hint = "--force replaces it"
        if key in files.named:
            named = files.named[key]
            if named is not None and named.resolve() == path.resolve():
                hint += f" and keeps its content, because {files.places[key]} names it"
            else:
                hint += (
                    f" and drops its content, because no {files.on}.{key} names it; --{key} FILE writes another file"
                )
        raise InfluenceError(f"{near_path(path)} exists already", hint)


def refuse_named_files(files: ConfiguredLabels) -> None:
    """Refuse moves while the config would still apply label files to positions that mean other images afterwards."""
    for key, path in files.named.items():
        where, option = files.places[key], f"{files.on}.{key}"
        # Given for this run only, it is applied with the moves and not named anywhere afterwards.
        if path is not None and not where.startswith("--set"):
            raise InfluenceError(
                f"{where}: {option} cannot be used with moves: afterwards its positions mean other images",
                f"remove the line, and give it this once so that it moves too: -s {option}={near_path(path)}",
            )


def refuse_open_moves(config: Path, log: Path, file: Path, *, resume: bool = False) -> LoggedBatch | None:
    """Refuse to work while moves are interrupted; give the moves if the same decisions resume them.

    Args:
        config: the config's file, for the command that resumes.
        log: held by the caller if ``resume``.
        file: the decisions.
        resume: whether moves are requested.
    """
    batch = last_open(read_log(log))
    if batch is None or batch.state == "applied":
        return None
    if not resume:
        refuse_held(log)
    undo = f"influence relabel --undo {typed_path(log)}"
    if batch.state == "undoing":
        raise InfluenceError(f"{near_path(log)}: undoing moves was interrupted", f"first run: {undo}")
    if resume and file.is_file() and file_hash(file) == batch.decisions[1]:
        return batch
    named = "" if config.absolute() == Path("influence.yaml").absolute() else f"-c {typed_path(config)} "
    decisions = Path(batch.decisions[0])
    raise InfluenceError(
        f"{near_path(log)}: moves by {near_path(decisions)} were interrupted",
        f"first resume: influence relabel {named}{typed_path(decisions)} --apply-moves; or undo: {undo}",
    )


def last_moves(log: Path, file: Path) -> LoggedBatch | None:
    """Give the last moves that are not undone; decisions that made such moves are refused.

    Their positions are from before the moves, which only their paths would show.
    """
    made = [batch for batch in read_log(log) if batch.state != "undone"]
    for batch in made if file.is_file() else ():
        if file_hash(file) == batch.decisions[1]:
            raise InfluenceError(
                f"{file} was already applied: its {counted(len(batch.moves), 'file')} were moved on {batch.time[:10]}",
                f"the folders hold the labels now; influence relabel --undo {typed_path(log)} undoes the moves",
            )
    return made[-1] if made else None
