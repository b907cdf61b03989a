"""A linear SVM on MNIST, 1 against 7, trained with the hinge loss to its minimum: python configs/svm.py configs/data.

The setting of Koh & Liang (ICML 2017, section 4.3): min over w of (1/n) Σ Hinge(yᵢ wᵀxᵢ) + 0.01/2·‖w‖², no intercept.
A classifier has one output a class: with two rows w₁ and w₇ the scores' difference is what wᵀx is there, the minimum
has w₁ = −w₇ = w/2, and l2 = 0.02 gives the same penalty: 0.02/2·(‖w₁‖² + ‖w₇‖²) = 0.01/2·‖w‖².

``train`` is what mnist_svm.yaml names for `influence verify --loo`: the hinge at its minimum, without an image.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

DIGITS = (1, 7)
PENALTY = 0.01
# A score wᵀx is within ‖x‖ √(2·gap/penalty) of the exact minimum's: 1e-5 by this. On all images rounding allows 1e-18.
LARGEST_GAP = 1e-14


class _Scores(nn.Sequential):
    """Layers that take images of any float type: what is trained in float64 stays in it."""

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = super().forward(x.to(next(self.parameters()).dtype))
        return outputs


def linear_svm(pixels: int = 784) -> nn.Sequential:
    """Make two linear scores on grey images, without intercepts: 1,568 parameters for 28×28 pixels."""
    return _Scores(nn.Flatten(), nn.Linear(pixels, 2, bias=False))


class OneAgainstSeven(Dataset[tuple[object, int]]):
    """The images of MNIST that show a 1 (label 0) or a 7 (label 1)."""

    classes = tuple(map(str, DIGITS))

    def __init__(self, root: str, *, train: bool = True, download: bool = False) -> None:
        from torchvision.datasets import MNIST

        self.whole = MNIST(root, train=train, download=download)
        labels = self.whole.targets
        self.kept = torch.isin(labels, torch.tensor(DIGITS)).nonzero()[:, 0]
        self.targets = (labels[self.kept] == DIGITS[1]).long()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.whole[int(self.kept[index])][0], int(self.targets[index])

    def arrays(self) -> tuple[Tensor, Tensor]:
        """Give the images [n, 784], float64 in [0, 1], and y [n] in {−1, 1}."""
        return self.whole.data[self.kept].flatten(1).double() / 255, 2.0 * self.targets.double() - 1


@dataclass(frozen=True)
class Minimum:
    """A linear SVM at the minimum of its objective, and the proof that it is there.

    Attributes:
        w: [d].
        alpha: α [n] in [0, 1], with w = Σ αᵢ yᵢ xᵢ / (n·penalty): 0 outside the margin, 1 inside, between on it.
        gap: the objective at w less that of the dual at α; so ‖w − ŵ‖² ≤ 2·gap/penalty.
    """

    w: Tensor
    alpha: Tensor
    gap: float


def minimise_hinge(
    x: Tensor, y: Tensor, penalty: float, start: Tensor | None = None, without: int | None = None
) -> Minimum:
    """Minimise (1/n) Σ_{j≠without} max(0, 1 − y_j wᵀx_j) + penalty/2·‖w‖² to rounding.

    By the method of multipliers on the dual with semismooth Newton steps inside (Li, Sun & Toh, SIAM J. Optim. 2018):
    a quadratic program, so that finitely many steps find which examples lie on the margin, and a linear system does
    the rest.

    Args:
        x: [n, d], float64.
        y: [n], −1 or 1.
        penalty: > 0.
        start: α [n] to start from: that of the same problem with one example more or less.
        without: an example to leave out; n is still that of all.

    Raises:
        ArithmeticError: the duality gap stays above 1e-14.
    """
    z = x * y[:, None]
    upper = torch.ones_like(y)
    if without is not None:
        upper[without] = 0
    alpha = torch.zeros_like(y) if start is None else torch.minimum(start, upper)
    w = _sum(z, alpha) / (len(z) * penalty)
    sigma = 0.1 if start is None else 1e-3
    gap = torch.inf
    for _ in range(30):
        w, alpha = _multiplier_step(z, w, alpha, upper, penalty, sigma)
        found = _polished(z, alpha, upper, penalty)
        gap = min(gap, found.gap)
        if gap <= LARGEST_GAP:
            return found
        sigma = max(sigma / 10, 1e-3)
    raise ArithmeticError(f"the hinge loss is not at its minimum: the duality gap is still {gap:.1e}")


def _multiplier_step(
    z: Tensor, w: Tensor, alpha: Tensor, upper: Tensor, penalty: float, sigma: float
) -> tuple[Tensor, Tensor]:
    """Minimise penalty/2·‖w‖² + (σ/n)·Σ e(uᵢ), uᵢ = αᵢ + (1 − zᵢᵀw)/σ, ∂e/∂u = clip(u, 0, upperᵢ); give w and that."""
    n = len(z)

    def evaluate(w: Tensor, margins: Tensor) -> tuple[float, Tensor, Tensor]:
        u = alpha + (1 - margins) / sigma
        clipped = torch.minimum(u.clamp_min(0), upper)
        energy = sigma * (clipped * u - clipped.square() / 2).sum() / n + penalty / 2 * w @ w
        return float(energy), clipped, u

    margins = z @ w
    energy, clipped, u = evaluate(w, margins)
    for _ in range(100):
        slope = penalty * w - _sum(z, clipped) / n
        free = (u > 0) & (u < upper)
        rows = z[free]
        # (penalty·I + rowsᵀrows/(nσ))⁻¹ by Woodbury: fewer examples are near the margin than there are pixels.
        kernel = rows @ rows.T
        kernel.diagonal().add_(penalty * n * sigma)
        inner = torch.cholesky_solve((rows @ slope)[:, None], torch.linalg.cholesky(kernel))[:, 0]
        direction = (rows.T @ inner - slope) / penalty
        along, decrease = z @ direction, -float(slope @ direction)
        step, before = 1.0, u
        trial = evaluate(w + direction, margins + along)
        # The rounding of the energy is no rise of it.
        while trial[0] > energy - 1e-4 * step * decrease + 1e-14 * energy and step > 1e-6:
            step /= 2
            trial = evaluate(w + step * direction, margins + step * along)
        w, margins = w + step * direction, margins + step * along
        energy, clipped, u = trial
        # A whole step inside one piece of a piecewise quadratic function ends at its minimum.
        if step == 1 and torch.equal(free, (u > 0) & (u < upper)) and torch.equal(before > 0, u > 0):
            break
    return w, clipped


def _sum(z: Tensor, alpha: Tensor) -> Tensor:
    """Compute zᵀα; few α are not 0."""
    some = alpha > 0
    return z[some].T @ alpha[some]


def _polished(z: Tensor, alpha: Tensor, upper: Tensor, penalty: float) -> Minimum:
    """Put the examples between the bounds on the margin to the last digit, and measure the gap."""
    scale = len(z) * penalty
    free = (alpha > 0) & (alpha < upper)
    rows = z[free]
    kernel = rows @ rows.T / scale
    # For rows that depend on each other; repeating the step makes up for it.
    kernel.diagonal().add_(1e-9)
    factor = torch.linalg.cholesky(kernel)
    alpha = alpha.clone()
    for _ in range(4):
        slack = 1 - rows @ (_sum(z, alpha) / scale)
        step = torch.cholesky_solve(slack[:, None], factor)[:, 0]
        alpha[free] = torch.minimum((alpha[free] + step).clamp_min(0), upper[free])
    w = _sum(z, alpha) / scale
    slack = 1 - z @ w
    # No term is below 0, so nothing cancels: the gap is right to its last digit.
    return Minimum(w, alpha, float((upper * slack.clamp_min(0) - alpha * slack).sum() / len(z)))


def train(
    model: nn.Module,
    data: Sequence[tuple[Tensor, int]],
    *,
    l2: float,
    seed: int,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> nn.Module:
    """Minimise mean hinge + l2/2·‖θ‖² to rounding; the model is in float64 then.

    There is one minimum: neither where the model starts nor the seed matters.
    """
    del seed
    x = torch.stack([image for image, _ in data]).flatten(1).double()
    y = 2.0 * torch.tensor([label for _, label in data], dtype=torch.float64) - 1
    _set_weights(model.double(), minimise_hinge(x, y, l2 / 2).w)
    progress(1, 1)
    return model


def as_model(w: Tensor) -> nn.Module:
    """Make the two-output model whose difference of scores is wᵀx."""
    model = linear_svm(len(w))
    _set_weights(model, w)
    return model


def _set_weights(model: nn.Module, w: Tensor) -> None:
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-w / 2, w / 2]))


if __name__ == "__main__":
    images, signs = OneAgainstSeven(sys.argv[1], download=True).arrays()
    trained = minimise_hinge(images, signs, PENALTY)
    torch.save(as_model(trained.w).state_dict(), Path(__file__).parent / "mnist_svm.pt")
