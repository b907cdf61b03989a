"""influence init."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

CONFIG = Path("influence.yaml")
KEPT = "it is not replaced: move it, or run init in another folder"


def command(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DIR | CHECKPOINT DATA [TEST]]",
            help="The folder for a starter; or a checkpoint, its training data and its test data.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODULE:NAME", help="The function or class that builds the model of CHECKPOINT."),
    ] = None,
) -> None:
    """Write influence.yaml: from a checkpoint and its data, or as a commented starter.

    With a checkpoint it looks: the architecture, the classes, the form of the data, the transform that the model is
    most often right with. A comment says what each line was guessed from. Then it runs influence check.

    Examples:

      influence init runs/best.pt data/

      influence init lightning.ckpt data/train data/val --model net:LitNet

      influence init
    """
    from influence_cli.errors import InfluenceError

    given = paths or []
    if len(given) > 3:
        raise InfluenceError(
            f"init takes a checkpoint, training data and test data, not {len(given)} paths",
            "influence init CHECKPOINT DATA [TEST]",
        )
    if len(given) > 1:
        _look(given[0], given[1], given[2] if len(given) > 2 else None, model)
    elif model is not None:
        raise InfluenceError(
            "--model goes with a checkpoint and its data",
            f"influence init CHECKPOINT DATA --model {shlex.quote(model)}",
        )
    else:
        _start(given[0] if given else Path())


def _look(checkpoint: Path, data: Path, test: Path | None, model: str | None) -> None:
    """Write a config for a checkpoint and data, and check it."""
    import os

    from influence_cli.commands import check
    from influence_cli.errors import InfluenceError
    from influence_cli.runtime.terminal import Terminal

    if os.path.lexists(CONFIG):
        raise InfluenceError(f"{CONFIG} exists already", KEPT)
    given = [str(path) for path in (checkpoint, data, test) if path is not None]
    words = ["influence", "init", *given, *(["--model", model] if model is not None else [])]
    terminal = Terminal()
    with terminal.status("loading torch"):
        from influence_cli.setup.plan import plan_config
    text = plan_config(CONFIG, shlex.join(words), checkpoint, data, test, model, terminal)
    _write_new(CONFIG, text, KEPT)
    terminal.say(f"wrote {CONFIG}; its comments say what each line was guessed from")
    check.command(config=CONFIG)


def _start(folder: Path) -> None:
    """Write the starter."""
    from influence_cli.errors import InfluenceError, describe
    from influence_cli.runtime.terminal import Terminal

    path = folder / CONFIG
    text = files("influence_cli.commands").joinpath("starter.yaml").read_text(encoding="utf-8")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise InfluenceError(
            f"{folder} is a file, not a folder",
            f"for a checkpoint name its data too: influence init {shlex.quote(str(folder))} DATA [TEST]; "
            "or choose a folder: influence init DIR",
        ) from error
    except OSError as error:
        raise InfluenceError(f"{path} cannot be written: {describe(error)}") from error
    _write_new(path, text, "edit it, or choose another folder: influence init DIR")
    Terminal().say(
        f"wrote {path}; next: name your model, checkpoint and data in it, then run influence check "
        "(influence init CHECKPOINT DATA writes one that is complete)"
    )


def _write_new(path: Path, text: str, hint: str) -> None:
    """Write a file that must not be there yet."""
    from influence_cli.errors import InfluenceError, describe

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InfluenceError(f"{path} exists already", hint) from error
    except OSError as error:
        raise InfluenceError(f"{path} cannot be written: {describe(error)}") from error
