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
)
from influence_cli.errors import InfluenceError
from influence_cli.results.perturb_rows import COLUMNS, HIDDEN, perturb_rows
from influence_cli.runtime.stdio import stdin_lines

if TYPE_CHECKING:
    from torch import Tensor

    from influence_cli.data.batches import Batch
    from influence_cli.influence.test_selection import Selected
    from influence_cli.model.task import Task
    from influence_cli.perturb.eight_bit import Ball, PixelScale
    from influence_cli.perturb.estimate import Perturbed
    from influence_cli.results.run import Session

# Test examples with a sentence of their own on stderr.
SAID = 3


def command(
    index: Annotated[
        int | None, typer.Argument(metavar="TRAIN_INDEX", min=0, help="The training image that is changed.")
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    tests: Annotated[
        list[str] | None,
        typer.Option(
            "--test", metavar="TEST", help="As for rank: an index, a slice, a file, …; more than once for more."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", metavar="label|predicted|NAME", help="Whose loss is explained, as for rank.")
    ] = "label",
    delta: Annotated[
        Path | None,
        typer.Option(
            "--delta",
            metavar="FILE.npy|IMAGE",
            help="The change: δ in the model's input space, or the changed image as a file. Default: the change that "
            "raises the loss most while rounding to 8 bits hides it.",
        ),
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also train again with the changed image (an output layer, by Newton).")
    ] = False,
    map_: Annotated[
        Path | None,
        typer.Option("--map", metavar="FILE.png|npy", help="Write the signed map of the pixels of the image."),
    ] = None,
    pixel_step: Annotated[
        str | None,
        typer.Option(
            "--pixel-step",
            metavar="STEP",
            help="Of one 8-bit level in the model's input, where the transform does not tell: 1/255, or one a channel.",
        ),
    ] = None,
    black: Annotated[
        str | None, typer.Option("--black", metavar="X", help="With --pixel-step: the input of black; default 0.")
    ] = None,
    attack: Annotated[
        bool,
        typer.Option(
            "--attack",
            help="Flip the prediction of TEST by changes of training images that rounding to 8 bits hides; the top "
            "layer is trained again after each round.",
        ),
    ] = False,
    images: Annotated[
        int, typer.Option("--images", min=1, metavar="N", help="With --attack: training images to change.")
    ] = 1,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds", min=1, metavar="R", help="With --attack: steps at most, from a tenth of a level down."
        ),
    ] = 60,
    folder: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="With --attack: where the changed images are written.")
    ] = Path("attack"),
    attackable: Annotated[
        bool,
        typer.Option("--attackable", help="Rank the test examples (default: all) that one training image could flip."),
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
    """Estimate how the loss of a test image changes with the pixels of a training image.

    estimated is the rise of the test loss (nats) if the training image x becomes x + δ and the model is trained again,
    to first order in δ: slope · δ, the slope being −(1/n) ∇ₓ(s_testᵀ∇L(x)). replaced is the same without that
    restriction: influence of x minus that of x + δ. channel, row, column and slope are of the steepest pixel, per unit
    of the model's input.

    --attack and --attackable take the layer that gives the output to its minimum and keep what is below it (Koh & Liang
    2017, section 5.2). images are what was changed, flips all test predictions that changed, moved the largest change
    of a pixel in 8-bit levels. gain is by how much one image could lower the margin between label and next class;
    from a ratio of gain to margin of 1 on, it could flip the prediction.

    Examples:

      influence perturb 12 --test 17

      influence perturb 12 --test 17 --map pixels.png --report pixels.html

      influence perturb 12 --test 17 --delta retouched.png

      influence perturb --attackable

      influence perturb --attack --test 17 --images 2 --to attack
    """
    from influence_cli.commands.session import begin
    from influence_cli.perturb.files import check_map
    from influence_cli.report.html import check_page

    if attack and attackable:
        raise InfluenceError("--attack and --attackable are two commands", "run one after the other")
    if (attack or attackable) and (delta or retrain or map_ or report or target != "label"):
        raise InfluenceError(
            f"{'--attack' if attack else '--attackable'} goes with none of --delta, --map, --report, --retrain and "
            "--target",
            "leave them out: an attack trains again by itself, and on the label's loss",
        )
    if not tests and not attackable:
        raise InfluenceError("perturb needs the test example whose loss is explained", "influence perturb 12 --test 17")
    if index is None and not (attack or attackable):
        raise InfluenceError("perturb needs the training image that is changed", "influence perturb 12 --test 17")
    if black is not None and pixel_step is None:
        raise InfluenceError("--black says where the levels of --pixel-step begin", "add --pixel-step 1/255")
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
    _perturb(session, index, tests, target, delta, retrain, map_, (pixel_step, black), report, strict)


def _perturb(
    session: Session,
    index: int,
    words: list[str],
    target: str,
    delta: Path | None,
    retrain: bool,
    map_: Path | None,
    pixels: tuple[str | None, str | None],
    report: Path | None,
    strict: bool,
) -> None:
    from influence_cli.commands.session import emit, load
    from influence_cli.influence.test_gradients import check_target
    from influence_cli.perturb.estimate import perturb_image
    from influence_cli.perturb.files import check_image, write_map
    from influence_cli.perturb.inputs import read_training_image
    from influence_cli.precompute.prepare import prepare_all

    tasks = load(session)
    check_target(target, tasks[0].classes)
    batch = read_training_image(tasks[0], index)
    for file, option in ((report, "--report"), (map_, "--map")):
        if file is not None and file.suffix.lower() != ".npy":
            check_image(batch.inputs[0], option)
    selected = _select(session, tasks, words)
    scale, room = _room(session, tasks[0], batch, pixels)
    change = _change(session, tasks[0], batch, delta, room)
    if retrain and change is None:
        raise InfluenceError(
            "--retrain needs a change, and no 8-bit level is known here", "--delta FILE, or --pixel-step"
        )
    # Without rows: only the inverse curvature is needed, on all its coordinates. This one is made of the rows.
    rows = session.config.curvature.method == "fisher"
    stores = prepare_all(session.config, tasks, session.terminal, on_the_fly=not rows)
    result = perturb_image(
        stores,
        index,
        selected,
        config=session.config,
        change=change,
        target=target,
        retrain=retrain,
        terminal=session.terminal,
        strict=strict,
    )
    found, session.run.scores, session.run.newton = result.effects, result.scores, result.newton
    name = None if change is None else str(delta) if delta is not None else HIDDEN
    emit(session, perturb_rows(tasks[0], batch, found, name), COLUMNS)
    for one in found[:SAID]:
        session.terminal.say(_sentence(one, index, name))
    if map_ is not None:
        write_map(map_, batch.inputs[0], found[0].slope, scale)
        session.terminal.say(f"wrote {map_}{' of the first test example' if len(found) > 1 else ''}")
    if report is not None:
        from influence_cli.pages.perturb import perturb_page
        from influence_cli.report.html import write_page

        page = perturb_page(session, stores, batch, found, scale, name)
        session.terminal.say(f"wrote {report} ({write_page(page, report):,} bytes)")
    elif map_ is None:
        session.terminal.say("next: --map pixels.png shows which pixels")


def _sentence(one: Perturbed, index: int, delta: str | None) -> str:
    """Say what the change does to one test example, or without a change where its loss goes."""
    if one.estimated is None:
        way = "harmful: without it the loss falls" if one.influence < 0 else "helpful: without it the loss rises"
        return f"training image {index} is {way} by about {abs(one.influence):.3g} for {one.test.title()}"
    what = "the steepest change that rounding to 8 bits hides" if delta == HIDDEN else f"the change to {delta}"
    actual = "" if one.actual is None else f"; trained again: {one.actual:+.3g}"
    return (
        f"{what} in training image {index} moves the loss of {one.test.title()} by about {one.estimated:+.3g}, "
        f"{one.test.loss:.3g} now{actual}"
    )


def _select(session: Session, tasks: list[Task], words: list[str]) -> list[Selected]:
    from influence_cli.influence.test_selection import select
    from influence_cli.model.task import misclassified

    return select(words, tasks[0].test, tasks[0].classes, lambda: misclassified(tasks, session.terminal), stdin_lines())


def _room(
    session: Session, task: Task, batch: Batch, pixels: tuple[str | None, str | None]
) -> tuple[PixelScale | None, Ball | None]:
    """Find where 8-bit levels lie in the model's input; where that is unknown and not asked for, do without."""
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
    """Give δ from the slope: the one of --delta, or the steepest that rounding to 8 bits hides."""
    from influence_cli.perturb.files import read_change

    x = batch.inputs[0]
    if delta is not None:
        given = read_change(delta, task.train, x, task.train.title(int(batch.indices[0])))
        return lambda _: given
    if room is None:
        session.terminal.say("no 8-bit level is known here, so the slope alone is given; --delta FILE, or --pixel-step")
        return None
    return lambda slope: room.corner(x, slope).double() - x.double()
