"""What --precision changes, and what it leaves alone; what a GPU is asked for and given (no GPU is needed here)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from influence_cli import load_config, load_tasks
from influence_cli.curvature import explicit
from influence_cli.model.network import recurrent_backward, track
from influence_cli.model.task import set_precision
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import jacobians
from influence_cli.precompute import decide as deciding
from influence_cli.precompute import fit
from influence_cli.precompute.decide import decide
from influence_cli.precompute.prepare import prepare_all
from influence_cli.runtime.memory import available_bytes, is_out_of_memory
from influence_cli.runtime.terminal import Terminal


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    set_precision("float32")


def tf32() -> tuple[bool, bool]:
    """Say whether TF32 is allowed for matrices and for convolutions."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def test_loading_forbids_tf32_that_torch_allows_for_convolutions(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    set_precision("tf32")
    load_tasks(load_config(Path("influence.yaml")))
    assert tf32() == (False, False)


def test_the_probe_and_an_exact_matrix_are_in_float32_whatever_the_precision(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    seen: list[tuple[bool, bool]] = []

    def watched(work: Any, *words: Any, **more: Any) -> Any:
        seen.append(tf32())
        return work(*words, **more)

    monkeypatch.setattr(deciding, "make_network", partial(watched, make_network))
    monkeypatch.setattr(fit, "curvature_matrix", partial(watched, explicit.curvature_matrix))
    config = load_config(Path("influence.yaml"), ["precision=tf32"])
    tasks = load_tasks(config)
    decide(config, tasks[0], Terminal(quiet=True))
    assert tf32() == (True, True)
    prepare_all(config, tasks, Terminal(quiet=True))
    assert seen == [(False, False)] * 3
    assert tf32() == (True, True)


def test_jacobians_of_a_bfloat16_pass_are_those_of_float32_to_its_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    inputs, targets = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    loss = partial(nn.functional.cross_entropy, reduction="none")
    network = make_network(track(model, loss, ["*"], "here"), inputs)
    exact, rounded = (
        jacobians(replace(network, precision=precision), inputs, targets) for precision in ("float32", "bf16")
    )
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert float((one - other).norm()) < 0.02 * float(one.norm())


@pytest.mark.parametrize(
    ("model", "enabled"),
    [(nn.Sequential(nn.Conv2d(1, 2, 3)), True), (nn.Sequential(nn.LSTM(2, 2)), False), (nn.GRU(2, 2), False)],
)
def test_only_recurrent_models_do_without_cudnn(model: nn.Module, enabled: bool) -> None:
    with recurrent_backward(model):
        assert torch.backends.cudnn.enabled is enabled
        assert tf32()[1] is False
    assert torch.backends.cudnn.enabled


def test_what_torch_holds_ready_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 3000)
    assert available_bytes(torch.device("cuda")) == 3000


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_a_library_that_cannot_allocate_is_out_of_memory(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))


def test_another_failure_is_not() -> None:
    assert not is_out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))
