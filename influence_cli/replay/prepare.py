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


def check_options(
    config: Config, terminal: Terminal, *, skip: bool = False, on_the_fly: bool = False, strict: bool = False
) -> None:
    """Refuse options that a replay cannot follow, before any work; one that changes nothing is said.

    Args:
        config: of the run.
        terminal: takes the warning.
        skip: ``--skip-unreadable``.
        on_the_fly: ``--on-the-fly``.
        strict: ``--strict``.

    Raises:
        InfluenceError: ``curvature.method`` is ``replay``, and it cannot do that.
    """
    if config.curvature.method != REPLAY:
        return
    if skip:
        raise InfluenceError(
            "--skip-unreadable: a replay takes the steps of the run, which read every training image",
            "list unreadable images under train.exclude, and train again: influence train",
        )
    if on_the_fly:
        raise InfluenceError("--on-the-fly: a replay stores no gradients in any case", "leave it out")
    if strict:
        terminal.warn("--strict is not used: a replay solves nothing that could fail to converge")


def refuse_replay(config: Config, command: str, instead: str) -> None:
    """Refuse a command that needs a store or a curvature, before any work.

    Raises:
        InfluenceError: ``curvature.method`` is ``replay``.
    """
    if config.curvature.method == REPLAY:
        raise InfluenceError(
            f"{config.where('curvature', 'method')}: {command}, but under curvature.method replay there is none",
            instead,
        )


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
    check_options(config, terminal, skip=skip_unreadable, on_the_fly=on_the_fly)
    _warn_of_unused(config, terminal)
    started, (task,) = time.perf_counter(), tasks
    replayed = open_run(config, task)
    verdict = measure_verdict(replayed, terminal)
    (terminal.say if verdict.trusted else terminal.warn)(verdict.sentence())
    network = track(task.model, task.loss, ("*",), config.where("curvature", "method"))
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


def _warn_of_unused(config: Config, terminal: Terminal) -> None:
    """Name the keys that say something of a curvature, which a replay does not have."""
    curvature = config.curvature
    given = {
        "curvature.damping": curvature.damping != "auto",
        "curvature.tolerance": curvature.tolerance is not None,
        "curvature.max_iterations": curvature.max_iterations is not None,
        "precision": config.precision != "float32",
    }
    unused = [name for name, is_given in given.items() if is_given]
    if unused:
        verb = "is" if len(unused) == 1 else "are"
        terminal.warn(f"{', '.join(unused)} {verb} not used: a replay follows training.recipe alone")
