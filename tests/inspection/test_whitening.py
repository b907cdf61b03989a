"""Whitened pictures against all eigenvectors, and what whitening is for."""

from __future__ import annotations

import torch
from torch.nn import functional

from influence_cli.inspection.whitening import _leading, whiten


def test_leading_eigenvalues_are_those_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 300, generator=generator) * torch.linspace(1, 0.02, 300)
    moment = x.T @ x / 500
    values, vectors = _leading(moment, 20)
    exact = torch.linalg.eigvalsh(moment.double()).flip(0)[:20].float()
    assert torch.allclose(values, exact, rtol=0.02)
    assert torch.allclose(vectors.T @ vectors, torch.eye(20), atol=1e-4)


def test_components_have_variance_one_and_flat_pictures_none() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(400, 1, 5, 5, generator=generator) * 255
    pictures = functional.interpolate(coarse, size=(16, 16), mode="bilinear").to(torch.uint8)
    whitening = whiten(pictures, 8)
    x = pictures.float().flatten(1)
    x = functional.normalize(x - x.mean(dim=1, keepdim=True), dim=1)
    variance = ((x - whitening.mean) @ whitening.directions).square().mean(dim=0)
    assert torch.allclose(variance, torch.ones_like(variance), atol=0.15)
    assert not whitening.apply(torch.full((1, 1, 16, 16), 80, dtype=torch.uint8)).any()
