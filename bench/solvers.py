"""How many products with the curvature do conjugate gradients need, with and without a preconditioner?

    python bench/solvers.py --model build/cnn.pt --images 4000   (half an hour, 8 GB; the model is trained if missing)

The demo's CNN (55,338 parameters) trained on 10,000 Fashion-MNIST images, the GGN over some of them, λ = auto (0.1 ×
the mean eigenvalue); right sides are gradients of test images, to a relative residual of 1e-3. Products come from the
rows of the GGN in memory, the same matrix as the one that `influence` multiplies with by two backward passes: both are
compared first. Of more than 4,000 images the rows are too large; products are then by backward passes, and only one
right side is solved for, without and with the preconditioner (--most 250: half an hour). One thread.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import lds_retrain

from influence_cli.curvature.blocks import joined, keep
from influence_cli.curvature.coordinates import Blocks, full_vectors, vector_coordinates
from influence_cli.curvature.damping import C
from influence_cli.curvature.ekfac import fit
from influence_cli.curvature.operator import Examples, mean_product
from influence_cli.curvature.preconditioner import ROWS, heaviest_rows, row_preconditioner
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, track
from influence_cli.passes import curvature_products
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients, jacobians
from influence_cli.solvers.cg import Product, SolveInfo, conjugate_gradients
from influence_cli.solvers.nystrom import nystrom

TRAINED, TOLERANCE, TOGETHER, BATCH = 10_000, 1e-3, 8, 256
MOST_IN_ROWS = 4_000
Solve = Callable[[Tensor], SolveInfo]


def load_network(path: Path, data: Path) -> Network:
    """Read the CNN, or train it on the first 10,000 images and keep it."""
    model = lds_retrain.RECIPES["cnn"].build().eval()
    if not path.exists():
        x = lds_retrain.read_inputs(data, "train", slice(0, TRAINED))
        y = torch.tensor(lds_retrain.read(data, "train", "labels")[:TRAINED]).long()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(lds_retrain.train("cnn", x, y, 0).state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    loss = partial(nn.functional.cross_entropy, reduction="none")
    return make_network(track(model, loss, ("*",), "layers"), lds_retrain.read_inputs(data, "train", slice(0, 8)))


def mean_eigenvalue(network: Network, examples: Examples) -> float:
    """Compute the GGN's trace / p: the mean over examples of tr(S J Jᵀ) / p."""
    total = 0.0
    for at in range(0, len(examples), 50):
        part = slice(at, at + 50)
        j, s, _ = jacobians(network, examples.inputs[part], examples.targets[part])
        total += float(torch.einsum("bcp,bcd,bdp->", j, s, j))
    return total / len(examples) / network.size


def ekfac_preconditioner(network: Network, examples: Examples, shift: float) -> Product:
    """Invert EK-FAC's GGN + shift·I."""
    x, y = examples.inputs, examples.targets
    parts = [
        Batch(x[at : at + 500], y[at : at + 500], np.arange(len(y))[at : at + 500]) for at in range(0, len(y), 500)
    ]
    blocks = fit(network, lambda _stage, start: parts[start:], how="sampled", seed=0)
    basis, inverse = Blocks(tuple(keep(blocks, None, x.device))), 1 / (joined(blocks) + shift)
    return lambda r: full_vectors(network, basis, vector_coordinates(network, basis, r) * inverse)


def report(name: str, solve: Solve, sides: Sequence[Tensor], plain: int | None = None) -> int:
    """Solve for each block of right sides and print a row of the table; give the products."""
    started = time.perf_counter()
    found = [solve(block) for block in sides]
    count, most = sum(info.products for info in found), max(info.iterations for info in found)
    worst = max(info.residual for info in found)
    shown = f"{count:,}" if worst <= TOLERANCE else f"> {count:,}"
    ratio = "" if plain is None else f"{plain / count:.1f}"
    spent = time.perf_counter() - started
    print(
        f"| {name} | {sum(map(len, sides))} | {most:,} | {shown} | {worst:.1e} | {ratio} | {spent:.0f} s |", flush=True
    )
    return count


def time_products(network: Network, x: Tensor, y: Tensor, count: int = 300) -> None:
    """Print what a product with many vectors takes by the layer pass and by reverse mode twice."""
    vectors = torch.randn(count, network.size, generator=torch.Generator().manual_seed(0))
    seconds = []
    for way in (curvature_products.curvature_product, curvature_products.reverse_product):
        way(network, x[:8], y[:8], vectors[:2], "ggn")
        started = time.process_time()
        way(network, x, y, vectors, "ggn")
        seconds.append(time.process_time() - started)
    print(
        f"one product with {count} vectors, {len(y)} images: layer pass {seconds[0]:.2f} s, reverse mode twice "
        f"{seconds[1]:.2f} s of one core: {seconds[1] / seconds[0]:.1f} times"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the network's weights; trained if missing")
    parser.add_argument("--images", type=int, default=4_000)
    parser.add_argument("--most", type=int, default=1_500, help="iterations at most")
    parser.add_argument("--data", type=Path, default=lds_retrain.DATA, help="folder that holds FashionMNIST/raw/*.gz")
    words = parser.parse_args()
    torch.set_num_threads(1)
    network = load_network(words.model, words.data)
    x = lds_retrain.read_inputs(words.data, "train", slice(0, words.images))
    y = torch.tensor(lds_retrain.read(words.data, "train", "labels")[: words.images]).long()
    examples = Examples(x, y, BATCH)
    test_x = lds_retrain.read_inputs(words.data, "t10k", slice(0, TOGETHER))
    test_y = torch.tensor(lds_retrain.read(words.data, "t10k", "labels")[:TOGETHER]).long()
    v = example_gradients(network, test_x, test_y)[0]

    time_products(network, x[:BATCH], y[:BATCH])
    shift = C * mean_eigenvalue(network, examples)
    print(f"{len(y):,} images, {network.size:,} parameters; λ = {C:g} × mean eigenvalue = {shift:.3g}", flush=True)
    product = mean_product(network, examples, "ggn", shift)
    large = len(y) > MOST_IN_ROWS
    if not large:
        rows, backward = heaviest_rows(network, examples, 10 * len(y)), product(v[:1])

        def product(u: Tensor) -> Tensor:
            return (u @ rows.T) @ rows + shift * u

        difference = float((product(v[:1]) - backward).norm() / backward.norm())
        print(f"{len(rows):,} rows; products differ by {difference:.1e}\n")
    print("| conjugate gradients | right sides | iterations | products | residual | fewer by | time |")
    print("|---|---|---|---|---|---|---|", flush=True)

    def by(precondition: Product | None) -> Solve:
        how = {"precondition": precondition, "tolerance": TOLERANCE, "max_iterations": words.most}
        return lambda block: conjugate_gradients(product, block, **how)[1]  # type: ignore[arg-type]

    one, each, block = [v[:1]], list(v.split(1)), [v]
    whole = row_preconditioner(heaviest_rows(network, examples), shift)
    better = report(f"preconditioned by {ROWS:,} rows", by(whole), one)
    plain = report("plain", by(None), one)
    # Where plain conjugate gradients stop at the limit, all ratios are lower bounds.
    print(
        f"\npreconditioned: {'at least ' if plain >= words.most else ''}{plain / better:.1f} times fewer (asked: 5)\n"
    )
    if large:
        return
    fewer = row_preconditioner(heaviest_rows(network, examples, ROWS // 4), shift)
    report(f"preconditioned by {ROWS // 4:,} rows", by(fewer), one, plain)
    report(f"preconditioned by {ROWS:,} rows, one by one", by(whole), each)
    report(f"preconditioned by {ROWS:,} rows, one block", by(whole), block)
    report(f"preconditioned by {ROWS // 4:,} rows, one by one", by(fewer), each)
    report(f"preconditioned by {ROWS // 4:,} rows, one block", by(fewer), block)
    report("plain, one block", by(None), block)
    sketched: Solve = lambda side: nystrom(product, side, tolerance=TOLERANCE, max_iterations=words.most)[1]  # noqa: E731
    report("Nyström, 100 products of it with random vectors", sketched, one, plain)
    report("preconditioned by EK-FAC", by(ekfac_preconditioner(network, examples, shift)), one, plain)


if __name__ == "__main__":
    main()
