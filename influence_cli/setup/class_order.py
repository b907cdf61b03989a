"""Which output of the model is which class of the data: by names where both have them, else in the order of the data.

Folders are numbered in sorted order. A model that was trained elsewhere may have another order, or more classes.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass

from influence_cli.errors import InfluenceError, few
from influence_cli.setup.guesses import ModelGuess


@dataclass(frozen=True)
class Order:
    """The output of each class.

    Attributes:
        outputs: by class name; None where class i is output i.
        why: what says so.
        open: whether nothing says so, and predictions should.
        remark: what people should know, or an empty text.
    """

    outputs: dict[str, int] | None
    why: str = ""
    open: bool = False
    remark: str = ""


def guess_order(model: ModelGuess, classes: Sequence[str] | None, count: int) -> Order:
    """Match class names of the data with those of the outputs.

    Args:
        model: its number of outputs and their names, if any.
        classes: names by class number, or None where the data have numbers alone.
        count: classes in the data.

    Raises:
        InfluenceError: the data have more classes than the model has outputs.
    """
    outputs = 2 if model.outputs == 1 else model.outputs
    if outputs is not None and count > outputs:
        raise InfluenceError(
            f"the model has {outputs} outputs, but the data have {count} classes"
            + (f" ({few(classes)})" if classes else ""),
            "is this the data that it was trained on, or a folder above or below?",
        )
    if classes is None:
        return Order(None, open=False)
    for names, why in _names(model, outputs):
        matched = match(classes, names)
        if matched is None:
            continue
        if list(matched.values()) == list(range(count)) and count == outputs:
            return Order(None)
        return Order(matched, why)
    remark = ""
    if model.names is not None:
        remark = f"the class names in the checkpoint ({few(model.names)}) are not those of the data ({few(classes)})"
    if outputs is not None and count < outputs:
        return Order({name: number for number, name in enumerate(classes)}, open=True, remark=remark)
    return Order(None, open=True, remark=remark)


def match(classes: Sequence[str], names: Sequence[str]) -> dict[str, int] | None:
    """Find each class among the names of the outputs; None unless every one is there once.

    Case, spaces and punctuation do not count, and ``tench, Tinca tinca`` has two names.
    """
    if len(set(names)) == len(names) and set(classes) <= set(names):
        return {name: names.index(name) for name in classes}
    known: dict[str, set[int]] = {}
    for number, name in enumerate(names):
        for word in {name, *name.split(",")}:
            known.setdefault(_key(word), set()).add(number)
    matched = {name: known.get(_key(name), set()) for name in classes}
    if any(len(numbers) != 1 for numbers in matched.values()):
        return None
    outputs = {name: next(iter(numbers)) for name, numbers in matched.items()}
    return outputs if len(set(outputs.values())) == len(outputs) else None


def by_number(classes: Sequence[str]) -> dict[str, int] | None:
    """Number classes whose names are numbers by these, where sorted as words they have another order (1, 10, 2)."""
    if not all(name.isascii() and name.isdecimal() and len(name) < 10 for name in classes):
        return None
    ordered = sorted(classes, key=int)
    return None if ordered == list(classes) else {name: number for number, name in enumerate(ordered)}


def _names(model: ModelGuess, outputs: int | None) -> list[tuple[Sequence[str], str]]:
    """List names by output: those of the checkpoint, and ImageNet's for a thousand outputs."""
    lists: list[tuple[Sequence[str], str]] = []
    if model.names is not None and len(model.names) == outputs:
        lists.append((model.names, model.names_why))
    if outputs == 1000 and model.names is None:
        from torchvision.models import ResNet18_Weights

        lists.append((ResNet18_Weights.DEFAULT.meta["categories"], "the 1,000 classes of ImageNet"))
        if importlib.util.find_spec("timm") is not None:
            from timm.data import ImageNetInfo

            lists.append((ImageNetInfo("imagenet-1k").label_names(), "the WordNet numbers of ImageNet"))
    return lists


def _key(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold() or name
