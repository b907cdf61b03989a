"""Λ + l2 + λ of each coordinate, and how much of a curvature a store keeps."""

from __future__ import annotations

import pytest
import torch

from influence_cli.curvature.damping import Damping
from influence_cli.curvature.spectrum import Group, Spectrum


def spectrum(*, known: bool) -> Spectrum:
    """Give two layers of 3 and 2 parameters, of which two coordinates and one are kept."""
    whole = (torch.tensor([4.0, 2.0, 1.0]), torch.tensor([3.0, 0.5]))
    groups = tuple(
        Group(name, len(values), float(values.sum()), values if known else None)
        for name, values in zip(("a", "b"), whole, strict=True)
    )
    return Spectrum(torch.tensor([4.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([0, 0, 1]), groups, 0.0)


def test_shift_is_l2_and_the_damping_of_the_coordinates_layer() -> None:
    shift = spectrum(known=True).shift(Damping((0.1, 0.2), "given"), 0.01)
    assert shift.tolist() == pytest.approx([0.11, 0.11, 0.21])


def test_the_effective_dimension_is_of_what_is_kept_and_of_all() -> None:
    damping, l2 = Damping((0.1, 0.2), "given"), 0.01
    first, second = [4 / 4.11, 2 / 2.11, 1 / 1.11], [3 / 3.21, 0.5 / 0.71]
    kept, whole = spectrum(known=True).dimension(damping, l2)
    assert kept == pytest.approx(sum(first[:2]) + second[0])
    assert whole == pytest.approx(sum(first) + sum(second))
    # Where only the trace is known, what is left out counts as if no direction had more than a hair of it.
    kept_again, bound = spectrum(known=False).dimension(damping, l2)
    assert kept_again == kept
    assert bound == pytest.approx(kept + 1 / 0.11 + 0.5 / 0.21)
    assert bound >= whole
