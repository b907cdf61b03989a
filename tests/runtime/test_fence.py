"""fence: what a block changes for the whole process is as before when it ends, also if it fails."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.runtime.fence import fenced, torch_modes

CHANGES: dict[str, Callable[[], object]] = {
    "dtype": lambda: torch.set_default_dtype(torch.float64),
    "gradients": lambda: torch.set_grad_enabled(False),
    "device": lambda: torch.set_default_device("meta"),
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "products": lambda: torch.set_float32_matmul_precision("medium"),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "numpy": lambda: np.seterr(all="raise"),
    "warnings": lambda: warnings.simplefilter("error", category=ImportWarning),
    "folder": lambda: os.chdir("/"),
    "words": lambda: sys.argv.clear() or setattr(sys, "argv", []),
    "signal": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
}


def state() -> list[object]:
    errors = [one for one in warnings.filters if one[0] == "error"]
    return [torch_modes(), np.geterr(), errors, Path.cwd(), list(sys.argv), signal.getsignal(signal.SIGINT)]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_block_changes_is_as_before(monkeypatch: pytest.MonkeyPatch, change: str, fails: bool) -> None:
    monkeypatch.setattr(sys, "argv", ["influence", "rank"])
    before = state()

    def run() -> None:
        with fenced(["script.py"]):
            assert sys.argv == ["script.py"]
            CHANGES[change]()
            assert change == "words" or state() != before
            if fails:
                raise RuntimeError("as a user's code may")

    if fails:
        with pytest.raises(RuntimeError):
            run()
    else:
        run()
    assert state() == before


def test_random_states_are_left_alone() -> None:
    """A transform that draws from them has to be seen to be random."""
    torch.manual_seed(0)
    with fenced():
        first = torch.rand(3)
    with fenced():
        assert not torch.equal(torch.rand(3), first)


def test_other_filters_stay() -> None:
    with warnings.catch_warnings():
        with fenced():
            warnings.filterwarnings("ignore", message="of a library")
            warnings.filterwarnings("error", message="of a script")
        kept = [(one[0], getattr(one[1], "pattern", "")) for one in warnings.filters]
    assert ("ignore", "of a library") in kept
    assert ("error", "of a script") not in kept
