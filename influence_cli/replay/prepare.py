"""Give what a command scores with: a store with its curvature, or a run that is replayed."""

from __future__ import annotations

import time
from collections.abc import Sequence

from influence_cli.config.schema import Config
from influence_cli.curvature.choice import Choice
from influence_cli.errors import InfluenceError
from influence_cli.model.network import track
from influence_cli.model.task import Task
from influence_cli.precompute.prepare import all_complete, prepare_all
from influence_cli.precompute.prepared import Prepared, settings_of
from influence_cli.replay.effects import RunEffects
from influence_cli.replay.open import open_run
from influence_cli.replay.verdict import measure_verdict
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
    replayed = open_run(config, task, terminal)
    verdict = measure_verdict(replayed, terminal)
    (terminal.say if verdict.trusted else terminal.warn)(verdict.sentence())
    network = track(task.model, task.loss, ("*",), where)
    choice = Choice(REPLAY, "hessian", network, None)
    return [
        Prepared(
            task,
            choice,
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
    ]
