"""Several files that appear together or not at all: each is complete beside its place before the first takes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from influence_cli.report.formats import check_output, unwritable


@dataclass(frozen=True)
class NewFile:
    """A file to be written.

    Attributes:
        path: where it is to appear.
        write: writes the whole of it to the path it is given, which has the same suffix.
        verify: reads it back from there; raises where it is not what was meant.
    """

    path: Path
    write: Callable[[Path], None]
    verify: Callable[[Path], None] = lambda _: None


def write_together(files: Sequence[NewFile]) -> None:
    """Write files so that a failure leaves every one of them as it was.

    All are written and verified beside their places first, under hidden names, and only then renamed; if a rename
    fails, those before it are taken back. A link is kept: what it points to is replaced.

    Raises:
        InfluenceError: one cannot be written, or does not read back.
    """
    for file in files:
        check_output(file.path)
    targets = [Path(os.path.realpath(file.path)) for file in files]
    parts = [_beside(target, "part") for target in targets]
    kept: dict[Path, Path] = {}
    try:
        for file, target, part in zip(files, targets, parts, strict=True):
            try:
                file.write(part)
                with part.open("rb") as stream:
                    os.fsync(stream.fileno())
                if target.exists():
                    kept[target] = _beside(target, "old")
                    shutil.copy2(target, kept[target])
            except OSError as error:
                raise unwritable(file.path, error) from error
            file.verify(part)
        _rename(files, targets, parts, kept)
    finally:
        for path in (*parts, *kept.values()):
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _rename(
    files: Sequence[NewFile], targets: Sequence[Path], parts: Sequence[Path], kept: Mapping[Path, Path]
) -> None:
    done: list[Path] = []
    for file, target, part in zip(files, targets, parts, strict=True):
        try:
            part.replace(target)
            done.append(target)
        except BaseException as error:
            for changed in reversed(done):
                if changed in kept:
                    os.replace(kept[changed], changed)  # noqa: PTH105 (another function than the one that has just failed)
                else:
                    changed.unlink()
            if isinstance(error, OSError):
                raise unwritable(file.path, error) from error
            raise


def _beside(target: Path, word: str) -> Path:
    return target.with_name(f".{target.stem}.influence-{word}{target.suffix}")
