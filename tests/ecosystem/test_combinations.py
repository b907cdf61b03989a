"""Checkpoints, data and transforms as libraries write them give the rows that the plain state dict gives."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.ecosystem.combinations import COMBINATIONS, INIT, INIT_ALIKE, Combination
from tests.ecosystem.pictures import pictures
from tests.ecosystem.projects import key_of, make_project, make_reference, number_of

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries

RANK = ("rank", "0:3", "--top", 5, "--format", "jsonl")
MISLABELS = ("mislabels", "--top", 12, "--format", "jsonl")
CHECK = ("check", "--format", "jsonl")
PARAMETERS = [
    pytest.param(combination, id=combination.name, marks=() if combination.quick else pytest.mark.ecosystem)
    for combination in COMBINATIONS
]
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def known(one_thread: None) -> dict[str, tuple[Rows, Rows]]:
    """The rows of references, by what they depend on."""
    return {}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and no module of one project for the next."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "YOLO_OFFLINE", "NO_ALBUMENTATIONS_UPDATE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("YOLO_VERBOSE", "false")  # it logs to the stdout of the test that imports it first
    for name in ("HF_HOME", "YOLO_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in sys.modules.keys() - before:
        if (file := getattr(sys.modules[name], "__file__", None)) and Path(file).is_relative_to(tmp_path):
            del sys.modules[name]


def rows_of(text: str) -> Rows:
    return [json.loads(line) for line in text.splitlines()]


def comparable(rows: Rows, combination: Combination) -> Rows:
    """Leave out paths, which the plain tensors do not have, and give outputs for class names."""
    labels = ("test_label", "test_predicted", "label", "predicted", "suggested")
    return [
        {
            key: number_of(combination, value) if key in labels else value
            for key, value in row.items()
            if not key.endswith("path")
        }
        for row in rows
    ]


def assert_same(rows: Rows, expected: Rows, combination: Combination) -> None:
    rows, expected = comparable(rows, combination), comparable(expected, combination)
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
        numbers = {key for key, value in other.items() if isinstance(value, float)}
        assert {key: row[key] for key in row.keys() - numbers} == {key: other[key] for key in other.keys() - numbers}
        assert [row[key] for key in numbers] == pytest.approx([other[key] for key in numbers], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("combination", PARAMETERS)
def test_the_rows_are_those_of_the_plain_state_dict(
    combination: Combination, tmp_path: Path, influence: Command, known: dict[str, tuple[Rows, Rows]]
) -> None:
    for package in combination.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-ecosystem")
    project = tmp_path / "project"
    project.mkdir()
    state, apply = make_project(project, combination)
    if combination.checkpoint.convert:
        wanted = Path(combination.checkpoint.model.partition("checkpoint: ")[2])
        influence("convert", combination.checkpoint.convert, "-o", wanted, "--trust", cwd=project)
    checked = influence(*CHECK, cwd=project)
    measured = {row["item"]: row["value"] for row in rows_of(checked.out)}
    assert measured
    rows = (rows_of(influence(*RANK, cwd=project).out), rows_of(influence(*MISLABELS, cwd=project).out))
    key = key_of(combination, state)
    if key not in known:
        plain = tmp_path / "plain"
        plain.mkdir()
        make_reference(plain, combination, state, apply)
        known[key] = (rows_of(influence(*RANK, cwd=plain).out), rows_of(influence(*MISLABELS, cwd=plain).out))
    for mine, expected in zip(rows, known[key], strict=True):
        assert_same(mine, expected, combination)
    if words := (INIT | INIT_ALIKE).get(combination.name):
        (project / "influence.yaml").rename(project / "by-hand.yaml")
        (project / "influence.h5").unlink()
        influence("init", *words.split(), cwd=project)
        again = rows_of(influence(*RANK, cwd=project).out)
        given = dict(
            enumerate(
                combination.data.outputs[label] for _, label in pictures("train") if label in combination.data.outputs
            )
        )
        assert {row["index"]: row["label"] for row in comparable(again, combination)}.items() <= given.items()
        if combination.name in INIT_ALIKE:
            assert_same(again, known[key][0], combination)
    labels = {row["label"] for row in rows[0]}
    assert labels <= set(combination.data.names or map(str, combination.data.outputs.values()))
