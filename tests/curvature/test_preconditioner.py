"""Preconditioners with a shift of every layer, against dense matrices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.curvature.blocks import Block, joined, keep
from influence_cli.curvature.coordinates import Blocks, full_vectors
from influence_cli.curvature.ekfac import fit
from influence_cli.curvature.preconditioner import block_preconditioner, by_parameter, scaled_row_preconditioner
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, track
from influence_cli.passes.coverage import make_network

loss = partial(nn.functional.cross_entropy, reduction="none")


def fitted() -> tuple[Network, list[Block]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).eval()
    x, y = torch.randn(16, 1, 4, 4), torch.randint(0, 3, (16,))
    network = make_network(track(model, loss, ("*",), "layers"), x)
    return network, fit(network, lambda _stage, start: [Batch(x, y, np.arange(16))][start:], how="sampled", seed=0)


def dense_inverse(network: Network, blocks: list[Block], added: Tensor) -> Tensor:
    basis = Blocks(tuple(keep(blocks, None, torch.device("cpu"))))
    p = full_vectors(network, basis, torch.eye(basis.width)).double()
    return torch.linalg.inv(p.T @ torch.diag(joined(blocks).double()) @ p + torch.diag(added))


def test_blocks_invert_ekfac_at_the_shift_of_each_layer() -> None:
    network, blocks = fitted()
    assert len(blocks) == 3
    shifts = [0.01, 2.0, 0.3]
    added = by_parameter(network, blocks, shifts)
    for block, value in zip(blocks, shifts, strict=True):
        for name in block.names:
            assert bool((added[network.slots[name]] == value).all())
    r = torch.randn(4, network.size)
    expected = r.double() @ dense_inverse(network, blocks, added)
    assert torch.allclose(block_preconditioner(network, blocks, shifts)(r).double(), expected, rtol=1e-3, atol=1e-4)


def test_directions_that_a_basis_leaves_out_have_the_shift_alone() -> None:
    network, blocks = fitted()
    whole = next(block for block in blocks if block.size == 27)
    q_out, q_in = whole.sides()
    cut = replace(whole, q_in=q_in[:, :, :4], values=whole.values[:, :, :4])
    assert cut.count < cut.size
    some, shifts = [cut if block is whole else block for block in blocks], [0.01, 2.0, 0.3]
    r = torch.randn(4, network.size)
    expected = r.double() @ dense_inverse(network, some, by_parameter(network, some, shifts))
    assert torch.allclose(block_preconditioner(network, some, shifts)(r).double(), expected, rtol=1e-3, atol=1e-4)
    assert q_out.shape[2] == whole.values.shape[1]


@pytest.mark.parametrize("count", [6, 60])
def test_rows_between_roots_of_the_shift(count: int) -> None:
    torch.manual_seed(0)
    rows, shift = torch.randn(count, 40), torch.logspace(-2, 1, 40)
    r = torch.randn(3, 40)
    expected = r.double() @ torch.linalg.inv((rows.T @ rows).double() + torch.diag(shift.double()))
    assert torch.allclose(scaled_row_preconditioner(rows, shift)(r).double(), expected, rtol=1e-3, atol=1e-4)
