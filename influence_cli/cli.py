"""The command line: registers the commands, and turns every ending into its exit code.

0 ok · 1 findings above --fail-above · 2 any error · 130 Ctrl-C. A closed pipe is 0. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from influence_cli import __version__
from influence_cli.commands import check, demo, gradients, init, mislabels, rank
from influence_cli.errors import InfluenceError, Stopped
from influence_cli.terminal import Terminal


class _Group(TyperGroup):
    """Ends every command the same way."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes one line on stderr and an exit code."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except InfluenceError as error:
            if os.environ.get("INFLUENCE_DEBUG"):
                raise
            _print_error(error.message, error.hint)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            kept = str(error) if isinstance(error, Stopped) else "finished work is kept; run the same command to go on"
            Terminal().say(f"interrupted: {kept}")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader has what it wanted (| head). Python would complain once more while closing stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except MemoryError:
            _print_error("memory ran out", "track fewer layers (gradients.layers), or use a smaller gradients.block")
            raise typer.Exit(2) from None


def _print_error(message: str, hint: str) -> None:
    from rich.text import Text

    console = Terminal().console
    # Messages may carry file names: nothing in them may move the cursor.
    console.print(Text.assemble(("error: ", "bold red"), _printable(message)))
    if hint:
        console.print(Text(f"  {_printable(hint)}"))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


app = typer.Typer(
    name="influence",
    cls=_Group,
    help="Which training images made the model say this, and which labels are wrong?",
    epilog="Start here: influence demo",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"influence {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


for _name, _module in (
    ("demo", demo),
    ("init", init),
    ("check", check),
    ("gradients", gradients),
    ("rank", rank),
    ("mislabels", mislabels),
):
    app.command(_name)(_module.command)


def main() -> None:
    """Run the command line."""
    app()
