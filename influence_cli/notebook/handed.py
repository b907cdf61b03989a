"""The objects of a notebook in the place of what a config names: its factories are the functions here.

Each gives what ``handing`` holds while its block runs. So an object takes the same path, with the same checks, as the
name of a function in a YAML file. The parameters ``code`` and ``written`` only tell a store that an object has changed.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import xxhash
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from influence_cli.errors import InfluenceError, describe

MEANS = ("mean", "none")


@dataclass(frozen=True)
class Examples:
    """A data set, and the transform that was taken off it, so that its pictures can be shown."""

    source: Any
    transform: Callable[[Any], Any] | None


@dataclass(frozen=True)
class Handed:
    """What the notebook gave; ``loss`` is a callable that no known loss covers, or None."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor] | None
    train: Examples
    test: Examples | None


_held: ContextVar[Handed] = ContextVar("handed")


@contextmanager
def handing(handed: Handed) -> Iterator[None]:
    """Let the factories of this module give these objects."""
    token = _held.set(handed)
    try:
        yield
    finally:
        _held.reset(token)


def model(code: str) -> nn.Module:  # noqa: ARG001
    """Copy the model: what is added to it, and the device it moves to, are not the notebook's."""
    return copy.deepcopy(_held.get().model)


def train() -> Any:
    """Give the training examples."""
    return _held.get().train.source


def test() -> Any:
    """Give the test examples."""
    return _of_test().source


def train_transform(written: str) -> Any:  # noqa: ARG001
    """Give the transform of the training examples."""
    return _held.get().train.transform


def test_transform(written: str) -> Any:  # noqa: ARG001
    """Give the transform of the test examples."""
    return _of_test().transform


def _of_test() -> Examples:
    examples = _held.get().test
    if examples is None:
        raise ValueError("there are no test examples")
    return examples


class Loss(nn.Module):
    """A loss of the notebook's own, on the model's device, one number per example where it has a reduction."""

    def __init__(self, code: str) -> None:  # noqa: ARG002
        super().__init__()
        given = _held.get().loss
        if given is None:
            raise ValueError("there is no loss")
        self.function: Callable[[Tensor, Tensor], Tensor] = given
        if isinstance(given, nn.Module):
            self.function = own = copy.deepcopy(given)
            if getattr(own, "reduction", None) == "mean":
                own.reduction = "none"  # type: ignore[assignment]

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give the losses [b]."""
        return self.function(outputs, targets)


def examples_of(given: object, name: str) -> Examples:
    """Take the data set out of what was given for ``train`` or ``test``.

    Args:
        given: a data set with a length and items by index, or a DataLoader of one.
        name: of the argument, for errors.

    Raises:
        InfluenceError: it has no length or no items by index, or a loader makes its inputs only in a batch.
    """
    if isinstance(given, DataLoader):
        if getattr(given.collate_fn, "__module__", "") != "torch.utils.data._utils.collate":
            raise InfluenceError(
                f"{name}: the DataLoader has a collate_fn of its own, but examples are read one by one",
                "give a data set whose items are (input, label)",
            )
        given = given.dataset
    try:
        if isinstance(given, IterableDataset) or not hasattr(given, "__getitem__"):
            raise TypeError("it has no items by index")
        len(given)  # type: ignore[arg-type]
    except Exception as error:
        why = str(error) if isinstance(error, TypeError) else describe(error)
        raise InfluenceError(
            f"{name}: a {type(given).__name__} is not a data set with a length and items by index ({why})",
            "give a map-style data set: with __len__, and with __getitem__ that returns (input, label)",
        ) from error
    return _without_transform(given)


def _without_transform(source: Any) -> Examples:
    """Take the transform off a data set of torchvision's, also inside of a ``Subset``: its pictures can be shown then.

    A class of the user's own, which may use its transform in another way, stays as it is.
    """
    if type(source) is Subset:
        inner = _without_transform(source.dataset)
        return (
            Examples(source, None)
            if inner.transform is None
            else Examples(Subset(inner.source, source.indices), inner.transform)
        )
    getter = getattr(type(source), "__getitem__", None)
    names = getattr(getattr(getter, "__code__", None), "co_names", ())
    of_library = str(getattr(getter, "__module__", "")).startswith("torchvision.datasets.")
    if not of_library or "transform" not in names or "transforms" in names or not callable(source.transform):
        return Examples(source, None)
    bare = copy.copy(source)
    bare.transform = None
    return Examples(bare, source.transform)


def code_of(thing: object) -> str:
    """Hash the sources of an object's class, or of those of all its modules, or of a function.

    A source that cannot be found, such as one typed into Python, counts as its name.
    """
    inside = thing.modules() if isinstance(thing, nn.Module) else [thing]
    texts = set()
    for part in inside:
        made = part if inspect.isroutine(part) else type(part)
        text = f"{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', '')}"
        if not text.startswith("torch."):
            with suppress(OSError, TypeError):
                text = inspect.getsource(made)
        texts.add(text)
    return xxhash.xxh3_64_hexdigest("\0".join(sorted(texts)).encode(errors="surrogatepass"))
