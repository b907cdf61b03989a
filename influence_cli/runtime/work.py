"""What a command is doing: the part of the work and the examples, for an error that nobody expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from influence_cli.errors import InfluenceError

Trial = Callable[[Any, Any], object]

# Mark the notes that ``during`` and ``examples`` leave on an exception (PEP 678).
_DURING, _AT = "during ", "at "
# Runs of model and loss on (inputs, targets) of one example, one per checkpoint that was loaded last.
trials: list[Trial] = []
# Names of the examples that are being computed, the latest last.
_examples: list[Callable[[], str]] = []


@contextmanager
def during(what: str) -> Iterator[None]:
    """Note on an unexpected exception which part of the work it stopped.

    Args:
        what: such as ``gradients of influence.h5``.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, InfluenceError):
            error.add_note(_DURING + what)
        raise


@contextmanager
def examples(name: Callable[[], str]) -> Iterator[None]:
    """Say which examples are in work while the block runs; they are named only if it comes to an error."""
    _examples.append(name)
    try:
        yield
    except Exception as error:
        if not isinstance(error, InfluenceError):
            error.add_note(_AT + name())
        raise
    finally:
        _examples.remove(name)


def fails_alone(inputs: Any, targets: Any) -> bool:
    """Say whether model or loss fail on one example by itself."""
    for trial in trials:
        try:
            trial(inputs, targets)
        except KeyboardInterrupt:
            raise
        except BaseException:
            return True
    return False


def where_it_stopped(error: BaseException) -> tuple[str, str]:
    """Give the example, or the examples, and the innermost part of the work at which an exception came; or nothing."""
    notes = [str(note) for note in getattr(error, "__notes__", ())]
    part = next((note.removeprefix(_DURING) for note in notes if note.startswith(_DURING)), "")
    at = next((note.removeprefix(_AT) for note in notes if note.startswith(_AT)), "")
    return at or (_examples[-1]() if _examples else ""), part
