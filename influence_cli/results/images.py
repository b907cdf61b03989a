"""Reads the images of two compared results, from the files that they name or from the data sets of the config."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_cli.data.file_sets import is_within
from influence_cli.errors import InfluenceError, near_path
from influence_cli.report.table import Row
from influence_cli.results.reader import Result

if TYPE_CHECKING:
    from influence_cli.config.schema import DataConfig
    from influence_cli.data.split import Split

# Takes a row and gives the image, as the file or the data set has it; or raises InfluenceError.
Reader = Callable[[Row], Any]


@dataclass(frozen=True)
class Item:
    """Which columns describe an example: of the training set, or of the test set."""

    word: str
    index: str
    path: str
    label: str
    predicted: str | None


TRAINING = Item("example", "index", "path", "label", None)
TEST = Item("test example", "test", "test_path", "test_label", "test_predicted")


def image_reader(
    results: tuple[Result, Result], needed: Sequence[Row], item: Item, config: Path, option: str
) -> Reader:
    """Choose where images come from: the files that the results name, or the data set of the config by position.

    Args:
        results: the two that are compared.
        needed: rows whose images will be read.
        item: training or test examples.
        config: names the data set if the results name no files.
        option: what the images are for, such as ``--report``.

    Raises:
        InfluenceError: a file that a row names is missing, or the data set is not that of the results.
    """
    paths = [row.get(item.path) for result in results for row in result.rows]
    if all(path is not None and not is_within(str(path)) for path in paths):
        places = {id(row): at for row, at in _placed(results)}
        for row in needed:
            if not Path(str(row[item.path])).is_file():
                raise InfluenceError(
                    f"{places[id(row)]}: the image {row[item.path]} is missing",
                    f"run in the folder that the paths are relative to, or leave out {option}",
                )
        return lambda row: _of_file(row, item)
    from influence_cli.config.load import load_config
    from influence_cli.data.datasets import load_split, load_splits
    from influence_cli.data.split import raw_item

    try:
        loaded = load_config(config, ())
    except InfluenceError as error:
        raise InfluenceError(
            f"these results name no files, so {option} needs the data set of the config: {error.message}", error.hint
        ) from error
    # Without a test set in the config, test examples are those of the training set.
    of_test = item is TEST or {result.on for result in results} == {"test"}
    section = (loaded.test if of_test else None) or loaded.train
    if section is loaded.train:
        split = load_split(loaded, "train", section)
        classes = split.classes
    else:
        train, test = load_splits(loaded)
        split, classes = test or train, train.classes
    _check_labels(results, item, split, section, classes, config, option)

    def read(row: Row) -> Any:
        if row[item.index] is None:
            return _of_file(row, item)
        return raw_item(split, int(row[item.index] or 0))[0]

    return read


def _of_file(row: Row, item: Item) -> Any:
    from influence_cli.data.image_files import open_image

    if row.get(item.path) is None:
        raise InfluenceError(
            f"the results have {item.word}s with neither a position nor a file", "rank again with -o FILE"
        )
    return open_image(Path(str(row[item.path])))


def _check_labels(
    results: tuple[Result, Result],
    item: Item,
    split: Split,
    section: DataConfig,
    classes: Sequence[str] | None,
    config: Path,
    option: str,
) -> None:
    """Refuse a data set whose labels are not those of the results: its images at these positions are different.

    The labels of the data set itself are right too: a result may be older than ``labels`` in the config.
    """
    from influence_cli.data.datasets import source_labels

    known = [split.labels] if section.labels is None else [split.labels, source_labels(split)]

    def name(number: int) -> str:
        return classes[number] if classes is not None and 0 <= number < len(classes) else str(number)

    for row, place in _placed(results):
        index, label = row[item.index], row.get(item.label)
        if not isinstance(index, int) or label is None:
            continue
        names = [name(int(labels[index])) for labels in known] if 0 <= index < len(split.labels) else []
        if str(label) not in names:
            there = f"it is labelled {names[0]}" if names else "it does not exist"
            other = "another data set" + ("" if split.name == "test" else " (or from --on test)")
            raise InfluenceError(
                f"{place}: {item.word} {index} is labelled {label}, but in the {split.name} data set of "
                f"{near_path(config)} {there}: these results are from {other}",
                f"name the config of their data set with -c, or leave out {option}",
            )


def _placed(results: tuple[Result, Result]) -> Iterator[tuple[Row, str]]:
    for result in results:
        yield from zip(result.rows, result.places, strict=True)
