"""Give what a command scores with, a store or a run that is replayed; say what a run is, and what it cannot give."""

from __future__ import annotations

import time
from collections.abc import Sequence

from influence_cli.config.schema import Config, RecipeConfig
from influence_cli.curvature.choice import Choice
from influence_cli.errors import InfluenceError, human_bytes
from influence_cli.model.network import track
from influence_cli.model.task import Task
from influence_cli.precompute.check import Finding
from influence_cli.precompute.prepare import all_complete, prepare_all
from influence_cli.precompute.prepared import Prepared, settings_of
from influence_cli.replay.effects import RunEffects
from influence_cli.replay.open import Replayed, open_run, record_of
from influence_cli.replay.recipe import Recipe, make_recipe
from influence_cli.replay.verdict import COST, Verdict, kept_verdict, measure_verdict
from influence_cli.runtime.terminal import Terminal, or_silent

REPLAY = "replay"
# What `check` says of a recipe beside its optimiser, where it is not the default.
SHOWN = ("momentum", "nesterov", "betas", "weight_decay", "schedule", "warmup", "clip", "label_smoothing", "precision")


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
            "list unreadable images under train.exclude, and train again",
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
    replayed = open_run(config, task, terminal)
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
        terminal.warn(f"{', '.join(unused)} {verb} not used: a replay follows the run alone")


def run_findings(config: Config, tasks: Sequence[Task], terminal: Terminal) -> list[Finding]:
    """Look at the recipe of a config and the record of its run; measure the verdict if the method is replay.

    Args:
        config: of the run.
        tasks: one per checkpoint.
        terminal: warnings, and the progress of what is measured.

    Returns:
        Findings in reading order; none without a recipe or a record.

    Raises:
        InfluenceError: the recipe contradicts itself; under ``curvature.method: replay`` also where the run cannot be
            replayed.
    """
    training, findings = config.training, list[Finding]()
    if training is None or (training.recipe is None and training.record is None) or len(tasks) != 1:
        return findings
    if training.recipe is not None:
        recipe = make_recipe(config, len(tasks[0].train))
        epochs = f"{recipe.settings.epochs:,} epochs of {recipe.steps_per_epoch:,}"
        findings += [Finding("recipe", _described(recipe.settings)), Finding("steps of the run", recipe.steps, epochs)]
        _warn_of_decay(config, recipe, terminal)
    elif config.curvature.method != REPLAY:  # a recorded loop is rebuilt once before it is believed
        how = "influence check -s curvature.method=replay rebuilds it once, and measures the verdict"
        return [Finding("record of the run", str(record_of(config).shown), how)]
    try:
        replayed = open_run(config, tasks[0], terminal)
    except InfluenceError as error:
        if config.curvature.method == REPLAY:
            raise
        # Other methods do not need the run.
        return [*findings, Finding("record of the run", None, error.message)]
    size = sum(path.stat().st_size for path in replayed.record.folder.rglob("*") if path.is_file())
    states = f"complete, {len(replayed.run.kept):,} states of {replayed.run.steps:,} steps"
    findings.append(Finding("record of the run", str(replayed.record.shown), f"{states}, {human_bytes(size)}"))
    return [*findings, _verdict_finding(config, replayed, terminal)]


def _verdict_finding(config: Config, replayed: Replayed, terminal: Terminal) -> Finding:
    measured = config.curvature.method == REPLAY
    verdict = measure_verdict(replayed, terminal) if measured else kept_verdict(replayed)
    if verdict is None:
        cost = f"about {COST} trainings, once: influence check -s curvature.method=replay"
        return Finding("verdict on the run", None, f"not measured yet; {cost}")
    (terminal.say if verdict.trusted else terminal.warn)(verdict.sentence())
    return Finding("verdict on the run", verdict.agreement, "r of predicted and actual changes of the test losses")


def _described(given: RecipeConfig) -> str:
    """Give the recipe in a line: what is not said has its default."""
    parts = [f"{given.optimizer}, lr {given.lr:g}, batch {given.batch:,}"]
    for key in SHOWN:
        value = getattr(given, key)
        if value != RecipeConfig.model_fields[key].default:
            parts.append(f"{key} {value}")
    if given.augment:
        parts.append(f"augment {', '.join(step.name for step in given.augment)}")
    return ", ".join(parts)


def _warn_of_decay(config: Config, recipe: Recipe, terminal: Terminal) -> None:
    """Warn where the l2 of the other methods is not what the recipe trains with."""
    decay, kind = recipe.settings.weight_decay, recipe.settings.optimizer
    where = config.where("training", "recipe", "weight_decay")
    if kind == "adamw":
        if decay and config.l2:
            terminal.warn(
                f"{where}: adamw shrinks the weights beside the loss, so no l2 describes it; l2 holds for the other "
                "curvature methods alone"
            )
    elif isinstance(config.l2, float | int) and float(config.l2) != decay:
        terminal.warn(
            f"{where}: the recipe trains with weight_decay {decay:g}, but l2 is {float(config.l2):g}; a replay "
            f"follows the recipe, every other method l2: make them equal (l2: {decay:g})"
        )
