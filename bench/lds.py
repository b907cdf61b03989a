"""Which λ and how many coordinates predict retraining? Linear datamodeling scores (LDS) of the project's own scores.

    python bench/lds_retrain.py --net cnn --out FOLDER       (an hour or less: 60 half-subsets, retrained once)
    python bench/lds.py FOLDER                               (minutes; --subsets 20 to try it)

The score of a half-subset on a test image is the summed influence of the training images left out; its LDS is the
Spearman correlation with the actual loss over the subsets, averaged over 300 test images (Park et al. 2023). The
interval is ± 1.96 standard errors of a bootstrap over subsets and test images. AP is self-influence's average precision
on the 10% of labels that were flipped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import lds_retrain

from influence_cli.curvature.blocks import Block, keep, largest
from influence_cli.curvature.coordinates import Blocks, coordinates
from influence_cli.curvature.damping import C
from influence_cli.curvature.ekfac import fit
from influence_cli.curvature.kronecker_plan import SAMPLED_AT_LEAST
from influence_cli.curvature.spectrum import Spectrum, layered
from influence_cli.data.batches import Batch
from influence_cli.metrics import average_precision, bootstrap_lds, lds, spearman
from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network
from influence_cli.store.encoding import decode, encode

BATCH = 500
MULTIPLES = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
ABSOLUTE = (0.001, 0.01, 0.1, 1.0)
COUNTS = (4096, 512)
SHOWN = 30  # test images whose scores are compared in full


def interval(predicted: np.ndarray, actual: np.ndarray, draws: int = 100) -> float:
    """Bootstrap over subsets and tests: 1.96 standard errors of the LDS."""
    return 1.96 * float(bootstrap_lds([predicted], actual, draws).std())


class Measured:
    """Coordinates of one network's training and test images in the whole EK-FAC basis, and what retraining gave."""

    def __init__(self, truth: lds_retrain.GroundTruth, blocks: Sequence[Block], train: np.ndarray, test: np.ndarray):
        self.blocks, self.train, self.test = blocks, train, test
        self.spectrum: Spectrum = layered(blocks, None)
        self.owner = self.spectrum.owner.numpy()
        self.values = self.spectrum.values.numpy()
        self.means = np.array([group.mean for group in self.spectrum.groups])
        self.out = (~truth.membership).astype(np.float32)
        self.actual = truth.losses.T.astype(np.float64)
        self.flipped = truth.choice.flipped
        self.summed = self.removed(train)

    def removed(self, rows: np.ndarray) -> np.ndarray:
        """Sum the rows of the images that each half leaves out: [subsets, coordinates]."""
        return np.asarray(self.out @ rows)

    def score(self, weights: np.ndarray, summed: np.ndarray | None = None, test: np.ndarray | None = None) -> str:
        """Give the LDS of weighted products, with its interval."""
        left = (self.test if test is None else test) * weights.astype(np.float32)
        predicted = (left @ (self.summed if summed is None else summed).T).astype(np.float64)
        return f"{lds(predicted, self.actual).mean():.3f} ± {interval(predicted, self.actual):.3f}"

    def likeness(self, weights: np.ndarray, chosen: np.ndarray) -> float:
        """Correlate (Spearman) the influence by the chosen coordinates with that by all, over training images."""
        left = self.test[:SHOWN] * weights.astype(np.float32)
        whole, part = left @ self.train.T, left[:, chosen] @ self.train[:, chosen].T
        return float(lds(part, whole).mean())

    def precision(self, weights: np.ndarray) -> float:
        """Give the average precision of self-influence on the flipped labels."""
        own = np.concatenate([np.square(part) @ weights for part in np.array_split(self.train, 20)])
        return average_precision(own, self.flipped)


def measure(truth: lds_retrain.GroundTruth, sample: int | None = None) -> Measured:
    """Fit EK-FAC on the checkpoint, its covariances on all images or a sample, and compute every coordinate."""
    loss = partial(nn.functional.cross_entropy, reduction="none")
    x, y = truth.train_inputs, torch.from_numpy(truth.choice.given)
    network = make_network(track(truth.model, loss, ("*",), "layers"), x[:8])

    def batches(inputs: Tensor, labels: Tensor, start: int) -> list[Batch]:
        return [
            Batch(inputs[at : at + BATCH], labels[at : at + BATCH], np.arange(at, min(at + BATCH, len(labels))))
            for at in range(start * BATCH, len(labels), BATCH)
        ]

    chosen = torch.arange(len(y))
    if sample is not None:
        chosen = torch.from_numpy(np.sort(np.random.default_rng(0).choice(len(y), sample, replace=False)))
    sampled = x[chosen], y[chosen]
    blocks = fit(
        network,
        lambda stage, start: batches(*(sampled if stage == "covariances" else (x, y)), start),
        how="sampled",
        seed=0,
    )
    basis = Blocks(tuple(keep(blocks, None, torch.device("cpu"))))
    sides = []
    for inputs, labels in ((x, y), (truth.test_inputs, torch.from_numpy(truth.choice.test_labels))):
        rows = np.empty((len(labels), basis.width), dtype=np.float32)
        for batch in batches(inputs, labels, 0):
            rows[batch.indices] = coordinates(network, basis, batch.inputs, batch.targets)[0].numpy()
        sides.append(rows)
    return Measured(truth, blocks, *sides)


def by_value(found: Measured, count: int) -> np.ndarray:
    """Choose the coordinates of largest Λ, without regard to layers."""
    return np.sort(np.argsort(-found.values, kind="stable")[:count])


def sweep(found: Measured) -> None:
    """Print the table: λ in rows, how many coordinates in columns."""
    print(
        f"\n| λ | d_eff | AP | LDS, all {len(found.values):,} | top {COUNTS[0]:,} Λ/mean | top {COUNTS[0]:,} Λ "
        f"| top {COUNTS[1]:,} Λ/mean | as many as d_eff | Spearman of top {COUNTS[0]:,} with all |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [(f"{c:g} × mean", c * found.means[found.owner]) for c in MULTIPLES]
    rows += [(f"{value:g}", np.full(len(found.values), value)) for value in ABSOLUTE]
    for name, shift in rows:
        weights = 1 / (found.values + shift)
        dimension = float((found.values * weights).sum())
        cells = [found.score(weights)]
        chosen = {count: largest(found.blocks, min(count, len(weights))) for count in COUNTS}
        own = largest(found.blocks, min(len(weights), max(len(found.blocks), int(np.ceil(dimension)))))
        subsets = (chosen[COUNTS[0]], by_value(found, COUNTS[0]), chosen[COUNTS[1]], own)
        cells += [found.score(weights[subset], found.summed[:, subset], found.test[:, subset]) for subset in subsets]
        like = found.likeness(weights, chosen[COUNTS[0]])
        print(f"| {name} | {dimension:,.0f} | {found.precision(weights):.3f} | {' | '.join(cells)} | {like:.3f} |")
    plain = np.ones(len(found.values))
    print(f"| `identity` | | {found.precision(plain):.3f} | {found.score(plain)} | | | | | |")


def sampled(found: Measured, truth: lds_retrain.GroundTruth) -> None:
    """Print what a sample of images for the covariances changes, at the λ of ``auto``."""
    print("\n| covariances from | LDS | Spearman of influence | of self-influence |\n|---|---|---|---|")
    shift = C * found.means[found.owner]
    weights = 1 / (found.values + shift)
    whole = (found.test[:SHOWN] * weights.astype(np.float32)) @ found.train.T
    own = np.concatenate([np.square(part) @ weights for part in np.array_split(found.train, 20)])
    print(f"| all {len(whole.T):,} images | {found.score(weights)} | 1 | 1 |")
    other = measure(truth, SAMPLED_AT_LEAST)
    weights = 1 / (other.values + C * other.means[other.owner])
    again = (other.test[:SHOWN] * weights.astype(np.float32)) @ other.train.T
    own_again = np.concatenate([np.square(part) @ weights for part in np.array_split(other.train, 20)])
    likeness = float(lds(again, whole).mean())
    own_likeness = spearman(own, own_again)
    print(f"| {SAMPLED_AT_LEAST:,} of them | {other.score(weights)} | {likeness:.4f} | {own_likeness:.4f} |")


def rounded(found: Measured) -> None:
    """Print the LDS of rows rounded as a store rounds them, and of a random sketch, at the λ of ``auto``."""
    weights = 1 / (found.values + C * found.means[found.owner])
    half = largest(found.blocks, COUNTS[0])
    print(f"\n| rows at λ = {C:g} × mean | LDS, all {len(weights):,} | top {COUNTS[0]:,} |")
    print("|---|---|---|")
    for dtype in ("float32", "float16", "int8"):
        cells = []
        for subset in (np.arange(len(weights)), half):
            rows = np.ascontiguousarray(found.train[:, subset])
            if dtype != "float32":
                parts = []
                for part in np.array_split(rows, 20):
                    columns = encode(part, dtype)
                    parts.append(decode(columns["coordinates"], columns["scales"], np.empty_like(part)).copy())
                rows = np.concatenate(parts)
            cells.append(found.score(weights[subset], found.removed(rows), found.test[:, subset]))
        print(f"| {dtype} | {cells[0]} | {cells[1]} |")
    generator = torch.Generator().manual_seed(0)
    root = torch.from_numpy(np.sqrt(weights).astype(np.float32))
    left = np.zeros((len(found.test), COUNTS[0]), dtype=np.float32)
    right = np.zeros((len(found.summed), COUNTS[0]), dtype=np.float32)
    for columns in np.array_split(np.arange(len(weights)), 20):
        signs = torch.randn(len(columns), COUNTS[0], generator=generator) / COUNTS[0] ** 0.5
        own = root[columns]
        left += ((torch.from_numpy(found.test[:, columns]) * own) @ signs).numpy()
        right += ((torch.from_numpy(found.summed[:, columns]) * own) @ signs).numpy()
    print(f"| random sketch of preconditioned rows | | {found.score(np.ones(COUNTS[0]), right, left)} |")


def main() -> None:
    """Load what retraining gave, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    words = parser.parse_args()
    truth = lds_retrain.load(words.folder)
    print(f"{words.folder.name}: {len(truth.losses)} half-subsets of {truth.membership.shape[1]:,} images")
    found = measure(truth)
    sweep(found)
    rounded(found)
    sampled(found, truth)


if __name__ == "__main__":
    main()
