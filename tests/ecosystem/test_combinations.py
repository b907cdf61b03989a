"""Checkpoints, data and transforms as libraries write them give the rows that the plain state dict gives."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Command
from tests.ecosystem.combinations import COMBINATIONS, INIT, SET, Combination
from tests.ecosystem.projects import key_of, line_of, make_project, make_reference, number_of

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the libraries

RANK = ("rank", "0:3", "--top", 5, "--format", "jsonl")
MISLABELS = ("mislabels", "--top", 12, "--format", "jsonl")
CHECK = ("check", "--format", "jsonl")
PARAMETERS = [
    pytest.param(combination, id=combination.name, marks=() if combination.quick else pytest.mark.ecosystem)
    for combination in COMBINATIONS
]
# What `check` measures that depends on weights, data and transform.
MEASURED = (
    "training examples", "test examples", "parameters tracked", "training accuracy", "mean training loss",
    "gradient norm at the checkpoint", "test accuracy",
)  # fmt: skip
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """What the commands say of one project."""

    measured: dict[str, float]
    ranked: Rows
    suspects: Rows


@pytest.fixture(scope="module")
def known(one_thread: None) -> dict[str, Results]:
    """The results of references, by what they depend on."""
    return {}


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and no module of one project for the next."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "YOLO_OFFLINE", "NO_ALBUMENTATIONS_UPDATE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("YOLO_VERBOSE", "false")  # else it logs to the stdout of the test that imports it first
    for name in ("HF_HOME", "YOLO_CONFIG_DIR", "MPLCONFIGDIR"):  # read once, when a library is imported
        monkeypatch.setenv(name, str(tmp_path_factory.getbasetemp() / "home"))
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


def results_of(project: Path, influence: Command) -> Results:
    checked = {row["item"]: row["value"] for row in rows_of(influence(*CHECK, cwd=project).out)}
    ranked, suspects = (rows_of(influence(*words, cwd=project).out) for words in (RANK, MISLABELS))
    return Results({item: checked[item] for item in MEASURED}, ranked, suspects)


@pytest.mark.parametrize("combination", PARAMETERS)
def test_the_rows_are_those_of_the_plain_state_dict(
    combination: Combination, tmp_path: Path, influence: Command, known: dict[str, Results]
) -> None:
    for package in combination.needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-ecosystem")
    project, plain = tmp_path / "project", tmp_path / "plain"
    project.mkdir()
    state, apply = make_project(project, combination)
    wanted = ""
    if combination.checkpoint.convert:
        wanted = combination.checkpoint.model.partition("checkpoint: ")[2]
        influence("convert", combination.checkpoint.convert, "-o", wanted, "--trust", cwd=project)
    results = results_of(project, influence)
    key = key_of(combination, state)
    if key not in known:
        plain.mkdir()
        make_reference(plain, combination, state, apply)
        known[key] = results_of(plain, influence)
    expected = known[key]
    assert results.measured == pytest.approx(expected.measured, rel=1e-6)
    assert_same(results.ranked, expected.ranked, combination)
    assert_same(results.suspects, expected.suspects, combination)
    # Where the data have names, the rows have them.
    labels = {row["label"] for row in results.ranked}
    assert labels <= set(combination.data.names or map(str, combination.data.outputs.values()))
    for name in ("influence.yaml", "influence.h5"):
        (project / name).unlink()
    data = INIT[combination.name].split()[1:]
    if combination.checkpoint.convert:
        refused = influence("init", combination.checkpoint.convert, *data, cwd=project, code=2).err
        assert f"influence convert {combination.checkpoint.convert} -o {wanted} --trust" in refused
        assert not (project / "influence.yaml").exists()
    influence("init", *INIT[combination.name].split(), cwd=project)
    given = ("-s", "l2=0.01", *(word for key in SET[combination.name] for word in ("-s", line_of(combination, key))))
    assert_same(rows_of(influence(*RANK, *given, cwd=project).out), expected.ranked, combination)
    assert_same(rows_of(influence(*MISLABELS, *given, cwd=project).out), expected.suspects, combination)
