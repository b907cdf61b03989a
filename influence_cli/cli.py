"""The command line: registers the commands, and turns every outcome into an exit code.

0 ok · 1 findings above --fail-above · 2 any error · 130 Ctrl-C. A closed pipe is 0. Nothing here imports torch.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from influence_cli import __version__
from influence_cli.commands import (
    check,
    compare,
    convert,
    gradients,
    groups,
    index,
    init,
    perturb,
    rank,
    select,
    train,
    verify,
)
from influence_cli.commands.labels import duplicates, issues, mislabels, relabel, review
from influence_cli.config import moved
from influence_cli.demo import command
from influence_cli.errors import InfluenceError, Stopped, one_line, printable
from influence_cli.runtime import distributed
from influence_cli.runtime.stdio import discard_stdout, open_missing, settle_stdout
from influence_cli.runtime.stdout import end_rows, rows_apart
from influence_cli.runtime.terminal import Terminal

# Commands whose work several processes share (runtime/distributed.py). The first process alone runs any other command.
SPREAD = ("gradients", "rank", "mislabels", "verify")
# The base of what typer raises for a wrong option or argument; it has no public name there.
_ClickException: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class _Group(TyperGroup):
    """Ends every command the same way."""

    def make_context(self, *args: Any, **words: Any) -> Any:
        """Read the options. --help and --version print here, and the reader of the pipe may be gone."""
        try:
            return super().make_context(*args, **words)
        except BrokenPipeError:
            discard_stdout()
            raise SystemExit(0) from None
        except OSError as error:
            _refuse_stdout(error)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            if distributed.speaks(130):
                Terminal().say("interrupted before the command started")
            raise SystemExit(130) from None
        except Exception as error:
            _refuse_usage(error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error becomes one line on stderr and an exit code."""
        moved.tell = Terminal().warn
        try:
            result = super().invoke(ctx)
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                raise
            except OSError as error:
                _refuse_stdout(error)
                raise typer.Exit(2) from None
            return result
        except distributed.Finished:
            raise typer.Exit(0) from None
        except InfluenceError as error:
            _print_error(error.message, error.hint)
            raise typer.Exit(distributed.ending(2)) from None
        except KeyboardInterrupt as error:
            kept = str(error) if isinstance(error, Stopped) else "finished work is kept; run the same command to resume"
            if distributed.speaks(130):  # whichever process that is
                Terminal().console.print(printable(f"interrupted: {kept}"), markup=False)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            distributed.speaks(0)
            discard_stdout()
            raise typer.Exit(0) from None
        except MemoryError:
            _print_error("out of memory", "track fewer layers (gradients.layers), or use a smaller gradients.block")
            raise typer.Exit(2) from None
        except Exception as error:
            _refuse_usage(error)
            if hasattr(error, "exit_code") or isinstance(error, typer.Abort):
                raise  # typer's own ways to end
            _print_unexpected(error, ctx)
            raise typer.Exit(2) from None
        except BaseException as error:  # SystemExit and the like: no command of ours ends so, and 1 is for findings
            _print_unexpected(error, ctx)
            raise typer.Exit(2) from None


class _Command(TyperCommand):
    def make_context(self, *args: Any, **words: Any) -> Any:
        """Read the options; --help prints here."""
        try:
            return super().make_context(*args, **words)
        except BrokenPipeError:
            raise
        except OSError as error:
            _refuse_stdout(error)
            raise typer.Exit(2) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with stdout for its rows alone."""
        with rows_apart():
            return super().invoke(ctx)


def _print_unexpected(error: BaseException, context: Any) -> None:
    from influence_cli.config.raised import explain

    _print_error(*explain(error, context.invoked_subcommand or "influence"))


def _refuse_usage(error: Exception) -> None:
    """Print a mistake on the command line like any other error: typer would print three lines of its own."""
    if not isinstance(error, _ClickException) or type(error).__name__ == "NoArgsIsHelpError":
        return
    message = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    _print_error(
        message[:1].lower() + message[1:], f"{context.command_path if context else 'influence'} -h lists the options"
    )
    raise SystemExit(2) from None


def _refuse_stdout(error: OSError) -> None:
    _print_error(
        f"stdout cannot be written: {error.strerror or error}", "send it to a pipe, or to a disk with free space"
    )


def _print_error(message: str, hint: str) -> None:
    from rich.text import Text

    if os.environ.get("INFLUENCE_DEBUG"):
        traceback.print_exc()
    if not distributed.speaks(2):
        return
    console = Terminal().console
    console.print(Text.assemble(("error: ", "bold red"), one_line(distributed.whose() + message)))
    if hint:
        console.print(Text(f"  {one_line(hint)}"))


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
        sys.stdout.flush()
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version
    count = distributed.started()[1]
    if count > 1 and context.invoked_subcommand not in SPREAD:
        if not distributed.started_first():
            raise typer.Exit(0)
        Terminal().say(f"{context.invoked_subcommand} runs in one process: {count - 1} of {count} processes have ended")
        distributed.stay_alone()


for _name, _module in (
    ("demo", command),
    ("init", init),
    ("check", check),
    ("train", train),
    ("gradients", gradients),
    ("rank", rank),
    ("groups", groups),
    ("mislabels", mislabels),
    ("review", review),
    ("relabel", relabel),
    ("duplicates", duplicates),
    ("issues", issues),
    ("compare", compare),
    ("verify", verify),
    ("select", select),
    ("perturb", perturb),
    ("index", index),
    ("convert", convert),
):
    app.command(_name, cls=_Command)(_module.command)


def main() -> None:
    """Run the command line."""
    open_missing()
    if not distributed.started_first():
        discard_stdout()  # one process writes rows, --help and the version
    try:
        app()
    finally:
        settle_stdout()
        end_rows()
        distributed.leave()
