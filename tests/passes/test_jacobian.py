"""A Jacobian that is kept between products: the same numbers as one that is rebuilt, and as many as it says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from influence_cli.curvature import operator
from influence_cli.curvature.operator import Examples, fits_kept, kept_mean_product, mean_product
from influence_cli.passes.jacobian import keep_jacobian, kept_product, numbers_per_example
from tests.passes.test_curvature_products import CASES, convolutional, dense, make


class Scaled(nn.Module):
    """A parameter outside the layer pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = convolutional(), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale.exp()


@pytest.mark.parametrize(("build", "names"), [*CASES, (Scaled, ())])
def test_products_with_it_equal_a_dense_ggn_and_it_is_as_large_as_said(build: type, names: tuple[str, ...]) -> None:
    network, x, y = make(build(), names)
    v = torch.randn(5, network.size, dtype=torch.float64)
    kept = keep_jacobian(network, x, y, v.dtype)
    expected = v @ dense(network, x, y)
    for _ in range(2):
        assert float((kept_product(network, kept, v) - expected).norm() / expected.norm()) < 1e-12
    held = kept.curvature.numel() + sum(
        part.rows.numel() + (0 if part.a is None else part.a.numel()) for part in kept.parts
    )
    assert numbers_per_example(network, x) * len(x) == held


def test_the_mean_product_is_that_of_a_rebuilt_one() -> None:
    network, x, y = make(convolutional())
    shift = torch.rand(network.size, dtype=torch.float64)
    counts: list[int] = []
    product = kept_mean_product(network, Examples(x, y, 4), shift, torch.float64, counts.append)
    assert counts == [4, 4, 1]
    v = torch.randn(3, network.size, dtype=torch.float64)
    expected = mean_product(network, Examples(x, y, 5), "ggn", shift)(v)
    assert float((product(v) - expected).norm() / expected.norm()) < 1e-12


def test_it_is_kept_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = make(convolutional())
    need = 4 * numbers_per_example(network, x) * len(x)
    for free, fits in ((need / operator.KEPT_SHARE + 8, True), (need / operator.KEPT_SHARE - 8, False)):
        monkeypatch.setattr(operator, "available_bytes", lambda _, free=free: int(free))
        assert fits_kept(network, Examples(x, y, 4)) is fits
