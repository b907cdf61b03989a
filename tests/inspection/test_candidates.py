"""The nearest rows against all products."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from influence_cli.inspection import candidates
from influence_cli.inspection.candidates import closest


@pytest.mark.parametrize("count", [1, 3, 50])
def test_the_nearest_are_those_of_all_products(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(candidates, "HELD", 600)  # several blocks
    x = functional.normalize(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    rows, near = closest(x, x, count)
    products = x @ x.T
    products.fill_diagonal_(-torch.inf)
    best = products.topk(min(count, 39), dim=1)
    assert torch.equal(rows, best.indices)
    assert torch.allclose(near, best.values)
