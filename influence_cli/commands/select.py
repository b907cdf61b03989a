"""influence select."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    ConfigFile,
    Format,
    OnTheFly,
    Output,
    Quiet,
    Set,
    SkipUnreadable,
    Verbose,
)
from influence_cli.errors import InfluenceError, did_you_mean, near_path, typed_path

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.model.task import Task
    from influence_cli.results.run import Session
    from influence_cli.retrain.subsets import Kept

BY = ("influence", "loss", "random")
COLUMNS = ("rank", "index", "path", "label", "usefulness", "loss")
RETRAIN_COLUMNS = ("by", "keep", "examples", "repeats", "accuracy", "lowest", "highest", "difference", "loss")


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    keep: Annotated[
        float, typer.Option("--keep", metavar="SHARE", help="Of the training examples, above 0 and below 1.")
    ] = 0.8,
    by: Annotated[
        str,
        typer.Option(
            "--by", metavar="influence|loss|random", help="What goes: the least useful, the largest loss, any."
        ),
    ] = "influence",
    exclude: Annotated[
        Path | None,
        typer.Option(
            "--exclude", metavar="FILE", help="The exclusion file (.csv). Default: selected.csv beside the config."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
    retrain: Annotated[
        bool,
        typer.Option("--retrain", help="Train on what each way keeps, and compare the test accuracy; no file."),
    ] = False,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="R", help="Trainings of each way.")] = 3,
    on_the_fly: OnTheFly = False,
    skip_unreadable: SkipUnreadable = False,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Leave out the training images that are least useful to the test set: an exclusion file for the config.

    Useful is what the test examples' mean loss would rise by without it: the mean influence on them; below zero,
    removing helps. Every class loses the same share, and the rows are what is left out, the least useful of their class
    first. What train.exclude names already stays out.

    --retrain trains from scratch on all, and on what influence, loss and chance keep, by the function that training:
    names. One half of the test set, drawn at random, is what influence is measured on there, the other what accuracy
    is measured on. Its trainings are kept, shared by all processes that run the same command, and go on after a kill.

    Examples:

      influence select --keep 0.8

      influence select --keep 0.9 --by loss --exclude largest-loss.csv

      influence select --keep 0.8 --retrain --repeats 3
    """
    from influence_cli.commands.session import begin, load

    if by not in BY:
        raise InfluenceError(f"--by {by}: nothing can be chosen by that", did_you_mean(by, BY))
    if not 0 < keep < 1:
        raise InfluenceError(f"--keep {keep:g}: a share above 0 and below 1", "such as --keep 0.8")
    if retrain and (exclude is not None or by != "influence"):
        raise InfluenceError("--retrain compares all ways and writes no exclusion file", "run select again without it")
    if exclude is not None and exclude.suffix != ".csv":
        raise InfluenceError(f"--exclude {exclude}: exclusions are written as .csv", "such as --exclude selected.csv")
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output)
    path = session.config.folder / "selected.csv" if exclude is None else exclude
    if not retrain and path.exists() and not force:
        raise InfluenceError(f"{near_path(path)} exists", "--force replaces it, --exclude FILE names another")
    tasks = load(session)
    if retrain:
        _retrain(session, tasks, keep, repeats, on_the_fly=on_the_fly, skip=skip_unreadable)
    else:
        _write(session, tasks, keep, by, path, on_the_fly=on_the_fly, skip=skip_unreadable)


def _write(
    session: Session, tasks: list[Task], keep: float, by: str, path: Path, *, on_the_fly: bool, skip: bool
) -> None:
    import numpy as np

    from influence_cli.commands.session import emit
    from influence_cli.relabel.labels import exclusion_file
    from influence_cli.retrain.subsets import kept_rows, order_by
    from influence_cli.runtime.transaction import write_together

    split, say = tasks[0].train, session.terminal.say
    usefulness, losses = _usefulness(session, tasks, on_the_fly=on_the_fly, skip=skip)
    order = order_by(by, usefulness, losses, split.labels[split.indices], session.config.seed)
    kept = split.indices[kept_rows(order, keep)]
    left_out = np.setdiff1d(np.arange(len(split.labels)), kept)
    write_together([exclusion_file(path, split, left_out)])
    count = len(split) - len(kept)
    emit(session, _rows(tasks[0], order[:count], usefulness, losses), COLUMNS)
    harmful = int((usefulness[order[:count]] < 0).sum())
    say(
        f"{count:,} of {len(split):,} training examples are left out by {by}; {harmful:,} of them are harmful to the "
        "test set as a whole"
    )
    before = len(split.labels) - len(split)
    also = f", {before:,} of before included" if before else ""
    say(f"wrote {near_path(path)} ({len(left_out):,} examples{also})")
    say(f"next: influence check -s train.exclude={typed_path(path)}, or influence select --keep {keep:g} --retrain")


def _usefulness(session: Session, tasks: list[Task], *, on_the_fly: bool, skip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Give the mean influence on the test examples and the loss of every training example: float64 [n] each."""
    import numpy as np

    from influence_cli.influence.ensemble import make_inverses
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.run_facts import describe_run
    from influence_cli.influence.self_influence import harm_to_tests
    from influence_cli.precompute.prepare import prepare_all

    stores = prepare_all(session.config, tasks, session.terminal, skip_unreadable=skip, on_the_fly=on_the_fly)
    inverses = make_inverses(stores, session.config, session.terminal)
    facts = training_facts(stores)
    usefulness = -harm_to_tests(stores, inverses, session.terminal, skip, facts)
    session.run.scores = describe_run(stores, inverses, None, session.terminal)
    # What could not be read is of no use to anybody.
    return np.where(facts.read, usefulness, -np.inf), facts.losses.astype(np.float64)


def _rows(task: Task, rows: np.ndarray, usefulness: np.ndarray, losses: np.ndarray) -> Iterator[dict[str, object]]:
    import numpy as np

    split, read = task.train, np.isfinite(usefulness)
    for number, row in enumerate(rows.tolist(), start=1):
        index = int(split.indices[row])
        yield {
            "rank": number,
            "index": index,
            "path": split.path(index),
            "label": task.classes[int(split.labels[index])],
            "usefulness": float(usefulness[row]) if read[row] else None,
            "loss": float(losses[row]) if read[row] else None,
        }


def _retrain(session: Session, tasks: list[Task], keep: float, repeats: int, *, on_the_fly: bool, skip: bool) -> None:
    from influence_cli.commands.session import emit
    from influence_cli.retrain.subsets import compare_kept, order_by, retrain_kept, split_tests
    from influence_cli.retrain.training import load_training

    load_training(session.config)  # what cannot be trained is told before a store is made
    seed = session.config.seed
    halves = [split_tests(task, seed) for task in tasks]
    chosen, measured = halves[0][0].test_split(), halves[0][1]
    session.terminal.say(
        f"chosen by {len(chosen):,} test examples, accuracy measured on the {len(measured.test_split()):,} others"
    )
    usefulness, losses = _usefulness(session, [first for first, _ in halves], on_the_fly=on_the_fly, skip=skip)
    labels = tasks[0].train.labels[tasks[0].train.indices]
    found = retrain_kept(
        session.config,
        measured,
        lambda by, repeat: order_by(by, usefulness, losses, labels, seed + repeat),
        keep,
        repeats,
        session.terminal,
    )
    emit(session, _accuracies(found, keep), RETRAIN_COLUMNS)
    session.terminal.say(compare_kept(found))


def _accuracies(found: list[Kept], keep: float) -> Iterator[dict[str, object]]:
    """Give a row a way to choose; the difference is to training on all, seed by seed."""
    for own in found:
        yield {
            "by": own.by,
            "keep": 1.0 if own.by == "all" else keep,
            "examples": own.examples,
            "repeats": len(own.accuracies),
            "accuracy": float(own.accuracies.mean()),
            "lowest": float(own.accuracies.min()),
            "highest": float(own.accuracies.max()),
            "difference": float((own.accuracies - found[0].accuracies).mean()),
            "loss": float(own.losses.mean()),
        }
