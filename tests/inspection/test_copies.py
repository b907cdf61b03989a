"""Planted copies among photographs of noise, against what was planted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from influence_cli.inspection.copies import Links, exposed, find_links, same_pixels

N = 120


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    """Draw pictures that are smooth, with a few edges, and have nothing in common."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(N, 3, 7, 7, generator=generator) * 200 + 20
    return functional.interpolate(coarse, size=(32, 32), mode="bicubic").clamp(0, 255).round().to(torch.uint8)


def links(*parts: torch.Tensor) -> Links:
    pictures = torch.cat(parts)
    return find_links(pictures, np.arange(1, len(pictures) + 1).astype(np.uint64), None)


def test_without_copies_there_is_no_pair(scenes: torch.Tensor) -> None:
    assert len(links(scenes).pairs) == 0


@pytest.mark.parametrize("kind", ["noise", "flip", "crop", "light"])
def test_a_copy_is_paired_with_its_source_alone(scenes: torch.Tensor, kind: str) -> None:
    sources = scenes[:10].float()
    if kind == "noise":
        copies = sources + 3 * torch.randn(sources.shape, generator=torch.Generator().manual_seed(1))
    elif kind == "flip":
        copies = sources.flip(3)
    elif kind == "crop":
        copies = functional.interpolate(sources[:, :, 2:31, 1:30], size=(32, 32), mode="bilinear")
    else:
        copies = 1.3 * sources
    result = links(scenes, copies.clamp(0, 255).round().to(torch.uint8))
    assert result.pairs.tolist() == [[number, N + number] for number in range(10)]
    assert not result.exact.any()
    assert (result.similarity > 0.97).all()


def test_the_same_pixels_are_exact_and_paired_with_the_first() -> None:
    assert same_pixels(np.array([7, 0, 5, 7, 5, 0, 7], dtype=np.uint64)).tolist() == [[0, 3], [2, 4], [0, 6]]


def test_the_network_changes_no_pair_that_the_pixels_refuse(scenes: torch.Tensor) -> None:
    features = torch.ones(N, 4) + 1e-3 * torch.randn(N, 4, generator=torch.Generator().manual_seed(2))
    result = find_links(scenes, np.arange(1, N + 1).astype(np.uint64), features)
    assert len(result.pairs) == 0


def test_two_flat_pictures_are_no_copies() -> None:
    flat = torch.stack([torch.full((3, 32, 32), value, dtype=torch.uint8) for value in (10, 90)])
    assert len(links(flat).pairs) == 0


def test_light_is_matched_with_what_it_cuts_off() -> None:
    one = (torch.arange(256).view(1, 1, 16, 16) * 0.8 + 20).round().to(torch.uint8)
    other = (one.float() * 1.4 - 10).clamp(0, 255).round().to(torch.uint8)
    assert float((exposed(one, other) - other.float()).abs().max()) < 1.5
