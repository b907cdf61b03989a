"""influence init."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer


def command(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="The folder for influence.yaml.")] = Path(),
) -> None:
    """Write a commented starter influence.yaml.

    Examples:

      influence init

      influence init my-project
    """
    from influence_cli.errors import InfluenceError, describe
    from influence_cli.runtime.terminal import Terminal

    path = folder / "influence.yaml"
    text = files("influence_cli.commands").joinpath("starter.yaml").read_text(encoding="utf-8")
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise InfluenceError(f"{folder} is a file, not a folder", "choose a folder: influence init DIR") from error
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InfluenceError(
            f"{path} exists already", "edit it, or choose another folder: influence init DIR"
        ) from error
    except OSError as error:
        raise InfluenceError(f"{path} cannot be written: {describe(error)}") from error
    Terminal().say(f"wrote {path}; next: name your model, checkpoint and data in it, then run influence check")
