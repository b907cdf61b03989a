"""The layer pass: one forward and one backward, parameter gradients off, gives each layer's input a and slope δ.

Every wanted quantity of a layer is a contraction of the two (passes/contractions.py): the gradient of example i is
Σ_τ δ_iτ a_iτᵀ over the positions τ (pixels, tokens, repeated calls). So autograd never computes a parameter gradient,
and a layer without positions never forms an example gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError
from influence_cli.model.network import Layer, Network, frozen, owner_of, recurrent_backward
from influence_cli.model.outputs import logits_of
from influence_cli.passes.uses import Record, Uses

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass
class Call:
    """One call of a layer in a forward pass.

    Attributes:
        layer: its number in ``Network.layers``.
        a: what went in [b, …]; of a ``term`` the other factor.
        delta: the slope of the (summed) objective with respect to its output [b, …]; None if nothing depends on it.
        version: of ``a``, to detect that something overwrote it.
        how: of a layer that is read inside its module, the windows of a convolution or the shape of a term.
    """

    layer: int
    a: Tensor
    version: int
    delta: Tensor | None = None
    how: Any = None


@dataclass
class Tape:
    """A forward pass, ready for any number of backward passes.

    Attributes:
        outputs: [b, C], with their graph.
        calls: the layers' calls in the order in which they ran.
        anchors: leaves that the graph starts from.
        unused: the parameters that no output of the probe's examples depended on, by name.
    """

    outputs: Tensor
    calls: list[Call]
    anchors: list[Tensor] = field(default_factory=list)
    unused: dict[str, Tensor] = field(default_factory=dict)

    def backward(self, slopes: Tensor, *, again: bool = False) -> list[list[Call]]:
        """Pull slopes of the outputs back to every layer.

        Args:
            slopes: ∂(objective)/∂f [b, C].
            again: keep the graph for another call.

        Returns:
            The calls of each layer, by its number, their ``delta`` filled in.

        Raises:
            RuntimeError: a layer's input was overwritten after the layer had read it.
            UnevenError: the outputs depend on a parameter that was not used in the probe.
        """
        for call in self.calls:
            call.delta = None
            if call.a._version != call.version:
                raise RuntimeError("a layer's input is changed in place after the layer has read it")
        leaves = [*self.anchors, *self.unused.values()]
        if leaves and self.outputs.requires_grad:
            slopes = slopes.to(self.outputs.dtype)
            grads = torch.autograd.grad(self.outputs, leaves, slopes, retain_graph=again, allow_unused=True)
            refuse_used(self.unused, grads[len(self.anchors) :])
        count = 1 + max((call.layer for call in self.calls), default=-1)
        by_layer: list[list[Call]] = [[] for _ in range(count)]
        for call in self.calls:
            if call.delta is not None:
                by_layer[call.layer].append(call)
        return by_layer


class UnevenError(InfluenceError):
    """Examples take different ways through the model, and the probe did not show it.

    Attributes:
        names: the parameters that they reach, or do not.
    """

    def __init__(self, message: str, names: Collection[str]) -> None:
        """Say which layer, and what its examples did."""
        super().__init__(
            message,
            "which layers an example goes through depends on the example: leave such layers out (gradients.layers), or "
            "write their forward so that every example passes them (torch.where instead of an index)",
        )
        self.names = tuple(names)


def refuse_used(unused: Mapping[str, Tensor], grads: Sequence[Tensor | None]) -> None:
    """Stop where a parameter that the probe saw unused has a gradient after all.

    Raises:
        UnevenError: naming the first of them.
    """
    used = [name for name, grad in zip(unused, grads, strict=True) if grad is not None]
    if used:
        raise UnevenError(f"no example of the probe used {used[0]}, but one of this batch does", used)


class _Root(torch.autograd.Function):
    """Make the output of the first layers the start of a graph, without a copy and without a leaf.

    A leaf could not be changed in place, as the activation behind a layer often does.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, _anchor: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(_ctx: Any, slope: Tensor) -> tuple[None, Tensor]:
        return None, slope.new_zeros((), dtype=torch.float32)


def forward(network: Network, inputs: Tensor) -> Tape:
    """Run the model forward, and record the input of each covered layer.

    Args:
        network: the model; its ``layers`` are watched.
        inputs: [b, …], on any device.

    Raises:
        UnevenError: a layer had more or fewer rows than the examples have in it.
    """
    device = network.device()
    inputs = inputs.to(device, non_blocking=True)
    calls: list[Call] = []
    anchors: list[Tensor] = []
    rows = [0] * len(network.layers)

    def record(number: int, received: Tensor, output: Tensor, how: Any) -> Tensor:
        kind, a = network.layers[number].kind, received.detach()
        rows[number] += row_count(kind, received, output)
        a = a if kind == "term" else _by_example(kind, a, len(inputs))
        call = Call(number, a, a._version, how=how)
        calls.append(call)
        if not output.requires_grad:
            if not anchors:
                anchors.append(torch.zeros((), device=device, requires_grad=True))
            if output.untyped_storage().data_ptr() == received.untyped_storage().data_ptr():
                output = output.clone()  # a subclass that returns its input: a graph cannot start there
            output = _Root.apply(output, anchors[0])
        output.register_hook(lambda slope: setattr(call, "delta", _by_example(kind, slope, len(inputs))))
        return output

    with watching(network, record):
        outputs = logits_of(network.model(inputs))
    for layer, count in zip(network.layers, rows, strict=True):
        if layer.rows and count != layer.rows * len(inputs):
            raise UnevenError(
                f"layer {layer.name or layer.names[0]} saw {count:,} rows for {len(inputs):,} examples, but in the "
                f"probe {layer.rows:,} per example",
                layer.names,
            )
    named = network.parameters() if network.unused else {}
    return Tape(outputs, calls, anchors, {name: named[name] for name in network.unused})


@contextmanager
def watching(network: Network, record: Record) -> Iterator[None]:
    """Hand each use of the covered layers to ``record`` while the model runs, with no parameter in the graph.

    Parameters that are thought to be unused stay in it: that is how a use of them shows.
    """

    def watch(number: int) -> Any:
        return lambda _module, received, output: recorded(number, received[0], output, None)

    def recorded(number: int, received: Tensor, output: Tensor, how: Any) -> Tensor:
        # Without gradients the model itself needs none of this call.
        return record(number, received, output, how) if torch.is_grad_enabled() else output

    modules = dict(network.model.named_modules())
    with ExitStack() as stack:
        stack.enter_context(frozen(network.model, but=network.unused))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(precise(network.precision, network.device()))
        stack.enter_context(recurrent_backward(network.model))
        for number, layer in enumerate(network.layers):
            if not layer.inside:
                stack.callback(modules[layer.name].register_forward_hook(watch(number), prepend=True).remove)
        if any(layer.inside for layer in network.layers):
            stack.enter_context(Uses(network, recorded))
        yield


def row_count(kind: str, received: Tensor, output: Tensor) -> int:
    """Count the rows of a layer's call: of its input, or of what a term is added to or multiplied with."""
    rows = output if kind == "term" else received
    return len(rows) if rows.ndim else 0


def _by_example(kind: str, x: Tensor, examples: int) -> Tensor:
    """Put the examples first, where a layer reads several windows or tokens of each in their place: [b, m, …]."""
    if kind == "conv" or not examples or len(x) == examples or len(x) % examples:
        return x
    return x.reshape(examples, -1, *x.shape[1:])


def precise(precision: str, device: torch.device) -> Any:
    """Run the block in bfloat16 where autocast allows it, for ``bf16``; tf32 is set for the process."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def candidates(network: Network) -> list[Layer]:
    """List the modules that have a rule here and own tracked parameters that no other module shares."""
    holders: dict[int, int] = {}
    for module in network.model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    tracked: dict[str, list[str]] = {}
    for name in network.names:
        tracked.setdefault(owner_of(name), []).append(name)
    layers = []
    for owner, names in tracked.items():
        module = network.model.get_submodule(owner)
        short = {name.rpartition(".")[2]: name for name in names}
        shared = any(holders[id(network.model.get_parameter(name))] > 1 for name in names)
        if shared or not set(short) <= {"weight", "bias"}:
            continue
        layer = _describe(module, owner, short.get("weight", ""), short.get("bias", ""))
        if layer is not None:
            layers.append(layer)
    return layers


def terms(network: Network, names: Iterable[str]) -> list[Layer]:
    """Describe parameters, each by itself, as terms: added to the input, multiplied with it or repeated."""
    layers = []
    for name in names:
        size = network.model.get_parameter(name).numel()
        layers.append(Layer(owner_of(name), "term", name, "", 1, size, 1, inside=True))
    return layers


def _describe(module: nn.Module, name: str, weight: str, bias: str) -> Layer | None:
    if isinstance(module, nn.Linear):
        return Layer(name, "linear", weight, bias, 1, module.out_features, module.in_features)
    if isinstance(module, CONVOLUTIONS):
        groups, channels = module.groups, module.in_channels // module.groups
        kernel = int(torch.tensor(module.kernel_size).prod())
        return Layer(name, "conv", weight, bias, groups, module.out_channels // groups, channels * kernel)
    if isinstance(module, NORMS):
        size = next(module.parameters(recurse=False)).numel()
        return Layer(name, "norm", weight, bias, 1, size, 1)
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq:
        return Layer(name, "embedding", weight, bias, 1, module.num_embeddings, module.embedding_dim)
    return None
