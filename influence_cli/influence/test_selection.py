"""Which test examples: an index, a slice a:b, an image file, ``misclassified``, or a list on stdin."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from influence_cli.data.label_files import class_number
from influence_cli.data.split import Split, refuse_unlabelled, row_of
from influence_cli.errors import InfluenceError, quoted

FORMS = "TEST is an index, a slice a:b, an image file, misclassified, or - for a list on stdin"


@dataclass(frozen=True)
class Selected:
    """A test example, not read yet.

    Attributes:
        index: its position in the test set; None for a file.
        file: an image file; None for a position.
        label: the class to use as its label; None where there is none.
    """

    index: int | None
    file: Path | None
    label: int | None


def select_tests(
    words: Sequence[str],
    split: Split | None,
    classes: Sequence[str],
    misclassified: Callable[[], np.ndarray],
    lines: Iterable[str] = (),
) -> list[Selected]:
    """Resolve the TEST arguments, in the order given.

    Args:
        words: the arguments.
        split: the test examples; None where the config has none.
        classes: class names.
        misclassified: gives the positions that the model misclassifies; called only if needed.
        lines: stdin, read only for ``-``: ``TEST`` or ``TEST<tab>LABEL`` per line.

    Raises:
        InfluenceError: a word of another form, an index out of range, a label that does not exist, nothing selected.
    """
    selected: list[Selected] = []
    for word in words:
        if word == "-":
            for number, line in enumerate(lines, start=1):
                text = line.rstrip("\r\n")
                if not text.strip():
                    continue
                test, _, label_name = text.partition("\t")
                where = f"stdin:{number}"
                label = class_number(label_name, classes, where) if label_name else None
                selected += _one(test, split, label, misclassified, f"{where}: ")
        else:
            selected += _one(word, split, None, misclassified, "")
    if not selected:
        raise InfluenceError(f"no test example is selected by {' '.join(words)}", FORMS)
    return selected


def _one(
    word: str, split: Split | None, label: int | None, misclassified: Callable[[], np.ndarray], where: str
) -> list[Selected]:
    if word == "misclassified":
        positions = misclassified()
        return [_position(_needed(split, word, where), int(index), label, where) for index in positions]
    if re.fullmatch(r"\d{1,4000}", word, re.ASCII):
        return [_position(_needed(split, word, where), int(word), label, where)]
    match = re.fullmatch(r"(\d{0,4000}):(\d{0,4000})", word, re.ASCII)
    if match:
        split = _needed(split, word, where)
        length = len(split.source)
        start, stop = int(match[1] or 0), int(match[2] or length)
        if stop > length or start >= stop:
            raise InfluenceError(
                f"{where}the slice {word} is empty or out of range; valid indices are 0 to {length - 1}"
            )
        inside = split.indices[(split.indices >= start) & (split.indices < stop)]
        return [_position(split, int(index), label, where) for index in inside]
    path = Path(word)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # a name too long for a file, or with a zero byte
        is_file = is_folder = False
    if not is_file:
        problem = " is a folder" if is_folder else ": no such file or index"
        raise InfluenceError(f"{where}{quoted(word)}{problem}", FORMS)
    return [Selected(None, path, label)]


def _needed(split: Split | None, word: str, where: str) -> Split:
    if split is None:
        raise InfluenceError(
            f"{where}{word} selects test examples, but the config has no test data set",
            "add a section test: {dataset: …, args: {…}}, or give an image file",
        )
    return split


def _position(split: Split, index: int, label: int | None, where: str) -> Selected:
    length = len(split.source)
    if index >= length:
        raise InfluenceError(f"{where}there is no {split.name} example {index}; valid indices are 0 to {length - 1}")
    if row_of(split.indices, index) is None:
        raise InfluenceError(f"{where}{split.title(index)} is excluded ({split.name}.exclude)")
    return at_position(split, index) if label is None else Selected(index, None, label)


def at_position(split: Split, index: int) -> Selected:
    """Select the example at a position, with its label if it has one."""
    label = int(split.labels[index])
    return Selected(index, None, label if label >= 0 else None)


def refuse_without_label(selected: Iterable[Selected], split: Split | None, target: str) -> None:
    """Refuse positions without a label where the loss of their label is explained."""
    if target == "label" and split is not None:
        for item in selected:
            if item.index is not None and item.label is None:
                refuse_unlabelled(split, "--target predicted explains the predicted class; ")
