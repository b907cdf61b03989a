"""The record of a run on disk: states come back whole, or their file is named."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from influence_cli.errors import InfluenceError
from influence_cli.replay.record import Record, check_budget, kept_steps
from influence_cli.steps.run import State
from tests.support.small_project import flip

CPU = torch.device("cpu")


def state() -> State:
    return State(torch.arange(5.0), (torch.ones(5), torch.zeros(5)), torch.tensor([0.5]))


def test_a_state_comes_back(tmp_path: Path) -> None:
    record = Record(tmp_path / "influence.run")
    record.begin({"recipe": "one"})

    record.write(7, state())

    read = record.read(7, CPU)
    assert torch.equal(read.parameters, state().parameters)
    assert [slot.tolist() for slot in read.slots] == [slot.tolist() for slot in state().slots]
    assert torch.equal(read.buffers, state().buffers)
    assert (record.kept, record.made_of()) == ([7], {"recipe": "one"})


def test_a_damaged_or_missing_state_is_named(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write(7, state())
    path = record.folder / "state-000007.h5"
    flip(path, path.read_bytes().index(state().parameters.numpy().tobytes()))

    with pytest.raises(InfluenceError, match=r"state-000007\.h5 is damaged"):
        record.read(7, CPU)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InfluenceError, match=r"state-000007\.h5 cannot be read"):
        record.read(7, CPU)
    with pytest.raises(InfluenceError, match=r"state-000008\.h5 cannot be read"):
        record.read(8, CPU)


def test_damaged_facts_are_named(tmp_path: Path) -> None:
    record = Record(tmp_path)
    (tmp_path / "run.json").write_text("{")

    with pytest.raises(InfluenceError, match=r"run\.json cannot be read"):
        record.made_of()


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 1000])
def test_the_first_and_the_last_state_are_kept_and_about_the_root_of_all(steps: int) -> None:
    kept = kept_steps(steps)

    assert (kept[0], kept[-1]) == (0, steps)
    assert len(kept) <= steps**0.5 + 2
    assert max(b - a for a, b in pairwise(kept)) <= steps**0.5 + 1


def test_a_budget_that_is_too_small_names_what_is_needed() -> None:
    need = len(kept_steps(100)) * 64  # 16 numbers of four bytes

    check_budget(100, state(), need, "influence.yaml:3")
    with pytest.raises(InfluenceError, match=r"influence\.yaml:3: the record of 100 steps keeps 11 states") as refused:
        check_budget(100, state(), need - 1, "influence.yaml:3")
    assert f"gradients.budget={need}" in str(refused.value.hint)
