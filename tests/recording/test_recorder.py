"""The two lines in a loop: what they write, and which loops they refuse at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from influence_cli import InfluenceError, Recorder
from influence_cli.recording.states import kept_states
from influence_cli.recording.step_files import StepFiles
from influence_cli.runtime import disk


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def backward(model: nn.Module, count: int = 5) -> None:
    model.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(count, 4)), torch.arange(count) % 3).backward()


def test_it_writes_steps_and_about_a_root_of_the_states(tmp_path: Path) -> None:
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "a", model, optimizer) as recorder:
        for step in range(20):
            backward(model)
            recorder.step([step, step + 1, 2, 3, 4])
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            with torch.no_grad():
                model(torch.randn(2, 4))
            optimizer.step()
    files = StepFiles(tmp_path / "a")
    assert recorder.steps == files.count == 20
    assert kept_states(tmp_path / "a") == [0, 4, 8, 12, 16, 20]
    assert files.rows(19).tolist() == [19, 20, 2, 3, 4]
    assert files.settings(19).rates == (0.1 / 20,)
    # Nothing random is in the network, so no generator is kept.
    assert files.tensor("random", 3) is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_recording_changes_nothing(tmp_path: Path) -> None:
    ends = []
    for recorded in (False, True):
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        torch.manual_seed(2)
        for value in model.parameters():
            nn.init.normal_(value)
        optimizer = Adam(model.parameters(), lr=0.1)
        recorder = Recorder(tmp_path / "a", model, optimizer) if recorded else None
        for _ in range(6):
            backward(model)
            if recorder is not None:
                recorder.step(torch.arange(5), torch.zeros(5, 4))
            optimizer.step()
        ends.append(torch.cat([value.detach().reshape(-1) for value in model.parameters()]))
    assert torch.equal(*ends)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "RMSprop": lambda model: RMSprop(model.parameters()),
    "amsgrad=True": lambda model: Adam(model.parameters(), amsgrad=True),
    "maximize=True": lambda model: AdamW(model.parameters(), maximize=True),
    "dampening=0.1": lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.1),
    "differ in betas": lambda model: Adam(
        [{"params": [value], "betas": (0.9, 0.9 + number / 100)} for number, value in enumerate(model.parameters())]
    ),
    "of which the model has 4": lambda model: SGD([*model.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1),
}


@pytest.mark.parametrize("said", OPTIMIZERS)
def test_optimizers_that_a_replay_cannot_follow_are_refused(said: str, tmp_path: Path) -> None:
    model = small()
    with pytest.raises(InfluenceError) as told:
        Recorder(tmp_path / "a", model, OPTIMIZERS[said](model))
    assert said in told.value.message


def accumulate(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    backward(model)
    backward(model)
    recorder.step(range(5))
    optimizer.step()


def twice(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    backward(model)
    recorder.step(range(5))
    recorder.step(range(5))


def never(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    backward(model)
    optimizer.step()


def other_size(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    backward(model)
    recorder.step([1, 2, 3])
    optimizer.step()


def no_gradient(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    backward(model)
    model[2].bias.grad = None  # type: ignore[index,union-attr]
    recorder.step(range(5))
    optimizer.step()


def closure(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    backward(model)
    recorder.step(range(5))
    optimizer.step(lambda: 0.0)


def autocast(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    with torch.autocast("cpu"):
        backward(model)


def other_mode(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    for _ in range(2):
        backward(model)
        recorder.step(range(5))
        optimizer.step()
        model[1].eval()  # type: ignore[index]


def unclipped(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    recorder._clip = 1e-4
    backward(model)
    recorder.step(range(5))
    optimizer.step()
    recorder.close()


def negative(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    recorder.step([3, -1])


def empty(model: nn.Module, optimizer: Optimizer, recorder: Recorder) -> None:
    recorder.close()


LOOPS = {
    accumulate: "the model ran 2 times before optimizer.step()",
    twice: "called twice without optimizer.step()",
    never: "optimizer.step() without recorder.step(indices)",
    other_size: "3 indices, but the model was given 5 examples",
    no_gradient: "2.bias has no gradient at step 0",
    closure: "optimizer.step(closure) cannot be recorded",
    autocast: "runs under autocast",
    other_mode: "step 1: 1 changed between training and eval mode",
    unclipped: "above clip=0.0001",
    negative: "indices has -1",
    empty: "no step was recorded",
}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops_that_a_replay_cannot_follow_are_refused_at_once(
    loop: Callable[[nn.Module, Optimizer, Recorder], None], tmp_path: Path
) -> None:
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(InfluenceError) as told:
        loop(model, optimizer, Recorder(tmp_path / "a", model, optimizer))
    assert LOOPS[loop] in told.value.message


def test_a_record_is_not_overwritten_unasked(tmp_path: Path) -> None:
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1)
    for overwrite in (False, True):
        with Recorder(tmp_path / "a", model, optimizer, overwrite=overwrite) as recorder:
            backward(model)
            recorder.step(range(5))
            optimizer.step()
    with pytest.raises(InfluenceError, match="holds a record already"):
        Recorder(tmp_path / "a", model, optimizer)


def test_a_kill_at_any_change_on_disk_leaves_a_record_that_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, folder = [], tmp_path / "a"

    def look() -> None:
        if (folder / "state-000000.h5").exists():
            last = kept_states(folder)[-1]
            # The steps before a state are on disk before it.
            count = StepFiles(folder).count if last else 0
            assert count >= last
            moments.append(last)

    def watched(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*given: Path) -> None:
            look()
            change(*given)
            look()

        return changed

    monkeypatch.setattr(disk, "replace", watched(disk.replace))
    monkeypatch.setattr(disk, "remove", watched(disk.remove))
    model = small()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    with Recorder(folder, model, optimizer) as recorder:
        for _ in range(19):
            backward(model)
            recorder.step(range(5))
            optimizer.step()
    assert {0, 2, 4, 16, 19} <= {*moments}
    assert len(moments) > 50
