"""influence relabel."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import DEFAULT_CONFIG, ConfigFile, Format, Output, Quiet, Set, Verbose
from influence_cli.errors import InfluenceError, counted, near_path, typed_path
from influence_cli.results.record import DecisionCounts, RelabelledPair

if TYPE_CHECKING:
    from collections.abc import Sequence

    from influence_cli.relabel.labels import Relabelled
    from influence_cli.relabel.move_log import Batch
    from influence_cli.relabel.moves import Plan
    from influence_cli.results.run import Session

LOG = "moves.log.csv"
# Pairs of classes that are named.
PAIRS = 5


def command(
    file: Annotated[
        Path | None, typer.Argument(metavar="DECISIONS.csv", help="What was decided; with --undo the log of moves.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    on: Annotated[str, typer.Option("--on", metavar="train|test", help="Whose labels.")] = "train",
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="FILE",
            help="The new label file (.csv, .npy). Default: labels.csv beside the config (test-labels.csv).",
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            "--exclude",
            metavar="FILE",
            help="The new exclusion file (.csv, .npy). Default: exclude.csv beside the config (test-exclude.csv).",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    apply_moves: Annotated[
        bool,
        typer.Option("--apply-moves", help="Instead of label files, move the images to the folders of their classes."),
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take back the last moves of moves.log.csv, or of a log.")
    ] = False,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Turn decisions about labels into a label file and an exclusion file.

    The page of influence mislabels --report saves decisions.csv: index,path,label,decision,new_label, a decision being
    keep, relabel, drop or unsure. A line that no longer fits the data set is refused, and then nothing is written. The
    data set is not touched, except by --apply-moves: that renames images of an ImageFolder into the folder of their new
    class, or to dropped/ beside the root, and logs each of them for --undo. The model is not needed, and not changed.

    Examples:

      influence relabel decisions.csv

      influence relabel decisions.csv --labels labels.npy --exclude exclude.npy --force

      influence relabel decisions.csv --apply-moves

      influence relabel --undo
    """
    from influence_cli.commands.session import begin, begin_without_config

    if on not in ("train", "test"):
        raise InfluenceError(f"--on {on}: there is no such set", "known: train, test")
    if undo and (apply_moves or labels or exclude or force):
        raise InfluenceError("--undo goes with no other option of relabel", "influence relabel --undo [LOG]")
    if apply_moves and (labels or exclude or force):
        raise InfluenceError(
            "--apply-moves writes no label file: the folders are the labels then", "leave out --labels and --exclude"
        )
    if file is None and not undo:
        raise InfluenceError(
            "relabel needs a file of decisions",
            "influence mislabels --report labels.html: its page saves decisions.csv",
        )
    if undo and file is not None:  # a log says all that there is to know: no config is needed
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
            force,
        )


def _write(session: Session, file: Path, on: str, log: Path, outputs: Sequence[Path], force: bool) -> None:
    from influence_cli.commands.session import emit
    from influence_cli.relabel.checks import last_moves, refuse_open_moves, refuse_outputs
    from influence_cli.relabel.decisions import COLUMNS
    from influence_cli.relabel.labels import decision_rows, label_files
    from influence_cli.relabel.moves import manifest, plan_moves
    from influence_cli.runtime.transaction import take_back, write_together

    moves = outputs[0].with_name("moves.csv" if on == "train" else "test-moves.csv")
    if take_back((*outputs, moves)):
        session.terminal.say("took back what a run that was cut off had begun to write")
    refuse_open_moves(session.config, log, file)
    moved = last_moves(log, file)
    refuse_outputs(session.config, on, file, log, (*outputs, moves), session.output, force=force)
    result = _decide(session, file, on, log, moved)
    files = label_files(result, outputs[0], outputs[1])
    try:
        plan: Plan | None = plan_moves(result)
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
        f"wrote {near_path(outputs[0])} ({counted(len(result.overrides), 'label')} other than the data set's"
        f"{_before(session, on, 'labels')}) and {near_path(outputs[1])} "
        f"({counted(len(result.exclude), 'example')} left out{_before(session, on, 'exclude')})"
    )
    if plan is not None:
        say(f"wrote {near_path(moves)}: the {counted(len(plan.moves), 'move')} that --apply-moves would make instead")
        _say_renamed(session, plan)
    _say_next(session, result, on, outputs)


def _decide(session: Session, file: Path, on: str, log: Path, moved: Batch | None) -> Relabelled:
    """Read the decisions and note them for the run file; where files were moved since, an error says so."""
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
            error.message, f"{error.hint}; files were moved on {moved.time[:10]}, by {LOG} ({undo})"
        ) from error
    if moved is not None and not result.decisions.with_paths and result.split.paths is not None:
        raise InfluenceError(
            f"{LOG} moved files on {moved.time[:10]}, which changed positions, and {file} does not name its files",
            f"add the column path, or {undo} first",
        )
    session.run.decisions = DecisionCounts(**{word: result.decisions.count(word) for word in DECISIONS})
    session.run.relabelled = tuple(RelabelledPair(*pair) for pair in result.pairs())
    return result


def _describe(session: Session, result: Relabelled) -> None:
    """Say what was decided."""
    say, decided, pairs = session.terminal.say, result.decisions, result.pairs()
    say(
        f"{counted(len(decided.rows), 'decision')}: {decided.count('relabel'):,} relabelled, "
        f"{decided.count('drop'):,} dropped, {decided.count('keep'):,} kept, "
        f"{decided.count('unsure'):,} unsure (left as they are)"
    )
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
        say("nothing changes: no label is another one and no example is dropped")
        return
    section = config.train if on == "train" else config.test
    named = section is not None and [section.labels, section.exclude] == [path.absolute() for path in outputs]
    if named and not config.where(on, "labels").startswith("--set"):
        say(f"{config.path.name} names both files already")
    else:
        lines = {
            key: str(path.relative_to(config.folder) if path.is_relative_to(config.folder) else path)
            for key, path in zip(("labels", "exclude"), (path.absolute() for path in outputs), strict=True)
        }
        say(f"next: name them under {on}: in {config.path.name}")
        for line in yaml.safe_dump(lines, allow_unicode=True, width=10_000, sort_keys=False).splitlines():
            say(f"  {line}")
        words = [f"{on}.{key}={os.path.relpath(path)}" for key, path in zip(lines, outputs, strict=True)]
        say("or give them to a command: " + " ".join(f"-s {shlex.quote(word)}" for word in words))
    if on == "train":
        say("the model has still learned the old labels: train it again with these")


def _move(session: Session, file: Path, on: str, log: Path) -> None:
    from influence_cli.commands.session import emit
    from influence_cli.relabel.checks import last_moves, refuse_named_files, refuse_open_moves
    from influence_cli.relabel.move_log import open_log
    from influence_cli.relabel.moves import COLUMNS as MOVED
    from influence_cli.relabel.moves import DROPPED, apply_plan, continue_moves, plan_moves
    from influence_cli.runtime.outputs import refuse_clashes

    say, config = session.terminal.say, session.config
    refuse_clashes(((file, "the decisions"), (config.path, "the config"), (log, "the log of moves")), session.output)
    with open_log(log) as held:
        batch = refuse_open_moves(config, log, file, resume=True)
        if batch is not None:
            say(f"{near_path(log)} has moves that were cut off: going on with them")
            with session.terminal.progress(len(batch.moves), "moving files") as advance:
                done = continue_moves(held, batch, advance)
        else:
            refuse_named_files(config, on)
            result = _decide(session, file, on, log, last_moves(log, file))
            plan = plan_moves(result)
            _describe(session, result)
            if not plan.moves:
                emit(session, (), MOVED)
                say("nothing is to be moved")
                return
            with session.terminal.progress(len(plan.moves), "moving files") as advance:
                done = apply_plan(held, plan, file, advance)
            _say_renamed(session, plan)
            if plan.dropped and result.root is not None:
                say(f"{counted(plan.dropped, 'file')} dropped, to {near_path(result.root.parent / DROPPED)}")
    emit(session, ({"from": move.source, "to": move.target} for move in done.moves), MOVED)
    say(
        f"moved {counted(len(done.moves), 'file')}; each is in {near_path(log)}, and influence relabel --undo "
        f"{typed_path(log)} takes them back"
    )
    say(
        "positions have changed with the folders: label files, exclude files and decisions from before are stale, and "
        "not needed (those with paths are refused); the folders are the labels now"
    )
    if on == "train":
        say("next: train the model again")


def _undo(session: Session, log: Path, config: Path) -> None:
    from influence_cli.commands.session import emit
    from influence_cli.relabel.move_log import last_open, read_log
    from influence_cli.relabel.moves import COLUMNS as MOVED
    from influence_cli.relabel.moves import undo_moves
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
        f"took back {counted(len(back), 'move')} of {near_path(log)} "
        f"(run {batch.number}, by {near_path(Path(batch.decisions[0]))})"
    )
    if earlier := last_open(read_log(log)):
        say(f"--undo again takes back run {earlier.number}: {counted(len(earlier.moves), 'move')}")


def _before(session: Session, on: str, key: str) -> str:
    section = session.config.train if on == "train" else session.config.test
    return f", those of {session.config.where(on, key)} included" if getattr(section, key, None) is not None else ""


def _say_renamed(session: Session, plan: Plan) -> None:
    if plan.renamed:
        pair = next((move for move in plan.moves if Path(move.source).name != Path(move.target).name), plan.moves[0])
        session.terminal.say(
            f"{counted(plan.renamed, 'name')} taken in the new folder, so with a number behind: "
            f"{Path(pair.target).name}"
        )
