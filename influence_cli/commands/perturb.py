"""influence perturb."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    All,
    ConfigFile,
    Format,
    Output,
    Quiet,
    Report,
    Set,
    Strict,
    Verbose,
    given,
    refuse_together,
)
from influence_cli.errors import InfluenceError
from influence_cli.results.perturb_rows import COLUMNS, HIDDEN, perturb_rows

if TYPE_CHECKING:
    from torch import Tensor

    from influence_cli.data.batches import Batch
    from influence_cli.model.task import Task
    from influence_cli.perturb.change import Perturbed
    from influence_cli.perturb.eight_bit import Ball, PixelScale
    from influence_cli.results.run import Session

# Test examples that get their own sentence on stderr.
SAID = 3


def command(
    index: Annotated[
        int | None, typer.Argument(metavar="TRAIN_INDEX", min=0, help="The training image to change.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    tests: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="TEST", help="A test image, as for rank. Repeat the option for several."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="label|predicted|NAME", help="The class whose loss is explained, as for rank."
        ),
    ] = "label",
    delta: Annotated[
        Path | None,
        typer.Option(
            "--delta",
            metavar="FILE.npy|IMAGE",
            help="The change: δ in the model's input space, or the changed image as a file. Default: the change that "
            "raises the loss most among those that rounding to 8 bits hides.",
        ),
    ] = None,
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain", help="Also train again with the changed image (output layers only, by Newton steps)."
        ),
    ] = False,
    map_: Annotated[
        Path | None,
        typer.Option("--map", metavar="FILE.png|npy", help="Write the signed map of the image's pixels."),
    ] = None,
    pixel_step: Annotated[
        str | None,
        typer.Option(
            "--pixel-step",
            metavar="STEP",
            help="Size of an 8-bit level in the model's input, if the transform does not tell: 1/255, or one value per "
            "channel.",
        ),
    ] = None,
    black: Annotated[
        str | None,
        typer.Option("--black", metavar="X", help="With --pixel-step: the input value of black. Default: 0."),
    ] = None,
    attack: Annotated[
        bool,
        typer.Option(
            "--attack",
            help="Flip the prediction of TEST by changing training images so little that rounding to 8 bits hides it. "
            "The top layer is trained again after each round.",
        ),
    ] = False,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="With --attack: number of training images to change.")
    ] = 1,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            min=1,
            metavar="R",
            help="With --attack: maximum number of steps, each a tenth of a level or less.",
        ),
    ] = 60,
    folder: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="With --attack: the folder for the changed images.")
    ] = Path("attack"),
    attackable: Annotated[
        bool,
        typer.Option(
            "--attackable", help="Rank test examples (default: all) by how easily one training image flips them."
        ),
    ] = False,
    top: Annotated[int, typer.Option("--top", min=1, metavar="K", help="With --attackable: rows to show.")] = 10,
    all_: All = False,
    report: Report = None,
    strict: Strict = False,
    format: Format = None,
    output: Output = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Estimate what changed pixels of a training image do to a loss.

    estimated is the rise of the test loss (nats) if the training image x becomes x + δ and the model is trained again.
    It is first order in δ: slope · δ, where slope is −(1/n) ∇ₓ(s_testᵀ∇L(x)). replaced is the influence of x minus the
    influence of x + δ, for changes that are not small. channel, row and column are the place of the steepest pixel.
    slope is its slope per unit of the model's input.

    Under curvature.method replay, slope goes back through the run, --retrain takes the run again with x + δ, and
    replaced is empty.

    --attack and --attackable train the output layer to its minimum and keep the layers below it (Koh & Liang 2017,
    section 5.2). images are the changed training images. flips counts all test predictions that changed. moved is the
    largest change of a pixel in 8-bit levels. gain is how much one image could lower the margin between the label and
    the next class. ratio is gain divided by margin: from 1 on, the image could flip the prediction.

    Examples:

      influence perturb 12 --test 17

      influence perturb 12 --test 17 --map pixels.png --report pixels.html

      influence perturb 12 --test 17 --delta retouched.png

      influence perturb --attackable

      influence perturb --attack --test 17 --images 2 --to attack
    """
    from influence_cli.perturb.files import check_map
    from influence_cli.report.html import check_page
    from influence_cli.results.session import begin

    refuse_together(
        attack, attackable, message="--attack and --attackable are two commands", hint="run one after the other"
    )
    refuse_together(
        given(attack, attackable),
        given(delta, retrain, map_, report, target != "label"),
        message=f"{'--attack' if attack else '--attackable'} cannot be combined with --delta, --map, --report, "
        "--retrain or --target",
        hint="leave them out: an attack always trains again and uses the label's loss",
    )
    if not tests and not attackable:
        raise InfluenceError("perturb needs a test image whose loss it explains", "influence perturb 12 --test 17")
    if index is None and not (attack or attackable):
        raise InfluenceError("perturb needs a training image to change", "influence perturb 12 --test 17")
    if black is not None and pixel_step is None:
        raise InfluenceError("--black needs --pixel-step", "add --pixel-step 1/255")
    session = begin(config, set_, quiet=quiet, verbose=verbose, format=format, output=output, files=(map_, report))
    check_map(map_)
    check_page(report)
    if attack or attackable:
        from influence_cli.commands.perturb_attack import AttackOptions, run_attack, run_attackable

        count = None if all_ else top
        options = AttackOptions(tests or [], index, images, rounds, folder, (pixel_step, black), count)
        (run_attack if attack else run_attackable)(session, options)
        return
    if index is None or not tests:
        raise ValueError("both were asked for above")
    _perturb(
        session,
        index,
        tests,
        target,
        delta,
        retrain=retrain,
        map_=map_,
        pixels=(pixel_step, black),
        report=report,
        strict=strict,
    )


def _perturb(
    session: Session,
    index: int,
    words: list[str],
    target: str,
    delta: Path | None,
    *,
    retrain: bool,
    map_: Path | None,
    pixels: tuple[str | None, str | None],
    report: Path | None,
    strict: bool,
) -> None:
    from influence_cli.influence.test_gradients import check_target
    from influence_cli.perturb.estimate import perturb_image
    from influence_cli.perturb.files import check_image, write_map
    from influence_cli.perturb.inputs import read_training_image
    from influence_cli.replay.prepare import REPLAY, check_options, prepare_scores
    from influence_cli.results.session import emit, load, selected_tests

    check_options(session.config, session.terminal, strict=strict)
    _refuse_augmented(session)
    tasks = load(session)
    check_target(target, tasks[0].classes)
    batch = read_training_image(tasks[0], index)
    for file, option in ((report, "--report"), (map_, "--map")):
        if file is not None and file.suffix.lower() != ".npy":
            check_image(batch.inputs[0], option)
    selected = selected_tests(session, tasks, words, target=target)
    scale, room = _room(session, tasks[0], batch, pixels)
    change = _change(session, tasks[0], batch, delta, room)
    if retrain and change is None:
        raise InfluenceError(
            "--retrain needs a change, and the size of an 8-bit level is not known here",
            "--delta FILE, or --pixel-step",
        )
    # Only the inverse curvature is needed, on all its coordinates, so no rows are stored. Fisher is made from the rows,
    # and a replay has none.
    rows = session.config.curvature.method in ("fisher", REPLAY)
    stores = prepare_scores(session.config, tasks, session.terminal, on_the_fly=not rows)
    result = perturb_image(
        stores,
        index,
        selected,
        change=change,
        target=target,
        retrain=retrain,
        terminal=session.terminal,
        strict=strict,
    )
    effects, session.run.scores, session.run.newton = result.effects, result.scores, result.newton
    name = None if change is None else str(delta) if delta is not None else HIDDEN
    emit(session, perturb_rows(tasks[0], batch, effects, name), COLUMNS, brief=report is not None)
    for one in effects[:SAID]:
        session.terminal.say(_sentence(one, index, name))
    if map_ is not None:
        write_map(map_, batch.inputs[0], effects[0].slope, scale)
        session.terminal.say(f"wrote {map_}{' (first test example)' if len(effects) > 1 else ''}")
    if report is not None:
        from influence_cli.pages.perturb import perturb_page
        from influence_cli.results.session import write_report

        page = perturb_page(session, stores, batch, effects, scale, name)
        write_report(session, page, report)
    elif map_ is None:
        session.terminal.say("next: --map pixels.png shows which pixels matter")


def _refuse_augmented(session: Session) -> None:
    """Refuse a replay of steps that took other images than the training image: its pixels have no slope there."""
    training, method = session.config.training, session.config.curvature.method
    if method == "replay" and training is not None and training.recipe is not None and training.recipe.augment:
        raise InfluenceError(
            f"{session.config.where('training', 'recipe', 'augment')}: the run trains on augmented images, and a "
            "replay gives the slopes of these, not of the training image",
            "-s curvature.method=auto, or a recipe without augment",
        )


def _sentence(one: Perturbed, index: int, delta: str | None) -> str:
    """Say what the change does to the loss of one test example, or what the whole image does if there is no change."""
    if one.estimated is None:
        way = "harmful: without it the loss falls" if one.influence < 0 else "helpful: without it the loss rises"
        return f"training image {index} is {way} by about {abs(one.influence):.3g} for {one.test.title()}"
    what = "the steepest change that rounding to 8 bits hides" if delta == HIDDEN else f"the change to {delta}"
    actual = "" if one.actual is None else f"; after training again it changes by {one.actual:+.3g}"
    return (
        f"{what} in training image {index} changes the loss of {one.test.title()} by about {one.estimated:+.3g}, "
        f"from {one.test.loss:.3g}{actual}"
    )


def _room(
    session: Session, task: Task, batch: Batch, pixels: tuple[str | None, str | None]
) -> tuple[PixelScale | None, Ball | None]:
    """Find where 8-bit levels lie in the model's input. If that is unknown and not asked for, do without."""
    from influence_cli.perturb.eight_bit import ball, given_scale, pixel_scale

    title = task.train.title(int(batch.indices[0]))
    if pixels[0] is not None:
        scale = given_scale(pixels[0], pixels[1])
        return scale, ball(scale, batch.inputs[0], title)
    try:
        scale = pixel_scale(task.train)
        return scale, ball(scale, batch.inputs[0], title)
    except InfluenceError as error:
        session.terminal.detail(error.message)
        return None, None


def _change(
    session: Session, task: Task, batch: Batch, delta: Path | None, room: Ball | None
) -> Callable[[Tensor], Tensor] | None:
    """Give a function from the slope to δ: that of --delta, or the steepest one that rounding to 8 bits hides."""
    from influence_cli.perturb.files import read_change

    x = batch.inputs[0]
    if delta is not None:
        given = read_change(delta, task.train, x, task.train.title(int(batch.indices[0])))
        return lambda _: given
    if room is None:
        session.terminal.say(
            "the size of an 8-bit level is not known here, so only the slope is given; --delta FILE, or --pixel-step"
        )
        return None
    return lambda slope: room.corner(x, slope).double() - x.double()
