"""Every rule of the layer pass against a for-loop of autograd in float64, and that the rule is really used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from influence_cli.model.network import track
from influence_cli.passes.coverage import make_network
from influence_cli.passes.gradients import example_gradients
from tests.support.example_gradients import Headed, checked, covered, looped, loss, shifted

Case = tuple[Callable[[], nn.Module], tuple[int, ...]]
LINEAR: dict[str, Case] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear of tokens": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear of a grid": (lambda: nn.Linear(6, 4), (2, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "linear of tokens without bias": (lambda: nn.Linear(6, 4, bias=False), (3, 6)),
    "linear of one token": (lambda: nn.Linear(6, 4), (1, 6)),
}
CONVOLUTIONS: dict[str, Case] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 11)),
    "conv1d of one position": (lambda: nn.Conv1d(4, 6, 5), (4, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2), (4, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 5, 5)),
    "conv2d of one position": (lambda: nn.Conv2d(3, 4, 4, groups=1), (3, 4, 4)),
    "conv2d depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 5)),
    "conv2d 1×1": (lambda: nn.Conv2d(4, 3, 1), (4, 5, 4)),
    "conv2d 1×1 grouped": (lambda: nn.Conv2d(4, 6, 1, groups=2), (4, 5, 4)),
    "conv2d 1×1 with stride": (lambda: nn.Conv2d(4, 3, 1, stride=2), (4, 5, 4)),
    "conv2d 1×1 with padding": (lambda: nn.Conv2d(4, 3, 1, padding=1), (4, 3, 4)),
    "conv2d 1×3": (lambda: nn.Conv2d(2, 3, (1, 3)), (2, 4, 6)),
    "conv2d 3×2 with stride": (lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(0, 1)), (2, 4, 5)),
    "conv2d valid": (lambda: nn.Conv2d(2, 3, 3, padding="valid"), (2, 4, 5)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 4, 5)),
    "conv2d same, dilated": (lambda: nn.Conv2d(2, 3, (3, 5), padding="same", dilation=(2, 1)), (2, 6, 5)),
    "conv2d same, circular": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (3, 2, 1), stride=(2, 1, 1), padding=(1, 0, 1), groups=2), (2, 5, 4, 3)),
    "conv3d dilated": (lambda: nn.Conv3d(2, 3, 2, dilation=(2, 1, 2), bias=False), (2, 5, 4, 5)),
    "conv3d 1×1×1": (lambda: nn.Conv3d(2, 3, 1), (2, 3, 2, 4)),
    "conv3d same": (lambda: nn.Conv3d(2, 3, 3, padding="same"), (2, 3, 4, 3)),
}
for _mode in ("zeros", "reflect", "replicate", "circular"):
    CONVOLUTIONS |= {
        f"conv1d {_mode}": (partial(nn.Conv1d, 2, 3, 3, padding=2, padding_mode=_mode), (2, 6)),
        f"conv2d {_mode}": (
            partial(nn.Conv2d, 2, 4, 3, padding=(1, 2), stride=2, groups=2, padding_mode=_mode),
            (2, 4, 6),
        ),
        f"conv3d {_mode}": (partial(nn.Conv3d, 2, 3, 2, padding=(1, 0, 2), padding_mode=_mode), (2, 3, 3, 4)),
    }
NORMS: dict[str, Case] = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (6,)),
    "batch norm 1d of a sequence": (lambda: nn.BatchNorm1d(4), (4, 7)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(3, eps=0.1), (3, 4, 5)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), (2, 3, 2, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer norm of tokens": (lambda: nn.LayerNorm(6, eps=0.1), (2, 3, 6)),
    "layer norm over three axes": (lambda: nn.LayerNorm((2, 3, 6)), (2, 3, 6)),
    "layer norm over two axes": (lambda: nn.LayerNorm((3, 6)), (2, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 3, 5)),
    "group norm without positions": (lambda: nn.GroupNorm(2, 6, eps=0.1), (6,)),
    "RMS norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "RMS norm over two axes": (lambda: nn.RMSNorm((3, 6), eps=0.1), (2, 3, 6)),
}
RULES = LINEAR | CONVOLUTIONS | NORMS


@pytest.mark.parametrize("behind", [False, True], ids=["first", "behind another"])
@pytest.mark.parametrize("case", RULES)
def test_a_rule_gives_the_gradients_of_autograd(case: str, behind: bool) -> None:
    build, shape = RULES[case]
    inputs = torch.randn(6, *shape)
    layer = shifted(build()) if case in NORMS else build()
    network = checked(Headed(layer, inputs, behind=behind), inputs)
    assert network.rest == ()
    assert covered(network) == set(network.names)
    assert network.layers[-2].name == "layer"


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize(
    "case", ["linear", "linear of tokens", "conv1d", "conv2d", "conv3d circular", "batch norm 2d", "layer norm"]
)
def test_a_layer_may_be_tracked_in_part(case: str, frozen: str) -> None:
    build, shape = RULES[case]
    inputs = torch.randn(6, *shape)
    model = Headed(build(), inputs, behind=True)
    model.layer.get_parameter(frozen).requires_grad_(False)
    network = checked(model, inputs)
    assert f"layer.{frozen}" in network.left_out
    assert network.rest == ()
    assert covered(network) == set(network.names)


class Words(nn.Module):
    """An embedding of a few words an example."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(x)).mean(dim=1))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"padding_idx": -1}], ids=str)
def test_an_embedding_counts_repeated_words_and_leaves_out_padding(options: dict[str, int]) -> None:
    words = torch.randint(0, 9, (8, 7))
    words[:, :2] = torch.tensor([0, 8])
    network = checked(Words(**options), words)
    assert covered(network) == {"words.weight", "head.weight", "head.bias"}
    rows = example_gradients(network, words, torch.zeros(8, dtype=torch.int64))[0][:, network.slots["words.weight"]]
    if options:
        padding = options["padding_idx"] % 9
        assert not rows.view(8, 9, 4)[:, padding].any()


def test_an_embedding_whose_gradient_depends_on_the_batch_has_no_rule() -> None:
    assert "words.weight" in checked(Words(scale_grad_by_freq=True), torch.randint(0, 9, (8, 7))).rest


def test_an_embedding_inside_a_model_reads_integers() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.codes, self.head = nn.Linear(6, 6), nn.Embedding(3, 4), nn.Linear(30, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.before(x)
            codes = (h > 0).long() + (h > 1).long()
            return self.head(torch.cat([self.codes(codes).flatten(1), h], dim=1))

    network = checked(Quantised(), torch.randn(6, 6))
    assert network.rest == ()


@pytest.mark.parametrize("case", ["linear of tokens", "conv2d", "layer norm", "batch norm 2d"])
def test_float64(case: str) -> None:
    build, shape = RULES[case]
    inputs = torch.randn(6, *shape, dtype=torch.float64)
    model = Headed(build(), inputs.float(), behind=True).double().eval()
    targets = torch.randint(0, 5, (6,))
    network = make_network(track(model, loss, ("*",), "layers"), inputs)
    got = example_gradients(network, inputs, targets)[0]
    expected = torch.cat(list(looped(model, network.names, inputs, targets).values()), dim=1)
    assert network.rest == ()
    assert got.dtype == torch.float64
    assert float((got - expected).norm() / expected.norm()) <= 1e-13
