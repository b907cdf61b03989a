"""A loop of one's own: recorded, rebuilt and replayed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from influence_cli import InfluenceError
from influence_cli.replay.open import Replayed
from influence_cli.steps.backward import replay
from influence_cli.steps.forward import moments, run_again
from influence_cli.steps.run import State
from tests.conftest import Command
from tests.support.recorded_loop import STEPS, N, build, make, opened, record
from tests.support.small_project import refusal


def groups(model: nn.Module) -> list[dict[str, Any]]:
    biases = [value for name, value in model.named_parameters() if name.endswith("bias")]
    weights = [value for name, value in model.named_parameters() if not name.endswith("bias")]
    return [{"params": weights, "weight_decay": 0.02}, {"params": biases, "weight_decay": 0.0, "lr": 0.03}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
    "nesterov": lambda model: torch.optim.SGD(groups(model), lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda model: torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.01),
    "adamw": lambda model: torch.optim.AdamW(groups(model), lr=0.01, betas=(0.8, 0.99), eps=1e-6),
    "fused adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "foreach sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True),
}


def largest_differences(replayed: Replayed) -> tuple[float, float]:
    """Rebuild every kept state from the one before it.

    Returns:
        The largest difference of a parameter and of a number of the optimiser, relative to the largest of its vector.
    """
    network, run = replayed.network, replayed.run
    parameters, slots = [0.0], [0.0]
    for start, stop in zip(run.kept, run.kept[1:], strict=False):
        *_, last = moments(network, run, start, stop)
        after = run.taken(stop - 1).rule.step(last.state.parameters, last.state.slots, last.gradient)
        recorded = run.state(stop)
        parameters.append(difference(after[0], recorded.parameters))
        slots += [difference(one, other) for one, other in zip(after[1], recorded.slots, strict=True)]
    return max(parameters), max(slots)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_recorded_loop_is_rebuilt(name: str, tmp_path: Path) -> None:
    args = {"norm": True, "dropout": 0.2}
    model = build(make(tmp_path, **args), **args)
    optimizer = OPTIMIZERS[name](model)
    cycled = name in ("nesterov", "adamw")
    schedule = torch.optim.lr_scheduler
    scheduler = (
        schedule.OneCycleLR(optimizer, [0.2, 0.1], total_steps=STEPS)
        if cycled
        else schedule.CosineAnnealingLR(optimizer, STEPS)
    )
    record(tmp_path, model, optimizer, scheduler, clip=0.5)

    replayed = opened(tmp_path)

    assert replayed.run.steps == STEPS
    assert list(replayed.run.kept) == [0, 2, 4, 6, 8, 10, 12, 13]
    parameters, slots = largest_differences(replayed)
    assert parameters < (1e-5 if "adam" in name else 1e-6)
    assert slots < 2e-5
    assert len({replayed.run.taken(step).rule.momentum for step in range(STEPS)}) > 1 or not cycled


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_its_replay_is_the_derivative_of_whole_trainings(name: str, tmp_path: Path) -> None:
    args = {"norm": True, "dropout": 0.2, "double": True}
    model = build(make(tmp_path, **args), **args)
    record(tmp_path, model, OPTIMIZERS[name](model), clip=0.5, changed=lambda x, step: x.roll(step, -1), given=True)
    replayed = opened(tmp_path)
    network, run = replayed.network, replayed.run
    direction = torch.randn(network.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    last = run.state(run.steps)
    end = State(direction[None], tuple(torch.zeros_like(direction)[None] for _ in last.slots), last.buffers[None] * 0)
    slopes = replay(network, run, end)[0]

    for row in (2, 9, 17):
        ends = []
        for size in (1e-6, -1e-6):
            weights = np.ones(run.examples)
            weights[row] += size
            ends.append(float(run_again(network, run, weights).parameters @ direction))
        assert slopes[row] == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=2e-6, abs=1e-9)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def recorded(folder: Path, **given: Any) -> Path:
    model = build(make(folder))
    record(folder, model, sgd(model), **given)
    return folder


def refused(folder: Path) -> str:
    with pytest.raises(InfluenceError) as told:
        opened(folder)
    return f"{told.value.message}\n{told.value.hint}"


def edit(folder: Path, old: str, new: str) -> None:
    config = folder / "influence.yaml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))


def test_a_loop_of_another_loss_parts_at_its_first_step(tmp_path: Path) -> None:
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.1)
    message = refused(recorded(tmp_path, loss=smoothed))
    assert "parts from the record between steps 0 and 2" in message
    assert "at step 0 the norm of its gradient is" in message
    assert "label smoothing" in message


def test_clipping_that_was_not_told_parts_as_well(tmp_path: Path) -> None:
    message = refused(recorded(tmp_path, clip=0.01, told=False))
    assert "instead of 0.01" in message
    assert "clip=?" in message


@pytest.mark.parametrize(("at", "said"), [(6, "at step 7 the norm"), (7, "all its gradients agree")])
def test_weights_changed_outside_of_the_optimizer_are_told(at: int, said: str, tmp_path: Path) -> None:
    model = build(make(tmp_path))

    def shrink(step: int) -> None:
        if step == at:
            with torch.no_grad():
                model[-1].weight.mul_(0.8)  # type: ignore[index,union-attr]

    record(tmp_path, model, sgd(model), after=shrink)
    message = refused(tmp_path)
    assert "between steps 6 and 8" in message
    assert said in message
    assert "an EMA" in message


def test_augmented_inputs_that_were_not_given_are_refused(tmp_path: Path) -> None:
    message = refused(recorded(tmp_path, changed=lambda x, step: x.flip(-1) if step == 4 else x))
    assert "the inputs of step 4 are not those of the config's examples" in message
    assert "recorder.step(indices, inputs)" in message


def test_given_inputs_that_the_model_did_not_get_are_refused(tmp_path: Path) -> None:
    model = build(make(tmp_path))
    model.register_forward_pre_hook(lambda _module, args: (args[0] + 0.5,), prepend=True)
    record(tmp_path, model, sgd(model), given=True)
    assert "the inputs= of step 0 are not what the model was given" in refused(tmp_path)


def test_other_labels_and_examples_are_named(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    first = sorted((folder / "train" / "a").iterdir())[0]
    first.rename(folder / "train" / "b" / first.name)
    assert "labels are not those of the recorded loop" in refused(folder)
    for path in sorted((folder / "train" / "c").iterdir())[1:]:
        path.unlink()
    assert f"the loop trained on example {N - 1}, but the data set has {N - 7}" in refused(folder)


def test_an_example_that_the_config_leaves_out_is_named(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    np.save(folder / "exclude.npy", [5])
    edit(folder, "  args: {root: train}", "  exclude: exclude.npy\n  args: {root: train}")
    assert "the loop trained on example 5, which the config leaves out" in refused(folder)


def test_missing_steps_and_states_are_named(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    (folder / "runs" / "a" / "steps-000004.h5").rename(folder / "kept.h5")
    assert "steps 4 to 5 are missing" in refused(folder)
    (folder / "kept.h5").rename(folder / "runs" / "a" / "steps-000004.h5")
    (folder / "runs" / "a" / "state-000013.h5").unlink()
    assert "the state before step 13 is missing" in refused(folder)


def test_damage_is_named(tmp_path: Path) -> None:
    path = recorded(tmp_path) / "runs" / "a" / "steps-000002.h5"
    with h5py.File(path, "r+") as file:
        file["rates"][0] = 0.05
    assert "steps-000002.h5 is damaged" in refused(tmp_path)
    path.write_bytes(path.read_bytes()[:700])
    assert "steps-000002.h5 cannot be read" in refused(tmp_path)


def test_a_checkpoint_that_is_not_the_end_is_refused(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    weights = torch.load(folder / "model.pt")
    torch.save({**weights, "4.bias": weights["4.bias"] + 1}, folder / "model.pt")
    message = refused(folder)
    assert "model.pt is not the end of the recorded run: 4.bias differs by" in message
    assert "the record has 13 steps" in message


def test_a_record_that_was_cut_off_ends_with_its_last_state(tmp_path: Path) -> None:
    folder = make(tmp_path)
    model = build(folder)

    def stop(step: int) -> None:
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(folder, model, sgd(model), after=stop)
    torch.save(model.state_dict(), folder / "model.pt")
    assert "the record has 8 steps, and was cut off: recorder.close() keeps the last state" in refused(folder)


def test_a_run_that_diverged_says_at_which_step(tmp_path: Path) -> None:
    model = build(make(tmp_path))

    def explode(step: int) -> None:
        if step == 6:
            with torch.no_grad():
                model[0].weight.fill_(float("nan"))  # type: ignore[index,union-attr]

    with pytest.warns(UserWarning, match="the gradient of step 7 is no number"):
        record(tmp_path, model, sgd(model), after=explode)
    torch.save(build(tmp_path).state_dict(), tmp_path / "model.pt")
    assert "training diverged: the gradient of step 7 of 13 is no number" in refused(tmp_path)


def test_adam_with_too_small_an_eps_is_refused_in_float32(tmp_path: Path) -> None:
    model = build(make(tmp_path))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-30)
    record(tmp_path, model, optimizer, loss=lambda f, y: 1e-16 * nn.functional.cross_entropy(f, y))
    losses = "from torch.nn.functional import cross_entropy\n\n\ndef tiny(f, y):\n"
    (tmp_path / "losses.py").write_text(f"{losses}    return 1e-16 * cross_entropy(f, y, reduction='none')\n")
    edit(tmp_path, "training:", "loss: {factory: ./losses.py:tiny}\ntraining:")
    message = refused(tmp_path)
    assert "Adam has no derivative in float32" in message
    assert "float64" in message


def test_noise_before_a_batch_norm_is_no_other_run(tmp_path: Path) -> None:
    args = {"norm": True, "noise": True}
    model = build(make(tmp_path, **args), **args)
    record(tmp_path, model, torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-12), steps=40)
    assert opened(tmp_path).run.steps == 40


def test_another_model_is_named(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    edit(folder, "args: {}", "args: {norm: true}")
    torch.save(build(folder, norm=True).state_dict(), folder / "model.pt")
    assert "the loop trained 0.bias [4], which is missing in the config's model" in refused(folder)


def test_what_was_checked_is_not_checked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = recorded(tmp_path)
    opened(folder)
    monkeypatch.setattr("influence_cli.replay.recorded_run.take_step", None)
    opened(folder)


def test_the_command_says_it_in_one_line(tmp_path: Path, influence: Command) -> None:
    folder = recorded(tmp_path)
    assert "gradients.budget is 1,000" in refusal(influence, folder, "rank", 0, "-s", "gradients.budget=1000")
    edit(folder, "record: runs/a", "record: runs/b")
    assert "runs/b holds no record" in refusal(influence, folder, "rank", 0)
