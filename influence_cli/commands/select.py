"""influence select."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    ConfigFile,
    Format,
    OnTheFly,
    Output,
    Proxy,
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
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.results.run import Session
    from influence_cli.retrain.subsets import Kept

BY = ("replay", "influence", "loss", "random")
COLUMNS = ("rank", "index", "path", "label", "usefulness", "loss")
RETRAIN_COLUMNS = ("by", "keep", "examples", "repeats", "accuracy", "lowest", "highest", "difference", "loss")


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    keep: Annotated[
        float, typer.Option("--keep", metavar="SHARE", help="Share of training examples to keep, between 0 and 1.")
    ] = 0.8,
    by: Annotated[
        str | None,
        typer.Option(
            "--by",
            metavar="replay|influence|loss|random",
            help="What to leave out: the least useful, by the recorded run replayed or by influence; the largest "
            "losses; random examples. Default: replay where the run can be trusted, otherwise influence.",
        ),
    ] = None,
    proxy: Proxy = False,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, metavar="R", help="By replay: leave out a part, train again, and so on.")
    ] = 1,
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

    By replay, usefulness comes from the run that influence train recorded: this is the default where the run answers
    smoothly to its data. --proxy asks the run of a small smooth network instead.

    --retrain trains from scratch on all images, and on what replay, influence, loss and chance keep. It uses the
    training of the config (training:). The choice is made on one random half of the test set, accuracy measured on the
    other half. Trainings are kept and shared by all processes that run the same command. After a kill, run the same
    command to resume.

    Examples:

      influence select --keep 0.8

      influence select --keep 0.9 --proxy --rounds 2

      influence select --keep 0.9 --by loss --exclude largest-loss.csv

      influence select --keep 0.8 --retrain --repeats 3
    """
    from influence_cli.results.session import begin, load

    if by is not None and by not in BY:
        raise InfluenceError(f"--by {by}: no such way to select", did_you_mean(by, BY))
    if not 0 < keep < 1:
        raise InfluenceError(f"--keep {keep:g}: not a share above 0 and below 1", "for example --keep 0.8")
    refuse_together(
        retrain,
        given(exclude, by),
        message="--retrain compares all ways and writes no exclusion file: it cannot be combined with --by or "
        "--exclude",
        hint="run select once with --retrain and once without",
    )
    for option, wanted in (("--proxy", proxy), (f"--rounds {rounds}", rounds > 1)):
        refuse_together(
            wanted,
            by not in (None, "replay"),
            message=f"{option} is by replay: it cannot be combined with --by {by}",
            hint="--by replay",
        )
        refuse_together(
            wanted or by == "replay",
            given(on_the_fly, skip_unreadable),
            message=f"{option if wanted else '--by replay'} replays a run: it cannot be combined with --on-the-fly or "
            "--skip-unreadable",
            hint="leave one of them out",
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
    options = _Options(keep, by, proxy, rounds, on_the_fly, skip_unreadable)
    if retrain:
        _retrain(session, tasks, repeats, options)
    else:
        _write(session, tasks, path, options)


@dataclass(frozen=True)
class _Options:
    keep: float
    by: str | None
    proxy: bool
    rounds: int
    on_the_fly: bool
    skip: bool


def _write(session: Session, tasks: list[Task], path: Path, options: _Options) -> None:
    import numpy as np

    from influence_cli.relabel.labels import exclusion_file
    from influence_cli.results.session import emit
    from influence_cli.retrain.subsets import check_parts, kept_rows, order_by
    from influence_cli.runtime.transaction import write_together

    split, say, keep = tasks[0].train, session.terminal.say, options.keep
    check_parts(len(split), keep, options.rounds)  # before any work
    by, stores = _way(session, tasks, options)
    usefulness, losses = _usefulness(session, stores, skip=options.skip)
    if by == "replay":
        order, usefulness = _by_replay(session, stores[0], usefulness, options)
    else:
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
    proxy = " --proxy" if options.proxy else ""
    say(
        f"next: influence check -s train.exclude={typed_path(path)}, or "
        f"influence select --keep {keep:g}{proxy} --retrain"
    )


def _way(session: Session, tasks: list[Task], options: _Options) -> tuple[str, list[Prepared]]:
    """Decide by what images are left out, say why, and give what measures their usefulness."""
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.replay.trained import by_replay
    from influence_cli.results.record import SelectionRecord
    from influence_cli.results.session import prepare

    tasks[0].labelled_tests()
    prepared, by, why = None, options.by, "as asked for"
    if options.proxy:
        by, why, prepared = "replay", "of the proxy, as asked for", prepare(session, tasks, proxy=True)
    elif by == "replay" or (by is None and session.config.curvature.method == "replay"):
        by, prepared = "replay", prepare_scores(by_replay(session.config), tasks, session.terminal)
    elif by is None:
        trusted, why = _trusted(session, tasks, options)
        by, prepared = ("influence", None) if trusted is None else ("replay", [trusted])
        hint = "" if trusted else "; --proxy asks a small smooth network"
        session.terminal.say(f"leaving out by {by}: {why}{hint}")
    training = session.config.training
    if by == "replay" and options.rounds > 1 and not options.proxy and (training is None or training.recipe is None):
        raise InfluenceError(
            f"--rounds {options.rounds} trains again by training.recipe, but the config names the record of a loop",
            "leave it out, or add --proxy",
        )
    if by != "replay" and options.rounds > 1:
        raise InfluenceError(
            f"--rounds {options.rounds} needs a run to replay: {why}", "influence train records one; or add --proxy"
        )
    session.run.selection = SelectionRecord(by or "influence", why, options.rounds)
    if prepared is None:
        prepared = prepare(session, tasks, skip=options.skip, on_the_fly=options.on_the_fly)
    return by or "influence", prepared


def _trusted(session: Session, tasks: list[Task], options: _Options) -> tuple[Prepared | None, str]:
    """Give the recorded run where its numbers can be trusted, and why they can or cannot be asked."""
    from influence_cli.replay.trained import prepare_trusted

    if options.on_the_fly or options.skip:
        return None, "--on-the-fly and --skip-unreadable do not go with a replay"
    return prepare_trusted(session.config, tasks, session.terminal)


def _usefulness(session: Session, stores: list[Prepared], *, skip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Give, per training example, the mean influence on the test examples and the loss: float64 [n] each."""
    import numpy as np

    from influence_cli.influence.ensemble import make_inverses
    from influence_cli.influence.example_facts import training_facts
    from influence_cli.influence.run_facts import describe_run
    from influence_cli.influence.self_influence import harm_to_tests

    inverses = make_inverses(stores, session.terminal)
    facts = training_facts(stores)
    usefulness = -harm_to_tests(stores, inverses, session.terminal, skip=skip, facts=facts)
    session.run.scores = describe_run(stores, inverses, None, session.terminal)
    # An example that cannot be read is never useful.
    return np.where(facts.read, usefulness, -np.inf), facts.losses.astype(np.float64)


def _by_replay(
    session: Session, prepared: Prepared, usefulness: np.ndarray, options: _Options
) -> tuple[np.ndarray, np.ndarray]:
    """Order the training images by replay, in rounds: first those that go. Their usefulness is that of their round."""
    from influence_cli.replay.proxy import proxy_config
    from influence_cli.retrain.subsets import leave_out_in_rounds, replay_again

    split = prepared.task.train
    config = proxy_config(session.config, prepared.task) if options.proxy else session.config
    again = replay_again(config, prepared, session.terminal)
    labels = split.labels[split.indices]
    rounds = leave_out_in_rounds(usefulness, labels, options.keep, options.rounds, again)
    return rounds.order, rounds.usefulness


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


def _retrain(session: Session, tasks: list[Task], repeats: int, options: _Options) -> None:
    from influence_cli.replay.prepare import prepare_scores
    from influence_cli.results.session import emit
    from influence_cli.retrain.retraining import Retraining
    from influence_cli.retrain.subsets import BY, check_parts, compare_kept, order_by, retrain_kept, split_tests

    retraining = Retraining(session.config)
    retraining.check()  # a config without training fails before a store is made
    seed, terminal = session.config.seed, session.terminal
    check_parts(len(tasks[0].train), options.keep, options.rounds)
    halves = [split_tests(task, seed) for task in tasks]
    chosen, measured = halves[0][0].test_split(), halves[0][1]
    by, prepared = _way(session, tasks, options)
    terminal.say(f"images are chosen on {len(chosen):,} test examples, accuracy is measured on the other "
                 f"{len(measured.test_split()):,}")  # fmt: skip
    orders: dict[str, np.ndarray] = {}
    plain = session.config.curvature
    if plain.method == "replay":
        plain = plain.model_copy(update={"method": "auto"})
    config = session.config.model_copy(update={"curvature": plain})
    stores = prepare_scores(config, [first for first, _ in halves], terminal, skip_unreadable=options.skip,
                            on_the_fly=options.on_the_fly)  # fmt: skip
    usefulness, losses = _usefulness(session, stores, skip=options.skip)
    if by == "replay":
        half = replace(prepared[0], task=replace(prepared[0].task, test=chosen))
        orders["replay"], _ = _by_replay(session, half, _usefulness(session, [half], skip=False)[0], options)
    labels = tasks[0].train.labels[tasks[0].train.indices]
    kept = retrain_kept(
        retraining,
        measured,
        lambda by, repeat: orders[by] if by in orders else order_by(by, usefulness, losses, labels, seed + repeat),
        options.keep,
        repeats,
        terminal,
        BY if orders else BY[1:],
    )
    emit(session, _accuracies(kept, options.keep), RETRAIN_COLUMNS)
    terminal.say(compare_kept(kept))


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
