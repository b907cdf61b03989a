"""Agreement with kronfluence 1.0.1: same checkpoint, data and layers, the empirical Fisher on both sides.

Its scores lie in tests/data, written by bench/peers/kronfluence_reference.py in an environment of its own; the images
are the demo's. kronfluence does not divide by n.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.curvature.blocks import keep
from influence_cli.curvature.coordinates import Blocks, coordinates
from influence_cli.curvature.ekfac import fit
from influence_cli.curvature.spectrum import Spectrum, layered
from influence_cli.data.batches import Batch
from influence_cli.demo.project import read_images
from influence_cli.influence.scores import removal
from influence_cli.metrics import pearson, slope
from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network

REFERENCE = Path(__file__).parents[1] / "data" / "kronfluence_reference.npz"
N = 1000


@pytest.fixture(scope="module")
def fitted(one_thread: None) -> tuple[Spectrum, Tensor, Tensor, dict[str, np.ndarray]]:
    """Fit EK-FAC as kronfluence was, and give the coordinates of its training and test images."""
    with np.load(REFERENCE) as archive:
        reference = {name: archive[name] for name in archive.files}
    images, _ = read_images()
    mean, std = reference["mean_and_std"]

    def batch(part: str) -> Batch:
        x = torch.from_numpy((images[reference[f"{part}_tile"]] / np.float32(255) - mean) / std).float()[:, None]
        y = torch.from_numpy(reference[f"{part}_label"].astype(np.int64))
        return Batch(x, y, np.arange(len(y)))

    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 10),
    )
    state = {name.removeprefix("model/"): torch.from_numpy(value) for name, value in reference.items() if "/" in name}
    model.load_state_dict(state)
    train, test = batch("train"), batch("test")
    loss = partial(nn.functional.cross_entropy, reduction="none")
    network = make_network(track(model.eval(), loss, ("*",), "layers"), train.inputs)
    blocks = fit(network, lambda _stage, start: [train][start:], how="empirical", seed=0)
    basis = Blocks(tuple(keep(blocks, None, torch.device("cpu"))))
    rows, losses, _ = coordinates(network, basis, train.inputs, train.targets)
    assert torch.allclose(losses, torch.from_numpy(reference["train_loss"]), atol=1e-4)
    tests = coordinates(network, basis, test.inputs, test.targets)[0]
    return layered(blocks, None), rows.double(), tests.double(), reference


def test_mean_eigenvalues_agree(fitted: tuple[Spectrum, Tensor, Tensor, dict[str, np.ndarray]]) -> None:
    spectrum, _, _, reference = fitted
    for group in spectrum.groups:
        assert group.mean == pytest.approx(float(reference[f"mean_lambda_{group.name}"]), rel=1e-4)


@pytest.mark.parametrize("damping", ["one", "heuristic"])
def test_scores_agree(fitted: tuple[Spectrum, Tensor, Tensor, dict[str, np.ndarray]], damping: str) -> None:
    spectrum, rows, tests, reference = fitted
    means = torch.tensor([group.mean for group in spectrum.groups], dtype=torch.float64)[spectrum.owner]
    weights = 1 / (spectrum.values + (1.0 if damping == "one" else 0.1 * means))
    influence = removal((tests * weights) @ rows.T, N).numpy()
    own = removal((rows.square() @ weights), N).numpy()
    for ours, theirs in ((influence, reference[f"scores_{damping}"] / N), (own, reference[f"self_{damping}"] / N)):
        r, fitted_slope = pearson(ours.ravel(), theirs.ravel()), slope(ours.ravel(), theirs.ravel())
        print(f"λ {damping}: Pearson {r:.6f}, slope {fitted_slope:.5f}")
        assert r >= 0.99
        assert abs(fitted_slope - 1) <= 0.02
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)
