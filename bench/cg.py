"""Does `cg` predict retraining better than EK-FAC, and what does it cost? On two networks, paired.

    python bench/lds_retrain.py --net cnn --out build/lds/cnn --subsets 60     (20 minutes of one core)
    python bench/cg_retrain.py --out build/cg/residual --subsets 50            (15 minutes)
    python bench/cg.py build/lds/cnn build/cg/residual                         (10 minutes)

Every row is a linear datamodeling score over 300 test images, with a 95% interval by a bootstrap over halves and test
images; a difference is of the same draws. Times are of one thread, for all 300 test images together: set-up once (the
passes that need no test image), then seconds per test. What was chosen by these rows was chosen on the first network.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import cg_retrain
import lds_retrain
import public_data

from influence_cli.checkpoints.optimizer_state import adam_slowness
from influence_cli.curvature.blocks import Block
from influence_cli.curvature.damping import C_EXACT, C, TrainingTime, adam_time
from influence_cli.curvature.ekfac import fit
from influence_cli.curvature.operator import Examples, fits_kept, kept_mean_product, mean_product
from influence_cli.curvature.preconditioner import (
    block_preconditioner,
    by_parameter,
    heaviest_rows,
    row_preconditioner,
)
from influence_cli.data.batches import Batch
from influence_cli.errors import counted
from influence_cli.influence.layer_curvature import SAMPLE
from influence_cli.metrics import bootstrap_lds, lds
from influence_cli.model.network import Network, track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from influence_cli.solvers.cg import Product, conjugate_gradients, few_products

BATCH, DRAWS = 256, 400
# Numbers of images that are compared; those beyond a network's own count are all of them.
IMAGES = (768, 2_048, 10_000)
Solve = Callable[[Tensor], tuple[Tensor, str]]


@dataclass(frozen=True)
class Truth:
    """A checkpoint, its data, and what retraining on halves did to the test losses."""

    name: str
    network: Network
    examples: Examples
    tests: Examples
    v: Tensor  # gradients of the test losses [t, p]
    left_out: Tensor  # which images each half leaves out, float32 [halves, n]
    summed: Tensor  # Σ gᵢ over the images that each half leaves out, float64 [halves, p]
    actual: np.ndarray  # float64 [t, halves]
    l2: float
    time: TrainingTime  # η·K of the checkpoint's own training, by layer


def load(folder: Path) -> Truth:
    """Read a folder of lds_retrain.py or of cg_retrain.py; it may still lack halves."""
    if (folder / "data.npz").exists():
        found = lds_retrain.load(folder, public_data.need("fashion-mnist"))
        model, l2, recipe = found.model, found.l2, lds_retrain.RECIPES[found.net]
        x, y = found.train_inputs, torch.from_numpy(found.choice.given)
        test_x, test_y = found.test_inputs, torch.from_numpy(found.choice.test_labels)
        membership, losses = found.membership, found.losses
        name = "the demo's CNN, 10,000 Fashion-MNIST images"
    else:
        model, l2, recipe = cg_retrain.build().eval(), cg_retrain.RECIPE.l2, cg_retrain.RECIPE
        model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))
        (x, y), (test_x, test_y) = cg_retrain.images("train"), cg_retrain.images("test")
        paths = sorted(folder.glob("subset_*.npz"))
        membership, losses = np.zeros((len(paths), len(y)), dtype=bool), np.zeros((len(paths), len(test_y)))
        for row, path in enumerate(paths):
            with np.load(path) as file:
                membership[row, file["positions"]], losses[row] = True, file["losses"]
        name = f"ResNet-8, {len(y):,} CIFAR-10 images"
    time = training_time(folder, model, recipe, x, y)
    loss = partial(nn.functional.cross_entropy, reduction="none")
    network = make_network(track(model, loss, ("*",), "layers"), x[:8])
    summed = torch.zeros(len(membership), network.size, dtype=torch.float64)
    left_out = torch.from_numpy(~membership).float()
    for at in range(0, len(y), BATCH):
        part = slice(at, at + BATCH)
        summed += left_out[:, part] @ example_gradients(network, x[part], y[part])[0].detach()
    v = example_gradients(network, test_x, test_y)[0].detach()
    return Truth(
        name,
        network,
        Examples(x, y, BATCH),
        Examples(test_x, test_y, BATCH),
        v,
        left_out,
        summed,
        losses.T.astype(np.float64),
        l2,
        time,
    )


def training_time(folder: Path, model: nn.Module, recipe: lds_retrain.Recipe, x: Tensor, y: Tensor) -> TrainingTime:
    """Give η·K by layer, from Adam's second moments: the checkpoint is trained once more, from the same seed."""
    path = folder / "with-optimiser.pt"
    if not path.exists():
        torch.manual_seed(0)
        left: dict[str, object] = {}
        again = lds_retrain.minimise(recipe.build(), recipe, x, y, 0, left=left)
        pairs = zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        if not all(torch.allclose(one.float(), other.float(), atol=1e-3) for one, other in pairs):
            print("the checkpoint was not trained again to the same weights", file=sys.stderr)
        torch.save({"model": again.state_dict(), "optimizer": left}, path)
    slowness = adam_slowness(path, model, str(path))
    # The mean of a rate that falls to 0 by a cosine is half of it.
    whole = recipe.rate / 2 * recipe.epochs * -(-len(y) // recipe.batch)
    if slowness is None:
        raise ValueError(f"{path} has no second moments")
    return adam_time(whole, *slowness)


def sample(truth: Truth, count: int) -> Examples:
    """Draw some of the training images."""
    examples = truth.examples
    if count >= len(examples):
        return examples
    chosen = torch.from_numpy(np.sort(np.random.default_rng(0).choice(len(examples), count, replace=False)))
    return Examples(examples.inputs[chosen], examples.targets[chosen], BATCH)


def layers_of(network: Network, examples: Examples) -> list[Block]:
    """Fit EK-FAC on some images."""
    x, y = examples.inputs, examples.targets
    parts = [
        Batch(x[at : at + BATCH], y[at : at + BATCH], np.arange(at, min(at + BATCH, len(y))))
        for at in range(0, len(y), BATCH)
    ]
    return fit(network, lambda _stage, start: parts[start:], how="sampled", seed=0)


class Table:
    """Rows of scores, and the differences between them."""

    def __init__(self, truth: Truth) -> None:
        self.truth, self.predicted = truth, dict[str, np.ndarray]()
        print(f"\n{truth.name}, {truth.network.size:,} parameters, {truth.actual.shape[1]} halves\n")
        print("| estimate | LDS | 95% | set-up, s | s a test | residual |\n|---|---|---|---|---|---|", flush=True)

    def add(self, name: str, solve: Callable[[], Solve], tests: int | None = None) -> None:
        """Set a method up, solve for all tests or the first ones, and print its row."""
        started = time.process_time()
        apply = solve()
        ready = time.process_time()
        s, note = apply(self.truth.v[:tests])
        spent = (time.process_time() - ready) / len(s)
        predicted = (s.double() @ self.truth.summed.T).numpy()
        self.take(name, predicted, f"{ready - started:.0f} | {spent:.3f} | {note}")

    def take(self, name: str, predicted: np.ndarray, note: str = " | | ") -> None:
        """Print the row of what was predicted."""
        self.predicted[name] = predicted
        score = lds(predicted, self.truth.actual[: len(predicted)]).mean()
        low, high = np.quantile(self.draws([name])[:, 0], [0.025, 0.975])
        print(f"| {name} | {score:.3f} | {low:.3f} to {high:.3f} | {note} |", flush=True)

    def draws(self, names: Sequence[str]) -> np.ndarray:
        """Draw halves and tests: the scores of each name, [draws, names]; of the tests that all of them have."""
        count = min(len(self.predicted[name]) for name in names)
        predicted = [self.predicted[name][:count] for name in names]
        return bootstrap_lds(predicted, self.truth.actual[:count], DRAWS)

    def differences(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print paired differences."""
        print("\n| difference | tests | LDS | 95% |\n|---|---|---|---|")
        for one, other in pairs:
            if one not in self.predicted or other not in self.predicted:
                continue
            count = min(len(self.predicted[name]) for name in (one, other))
            first, second = self.draws([one, other]).T
            low, high = np.quantile(first - second, [0.025, 0.975])
            both = [lds(self.predicted[name][:count], self.truth.actual[:count]).mean() for name in (one, other)]
            print(f"| {one} − {other} | {count} | {both[0] - both[1]:+.3f} | {low:+.3f} to {high:+.3f} |", flush=True)


def by_layers(truth: Truth, multiple: float) -> Solve:
    """EK-FAC at a multiple of each layer's mean, fitted on all images."""
    blocks = layers_of(truth.network, truth.examples)
    inverse = block_preconditioner(truth.network, blocks, [truth.l2 + multiple * block.mean for block in blocks])
    return lambda v: (inverse(v), "")


def ggn_product(network: Network, examples: Examples, shift: float | Tensor) -> Product:
    """Multiply with the GGN, its Jacobian kept where it fits the memory, as the command does."""
    if fits_kept(network, examples):
        return kept_mean_product(network, examples, shift, torch.float32)
    return mean_product(network, examples, "ggn", shift)


def few(truth: Truth, images: int, count: int, *, training: bool = False) -> Solve:
    """The exact GGN of some images, λ of each layer, a number of products preconditioned by EK-FAC."""
    network, examples = truth.network, sample(truth, images)
    blocks = layers_of(network, examples)
    values = [C_EXACT * block.mean for block in blocks]
    if training:
        values = list(truth.time.damping([block.name for block in blocks]).values)
        print(
            f"λ of training {min(values):.3g} to {max(values):.3g}; "
            f"auto {min(C_EXACT * b.mean for b in blocks):.3g} to {max(C_EXACT * b.mean for b in blocks):.3g}",
            file=sys.stderr,
        )
    shifts = [truth.l2 + value for value in values]
    precondition = block_preconditioner(network, blocks, shifts)
    shift = by_parameter(network, blocks, shifts).float()
    product = ggn_product(network, examples, shift)

    def solve(v: Tensor) -> tuple[Tensor, str]:
        s, info = few_products(product, v, count, precondition=precondition)
        return s, f"{info.residual:.2f}"

    return solve


def whole(truth: Truth, tolerance: float) -> Solve:
    """One λ of all layers, all images, to a residual: the earlier default, with its Jacobian kept."""
    network, examples = truth.network, truth.examples
    trace = sum(block.trace for block in layers_of(network, sample(truth, 2_048)))
    shift = truth.l2 + C_EXACT * trace / network.size
    precondition = row_preconditioner(heaviest_rows(network, examples), shift)
    product = ggn_product(network, examples, shift)

    def solve(v: Tensor) -> tuple[Tensor, str]:
        s, info = conjugate_gradients(product, v, precondition=precondition, tolerance=tolerance, max_iterations=20)
        return s, f"{info.residual:.0e}, {info.iterations} products"

    return solve


def kronfluence(truth: Truth, python: Path, work: Path) -> dict[str, np.ndarray]:
    """Let kronfluence score the demo's CNN, in an environment of its own (bench/compare.py --install makes it)."""
    work.mkdir(exist_ok=True)
    (x, y), (test_x, test_y) = ((part.inputs, part.targets) for part in (truth.examples, truth.tests))
    np.savez(work / "case.npz", x=x.numpy(), y=y.numpy(), test_x=test_x.numpy(), test_y=test_y.numpy())
    torch.save(truth.network.model.state_dict(), work / "model-0.pt")
    script = Path(__file__).parent / "peers" / "score_lds.py"
    if not (work / "kronfluence.npz").exists():
        subprocess.run([python, script, "kronfluence", work], check=True, stdout=sys.stderr)
    with np.load(work / "kronfluence.npz") as file:
        scores = {name: file[name] for name in file.files if "models" not in name}
    return {name: (values @ truth.left_out.numpy().T).astype(np.float64) for name, values in scores.items()}


def compare(truth: Truth, rows: Sequence[str], whole_tests: int, peers: dict[str, np.ndarray]) -> None:
    """Print the tables of one network."""
    table, new = Table(truth), f"`cg`, 3 products, {SAMPLE:,} images"
    if "ekfac" in rows:
        table.add("EK-FAC, 0.1 × mean", lambda: by_layers(truth, C))
        table.add("EK-FAC, 10 × mean", lambda: by_layers(truth, C_EXACT))
    if "few" in rows:
        table.add(new, lambda: few(truth, SAMPLE, 3))
    if "images" in rows:
        for count in IMAGES:
            if count != SAMPLE:
                images = min(count, len(truth.examples))
                table.add(f"the same, {images:,} images", partial(few, truth, images, 3))
    if "products" in rows:
        for count in (1, 2, 5, 10):
            table.add(f"the same, {counted(count, 'product')}", partial(few, truth, SAMPLE, count))
    if "training" in rows:
        table.add("the same, `damping: training`", partial(few, truth, SAMPLE, 3, training=True))
    if "whole" in rows:
        table.add("`cg` before", lambda: whole(truth, 1e-2), whole_tests)
    for name, predicted in peers.items():
        table.take(name, predicted)
    names = list(table.predicted)
    table.differences([(new, name) for name in names if name != new])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--rows", default="ekfac,few,images,products,training,whole", help="which rows")
    parser.add_argument("--whole-tests", type=int, default=60, help="test images of the earlier default")
    parser.add_argument("--kronfluence", type=Path, help="a Python that has it; for the demo's CNN alone")
    words = parser.parse_args()
    torch.set_num_threads(1)
    for folder in words.folders:
        truth = load(folder)
        peers = {}
        if words.kronfluence is not None and (folder / "data.npz").exists():
            peers = kronfluence(truth, words.kronfluence.absolute(), (folder / "kronfluence").absolute())
        compare(truth, words.rows.split(","), words.whole_tests, peers)


if __name__ == "__main__":
    main()
