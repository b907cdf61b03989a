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
    given,
    refuse_together,
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
        float, typer.Option("--keep", metavar="SHARE", help="Share of training examples to keep, between 0 and 1.")
    ] = 0.8,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="influence|loss|random",
            help="What to leave out: the least useful, the largest losses, or random examples.",
        ),
    ] = "influence",
    exclude: Annotated[
        Path | None,
        typer.Option(
            "--exclude", metavar="FILE", help="The exclusion file (.csv). Default: selected.csv next to the config."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    retrain: Annotated[
        bool,
        typer.Option("--retrain", help="Write no file: train on what each way keeps, and compare the test accuracy."),
    ] = False,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, metavar="R", help="With --retrain: trainings per way.")
    ] = 3,
    on_the_fly: OnTheFly = False,
    skip_unreadable: SkipUnreadable = False,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List the training images that are least useful to the test set.

    The command writes an exclusion file for the config. usefulness is the mean influence on the test examples: how much
    their mean loss would rise without the image. Below zero, removing it helps. Every class loses the same share. The
    rows are the images that are left out, the least useful of each class first. Images that train.exclude already names
    stay out.

    --retrain trains from scratch on all images, and on what influence, loss and chance keep. It uses the training
    function of the config (training:). Influence is measured on one random half of the test set, accuracy on the other
    half. Trainings are kept and shared by all processes that run the same command. After a kill, run the same command
    to resume.

    Examples:

      influence select --keep 0.8

      influence select --keep 0.9 --by loss --exclude largest-loss.csv

      influence select --keep 0.8 --retrain --repeats 3
    """
    from influence_cli.results.session import begin, load

    if by not in BY:
        raise InfluenceError(f"--by {by}: no such way to select", did_you_mean(by, BY))
    if not 0 < keep < 1:
        raise InfluenceError(f"--keep {keep:g}: not a share above 0 and below 1", "for example --keep 0.8")
    refuse_together(
        retrain,
        given(exclude, by != "influence"),
        message="--retrain compares all ways and writes no exclusion file: it cannot be combined with --by or "
        "--exclude",
        hint="run select once with --retrain and once without",
    )
    if exclude is not None and exclude.suffix != ".csv":
        raise InfluenceError(f"--exclude {exclude}: the file must be .csv", "for example --exclude selected.csv")
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output)
    from influence_cli.replay.prepare import check_options

    check_options(session.config, session.terminal, skip=skip_unreadable, on_the_fly=on_the_fly)
    path = session.config.folder / "selected.csv" if exclude is None else exclude
    if not retrain and path.exists() and not force:
        raise InfluenceError(f"{near_path(path)} exists already", "--force replaces it, --exclude FILE names another")
    tasks = load(session)
    if retrain:
        _retrain(session, tasks, keep, repeats, on_the_fly=on_the_fly, skip=skip_unreadable)
    else:
        _write(session, tasks, keep, by, path, on_the_fly=on_the_fly, skip=skip_unreadable)


def _write(
    session: Session, tasks: list[Task], keep: float, by: str, path: Path, *, on_the_fly: bool, skip: bool
) -> None:
    import numpy as np

    from influence_cli.relabel.labels import exclusion_file
    from influence_cli.results.session import emit
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
        f"left out {count:,} of {len(split):,} training examples by {by}"
        + (f"; {harmful:,} of them are harmful to the test set as a whole" if harmful else "")
    )
    before = len(split.labels) - len(split)
    also = f", including {before:,} that were already excluded" if before else ""
    say(f"wrote {near_path(path)} ({len(left_out):,} examples{also})")
    say(f"next: influence check -s train.exclude={typed_path(path)}, or influence select --keep {keep:g} --retrain")


def _usefulness(session: Session, tasks: list[Task], *, on_the_fly: bool, skip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Give, per training example, the mean influence on the test examples and the loss: float64 [n] each."""
    import numpy as np

    from influence_cli.influence.ensemble import make_inverses
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.run_facts import describe_run
    from influence_cli.influence.self_influence import harm_to_tests
    from influence_cli.replay.prepare import prepare_scores

    tasks[0].labelled_tests()  # before any work
    stores = prepare_scores(session.config, tasks, session.terminal, skip_unreadable=skip, on_the_fly=on_the_fly)
    inverses = make_inverses(stores, session.terminal)
    facts = training_facts(stores)
    usefulness = -harm_to_tests(stores, inverses, session.terminal, skip=skip, facts=facts)
    session.run.scores = describe_run(stores, inverses, None, session.terminal)
    # An example that cannot be read is never useful.
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
    from influence_cli.results.session import emit
    from influence_cli.retrain.retraining import Retraining
    from influence_cli.retrain.subsets import compare_kept, order_by, retrain_kept, split_tests

    retraining = Retraining(session.config)
    retraining.check()  # a config without training fails before a store is made
    seed = session.config.seed
    halves = [split_tests(task, seed) for task in tasks]
    chosen, measured = halves[0][0].test_split(), halves[0][1]
    session.terminal.say(
        f"influence is measured on {len(chosen):,} test examples, accuracy on the other {len(measured.test_split()):,}"
    )
    usefulness, losses = _usefulness(session, [first for first, _ in halves], on_the_fly=on_the_fly, skip=skip)
    labels = tasks[0].train.labels[tasks[0].train.indices]
    kept = retrain_kept(
        retraining,
        measured,
        lambda by, repeat: order_by(by, usefulness, losses, labels, seed + repeat),
        keep,
        repeats,
        session.terminal,
    )
    emit(session, _accuracies(kept, keep), RETRAIN_COLUMNS)
    session.terminal.say(compare_kept(kept))


def _accuracies(kept: list[Kept], keep: float) -> Iterator[dict[str, object]]:
    """Give one row per way to select. The difference is to training on all examples, seed by seed."""
    for each in kept:
        yield {
            "by": each.by,
            "keep": 1.0 if each.by == "all" else keep,
            "examples": each.examples,
            "repeats": len(each.accuracies),
            "accuracy": float(each.accuracies.mean()),
            "lowest": float(each.accuracies.min()),
            "highest": float(each.accuracies.max()),
            "difference": float((each.accuracies - kept[0].accuracies).mean()),
            "loss": float(each.losses.mean()),
        }
