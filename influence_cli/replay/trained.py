"""Runs that a command trains itself: the proxy, and the recipe on a part of the images; and recorded ones to trust."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from influence_cli.config.schema import Config
from influence_cli.errors import InfluenceError, near_path
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.replay.open import Replayed, differing, made_of, open_run, recipe_run
from influence_cli.replay.outcomes import outcome_line
from influence_cli.replay.prepare import REPLAY, prepare_run
from influence_cli.replay.proxy import proxy_config, proxy_task
from influence_cli.replay.recipe_run import train_run
from influence_cli.replay.record import Record
from influence_cli.replay.verdict import measure_verdict
from influence_cli.runtime.terminal import Terminal, or_silent
from influence_cli.steps.run import State


def train_recorded(config: Config, task: Task, terminal: Terminal, what: str, folder: Path | None = None) -> Replayed:
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
    recorded = run.record.made_of()
    wanted = made_of(config, task, run.recipe, recorded)
    if recorded and differing(recorded, wanted):
        terminal.say(f"{run.record.shown} is of other images or another recipe; it is trained again")
        run.record.clear()
        recorded = {}
    if not recorded:
        run.record.begin(wanted)
    if {*run.kept} - {*run.record.kept}:
        with terminal.progress(run.steps, f"training {what}") as advance:
            train_run(network, run, advance)
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
        replayed = open_run(config, tasks[0], terminal)
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
    replayed = train_recorded(proxied, proxy_task(proxied, task), terminal, "the proxy")
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
