"""Model, images and training function of bench/paper/leave_one_out.py's network: the file that its config names.

From scratch, the training function takes Adam and then STEPS Gauss–Newton steps, whose factor it leaves in a file. A
retraining takes STEPS more of them from the checkpoint, with that factor, on all images at once in float64. Nothing in
it is random and no line search cuts a step, so that a training is a smooth function of its images: two of them differ
by the image that one lacks, and not by the optimiser's noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector, vector_to_parameters

# 10% of the 55,000 images that Koh & Liang train on.
IMAGES = 5_500
EPOCHS, BATCH, RATE = 80, 100, 0.01
# Whole steps diverge here.
STEPS, SIZE = 15, 0.5
# Added to the Gauss–Newton matrix of the steps: where there is hardly any curvature they would be too long.
TRUST = 0.1
# Images at one time, for gradients in float64 and for Jacobians in float32.
PIECE, JACOBIANS = 250, 50


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The first 5,500 training images of MNIST, or all test images."""

    def __init__(self, root: str, part: str) -> None:
        from torchvision.datasets import MNIST

        data, count = MNIST(root, train=part == "train"), IMAGES if part == "train" else None
        self.x, self.targets = data.data[:count, None].float() / 255, data.targets[:count].tolist()
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


class Network(nn.Sequential):
    """Layers that take images of any float type: a trained network stays in float64."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the outputs [b, 10]."""
        outputs: Tensor = super().forward(x.to(next(self.parameters()).dtype))
        return outputs


def build() -> nn.Module:
    """Make a CNN of 2,616 parameters, as many as Koh & Liang's, and like theirs with tanh."""
    return Network(
        *(nn.Conv2d(1, 5, 3, 2, padding=1), nn.Tanh()),
        *(nn.Conv2d(5, 10, 3, 2, padding=1), nn.Tanh()),
        *(nn.Conv2d(10, 16, 3, 2, padding=1), nn.Tanh()),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
    )


def train(
    model: nn.Module,
    data: Sequence[tuple[Tensor, int]],
    *,
    l2: float,
    seed: int,
    progress: Callable[[int, int], None] = lambda *_: None,
    factor: str,
) -> nn.Module:
    """Lower (1/n) Σ CE + l2/2·‖θ‖² from where the model is, in float64; it stays in float64.

    Without the file ``factor`` it is a training from scratch: it starts with Adam, and leaves the file.
    """
    file = Path(factor)
    x, y = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    if not file.exists():
        _adam(model, x, y, l2, seed)
        torch.save(_factor(model, x, l2), file)
    cholesky, model, x = torch.load(file), model.double(), x.double()
    for done in range(STEPS):
        progress(done, STEPS)
        weights = parameters_to_vector(model.parameters()).detach()
        slope = l2 * weights
        for images, labels in zip(x.split(PIECE), y.split(PIECE), strict=True):
            part = cross_entropy(model(images), labels, reduction="sum") / len(y)
            slope = slope + parameters_to_vector(torch.autograd.grad(part, list(model.parameters())))
        step = torch.cholesky_solve(slope[:, None], cholesky)[:, 0]
        vector_to_parameters(weights - SIZE * step, model.parameters())
    return model


def _adam(model: nn.Module, x: Tensor, y: Tensor, l2: float, seed: int) -> None:
    """Come near a minimum, in float32."""
    optimizer = torch.optim.Adam(model.parameters(), RATE, weight_decay=l2)
    generator = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * -(-len(y) // BATCH))
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()


def _factor(model: nn.Module, x: Tensor, l2: float) -> Tensor:
    """Give the Cholesky factor of (1/n) Σ JᵀSJ + (l2 + TRUST)·I, the Gauss–Newton matrix at the weights: [p, p]."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def outputs(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (image[None],))[0]
        return found

    jacobian = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))
    total = (l2 + TRUST) * torch.eye(sum(weight.numel() for weight in weights.values()), dtype=torch.float64)
    for images in x.split(JACOBIANS):
        rows = torch.cat([part.flatten(2) for part in jacobian(weights, images).values()], dim=2)
        with torch.no_grad():
            p = model(images).softmax(dim=1)
        # S = diag p − p pᵀ = QᵀQ with rows √p_c (e_c − p).
        rows -= torch.einsum("bc,bcp->bp", p, rows)[:, None]
        root = (rows * p.sqrt()[:, :, None]).flatten(0, 1)
        total += (root.T @ root) / len(x)
    return torch.linalg.cholesky(total)
