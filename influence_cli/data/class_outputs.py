"""Which output of the model is which class of the data: ``train.classes``, where their numbers are not the same."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from influence_cli.data.split import ClassOutputs, Split
from influence_cli.errors import InfluenceError, describe, did_you_mean


def read_class_outputs(given: Any, where: str) -> ClassOutputs:
    """Read ``train.classes``: names with outputs, labels with outputs, names of all outputs, or a file of one of these.

    Args:
        given: a dict, a list, or a path.
        where: the config's line.

    Raises:
        InfluenceError: a file that cannot be read, another form, or two classes for one output.
    """
    at = where
    if isinstance(given, Path):
        given, at = _read_file(given, where), f"{where}: {given}"
    if isinstance(given, dict) and isinstance(given.get("id2label"), dict):
        given = given["id2label"]
    elif isinstance(given, dict) and isinstance(given.get("label2id"), dict):
        given = given["label2id"]
    if isinstance(given, list | tuple) and given:
        return ClassOutputs({}, {}, {number: _names(name, at) for number, name in enumerate(given)}, where)
    if not isinstance(given, dict) or not given:
        raise InfluenceError(f"{at}: no classes in it", FORMS)
    if all(_is_number(value) for value in given.values()):
        _refuse_shared(given, at)
        by_name = {_word(key, at): value for key, value in given.items()}
        numbers = all(re.fullmatch(r"-?\d{1,9}", key, re.ASCII) for key in by_name)
        return ClassOutputs(by_name, {int(k): v for k, v in by_name.items()} if numbers else {}, {}, where)
    keys = [int(key) if re.fullmatch(r"\d{1,9}", str(key), re.ASCII) else -1 for key in given]
    if not all(_is_number(key) for key in keys) or len(set(keys)) < len(keys):
        raise InfluenceError(f"{at}: classes are neither all names nor all numbers", FORMS)
    return ClassOutputs({}, {}, {key: _names(name, at) for key, name in zip(keys, given.values(), strict=True)}, where)


# Outputs of a model, at most.
MOST = 10_000_000
FORMS = (
    "write {cat: 0, dog: 1}, names with output numbers; [cat, dog], the name of every output; or a file: .json or "
    ".yaml of these, a config.json with id2label, or .txt with a name per line"
)


def decide(given: ClassOutputs, train: Split) -> ClassOutputs:
    """Settle on the training examples, for the test examples too, whether numbers are names and whether names count.

    Args:
        given: what ``train.classes`` says.
        train: with the data set's own names and labels.
    """
    names = train.classes
    if given.by_label:
        is_named = bool(given.by_name.keys() & set(names or ()))
        return replace(given, by_label={}) if is_named else replace(given, by_name={})
    if names is None or not given.names:
        return replace(given, replaces=bool(given.names))
    # A set with more names than outputs, whose labels fit all the same, and do not by its names: as one whose first
    # name stands for no class.
    fits = len(names) > len(given.names) > int(train.labels.max(initial=-1))
    used = (int(label) for label in np.unique(train.labels[train.labels >= 0]))
    return replace(given, replaces=fits and any(_output_of(names[label], given) is None for label in used))


def by_names(test: Split, known: Sequence[str]) -> ClassOutputs | None:
    """Give the numbers of the training set to the classes of a test set that has its names under other numbers.

    Args:
        test: with the data set's own names.
        known: names of the training set, by number; empty where it has none.

    Returns:
        None where the two agree on every name that both have, or where the test set has names that are not known.
    """
    names = test.source_classes or ()
    numbers = {name: number for number, name in enumerate(known)}
    unclear = len(numbers) < len(known) or len(set(names)) < len(names) or not set(names) <= numbers.keys()
    if unclear or all(numbers[name] == number for number, name in enumerate(names)):
        return None
    return ClassOutputs(numbers, {}, {}, test.where)


def map_classes(split: Split, given: ClassOutputs) -> Split:
    """Number the classes of a split as the model's outputs; examples of a class without an output get the label −1.

    Args:
        split: with the data set's own names.
        given: from ``decide``.

    Returns:
        The split with ``class_outputs``, and with ``classes`` and ``mapping`` by output number.

    Raises:
        InfluenceError: the data set has no names to go by, or two of its classes have the same output.
    """
    names = split.classes
    if given.by_label:
        outputs = dict(given.by_label)
        known = {output: names[label] for label, output in outputs.items() if names and 0 <= label < len(names)}
        return _numbered(split, outputs, known)
    if given.replaces:
        return _numbered(split, {output: output for output in given.names}, _first(given))
    if names is None:
        raise InfluenceError(
            f"{given.where}: the {split.name} data set has no class names", "give its label numbers: {0: 3, 1: 7}"
        )
    known = _first(given) if given.names else {output: name for name, output in given.by_name.items()}
    found = {label: _output_of(name, given) for label, name in enumerate(names)}
    outputs = {label: output for label, output in found.items() if output is not None}
    _refuse_shared({names[label]: output for label, output in outputs.items()}, given.where)
    return _numbered(split, outputs, {**known, **{output: names[label] for label, output in outputs.items()}})


def in_outputs(labels: np.ndarray, outputs: Mapping[int, int]) -> np.ndarray:
    """Turn a data set's own labels into output numbers, −1 where there is none."""
    values, at = np.unique(labels, return_inverse=True)
    return np.array([outputs.get(int(value), -1) for value in values], dtype=np.int64)[at.reshape(-1)]


def refuse_missing(split: Split, own: np.ndarray, names: tuple[str, ...] | None, given: ClassOutputs) -> None:
    """Refuse examples in use whose class has no output.

    Args:
        split: after ``map_classes``, with its final labels.
        own: int64 [length], the data set's own labels.
        names: its own class names, or None.
        given: what ``train.classes`` says.

    Raises:
        InfluenceError: naming the class.
    """
    # A hidden label is −1 in the data set itself.
    lost = split.indices[(split.labels[split.indices] < 0) & (own[split.indices] >= 0)]
    if not len(lost):
        return
    label = int(own[lost[0]])
    name = names[label] if names is not None and label < len(names) else None
    if name is None or given.by_label or given.replaces:
        raise InfluenceError(
            f"{given.where}: label {label} of the {split.name} data set has no output",
            f"give it one, or leave its examples out ({split.name}.exclude)",
        )
    words = list(given.by_name) or [word for words in given.names.values() for word in words]
    raise InfluenceError(
        f"{given.where}: class {name} of the {split.name} data set has no output", did_you_mean(name, words)
    )


def _numbered(split: Split, outputs: dict[int, int], known: Mapping[int, str]) -> Split:
    taken, top = set(known.values()), max([*outputs.values(), *known], default=-1)
    classes = tuple(
        known.get(number) or (str(number) if str(number) not in taken else f"output {number}")
        for number in range(top + 1)
    )
    mapping = split.mapping
    if mapping is not None:
        mapping = {name: outputs[label] for name, label in mapping.items() if label in outputs}
    return replace(split, class_outputs=outputs, classes=classes, mapping=mapping)


def _first(given: ClassOutputs) -> dict[int, str]:
    return {output: " / ".join(words) for output, words in given.names.items()}


def _output_of(name: str, given: ClassOutputs) -> int | None:
    """Find the output of a class name: as written, or as one of the words of a name such as ``tench, Tinca tinca``."""
    if name in given.by_name:
        return given.by_name[name]
    hits = [output for output, words in given.names.items() if name in words or name == " / ".join(words)]
    if not hits:
        hits = [
            output
            for output, words in given.names.items()
            if name in (part.strip() for word in words for part in word.split(","))
        ]
    if len(hits) > 1:
        raise InfluenceError(
            f"{given.where}: {name} is the name of the outputs {hits[0]} and {hits[1]}",
            f"write {{{name}: {hits[0]}, …}}",
        )
    return hits[0] if hits else None


def _read_file(path: Path, where: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            return json.loads(text)
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise InfluenceError(f"{where}: {path} cannot be read: {describe(error)}", FORMS) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _names(value: Any, at: str) -> tuple[str, ...]:
    """Take a name, or several of one class."""
    values = value if isinstance(value, list) and value else [value]
    return tuple(_word(each, at) for each in values)


def _word(value: Any, at: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InfluenceError(f"{at}: {value!r} is no class name", 'put it in quotes if it is one: "yes"')
    return str(value)


def _is_number(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def _refuse_shared(outputs: Mapping[Any, int], at: str) -> None:
    owners: dict[int, Any] = {}
    for name, output in outputs.items():
        if output in owners:
            raise InfluenceError(
                f"{at}: {owners[output]} and {name} have the same output {output}",
                "an output is one class; merge the classes in the data set, or correct the number",
            )
        owners[output] = name
