"""influence relabel."""

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
    Set,
    Verbose,
    given,
    refuse_together,
)
from influence_cli.errors import InfluenceError, counted, near_path, typed_path
from influence_cli.results.label_records import DecisionCounts, RelabelledPair

if TYPE_CHECKING:
    from collections.abc import Sequence

    from influence_cli.relabel.labels import Relabelled
    from influence_cli.relabel.move_log import LoggedBatch
    from influence_cli.relabel.moves import MovePlan
    from influence_cli.results.run import Session

LOG = "moves.log.csv"
# Pairs of classes that are named on stderr.
PAIRS = 5


def command(
    file: Annotated[
        Path | None, typer.Argument(metavar="DECISIONS.csv", help="The decisions; with --undo: the log of moves.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    on: Annotated[str, typer.Option("--on", metavar="train|test", help="Which labels to change.")] = "train",
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="The new label file (.csv, .npy). Default: labels.csv next to the config; --on test: test-labels.csv.",
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            "--exclude",
            metavar="FILE",
            help="The new exclusion file (.csv, .npy). Default: exclude.csv next to the config (--on test: "
            "test-exclude.csv).",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    apply_moves: Annotated[
        bool,
        typer.Option(
            "--apply-moves",
            help="Move the images into the folders of their new classes instead of writing label files.",
        ),
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Undo the last moves of moves.log.csv, or of the log that is given.")
    ] = False,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn decisions about labels into new label files.

    The page of influence mislabels --report saves decisions.csv with the columns index,path,label,decision,new_label. A
    decision is keep, relabel, drop or unsure. If a line no longer fits the data set, the command refuses it and writes
    nothing. The outputs are a label file and an exclusion file. The data set itself stays as it is, unless you ask for
    --apply-moves: that moves images of an ImageFolder into the folder of their new class, or into dropped/ next to the
    root, and logs every move for --undo. The model is neither needed nor changed.

    Examples:

      influence relabel decisions.csv

      influence relabel decisions.csv --labels labels.npy --exclude exclude.npy --force

      influence relabel decisions.csv --apply-moves

      influence relabel --undo
    """
    from influence_cli.results.session import begin, begin_without_config

    if on not in ("train", "test"):
        raise InfluenceError(f"--on {on}: there is no such set", "known: train, test")
    refuse_together(
        undo,
        given(apply_moves, labels, exclude, force),
        message="--undo cannot be combined with --apply-moves, --labels, --exclude or --force",
        hint="influence relabel --undo [LOG]",
    )
    refuse_together(
        apply_moves,
        given(labels, exclude, force),
        message="--apply-moves writes no label file: afterwards the folders are the labels",
        hint="leave out --labels, --exclude and --force",
    )
    if file is None and not undo:
        raise InfluenceError(
            "relabel needs a file of decisions",
            "the page of influence mislabels --report labels.html saves decisions.csv",
        )
    if undo and file is not None:  # the log has everything: no config is needed
        without = begin_without_config(quiet=quiet, verbose=verbose, format=format, output=output)
        _undo(without, file, config)
        return
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output)
    log = session.config.folder / LOG
    if file is None:
        _undo(session, log, config)
    elif apply_moves:
        _move(session, file, on, log)
    else:
        before = "" if on == "train" else "test-"
        _write(
            session,
            file,
            on,
            log,
            tuple(
                given if given is not None else session.config.folder / f"{before}{name}.csv"
                for given, name in ((labels, "labels"), (exclude, "exclude"))
            ),
            force=force,
        )


def _write(session: Session, file: Path, on: str, log: Path, outputs: Sequence[Path], *, force: bool) -> None:
    from influence_cli.relabel.checks import last_moves, refuse_open_moves, refuse_outputs
    from influence_cli.relabel.decisions import COLUMNS
    from influence_cli.relabel.labels import configured_labels, decision_rows, label_files
    from influence_cli.relabel.moves import manifest, plan_moves
    from influence_cli.results.session import emit
    from influence_cli.runtime.transaction import take_back, write_together

    moves = outputs[0].with_name("moves.csv" if on == "train" else "test-moves.csv")
    if take_back((*outputs, moves)):
        session.terminal.say("rolled back files left half-written by an interrupted run")
    refuse_open_moves(session.config.path, log, file)
    moved = last_moves(log, file)
    used = configured_labels(session.config, on)
    refuse_outputs(used, file, log, (*outputs, moves), session.output, force=force)
    result = _decide(session, file, on, log, moved)
    files = label_files(result, outputs[0], outputs[1])
    try:
        plan: MovePlan | None = plan_moves(result)
    except InfluenceError as error:
        session.terminal.detail(f"no {moves.name}: {error.message}")
        plan = None
    if plan is not None:
        files.append(manifest(moves, plan))
    write_together(files)
    emit(session, decision_rows(result), COLUMNS)
    _describe(session, result)
    say = session.terminal.say
    say(
        f"wrote {near_path(outputs[0])} ({counted(len(result.overrides), 'label')} different from "
        f"the data set{_before(session, on, 'labels')}) and {near_path(outputs[1])} "
        f"({counted(len(result.exclude), 'excluded example')}{_before(session, on, 'exclude')})"
    )
    if plan is not None:
        say(f"wrote {near_path(moves)} ({counted(len(plan.moves), 'move')}: what --apply-moves would do instead)")
        _say_renamed(session, plan)
    _say_next(session, result, on, outputs)


def _decide(session: Session, file: Path, on: str, log: Path, moved: LoggedBatch | None) -> Relabelled:
    """Read the decisions and note them for the run file. If files were moved since, the error says so."""
    from influence_cli.relabel.decisions import DECISIONS
    from influence_cli.relabel.labels import apply_decisions

    undo = f"influence relabel --undo {typed_path(log)}"
    try:
        with session.terminal.status("loading data"):
            result = apply_decisions(session.config, file, on)
    except InfluenceError as error:
        if moved is None or "stale" not in error.message:
            raise
        raise InfluenceError(
            error.message, f"{error.hint}; files were moved on {moved.time[:10]}, see {LOG} ({undo})"
        ) from error
    if moved is not None and not result.decisions.with_paths and result.split.paths is not None:
        raise InfluenceError(
            f"files were moved on {moved.time[:10]} ({LOG}), so positions have changed, and {file} does not name files",
            f"add the column path, or run {undo} first",
        )
    session.run.decisions = DecisionCounts(**{word: result.decisions.count(word) for word in DECISIONS})
    session.run.relabelled = tuple(RelabelledPair(*pair) for pair in result.pairs())
    return result


def _describe(session: Session, result: Relabelled) -> None:
    """Say what was decided."""
    say, decided, pairs = session.terminal.say, result.decisions, result.pairs()
    words = {"relabel": "relabelled", "drop": "dropped", "keep": "kept", "unsure": "unsure (left as they are)"}
    parts = [f"{decided.count(decision):,} {word}" for decision, word in words.items() if decided.count(decision)]
    say(f"{counted(len(decided.rows), 'decision')}{': ' if parts else ''}{', '.join(parts)}")
    if pairs:
        say(
            "most often: "
            + ", ".join(f"{count:,} from {old} to {new}" for old, new, count in pairs[:PAIRS])
            + (f" (and {counted(len(pairs) - PAIRS, 'other pair')})" if len(pairs) > PAIRS else "")
        )


def _say_next(session: Session, result: Relabelled, on: str, outputs: Sequence[Path]) -> None:
    import os
    import shlex

    import yaml

    say, config = session.terminal.say, session.config
    if not result.decisions.count("relabel") + result.decisions.count("drop"):
        say("nothing changes: no label is changed and no example is dropped")
        return
    section = config.train if on == "train" else config.test
    named = section is not None and [section.labels, section.exclude] == [path.absolute() for path in outputs]
    if named and not config.where(on, "labels").startswith("--set"):
        say(f"{config.path.name} already names both files")
    else:
        lines = {
            key: str(path.relative_to(config.folder) if path.is_relative_to(config.folder) else path)
            for key, path in zip(("labels", "exclude"), (path.absolute() for path in outputs), strict=True)
        }
        say(f"next: name them under {on}: in {config.path.name}")
        for line in yaml.safe_dump(lines, allow_unicode=True, width=10_000, sort_keys=False).splitlines():
            say(f"  {line}")
        words = [f"{on}.{key}={os.path.relpath(path)}" for key, path in zip(lines, outputs, strict=True)]
        say("or add to a command: " + " ".join(f"-s {shlex.quote(word)}" for word in words))
    if on == "train":
        say("the model was trained on the old labels: train it again with the new ones")


def _move(session: Session, file: Path, on: str, log: Path) -> None:
    from influence_cli.relabel.checks import last_moves, refuse_named_files, refuse_open_moves
    from influence_cli.relabel.labels import configured_labels
    from influence_cli.relabel.move_log import open_log
    from influence_cli.relabel.moves import COLUMNS as MOVED
    from influence_cli.relabel.moves import DROPPED, apply_plan, continue_moves, plan_moves
    from influence_cli.results.session import emit
    from influence_cli.runtime.outputs import refuse_clashes

    say, config = session.terminal.say, session.config
    refuse_clashes(((file, "the decisions"), (config.path, "the config"), (log, "the log of moves")), session.output)
    with open_log(log) as held:
        batch = refuse_open_moves(config.path, log, file, resume=True)
        if batch is not None:
            say(f"{near_path(log)} has unfinished moves from an interrupted run: finishing them")
            with session.terminal.progress(len(batch.moves), "moving files") as advance:
                done = continue_moves(held, batch, advance)
        else:
            refuse_named_files(configured_labels(config, on))
            result = _decide(session, file, on, log, last_moves(log, file))
            plan = plan_moves(result)
            _describe(session, result)
            if not plan.moves:
                emit(session, (), MOVED)
                say("there is nothing to move")
                return
            with session.terminal.progress(len(plan.moves), "moving files") as advance:
                done = apply_plan(held, plan, file, advance)
            _say_renamed(session, plan)
            if plan.dropped and result.root is not None:
                say(f"moved {counted(plan.dropped, 'dropped file')} to {near_path(result.root.parent / DROPPED)}")
    emit(session, ({"from": move.source, "to": move.target} for move in done.moves), MOVED)
    say(
        f"moved {counted(len(done.moves), 'file')}, listed in {near_path(log)}; influence relabel --undo "
        f"{typed_path(log)} moves them back"
    )
    say(
        "the folders are the labels now, and positions have changed: older label files, exclude files and decisions "
        "are stale and no longer needed (those with paths are refused)"
    )
    if on == "train":
        say("next: train the model again")


def _undo(session: Session, log: Path, config: Path) -> None:
    from influence_cli.relabel.move_log import last_open, read_log
    from influence_cli.relabel.moves import COLUMNS as MOVED
    from influence_cli.relabel.moves import undo_moves
    from influence_cli.results.session import emit
    from influence_cli.runtime.outputs import refuse_clashes

    used = [(log, "the log of moves"), (config.parent / LOG, "the log of moves"), (config, "the config")]
    batches = read_log(log)
    used += [(log.parent / batch.decisions[0], "the decisions") for batch in batches]
    refuse_clashes(used, session.output)
    last = last_open(batches)
    with session.terminal.progress(len(last.moves) if last else 0, "moving files back") as advance:
        batch, back = undo_moves(log, advance)
    emit(session, ({"from": move.target, "to": move.source} for move in back), MOVED)
    say = session.terminal.say
    say(
        f"undid {counted(len(back), 'move')} of {near_path(log)} "
        f"(run {batch.number}, by {near_path(Path(batch.decisions[0]))})"
    )
    if earlier := last_open(read_log(log)):
        say(f"--undo again undoes run {earlier.number}: {counted(len(earlier.moves), 'move')}")


def _before(session: Session, on: str, key: str) -> str:
    section = session.config.train if on == "train" else session.config.test
    return f", including {session.config.where(on, key)}" if getattr(section, key, None) is not None else ""


def _say_renamed(session: Session, plan: MovePlan) -> None:
    if plan.renamed:
        pair = next((move for move in plan.moves if Path(move.source).name != Path(move.target).name), plan.moves[0])
        session.terminal.say(
            f"{counted(plan.renamed, 'file name')} already taken in the new folder: a number was added, as in "
            f"{Path(pair.target).name}"
        )
