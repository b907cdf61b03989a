"""Load the task of a project in this process, or the error that it is refused with."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_cli.config.load import load_config
from influence_cli.errors import InfluenceError
from influence_cli.model.task import Task, load_tasks


def load(project: Path, *values: str) -> Task:
    """Load the one task of a project, with some values of its config set."""
    (task,) = load_tasks(load_config(project / "influence.yaml", values))
    return task


def refused(project: Path, *values: str) -> InfluenceError:
    """Give the error that loading ends with."""
    with pytest.raises(InfluenceError) as caught:
        load(project, *values)
    return caught.value
