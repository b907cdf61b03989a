"""How long a solver can take is said before it starts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import Command

from influence_cli import inverse
from influence_cli.inverse import CG_TOLERANCE, expected_products
from influence_cli.solvers import conjugate_gradients


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e4])
def test_conjugate_gradients_need_no_more_products_than_said(condition: float) -> None:
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 400, dtype=torch.float64)
    taken = conjugate_gradients(lambda v: v * values, torch.ones(1, 400, dtype=torch.float64), tolerance=CG_TOLERANCE)
    # The bound is of the error in the energy norm; the residual may lag by the root of the condition number.
    assert taken[1].iterations <= 1.5 * expected_products("cg", 1.0, 1.0 / condition) + 1


def test_the_series_needs_what_its_slowest_direction_needs() -> None:
    shift = 0.01
    count = expected_products("lissa", 1.0, shift)
    assert (1 - shift) ** count == pytest.approx(inverse.LISSA_TOLERANCE, rel=0.1)


@pytest.mark.parametrize("method", ["cg", "lissa"])
def test_it_is_said_and_a_long_one_is_warned_of(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    words = ("rank", 0, "-s", f"curvature.method={method}", "-s", "gradients.store=raw.h5")
    done = influence(*words, cwd=project)
    assert re.search(rf"{method} for 1 right sides: at most about [\d,]+ products", done.err)
    assert "warning" not in done.err
    monkeypatch.setattr(inverse, "LONG", 0.0)
    assert f"warning: {method} may take" in influence(*words, cwd=project).err
