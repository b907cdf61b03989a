"""Files besides the examples that the user's code reads: arrays of labels, tables, statistics."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from influence_cli.config.schema import Config
from influence_cli.config.source_code import is_installed
from influence_cli.data.image_files import LISTED_SUFFIXES
from influence_cli.data.split import Split

CODE = {".py", ".pyc", ".pyi", ".so", ".pyd"}
# Images are examples: a data set that does not say which are its own has a sample of its inputs hashed.
IMAGES = LISTED_SUFFIXES | {".gif", ".jp2", ".avif", ".heic"}


def side_files(config: Config, train: Split, opened: Iterable[Path]) -> tuple[Path, ...]:
    """Choose, among opened files and those that arguments name, what the numbers depend on and no other check covers.

    Args:
        config: of the run; its own files are compared by what they say.
        train: the training examples, whose files are compared already.
        opened: what was read while the data set, the transform and the loss were made.

    Returns:
        Files in the project's folder, the current one, or where an argument of the data set points.
    """
    folder, section = config.folder, config.train
    steps = [step.args for step in section.transform or ()]
    named = list(_paths([section.args, steps, config.loss.args], folder))
    places = [folder, Path.cwd(), *named]
    known = {config.path, config.gradients.store, *(source.file for source in config.model.sources if source)}
    known |= {
        path for path in (section.csv, section.labels, section.exclude, section.classes) if isinstance(path, Path)
    }
    if section.folder is not None or section.huggingface:
        known.add(folder / (section.folder or section.huggingface))
    skipped = {os.path.abspath(path) for path in known}  # noqa: PTH100 (as the opened ones are spelt)
    chosen = [
        file
        for file in dict.fromkeys([*opened, *(path for path in named if path.is_file())])
        if file.suffix.lower() not in CODE | IMAGES
        and not any(str(place) in skipped for place in (file, *file.parents))
        and any(file.is_relative_to(place) for place in places)
        and not is_installed(file)
        and file.is_file()
    ]
    if not chosen:
        return ()
    names = train.files.names if train.files is not None else train.paths or ()
    examples = {os.path.abspath(folder / name) for name in names}  # noqa: PTH100
    return tuple(sorted(file for file in chosen if str(file) not in examples))


def _paths(value: Any, folder: Path) -> Iterator[Path]:
    """List the files and folders that arguments name."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _paths(item, folder)
    elif isinstance(value, str) and value and len(value) < 1000 and "\0" not in value:
        path = Path(os.path.abspath(folder / os.path.expanduser(value)))  # noqa: PTH100, PTH111
        try:
            if path.exists():
                yield path
        except OSError:
            return
