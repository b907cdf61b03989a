"""Which way each parameter's example gradients are computed: decided once, on examples spread over the classes.

A way is taken only where it agrees with autograd on random slopes, and where every example of a larger sample has as
many rows in the layer as every other one. A router that sends examples to experts gives some of them none.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError, few
from influence_cli.model.network import Layer, Network, recurrent_backward
from influence_cli.model.outputs import logits_of
from influence_cli.passes.contractions import flat_gradient
from influence_cli.passes.gradients import vectorised_products, wide_dtype
from influence_cli.passes.layers import candidates, forward, row_count, terms, watching

# Relative to the norm of a parameter's gradient, and to the whole gradient's, below which only rounding is left.
AGREES, ROUNDING = 1e-3, 1e-6
# Examples whose gradients are compared, and how many numbers these may have in all; examples per forward of the sample.
COMPARED, NUMBERS, CHUNK = 8, 2**26, 8


def make_network(network: Network, inputs: Tensor, slow: Collection[str] = ()) -> Network:
    """Decide, on real examples, how each tracked parameter's example gradients are computed.

    Args:
        network: from ``track``.
        inputs: [b, …], two or more examples; of a data set, spread over its classes.
        slow: parameters that the layer pass does not take, whatever the examples show.

    Returns:
        The network, with ``layers``, ``rest``, ``vectorised``, ``obstacle`` and ``unused`` set.

    Raises:
        InfluenceError: no output depends on any tracked parameter.
    """
    sample = inputs.to(network.device())
    count = max(2, min(COMPARED, NUMBERS // network.size))
    inputs = sample[torch.linspace(0, len(sample) - 1, min(count, len(sample))).long()]
    plain = replace(network, layers=(), rest=network.names, vectorised=False, obstacle="", unused=())
    with torch.no_grad():
        outputs = logits_of(network.model(inputs))
    # Random slopes: the loss's own slopes may be zero for a fitted example.
    slopes = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    try:
        truth, reached = example_by_example(plain, inputs, slopes)
    except RuntimeError as error:
        if "use_reentrant" in str(error):
            raise _recomputed() from error
        raise
    reached |= _reached(plain, sample, set(network.names) - reached)
    _refuse_backward_alone(plain, inputs, set(network.names) - reached)
    if not reached:
        _refuse_unreached(network, inputs)
    reached |= set(slow)
    layers = [layer for layer in candidates(plain) if reached.intersection(layer.names).difference(slow)]
    covered = _covered(plain, sample, _Compared(inputs, slopes, truth), layers, slow)
    done = {name for layer in covered for name in layer.names}
    unused = tuple(name for name in network.names if name not in reached)
    rest = tuple(name for name in network.names if name not in done and name in reached)
    made = replace(plain, layers=tuple(covered), rest=rest, unused=unused, vectorised=True)
    if not rest:
        return made
    looped = replace(made, vectorised=False)
    try:
        fast = vectorised_products(made, inputs, slopes)
    except InfluenceError:
        raise
    except Exception as error:
        return replace(looped, obstacle=" ".join(str(error).split())[:160] or type(error).__name__)
    wanted = torch.cat([truth[:, network.slots[name]] for name in rest], dim=1)
    if float((fast - wanted).norm()) > AGREES * float(wanted.norm()) + ROUNDING * float(truth.norm()) + 1e-12:
        return replace(looped, obstacle="its gradients under vmap differ from autograd's")
    return made


@dataclass(frozen=True)
class _Compared:
    """Examples [b, …], random slopes of their outputs, and autograd's Jᵢᵀuᵢ [b, p]."""

    inputs: Tensor
    slopes: Tensor
    truth: Tensor


def example_by_example(
    network: Network, inputs: Tensor, slopes: Tensor, rows: Sequence[int] | None = None
) -> tuple[Tensor, set[str]]:
    """Compute Jᵢᵀuᵢ by plain autograd, without the layer pass.

    All examples share one forward, the batch of the layer pass. In another batch, rounding may put a ReLU unit on the
    other side of its kink, and every gradient below it would differ without being wrong.

    Args:
        network: the model.
        inputs: [b, …].
        slopes: u [b, C].
        rows: which examples of the batch; None for all.

    Returns:
        [examples, p], and the tracked parameters that the outputs depend on.
    """
    rows = range(len(slopes)) if rows is None else rows
    out = torch.zeros(len(rows), network.size, dtype=wide_dtype(slopes), device=slopes.device)
    reached: set[str] = set()
    wanted = list(network.parameters().values())
    with torch.enable_grad(), recurrent_backward(network.model):
        outputs = logits_of(network.model(inputs.to(network.device())))
        for place, number in zip(out, rows if outputs.requires_grad else (), strict=False):
            grads = torch.autograd.grad(outputs[number], wanted, slopes[number], retain_graph=True, allow_unused=True)
            for name, part in zip(network.names, grads, strict=True):
                if part is not None:
                    place[network.slots[name]] = (part.to_dense() if part.is_sparse else part).reshape(-1)
                    reached.add(name)
    return out, reached


def _refuse_backward_alone(network: Network, inputs: Tensor, names: Collection[str]) -> None:
    """Refuse parameters that ``backward`` reaches and ``torch.autograd.grad`` does not: their gradients would be zero.

    Training is done by ``backward``. A part of the model that runs its own ``backward`` inside, as a reentrant
    checkpoint of activations does, gives its parameters nothing else.
    """
    if not names:
        return
    kept = {parameter: parameter.grad for parameter in network.model.parameters()}
    try:
        for parameter in kept:
            parameter.grad = None
        with torch.enable_grad(), recurrent_backward(network.model):
            outputs = logits_of(network.model(inputs))
            if outputs.requires_grad:
                outputs.sum().backward()  # type: ignore[no-untyped-call]
        parameters = network.parameters()
        alone = [name for name in network.names if name in names and parameters[name].grad is not None]
    finally:
        for parameter, grad in kept.items():
            parameter.grad = grad
    if alone:
        raise _recomputed(alone)


def _recomputed(names: Sequence[str] = ()) -> InfluenceError:
    what = f" to {few(names)}" if names else ""
    return InfluenceError(
        f"no gradient of a single example passes{what} through a part of the model that is recomputed in the backward "
        "pass (torch.utils.checkpoint with use_reentrant=True)",
        "write checkpoint(…, use_reentrant=False), or checkpoint only if self.training",
    )


def _refuse_unreached(network: Network, inputs: Tensor) -> None:
    """Refuse a model that gives its outputs no gradient: every influence would be zero."""
    with torch.enable_grad(), recurrent_backward(network.model):
        outputs = logits_of(network.model(inputs))
    if outputs.requires_grad:
        raise InfluenceError(
            f"no output of the model depends on the tracked parameters: {few(network.names)}",
            "track other layers (gradients.layers)",
        )
    mode = "torch.inference_mode" if outputs.is_inference() else "torch.no_grad, or detaches its outputs"
    raise InfluenceError(
        "the model's outputs have no gradient, so no influence can be computed",
        f"its forward runs under {mode}: leave that to the code that calls the model",
    )


def _reached(network: Network, sample: Tensor, names: Collection[str]) -> set[str]:
    """Name those of some parameters that the outputs of any example of the sample depend on."""
    left = {name: parameter for name, parameter in network.parameters().items() if name in names}
    reached: set[str] = set()
    for inputs in torch.split(sample, CHUNK):
        if not left:
            break
        with torch.enable_grad(), recurrent_backward(network.model):
            outputs = logits_of(network.model(inputs))
            if not outputs.requires_grad:
                continue
            grads = torch.autograd.grad(outputs.sum(), list(left.values()), allow_unused=True)
        some = {name for name, grad in zip(left, grads, strict=True) if grad is not None}
        reached |= some
        left = {name: parameter for name, parameter in left.items() if name not in some}
    return reached


def _covered(
    network: Network, sample: Tensor, compared: _Compared, layers: Sequence[Layer], slow: Collection[str]
) -> list[Layer]:
    """Keep the layers whose contracted gradients agree with autograd's.

    Where a module's own input and output do not, the functions inside it that take the weight may; and a parameter
    that is in no layer may be a term.
    """
    kept = _agreeing(network, sample, compared, _called_plainly(network, sample, layers))
    done = {name for layer in kept for name in layer.names}
    inside = [replace(layer, inside=True) for layer in layers if not done.issuperset(layer.names)]
    kept += _agreeing(network, sample, compared, inside)
    done = {name for layer in kept for name in layer.names}.union(slow)
    left = [name for name in network.names if name not in done and bool(compared.truth[:, network.slots[name]].any())]
    return kept + _agreeing(network, sample, compared, terms(network, left))


def _agreeing(network: Network, sample: Tensor, compared: _Compared, layers: Sequence[Layer]) -> list[Layer]:
    """Try layers, and keep those whose contracted gradients agree with autograd's, all examples alike."""
    if not layers:
        return []
    trial = replace(network, layers=tuple(layers), rest=())
    inputs, slopes, truth = compared.inputs, compared.slopes, compared.truth
    try:
        calls = forward(trial, inputs).backward(slopes)
        rows = _rows_per_example(trial, sample)
    except Exception as error:
        # An overwritten input: only autograd knows its old value. Nor does every model run while functions are watched.
        if isinstance(error, RuntimeError) or layers[0].inside:
            return []
        raise
    kept = []
    for number, (layer, layer_calls) in enumerate(zip(layers, calls, strict=False)):
        if not layer_calls or not rows[number]:
            continue
        # A term is recognised by its use alone; nothing but its gradient shows that this is its only use.
        rounding = ROUNDING if layer.kind != "term" else 0.01 * ROUNDING
        floor = rounding * float(truth.norm()) + 1e-12
        products = {name: torch.zeros_like(truth[:, network.slots[name]]) for name in layer.names}
        try:
            flat_gradient(trial, layer, layer_calls, products)
        except Exception:  # a subclass with other shapes: autograd takes its parameters
            continue
        if all(_agree(product, truth[:, network.slots[name]], floor) for name, product in products.items()):
            kept.append(replace(layer, rows=rows[number]))
    return kept


def _agree(products: Tensor, truth: Tensor, floor: float) -> bool:
    return float((products - truth).norm()) <= AGREES * float(truth.norm()) + floor


def _rows_per_example(network: Network, sample: Tensor) -> list[int]:
    """Count the rows that each example of a sample has in each layer; 0 where they are not the same for all."""
    counts: list[set[float]] = [set() for _ in network.layers]
    for inputs in torch.split(sample, CHUNK):
        rows = [0] * len(network.layers)

        def record(number: int, received: Tensor, output: Tensor, _how: Any, rows: list[int] = rows) -> Tensor:
            rows[number] += row_count(network.layers[number].kind, received, output)
            return output

        with watching(network, record):
            network.model(inputs)
        for seen, count in zip(counts, rows, strict=True):
            seen.add(count / len(inputs))
    return [int(next(iter(seen))) if len(seen) == 1 and all(map(float.is_integer, seen)) else 0 for seen in counts]


def _called_plainly(network: Network, sample: Tensor, layers: Sequence[Layer]) -> list[Layer]:
    """Drop modules that are never called, or not with one tensor whose rows are the examples or parts of them."""
    plain: dict[str, bool] = {}
    handles = []
    examples = 0

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            fits = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor)
            fits = fits and args[0].ndim > 1 and len(args[0]) == len(output) and len(output) % examples == 0
            plain[name] = plain.get(name, True) and fits

        return hook

    try:
        for layer in layers:
            module = network.model.get_submodule(layer.name)
            handles.append(module.register_forward_hook(watch(layer.name), with_kwargs=True))
        with torch.no_grad():
            for inputs in torch.split(sample, CHUNK):
                examples = len(inputs)
                network.model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [layer for layer in layers if plain.get(layer.name, False)]
