"""Write the kronfluence scores that a test of ours is held against.

    ENV/bin/python bench/peers/kronfluence_reference.py FOLDER_WITH_THE_GZ_FILES [OUT.npz]

A tiny CNN is trained on the demo's first 1,000 training images, and EK-FAC with the empirical Fisher (true labels) is
fitted on the same images. Kept, for the demo's first 20 test images with a loss above 0.05: scores [20, 1000] and
self-influence [1000] at damping 1 in every layer, and at 0.1 times the layer's mean eigenvalue. The images themselves
are named by their positions in the original files and in the demo's mosaic.

kronfluence keeps float32, so the same formula in float64 is computed beside it, and the differences are stored too:
a test can ask for no better agreement than that.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import read_fashion_mnist
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from time_kronfluence import Classification
from torch import Tensor, nn
from torch.utils.data import TensorDataset

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "influence_cli" / "demo" / "fashion_mnist.npz"
OUT = ROOT / "tests" / "data" / "kronfluence_reference.npz"
TRAIN, TEST = 1000, 20
# Below this loss the softmax of float32 leaves few digits of a test image's gradient (2 % wrong at a loss of 2e-6).
LEAST_LOSS = 0.05
DEMO_TRAIN = 5000  # the demo's mosaic holds this many training images, then its test images
MEAN, STD = 0.286, 0.353
EPOCHS = 15
DAMPINGS = {"one": 1.0, "heuristic": None}


def build() -> nn.Sequential:
    """Make the tiny CNN, 4,266 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 10),
    )


def train(x: Tensor, y: Tensor) -> nn.Sequential:
    """Fit the tiny CNN by Adam."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Give the share of labels that the model predicts."""
    return (model(x).argmax(1) == y).float().mean().item()


def images(folder: Path, split: str, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """Read the images at the positions, scaled as the demo scales them, and their labels."""
    x, y = read_fashion_mnist(folder, split)
    scaled = (torch.from_numpy(x[positions]).float() / 255 - MEAN) / STD
    return scaled.unsqueeze(1), torch.from_numpy(y[positions].astype(np.int64))


def by_kronfluence(state: dict[str, Tensor], data: TensorDataset, tests: TensorDataset) -> dict[str, np.ndarray]:
    """Let kronfluence compute all scores, and each layer's mean eigenvalue."""
    results: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        model, task = build(), Classification()
        model.load_state_dict(state)
        model = prepare_model(model, task)
        analyzer = Analyzer("reference", model, task, cpu=True, disable_tqdm=True, output_dir=folder, log_level=30)
        analyzer.fit_all_factors(
            "factors",
            data,
            per_device_batch_size=250,
            factor_args=FactorArguments(strategy="ekfac", use_empirical_fisher=True),
        )
        factors = analyzer.load_lambda_matrices("factors")
        for layer, matrix in factors["lambda_matrix"].items():
            results[f"mean_lambda_{layer}"] = (matrix / factors["num_lambda_processed"][layer]).mean().numpy()
        for name, damping in DAMPINGS.items():
            settings = {"per_device_train_batch_size": 250, "score_args": ScoreArguments(damping_factor=damping)}
            analyzer.compute_pairwise_scores(name, "factors", tests, data, per_device_query_batch_size=TEST, **settings)
            analyzer.compute_self_scores(name, "factors", data, **settings)
            results[f"scores_{name}"] = analyzer.load_pairwise_scores(name)["all_modules"].numpy()
            results[f"self_{name}"] = analyzer.load_self_scores(name)["all_modules"].numpy()
    return results


def example_gradients(
    model: nn.Sequential, data: TensorDataset
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, Tensor]]]:
    """Give every example's gradient [n, out, in + 1] of every layer, and the covariances of its inputs and outputs."""
    x, y = data.tensors
    inputs, outputs = {}, {}
    value = x.to(torch.float64)
    for name, layer in model.double().named_children():
        inputs[name] = value
        value = outputs[name] = layer(value)
    layers = [name for name, layer in model.named_children() if isinstance(layer, nn.Linear | nn.Conv2d)]
    loss = nn.functional.cross_entropy(value, y, reduction="sum")
    gradients, covariances = {}, {}
    for name, delta in zip(layers, torch.autograd.grad(loss, [outputs[name] for name in layers]), strict=True):
        layer, a = model.get_submodule(name), inputs[name].detach()
        if isinstance(layer, nn.Conv2d):
            a = nn.functional.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride).transpose(1, 2)
            delta = delta.flatten(2).transpose(1, 2)
        else:
            a, delta = a.unsqueeze(1), delta.unsqueeze(1)
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2)
        gradients[name] = delta.transpose(1, 2) @ a
        places = len(x) * a.shape[1]
        covariances[name] = (
            torch.einsum("nti,ntj->ij", a, a) / places,
            torch.einsum("nti,ntj->ij", delta, delta) / places,
        )
    return gradients, covariances


def by_formula(state: dict[str, Tensor], data: TensorDataset, tests: TensorDataset) -> dict[str, np.ndarray]:
    """Compute the same in float64: g' Q (Λ + λ)⁻¹ Q' g, summed over layers, Λ the mean of the squared Q' g."""
    model = build()
    model.load_state_dict(state)
    gradients, covariances = example_gradients(model, data)
    queries, _ = example_gradients(model, tests)
    results: dict[str, np.ndarray] = {}
    for layer, (inputs, outputs) in covariances.items():
        right, left = torch.linalg.eigh(inputs)[1], torch.linalg.eigh(outputs)[1]
        rotated, query = (left.T @ g[layer] @ right for g in (gradients, queries))
        eigenvalues = rotated.square().mean(dim=0)
        results[f"mean_lambda_{layer}"] = eigenvalues.mean().numpy()
        for name, damping in DAMPINGS.items():
            weights = 1 / (eigenvalues + (0.1 * eigenvalues.mean() if damping is None else damping))
            scores = torch.einsum("qoi,noi->qn", query * weights, rotated).numpy()
            own = (rotated.square() * weights).sum(dim=(1, 2)).numpy()
            results[f"scores_{name}"] = results.get(f"scores_{name}", 0) + scores
            results[f"self_{name}"] = results.get(f"self_{name}", 0) + own
    return results


def main(folder: Path, out: Path) -> None:
    """Train, score both ways, compare and write."""
    torch.set_num_threads(2)
    positions = np.load(DEMO)["positions"].astype(np.int64)
    tiles = {"train": np.arange(TRAIN), "test": np.arange(DEMO_TRAIN, len(positions))}
    x, y = images(folder, "train", positions[tiles["train"]])
    test_x, test_y = images(folder, "t10k", positions[tiles["test"]])
    model = train(x, y)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(test_x), test_y, reduction="none")
        print(
            f"accuracy: train {accuracy(model, x, y):.3f}, the demo's test images {accuracy(model, test_x, test_y):.3f}"
        )
    chosen = (loss > LEAST_LOSS).nonzero().flatten()[:TEST]
    test_x, test_y, tiles["test"] = test_x[chosen], test_y[chosen], tiles["test"][chosen.numpy()]
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        losses = {
            "train_loss": nn.functional.cross_entropy(model(x), y, reduction="none").numpy(),
            "test_loss": nn.functional.cross_entropy(model(test_x), test_y, reduction="none").numpy(),
        }
    data, tests = TensorDataset(x, y), TensorDataset(test_x, test_y)
    scores, exact = by_kronfluence(state, data, tests), by_formula(state, data, tests)
    # Of the float32 scores, the largest difference relative to the largest score of the same test image.
    differences = {}
    for name, value in scores.items():
        scale = np.abs(exact[name]).max(axis=-1, keepdims=True) if value.ndim else np.abs(exact[name])
        differences[f"difference_{name}"] = (np.abs(value - exact[name]) / scale).max()
        print(f"{name}: largest {np.abs(value).max():.4g}, difference {differences[f'difference_{name}']:.2e}")
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out,
        **{f"model/{name}": value.numpy() for name, value in state.items()},
        **{name: np.float32(value) for name, value in {**losses, **scores, **differences}.items()},
        **{f"{part}_tile": index.astype(np.int32) for part, index in tiles.items()},
        **{f"{part}_position": positions[index].astype(np.int32) for part, index in tiles.items()},
        train_label=y.numpy().astype(np.uint8),
        test_label=test_y.numpy().astype(np.uint8),
        mean_and_std=np.float32([MEAN, STD]),
    )
    print(f"{out.name}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else OUT)
