"""Which coordinates of a basis a layer a store keeps."""

from __future__ import annotations

import pytest
import torch

from influence_cli.curvature.blocks import Block, largest


def block(name: str, *values: float) -> Block:
    return Block(name, "diagonal", (name,), torch.tensor(values), None, None, None, len(values), float(sum(values)))


def test_largest_keeps_one_a_block_then_what_is_largest_beside_its_mean() -> None:
    # Beside the means 20 and 2: 0.5, 1, 1.5 and 0.5, 2.5, 0.5, 0.5. Curvature itself would choose the first block's.
    blocks = [block("a", 10, 20, 30), block("b", 1, 5, 1, 1)]
    assert largest(blocks, 2).tolist() == [2, 4]
    assert largest(blocks, 3).tolist() == [1, 2, 4]
    # Ties go to the earlier position.
    assert largest(blocks, 4).tolist() == [0, 1, 2, 4]
    assert largest(blocks, 5).tolist() == [0, 1, 2, 3, 4]
    assert largest(blocks, 9).tolist() == list(range(7))


def test_a_block_has_its_largest_however_small_it_is() -> None:
    assert largest([block("a", 9, 9, 9), block("b", 0.1, 0.1)], 2).tolist() == [0, 3]
    with pytest.raises(ValueError, match="fewer coordinates than blocks"):
        largest([block("a", 9, 9, 9), block("b", 0.1, 0.1)], 1)
