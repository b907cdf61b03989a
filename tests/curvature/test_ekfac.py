"""EK-FAC against a dense reference built with torch.kron and autograd, and against the exact curvature."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from influence_cli.curvature import ekfac, kronecker_plan
from influence_cli.curvature.blocks import describe as describe_blocks
from influence_cli.curvature.blocks import from_arrays, groups, joined, keep, largest, to_arrays
from influence_cli.curvature.coordinates import Blocks, coordinates, full_vectors, weighted_squares
from influence_cli.curvature.ekfac import Watch, fit
from influence_cli.curvature.explicit import curvature_matrix, eigenbasis
from influence_cli.curvature.fisher_draws import draws
from influence_cli.curvature.kronecker_plan import make_plan
from influence_cli.curvature.progress import Progress
from influence_cli.data.batches import Batch
from influence_cli.metrics import pearson, slope
from influence_cli.model.network import Network, track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradient_products import products
from influence_cli.passes.gradients import example_gradients, example_products

loss = partial(nn.functional.cross_entropy, reduction="none")
CPU = torch.device("cpu")


class Small(nn.Module):
    """A convolution, a grouped one with a norm, a layer used twice, a loose parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2)
        self.grouped = nn.Conv2d(4, 4, 2, groups=2, bias=False)
        self.norm = nn.GroupNorm(2, 4)
        self.twice = nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(4) * 0.1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.grouped(torch.tanh(self.conv(x)))))
        h = h.mean(dim=(2, 3)) + self.shift
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(h)))))


def made(model: nn.Module, inputs: Tensor) -> Network:
    return make_network(track(model.eval(), loss, ("*",), "layers"), inputs)


@pytest.fixture(scope="module")
def case() -> tuple[Network, list[Batch]]:
    torch.manual_seed(0)
    batches = [
        Batch(torch.randn(8, 1, 9, 9), torch.randint(0, 3, (8,)), np.arange(start, start + 8)) for start in (0, 8, 16)
    ]
    return made(Small().double().float(), batches[0].inputs), batches


def reference(network: Network, batches: list[Batch], how: str = "sampled", seed: int = 3) -> dict[str, tuple]:
    """Give each layer's dense basis and spectrum: covariances by a loop, torch.kron, the Fisher's diagonal in it."""
    rows, slopes = [], []
    for batch in batches:
        outputs = network.model(batch.inputs)
        for u in draws(network, outputs, batch.targets, how, seed, batch.indices):
            plain = replace(network, layers=(), rest=network.names, vectorised=False)
            rows.append(example_products(plain, batch.inputs, u).double())
            slopes.append((batch, u))
    fisher_rows, n = torch.cat(rows), sum(map(len, batches))
    found = {}
    for layer in (network.layers[number] for number in make_plan(network).layers):
        module = network.model.get_submodule(layer.name)
        into = torch.zeros(layer.groups, layer.width, layer.width, dtype=torch.float64)
        out = torch.zeros(layer.groups, layer.outputs, layer.outputs, dtype=torch.float64)
        for batch, u in slopes:
            for a, delta in calls_of(network.model, module, batch.inputs, u):
                for group in range(layer.groups):
                    if layer.kind == "conv":
                        cut = a[:, group * a.shape[1] // layer.groups : (group + 1) * a.shape[1] // layer.groups]
                        patch = nn.functional.unfold(cut, module.kernel_size, 1, 0, module.stride).transpose(1, 2)
                        d = delta.flatten(2)[:, group * layer.outputs : (group + 1) * layer.outputs].transpose(1, 2)
                    else:
                        patch, d = a[:, None], delta[:, None]
                    if layer.bias:
                        patch = torch.cat([patch, torch.ones_like(patch[..., :1])], dim=2)
                    into[group] += torch.einsum("btk,btl->kl", patch.double(), patch.double())
                    out[group] += torch.einsum("bto,btp->op", d.double(), d.double())
        bases = []
        for group in range(layer.groups):
            q_a, q_g = torch.linalg.eigh(into[group])[1].flip(1), torch.linalg.eigh(out[group])[1].flip(1)
            bases.append(torch.kron(q_g, q_a))
        weight = network.slots[layer.weight]
        own = fisher_rows[:, weight].reshape(len(fisher_rows), layer.groups, layer.outputs, layer.inputs)
        if layer.bias:
            bias = fisher_rows[:, network.slots[layer.bias]].reshape(len(fisher_rows), layer.groups, layer.outputs, 1)
            own = torch.cat([own, bias], dim=3)
        turned = torch.stack([own[:, g].flatten(1) @ bases[g] for g in range(layer.groups)], dim=1)
        found[layer.name] = (bases, turned.square().sum(dim=0) / n)
    return found


def calls_of(model: nn.Module, module: nn.Module, inputs: Tensor, u: Tensor) -> list[tuple[Tensor, Tensor]]:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.register_forward_hook(lambda _m, i, o: seen.append((i[0].detach(), o)))
    try:
        outputs = model(inputs)
        slopes = torch.autograd.grad(outputs, [o for _, o in seen], u)
    finally:
        handle.remove()
    return [(a, slope) for (a, _), slope in zip(seen, slopes, strict=True)]


def fitted(network: Network, batches: list[Batch], **how: object) -> list:
    options = {"how": "sampled", "seed": 3} | how
    return fit(network, lambda _stage, start: batches[start:], **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["sampled", "empirical", "exact", "root"])
def test_spectrum_and_scores_equal_a_dense_reference(case: tuple[Network, list[Batch]], how: str) -> None:
    network, batches = case
    blocks = {block.name: block for block in fitted(network, batches, how=how)}
    expected = reference(network, batches, how)
    assert set(expected) == {"conv", "grouped", "twice", "head"}
    assert {"conv", "grouped", "norm", "twice", "head"} < set(blocks)
    rows = torch.cat([example_gradients(network, b.inputs, b.targets)[0] for b in batches]).double()
    for name, (bases, spectrum) in expected.items():
        block = blocks[name]
        got = block.values.double().flatten(1)
        assert float((got - spectrum).norm() / spectrum.norm()) <= 1e-5, name
        # Eigenvectors are determined up to sign; scores are not.
        layer = next(layer for layer in network.layers if layer.name == name)
        own = rows[:, network.slots[layer.weight]].reshape(len(rows), layer.groups, layer.outputs, layer.inputs)
        if layer.bias:
            bias = rows[:, network.slots[layer.bias]].reshape(len(rows), layer.groups, layer.outputs, 1)
            own = torch.cat([own, bias], dim=3)
        damping = float(spectrum.mean())
        dense = sum(
            (own[:, g].flatten(1) @ bases[g] / (spectrum[g] + damping)) @ (own[:, g].flatten(1) @ bases[g]).T
            for g in range(layer.groups)
        )
        kept = keep([block], None, CPU)
        c = torch.cat([coordinates(network, Blocks(tuple(kept)), b.inputs, b.targets)[0] for b in batches]).double()
        ours = (c / (block.values.flatten().double() + damping)) @ c.T
        assert float((ours - dense).norm() / dense.norm()) <= 1e-5, name


def test_loose_parameters_have_their_exact_block(case: tuple[Network, list[Batch]]) -> None:
    network, batches = case
    blocks = {block.name: block for block in fitted(network, batches, how="empirical")}
    rows = torch.cat([example_gradients(network, b.inputs, b.targets)[0] for b in batches]).double()
    own = torch.cat([rows[:, network.slots[name]] for name in ("norm.weight", "norm.bias")], dim=1)
    moment = own.T @ own / len(own)
    block = blocks["norm"]
    assert block.kind == "dense"
    rebuilt = block.vectors.double() @ torch.diag(block.values.double()) @ block.vectors.double().T
    assert float((rebuilt - moment).norm() / moment.norm()) <= 1e-5


def test_wide_loose_parameters_are_diagonal(case: tuple[Network, list[Batch]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_plan, "EXACT_BLOCK", 5)
    network, batches = case
    blocks = {block.name: block for block in fitted(network, batches, how="empirical")}
    rows = torch.cat([example_gradients(network, b.inputs, b.targets)[0] for b in batches])
    assert blocks["norm"].kind == "diagonal"
    expected = torch.cat([rows[:, network.slots[name]] for name in ("norm.weight", "norm.bias")], dim=1)
    assert torch.allclose(blocks["norm"].values, expected.square().mean(dim=0), rtol=1e-5)


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
def test_it_is_the_exact_curvature_where_the_fisher_factorises(damping: float) -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 4)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    batches = [Batch(torch.randn(32, 6), torch.randint(0, 4, (32,)), np.arange(32)) for _ in range(3)]
    network = made(model, batches[0].inputs)
    blocks = fitted(network, batches, how="exact")
    rows = torch.cat([example_gradients(network, b.inputs, b.targets)[0] for b in batches]).double()
    vectors, values = eigenbasis(curvature_matrix(network, batches, "ggn"))
    exact = (rows @ vectors / (values + damping)) @ (rows @ vectors).T
    basis = Blocks(tuple(keep(blocks, None, CPU)))
    c = torch.cat([coordinates(network, basis, b.inputs, b.targets)[0] for b in batches]).double()
    ours = (c / (joined(blocks).double() + damping)) @ c.T
    assert float((ours - exact).norm() / exact.norm()) <= 1e-6


def test_kfac_is_the_product_of_the_factors(case: tuple[Network, list[Batch]]) -> None:
    network, batches = case
    head = next(block for block in fitted(network, batches, corrected=False) if block.name == "head")
    slopes = [u for b in batches for u in draws(network, network.model(b.inputs), b.targets, "sampled", 3, b.indices)]
    g = torch.cat(slopes).detach().double()
    seen: list[Tensor] = []
    handle = network.model.head.register_forward_hook(lambda _m, i, _o: seen.append(i[0]))
    for batch in batches:
        network.model(batch.inputs)
    handle.remove()
    a = torch.cat([torch.cat(seen).detach(), torch.ones(24, 1)], dim=1).double()
    expected = torch.linalg.eigvalsh(g.T @ g / 24).flip(0)[:, None] * torch.linalg.eigvalsh(a.T @ a / 24).flip(0)
    assert float((head.values[0] - expected).norm() / expected.norm()) <= 1e-5


def test_a_stopped_fit_goes_on_to_the_same_bytes(case: tuple[Network, list[Batch]]) -> None:
    network, batches = case
    whole = to_arrays(fitted(network, batches))
    for stop_after in range(1, 11):
        kept: list[Progress] = []

        class StopError(Exception):
            pass

        def save(progress: Progress, kept: list[Progress] = kept, stop_after: int = stop_after) -> None:
            kept.append(
                Progress(
                    progress.stage,
                    progress.done,
                    progress.examples,
                    {name: value.clone() for name, value in progress.arrays.items()},
                )
            )
            if len(kept) == stop_after:
                raise StopError

        with contextlib.suppress(StopError):
            fitted(network, batches, watch=Watch(save=save))
        resumed = to_arrays(fitted(network, batches, progress=kept[-1]))
        assert resumed.keys() == whole.keys()
        assert all(np.array_equal(resumed[name], whole[name]) for name in whole), stop_after


def test_kept_coordinates_are_those_of_the_whole_basis(case: tuple[Network, list[Batch]]) -> None:
    network, batches = case
    blocks = fitted(network, batches)
    batch = batches[0]
    everything = Blocks(tuple(keep(blocks, None, CPU)))
    whole = coordinates(network, everything, batch.inputs, batch.targets)[0]
    assert whole.shape[1] == len(joined(blocks)) == network.size
    for count in (len(blocks), 17, 60):
        chosen = largest(blocks, count)
        assert len(chosen) == count
        assert set(groups(blocks)[chosen]) == set(range(len(blocks)))
        part = coordinates(network, Blocks(tuple(keep(blocks, chosen, CPU))), batch.inputs, batch.targets)[0]
        assert torch.allclose(part, whole[:, torch.from_numpy(chosen)], atol=1e-6)
        values = torch.cat([kept.values for kept in keep(blocks, chosen, CPU)])
        assert torch.equal(values, joined(blocks)[torch.from_numpy(chosen)])


def test_vectors_products_and_squares_agree_with_coordinates(case: tuple[Network, list[Batch]]) -> None:
    network, batches = case
    blocks = fitted(network, batches)
    basis = Blocks(tuple(keep(blocks, None, CPU)))
    c, losses, outputs = coordinates(network, basis, batches[0].inputs, batches[0].targets)
    weights = 1 / (joined(blocks) + 0.1)
    s = c[:3] * weights
    vectors = full_vectors(network, basis, s)
    got, same_losses, same_outputs = products(network, vectors, batches[0].inputs, batches[0].targets)
    assert torch.allclose(got, c @ s.T, atol=1e-5)
    assert torch.equal(losses, same_losses)
    assert torch.equal(outputs, same_outputs)
    per_block = [1 / (block.values + 0.1) for block in blocks]
    squares = weighted_squares(network, basis, per_block, batches[0].inputs, batches[0].targets)[0]
    assert torch.allclose(squares.float(), (c.square() * weights).sum(dim=1), rtol=1e-4)


def test_blocks_come_back_from_arrays(case: tuple[Network, list[Batch]]) -> None:
    network, batches = case
    blocks = fitted(network, batches)
    arrays = to_arrays(blocks)
    back = from_arrays(describe_blocks(blocks), arrays.get)
    assert [block.name for block in back] == [block.name for block in blocks]
    assert torch.equal(joined(back), joined(blocks))


def test_a_wide_factor_has_its_top_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kronecker_plan, "WIDEST", 20)
    monkeypatch.setattr(kronecker_plan, "TOP", 8)
    monkeypatch.setattr(kronecker_plan, "OVERSAMPLED", 10)
    torch.manual_seed(2)
    mixing = torch.randn(6, 40)
    batches = [Batch(torch.randn(64, 6) @ mixing, torch.randint(0, 3, (64,)), np.arange(64)) for _ in range(2)]
    network = made(nn.Sequential(nn.Linear(40, 5), nn.Tanh(), nn.Linear(5, 3)), batches[0].inputs)
    wide, _ = fitted(network, batches)
    assert wide.q_in is not None
    assert wide.q_in.shape == (1, 41, 7)
    # The inputs have rank 6, and the bias one more: that is all that there is.
    monkeypatch.setattr(kronecker_plan, "WIDEST", 100)
    full, _ = fitted(network, batches)
    assert torch.allclose(wide.values[0, :, :7], full.values[0, :, :7], rtol=1e-3, atol=1e-6)
    assert wide.trace == pytest.approx(float(full.values.sum()), rel=1e-4)
    assert "left out" in ekfac.remainders([wide])[0]


@pytest.mark.slow
def test_beside_the_exact_curvature_of_trained_softmax_regression(one_thread: None) -> None:
    """Print r and slope of EK-FAC's influence on the exact one; it is an approximation, and better the larger λ is."""
    from influence_cli.demo.project import read_images

    images, labels = read_images()
    pooled = nn.functional.avg_pool2d(torch.from_numpy(images).float()[:, None] / 255, 2).flatten(1)
    x, y = pooled[:3000], torch.from_numpy(labels[:3000])
    l2 = 0.01
    model = nn.Linear(196, 10)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        value = loss(model(x), y).mean() + l2 / 2 * penalty
        value.backward()
        return value

    optimizer.step(closure)
    train, test = (
        Batch(x, y, np.arange(3000)),
        Batch(pooled[5000:5100], torch.from_numpy(labels[5000:5100]), np.arange(100)),
    )
    network = made(model, x[:8])
    blocks = fitted(network, [train], how="exact")
    basis = Blocks(tuple(keep(blocks, None, CPU)))
    vectors, values = eigenbasis(curvature_matrix(network, [train], "ggn"))
    exact = [example_gradients(network, b.inputs, b.targets)[0].double() @ vectors for b in (train, test)]
    ours = [coordinates(network, basis, b.inputs, b.targets)[0].double() for b in (train, test)]
    found = []
    for damping in (0.0, 0.01, 0.1, 1.0):
        expected = (exact[1] / (values + l2 + damping)) @ exact[0].T / 3000
        got = (ours[1] / (joined(blocks).double() + l2 + damping)) @ ours[0].T / 3000
        pair = expected.numpy().ravel(), got.numpy().ravel()
        r, factor = pearson(*pair), slope(*pair)
        print(f"λ = {damping:g}, l2 = {l2:g}: Pearson r {r:.4f}, slope {factor:.4f}")
        found.append(r)
    assert found == sorted(found)
    assert found[0] > 0.85
    assert found[3] > 0.99
