"""A gradient that goes wrong after the probe is noticed in its block, computed by autograd, and its layer is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from influence_cli.curvature.coordinates import Joint, coordinates
from influence_cli.data.batches import Batch
from influence_cli.model.network import Network, track
from influence_cli.passes.coverage import make_network
from influence_cli.precompute.decide import describe_network, remembered_network
from influence_cli.precompute.row_check import checked_rows, make_row_check, rows_or_autograd
from tests.conftest import Command
from tests.passes.test_coverage import Scaled, by_autograd, examples, loss


def decided(large: int | None = None) -> tuple[Network, Batch]:
    """Decide on plain examples, then give some of which one has another rule."""
    inputs, targets = examples(30)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Scaled(4, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
        model[1] = nn.Identity()
    network = make_network(track(model, loss, ("*",), "layers"), inputs.clamp(max=0.9))
    assert [layer.name for layer in network.layers] == ["0", "2"]
    if large is not None:
        inputs[large, -1] = 4.0
    return network, Batch(inputs, targets, np.arange(30))


@pytest.mark.parametrize("joint", [False, True])
def test_a_wrong_row_makes_autograd_compute_the_block(joint: bool) -> None:
    network, batch = decided(15)
    basis = Joint(torch.linalg.qr(torch.randn(network.size, 5))[0]) if joint else None
    values = coordinates(network, basis, batch.inputs, batch.targets)[0]
    truth = by_autograd(network.model, batch.inputs, batch.targets)
    wanted = truth @ basis.vectors if basis else truth
    assert not torch.allclose(values, wanted, rtol=1e-3, atol=1e-3)
    mended, culprit = rows_or_autograd(make_row_check(network, basis), batch, values, checked_rows(30))
    assert culprit == "2"
    torch.testing.assert_close(mended, wanted, rtol=1e-4, atol=1e-6)


def test_right_rows_stay_as_they_are() -> None:
    network, batch = decided()
    values = coordinates(network, None, batch.inputs, batch.targets)[0]
    same, culprit = rows_or_autograd(make_row_check(network, None), batch, values, checked_rows(30))
    assert same is values
    assert culprit == ""


def test_a_sum_that_differs_by_rounding_is_compared_in_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from influence_cli.precompute import row_check

    network, batch = decided()
    values = coordinates(network, None, batch.inputs, batch.targets)[0]
    summed = row_check.summed_gradient
    monkeypatch.setattr(row_check, "summed_gradient", lambda *given: (1.01 * summed(*given)[0], *summed(*given)[1:]))
    assert rows_or_autograd(make_row_check(network, None), batch, values, checked_rows(30))[1] == ""


def test_one_example_in_256_is_checked_and_one_at_least() -> None:
    assert [checked_rows(count).tolist() for count in (1, 2, 64, 256)] == [[0], [1], [32], [128]]
    assert all(len(checked_rows(count)) == max(1, count // 256) for count in range(256, 4000, 256))


LATER = """
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.expert, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        on = (x[:, 0] < 5).nonzero()[:, 0]
        return self.head(x.index_put((on,), self.expert(x[on])))


def build():
    torch.manual_seed(0)
    return Routed()


def points(n, seed):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(n) * 3 // n


def train():
    x, y = points(300, 0)
    x[190, 0] = 9.0
    return TensorDataset(x, y)


def test():
    return TensorDataset(*points(6, 1))
"""
CONFIG = """
model: {{factory: ./project.py:build, checkpoint: model.pt}}
l2: 0.01
train: {{dataset: ./project.py:train}}
test: {{dataset: ./project.py:test}}
curvature: {{method: {method}}}
gradients: {{block: 64}}
"""


@pytest.mark.parametrize("method", ["ekfac", "explicit"])
def test_a_way_that_the_sample_does_not_show_leaves_the_layer_to_autograd(
    method: str, influence: Command, tmp_path: Path
) -> None:
    (tmp_path / "project.py").write_text(LATER)
    (tmp_path / "influence.yaml").write_text(CONFIG.format(method=method))
    space: dict[str, object] = {}
    exec(LATER, space)
    model = space["build"]()  # type: ignore[operator]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    done = influence("gradients", cwd=tmp_path)
    assert "layer expert saw" in done.err
    assert "autograd computes its gradients, one example at a time (slower)" in done.err
    again = influence("rank", "0:6", "--matrix", "got.h5", cwd=tmp_path)
    assert "layer expert saw" not in again.err

    import h5py

    from influence_cli.store.store import Store

    with h5py.File(tmp_path / "got.h5") as file:
        assert np.abs(file["influence"][:, 190]).max() > 0
    with Store.open(tmp_path / "influence.h5") as store:
        described = store.facts["network"]
        squares = np.concatenate([(rows.astype(np.float64) ** 2).sum(axis=1) for _, rows in store.scan()])
    assert set(described["rest"]) == {"expert.weight", "expert.bias"}
    data = space["train"]()  # type: ignore[operator]
    grads = by_autograd(model, *data.tensors)
    np.testing.assert_allclose(squares, grads.double().square().sum(dim=1), rtol=1e-3)


def test_a_complete_store_remembers_the_ways(influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from influence_cli.precompute import decide

    influence("gradients", cwd=tiny)
    before = influence("rank", "0", cwd=tiny).out
    monkeypatch.setattr(decide, "make_network", None)
    assert influence("rank", "0", cwd=tiny).out == before


def test_what_is_remembered_is_what_was_decided() -> None:
    network, _ = decided()
    made = remembered_network(replace(network, layers=(), rest=()), describe_network(network))
    assert made == network
