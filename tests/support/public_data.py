"""Real data where it is there: a test that finds none is skipped, and says how to get it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.public_data import find, how_to_get


def shared(name: str) -> Path:
    """Name the folder of a real data set, or skip with a reason."""
    folder = find(name)
    if folder is None:
        pytest.skip(how_to_get(name))
    return folder
