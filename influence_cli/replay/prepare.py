"""Give what a command scores with: a store with its curvature, or a run that is replayed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from influence_cli.config.schema import Config
from influence_cli.curvature.choice import Choice
from influence_cli.errors import InfluenceError, near_path
from influence_cli.model.network import track
from influence_cli.model.task import Task
from influence_cli.precompute.prepare import all_complete, prepare_all
from influence_cli.precompute.prepared import Prepared, settings_of
from influence_cli.replay.effects import RunEffects
from influence_cli.replay.open import Replayed, differing, made_of, open_run, recipe_run
from influence_cli.replay.outcomes import outcome_line
from influence_cli.replay.proxy import proxy_config, proxy_task
from influence_cli.replay.recipe_run import train_run
from influence_cli.replay.record import Record
from influence_cli.replay.run import State
from influence_cli.replay.verdict import Verdict, measure_verdict
from influence_cli.runtime.terminal import Terminal, or_silent

REPLAY = "replay"


def refuse_replay(config: Config, option: str, why: str) -> None:
    """Refuse what a replay cannot give, before any work.

    Args:
        config: of the run.
        option: such as ``--normalise``.
        why: what a replay does not have.

    Raises:
        InfluenceError: ``curvature.method`` is ``replay``.
    """
    if config.curvature.method == REPLAY:
        raise InfluenceError(f"{option}: {why} under curvature.method replay", "-s curvature.method=auto")


def stores_complete(config: Config) -> bool:
    """Say whether every checkpoint has a store with all its rows; a run that is replayed has none."""
    return config.curvature.method != REPLAY and all_complete(config)


def prepare_scores(
    config: Config,
    tasks: Sequence[Task],
    terminal: Terminal | None = None,
    *,
    skip_unreadable: bool = False,
    on_the_fly: bool = False,
) -> list[Prepared]:
    """Give what every checkpoint is scored with.

    Args:
        config: of the run.
        tasks: the checkpoints.
        terminal: progress; the verdict on a run that is replayed.
        skip_unreadable: go on without unreadable examples.
        on_the_fly: store no gradients.

    Raises:
        InfluenceError: as ``prepare_all``; or there is no record of the run, or it is another run's.
    """
    terminal = or_silent(terminal)
    if config.curvature.method != REPLAY:
        return prepare_all(config, tasks, terminal, skip_unreadable=skip_unreadable, on_the_fly=on_the_fly)
    where = config.where("curvature", "method")
    if len(tasks) > 1:
        raise InfluenceError(
            f"{where}: a replay explains the checkpoint at the end of a run, but model.checkpoint names {len(tasks)}",
            "name the last one alone",
        )
    if on_the_fly:
        raise InfluenceError("--on-the-fly: a replay stores no gradients in any case", "leave it out")
    started, (task,) = time.perf_counter(), tasks
    replayed = open_run(config, task)
    verdict = measure_verdict(replayed, terminal)
    (terminal.say if verdict.trusted else terminal.warn)(verdict.sentence())
    return [prepare_run(config, replayed, verdict, started)]


def prepare_run(config: Config, replayed: Replayed, verdict: Verdict | None, started: float) -> Prepared:
    """Give what a command scores with, of a run that is open.

    Args:
        config: of the run.
        replayed: the run.
        verdict: on it; None where it was not measured.
        started: when the work on it began, on the clock of ``time.perf_counter``.
    """
    task = replayed.task
    network = track(task.model, task.loss, ("*",), config.where("curvature", "method"))
    return Prepared(
        task,
        Choice(REPLAY, "hessian", network, None),
        replayed.record.folder,
        None,
        None,
        on_the_fly=True,
        batch=256,
        gradient_norm=None,
        seconds=time.perf_counter() - started,
        settings=settings_of(config, 0),
        effects=RunEffects(replayed, verdict),
    )


def recorded_run(config: Config, task: Task, terminal: Terminal, what: str, folder: Path | None = None) -> Replayed:
    """Give the run by a recipe on the task's examples: recorded before, or trained and recorded now.

    Args:
        config: with a recipe.
        task: its training examples are those of the run; its model gets the weights at the end.
        terminal: progress.
        what: is trained, for the progress.
        folder: of the record; by default that of the config. A record of another run in it is replaced.

    Raises:
        InfluenceError: the training diverges.
        Stopped: Ctrl-C; what was kept stays.
    """
    network, run = recipe_run(config, task)
    if folder is not None:
        run = replace(run, record=Record(folder))
    wanted, recorded = made_of(config, task, run.recipe), run.record.made_of()
    if recorded and differing(recorded, wanted):
        terminal.say(f"{run.record.shown} is of other images or another recipe; it is trained again")
        run.record.clear()
        recorded = {}
    if not recorded:
        run.record.begin(wanted)
    if {*run.kept} - {*run.record.kept}:
        with terminal.progress(run.steps, f"training {what}") as advance:
            train_run(network, run, lambda steps, _loss: advance(steps))
    network.load(run.state(run.steps))
    task.model.load_state_dict(network.model.state_dict())
    return Replayed(task, network, run, run.record)


def prepare_trusted(config: Config, tasks: Sequence[Task], terminal: Terminal) -> tuple[Prepared | None, str]:
    """Give the recorded run of a config if its numbers can be trusted, and why it can or cannot be asked.

    Args:
        config: whatever its ``curvature.method`` is.
        tasks: the checkpoints.
        terminal: progress.
    """
    started, training = time.perf_counter(), config.training
    if training is None or (training.recipe is None and training.record is None):
        return None, "the config has no training.recipe"
    if len(tasks) > 1:
        return None, f"a run has one checkpoint, but the config names {len(tasks)}"
    try:
        replayed = open_run(config, tasks[0])
    except InfluenceError as error:
        return None, error.message
    verdict = measure_verdict(replayed, terminal)
    return prepare_run(config, replayed, verdict, started) if verdict.trusted else None, verdict.sentence()


def by_replay(config: Config) -> Config:
    """Give a config whose curvature is that of its run, replayed."""
    return config.model_copy(update={"curvature": config.curvature.model_copy(update={"method": REPLAY})})


def prepare_proxy(config: Config, task: Task, terminal: Terminal | None = None) -> Prepared:
    """Train the proxy on a task's images, or read its record, and give what a command scores with.

    Args:
        config: of the user's own network.
        task: its data are used.
        terminal: progress; says that the numbers are the proxy's, and its verdict.

    Raises:
        InfluenceError: as ``proxy_config``.
    """
    started, terminal = time.perf_counter(), or_silent(terminal)
    task.labelled_tests()  # before any work
    proxied = proxy_config(config, task)
    replayed = recorded_run(proxied, proxy_task(proxied, task), terminal, "the proxy")
    verdict = measure_verdict(replayed, terminal)
    prepared = prepare_run(proxied, replayed, verdict, started)
    terminal.say(
        f"these numbers are of {proxy_words(prepared)}, trained on the same images: "
        f"{outcome_line(replayed.task, replayed.network, last_state(replayed))}"
    )
    (terminal.say if verdict.trusted else terminal.warn)(f"the proxy: {verdict.sentence()}")
    return prepared


def proxy_words(prepared: Prepared) -> str:
    """Say what answers in the place of the user's network."""
    return f"a smooth proxy network of {prepared.choice.network.size:,} parameters ({near_path(prepared.path)})"


def last_state(replayed: Replayed) -> State:
    """Give the state at the end of a run."""
    return replayed.run.state(replayed.run.steps)
