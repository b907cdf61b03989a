"""`rank --normalise`: divide influence by how far a training example moves the model, so that outliers do not lead.

An example of large loss or gradient has a large influence on every test example, and leads every list. RelatIF asks
which example explains this prediction *for what it changes elsewhere* (Barshan, Brunet & Dziugaite, AISTATS 2020,
"RelatIF: identifying explanatory training samples via relative influence"). The formulas are in influence/scores.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.curvature.choice import SOLVERS
from influence_cli.errors import InfluenceError, did_you_mean
from influence_cli.influence.inverse import Inverse
from influence_cli.influence.scores import change_in_loss, change_in_parameters

# What a score is, for the page and the run file.
MEANING = {
    "relatif": "rise of the loss per change of the parameters, s_testᵀgᵢ / ‖(H+λI)⁻¹gᵢ‖ (θ-relative influence)",
    "relatif-loss": "rise of the loss per change of the losses, s_testᵀgᵢ / √(gᵢᵀ(H+λI)⁻¹gᵢ) (ℓ-relative)",
    "cosine": "s_testᵀgᵢ / √(g_testᵀ(H+λI)⁻¹g_test · gᵢᵀ(H+λI)⁻¹gᵢ), from −1 to 1",
}
NONE = "none"


def check_normalise(kind: str, method: str) -> None:
    """Refuse an unknown normalisation, or one that the curvature cannot give, before any work.

    Args:
        kind: of ``--normalise``.
        method: ``curvature.method``.
    """
    if kind not in (NONE, *MEANING):
        raise InfluenceError(f"--normalise {kind}: there is no such score", did_you_mean(kind, (NONE, *MEANING)))
    if kind != NONE and method == "replay":
        raise InfluenceError(
            f"--normalise {kind}: a replay has no curvature to measure a norm by", "-s curvature.method=auto"
        )
    if kind != NONE and method in SOLVERS:
        raise InfluenceError(
            f"--normalise {kind}: under {method} the norm of every training example would need its own solve",
            "-s curvature.method=auto (or explicit, ekfac, kfac, arnoldi, fisher, identity)",
        )


@dataclass(frozen=True)
class Norms:
    """What the influence of a training example is divided by, under one checkpoint.

    Attributes:
        kind: of ``--normalise``.
        inverse: of the checkpoint's curvature.
    """

    kind: str
    inverse: Inverse

    def of_rows(self, rows: Tensor) -> Tensor:
        """Compute the norms [b] from coordinates of gradients [b, k]."""
        solved = self.inverse.apply(rows)
        return change_in_parameters(solved) if self.kind == "relatif" else change_in_loss(solved, rows)

    def weights(self, inverses: Sequence[Tensor]) -> list[Tensor]:
        """Give the weights w of which a norm is √(Σⱼ wⱼ c_ij²), from 1/(Λ + l2 + λ)."""
        return [inverse.square() if self.kind == "relatif" else inverse for inverse in inverses]


def test_norms(kind: str, inverses: Sequence[Inverse], gradients: Sequence[Tensor]) -> Tensor | None:
    """Give √(g_testᵀ(H + λI)⁻¹g_test) [m] for ``cosine``, mean of the checkpoints; None for the others."""
    if kind != "cosine":
        return None
    norms = [Norms(kind, inverse).of_rows(rows) for inverse, rows in zip(inverses, gradients, strict=True)]
    return torch.stack([each.cpu() for each in norms]).mean(dim=0)
