"""What the tests of Parquet files and of tar shards share: pictures, and a project that is read from such files."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from influence_cli.config.load import load_config
from influence_cli.config.schema import Config
from influence_cli.errors import InfluenceError
from tests.conftest import Command, make_project


def encoded(number: int, size: tuple[int, int] = (6, 5), mode: str = "RGB", kind: str = "PNG") -> bytes:
    """Encode a picture in which every pixel depends on a number."""
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3)).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind)
    return out.getvalue()


def refused(action: Callable[[], object]) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        action()
    assert "\n" not in caught.value.message
    return caught.value


def as_data_files(project: Path, dataset: str, files: str) -> Config:
    """Let a project's config name files instead of folders: ``files`` has the part, ``train`` or ``test``, for {0}."""
    path = project / "influence.yaml"
    text = path.read_text()
    for part in ("train", "test"):
        old = f"  dataset: torchvision.datasets.ImageFolder\n  args: {{root: {part}}}"
        assert old in text
        text = text.replace(old, f"  dataset: {dataset}\n  args: {{files: '{files.format(part)}'}}")
    path.write_text(text)
    return load_config(path)


def assert_same_results(
    influence: Command, folder: Path, convert: Callable[[Path], object], path: re.Pattern[str]
) -> None:
    """Compare what the commands say of an ImageFolder with what they say of the same images in other files.

    Args:
        influence: runs a command.
        folder: a project of real images is made there.
        convert: writes the files, and lets the config name them.
        path: what stands for an example's path afterwards.
    """
    project = make_project(folder / "project", 160, 80)
    commands = (("rank", "3", "--top", "20"), ("mislabels", "--all"))
    expected = [_rows(influence(*words, "--format", "csv", cwd=project).out)[0] for words in commands]
    (project / "influence.h5").unlink()
    convert(project)
    influence("gradients", cwd=project)
    for words, own in zip(commands, expected, strict=True):
        page = folder / f"{words[0]}.html"
        found, paths = _rows(influence(*words, "--format", "csv", "--report", page, cwd=project).out)
        assert found == own
        assert all(map(path.fullmatch, paths))
        assert page.read_text().count("<img") > 20  # pictures out of the files


def _rows(text: str) -> tuple[list[dict[str, str]], list[str]]:
    """Read rows without their paths, and the paths."""
    found = list(csv.DictReader(io.StringIO(text)))
    paths = [row.pop(name) for row in found for name in ("path", "test_path") if row.get(name)]
    assert len(paths) >= len(found) > 20
    return found, paths
