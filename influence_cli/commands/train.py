"""influence train."""

from __future__ import annotations

from typing import Annotated

import typer

from influence_cli.commands.options import DEFAULT_CONFIG, ConfigFile, Quiet, Set, Verbose


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train again, and replace the checkpoint and the record.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train by training.recipe, write the checkpoint, and record the run so that it can be replayed.

    The same recipe gives the same weights. After Ctrl-C or a kill, run it again: it resumes.

    Examples:

      influence train

      influence train -s training.recipe.epochs=40 --overwrite

      influence train && influence rank misclassified -s curvature.method=replay
    """
    from influence_cli.results.session import begin

    session = begin(config, set_, quiet=quiet, verbose=verbose, rows=False)
    from influence_cli.errors import human_bytes, near_path
    from influence_cli.model.task import load_tasks
    from influence_cli.replay.open import (
        checkpoint_path,
        is_trained,
        made_of,
        recipe_run,
        save_checkpoint,
    )
    from influence_cli.replay.outcomes import outcome_line
    from influence_cli.replay.recipe_run import train_run
    from influence_cli.replay.record import check_budget, kept_steps, state_bytes

    loaded, terminal = session.config, session.terminal
    path = checkpoint_path(loaded)
    with terminal.status("loading model and data"):
        (task,) = load_tasks(loaded, terminal, trained=False)
    network, run = recipe_run(loaded, task)
    record = run.record
    wanted = made_of(loaded, task, run.recipe, {} if overwrite else record.made_of())
    if not overwrite and is_trained(loaded, run, wanted):
        terminal.say(f"{near_path(path)} is trained and its run is recorded; --overwrite trains it again")
        return
    state = network.first_state(run.recipe.rule(0).slots)
    check_budget(run.steps, state, loaded.gradients.budget, loaded.where("gradients", "budget"))
    size = len(kept_steps(run.steps)) * state_bytes(state)
    terminal.say(
        f"{run.examples:,} images, {run.recipe.settings.epochs:,} epochs of {run.recipe.steps_per_epoch:,} steps; "
        f"{len(kept_steps(run.steps)):,} states are kept in {record.shown} ({human_bytes(size)})"
    )
    if overwrite:
        record.clear()
    record.begin(wanted)
    with terminal.progress(run.steps, "training steps") as advance:
        last = train_run(network, run, advance)
    save_checkpoint(network, last, path)
    terminal.say(f"wrote {near_path(path)}")
    if task.test is not None:
        terminal.say(outcome_line(task, network, last))
    terminal.say("next: influence check, or influence rank misclassified -s curvature.method=replay")
