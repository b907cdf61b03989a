"""The network as it trains: losses, the mean gradient, and what a replay needs of a batch, of flat vectors.

For a batch and vectors c the replay needs Hc, H the Hessian of the batch's mean loss, and the inner products gᵢᵀc of
all its examples' gradients. Both are tangents of one thing, the losses with their mean's gradient, along c (Pearlmutter
1994): forward mode over reverse mode. Many vectors share the pass that has no tangent.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap

from influence_cli.errors import InfluenceError
from influence_cli.model.network import differentiable_attention, recurrent_backward
from influence_cli.model.outputs import Loss, logits_of
from influence_cli.runtime.memory import is_out_of_memory
from influence_cli.steps.norms import Norm, averaging_norms, inputs_of, momentum_of, plain_norms, without_averages
from influence_cli.steps.run import State, Taken

# Numbers that the vectors of one pass may hold, counted as inputs × vectors × how much wider a network is inside: so
# few stay in the cache, and the allocator gives them back to the next pass.
HELD_NUMBERS, WIDER = 2**22, 32

# Forward mode imports this at its first use, and it warns of torch's own use of torch.jit.
with warnings.catch_warnings(), suppress(ImportError):
    warnings.simplefilter("ignore")
    importlib.import_module("torch._decomp.decompositions_for_jvp")


@dataclass(frozen=True)
class TrainedNetwork:
    """A model in training mode, whose parameters and buffers are given with every call.

    Attributes:
        model: its own numbers are never used, but for integer buffers; in training mode.
        loss: (outputs [b, C], targets [b]) to losses [b], of which a batch's mean is trained.
    """

    model: nn.Module
    loss: Loss
    _backwards_only: list[bool] = field(default_factory=list, init=False, repr=False)
    _slots: dict[str, tuple[slice, torch.Size]] = field(init=False, repr=False)
    _buffers: dict[str, tuple[slice, torch.Size]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        trained = ((name, value) for name, value in self.model.named_parameters() if value.requires_grad)
        object.__setattr__(self, "_slots", _places(trained))
        floating = ((name, value) for name, value in self.model.named_buffers() if value.is_floating_point())
        object.__setattr__(self, "_buffers", _places(floating))

    @property
    def names(self) -> tuple[str, ...]:
        """Name the trained parameters, in their order."""
        return tuple(self._slots)

    @property
    def size(self) -> int:
        """Count p, the trained numbers."""
        return _size(self._slots)

    @property
    def buffer_names(self) -> tuple[str, ...]:
        """Name the buffers, in their order."""
        return tuple(self._buffers)

    def slot(self, name: str) -> slice:
        """Say where a parameter is in θ."""
        return self._slots[name][0]

    @property
    def mixes_examples(self) -> bool:
        """Say whether examples of a batch change each other's loss: a batch cannot be cut then."""
        return bool(self._norms)

    def first_state(self, slots: int) -> State:
        """Give the model's own numbers as a state, with slots of zeros."""
        parameters = _flat([self.model.get_parameter(name) for name in self._slots], self.model)
        buffers = _flat([self.model.get_buffer(name) for name in self._buffers], self.model)
        return State(parameters, tuple(torch.zeros_like(parameters) for _ in range(slots)), buffers)

    def load(self, state: State) -> None:
        """Copy a state into the model's own numbers, for a checkpoint or an evaluation."""
        with torch.no_grad():
            for name, value in _views(self._slots, state.parameters).items():
                self.model.get_parameter(name).copy_(value)
            for name, value in _views(self._buffers, state.buffers).items():
                self.model.get_buffer(name).copy_(value)

    def gradient(
        self, state: State, inputs: Tensor, targets: Tensor, weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute what a step needs of its batch.

        Args:
            state: before the step.
            inputs: [b, …].
            targets: [b].
            weights: [b], of each example, 1 by default. The divisor is b whatever they are.

        Returns:
            The gradient [p] of the mean loss, the losses [b], and the buffers [q] after the pass.
        """
        parameters = state.parameters.detach().requires_grad_()
        buffers = {name: value.clone() for name, value in _views(self._buffers, state.buffers).items()}
        with torch.enable_grad(), self._training():
            losses = self._losses(parameters, buffers, inputs, targets)
            mean = (losses if weights is None else weights * losses).sum() / len(losses)
            (gradient,) = torch.autograd.grad(mean, parameters)
        after = torch.cat([buffers[name].reshape(-1) for name in self._buffers]) if buffers else state.buffers
        return gradient, losses.detach(), after.detach()

    def products(self, state: State, taken: Taken, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply vectors with a batch's Hessian, and with the gradients of its examples.

        Args:
            state: before the step.
            taken: the batch.
            vectors: c [K, p].

        Returns:
            Hc [K, p] of the mean loss, and gᵢᵀc [K, b].
        """
        try:
            return self._in_parts(state, taken, vectors)
        except (NotImplementedError, RuntimeError) as error:  # an operation without forward mode or a rule for vmap
            if self._backwards_only or is_out_of_memory(error):
                raise
            self._backwards_only.append(True)
        try:
            return self._in_parts(state, taken, vectors)
        except RuntimeError as error:
            missing = re.search(r"derivative for (\S+) is not implemented", str(error))
            if missing is None:
                raise
            raise InfluenceError(
                f"a replay differentiates the network twice, but torch has no derivative of {missing[1]}",
                "replace the layer it belongs to: nn.Sigmoid for nn.Hardsigmoid, say; or use curvature.method: ekfac",
            ) from error

    def _in_parts(self, state: State, taken: Taken, vectors: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(taken.targets)
        at_once = self._vectors_at_once(taken.inputs)
        size = batch if self.mixes_examples else max(1, min(batch, batch * at_once // len(vectors)))
        curved, inner = torch.zeros_like(vectors), []
        for inputs, targets in zip(torch.split(taken.inputs, size), torch.split(taken.targets, size), strict=True):
            rows = [
                self._products(state, inputs, targets, some, batch)
                for some in torch.split(vectors, max(1, min(len(vectors), at_once * batch // size)))
            ]
            curved += torch.cat([product for product, _ in rows])
            inner.append(torch.cat([each for _, each in rows]))
        return curved, torch.cat(inner, dim=1)

    def _vectors_at_once(self, inputs: Tensor) -> int:
        return max(1, HELD_NUMBERS // (inputs.numel() * WIDER))

    def _products(
        self, state: State, inputs: Tensor, targets: Tensor, vectors: Tensor, divisor: int
    ) -> tuple[Tensor, Tensor]:
        buffers = _views(self._buffers, state.buffers)

        def losses(parameters: Tensor) -> tuple[Tensor, Tensor]:
            each = self._losses(parameters, buffers, inputs, targets)
            return each.sum() / divisor, each

        def along(vector: Tensor) -> tuple[Tensor, Tensor]:
            tangents: tuple[Tensor, Tensor] = jvp(grad(losses, has_aux=True), (state.parameters,), (vector,))[1]
            return tangents

        if self._backwards_only:
            return self._products_backwards(state, inputs, targets, vectors, divisor)
        with self._training(), without_averages(self._norms.values()), differentiable_attention():
            if len(vectors) == 1:  # which costs half of what it does under vmap
                product, products = along(vectors[0])
                return product[None].detach(), products[None].detach()
            curved, inner = vmap(along, randomness="same")(vectors)
        return curved.detach(), inner.detach()

    def _products_backwards(
        self, state: State, inputs: Tensor, targets: Tensor, vectors: Tensor, divisor: int
    ) -> tuple[Tensor, Tensor]:
        """Compute the same by reverse mode twice, vector by vector: some operations have no forward mode.

        Gᵀc, with G = Σ wᵢgᵢ/|B| at w = 1, has the derivative Hc in θ and gᵢᵀc/|B| in w.
        """
        parameters = state.parameters.detach().requires_grad_()
        weights = torch.ones(len(targets), dtype=parameters.dtype, device=parameters.device, requires_grad=True)
        buffers = _views(self._buffers, state.buffers)
        with (
            torch.enable_grad(),
            self._training(),
            without_averages(self._norms.values()),
            differentiable_attention(),
            recurrent_backward(self.model),
        ):
            total = (weights * self._losses(parameters, buffers, inputs, targets)).sum() / divisor
            (gradient,) = torch.autograd.grad(total, parameters, create_graph=True)
            pairs = [
                torch.autograd.grad(gradient @ vector, (parameters, weights), retain_graph=True) for vector in vectors
            ]
        return torch.stack([curved for curved, _ in pairs]), torch.stack([inner * divisor for _, inner in pairs])

    def input_slopes(self, state: State, taken: Taken, vectors: Tensor, averages: Tensor, places: Tensor) -> Tensor:
        """Give the derivative in some inputs of a batch of what a step passes on, summed over them.

        Args:
            state: before the step.
            taken: the batch.
            vectors: c [K, p]; the mean loss's derivative along each is differentiated.
            averages: derivatives of a measure in the running averages after the step [K, q].
            places: int64, of the inputs in the batch.

        Returns:
            [K, …], in the shape of an input.
        """
        # Where examples do not change each other's loss, the others have no part in it.
        chosen = taken.inputs[places], taken.targets[places]
        whole = (taken.inputs, taken.targets)
        inputs, targets = whole if self.mixes_examples else chosen
        buffers, batch = _views(self._buffers, state.buffers), len(taken.targets)

        def passed(some: Tensor, vector: Tensor, average: Tensor) -> Tensor:
            def mean(parameters: Tensor) -> Tensor:
                return self._losses(parameters, buffers, some, targets).sum() / batch

            moved: Tensor = jvp(mean, (state.parameters,), (vector,))[1]
            if self.mixes_examples:
                moved = moved + self._batch_averages(state.parameters, state, some) @ average
            return moved

        with self._training(), without_averages(self._norms.values()), differentiable_attention():
            slopes: Tensor = vmap(grad(passed), in_dims=(None, 0, 0), randomness="same")(inputs, vectors, averages)
        slopes = slopes[:, places] if self.mixes_examples else slopes
        return slopes.sum(dim=1).detach()

    def example_gradient(self, state: State, taken: Taken, weights: Tensor) -> Tensor:
        """Compute Σ weights[j, i] gᵢ over a batch: [K, p] for weights [K, b]."""
        buffers = _views(self._buffers, state.buffers)
        with self._training(), without_averages(self._norms.values()), differentiable_attention():
            pull = vjp(lambda theta: self._losses(theta, buffers, taken.inputs, taken.targets), state.parameters)[1]
            sums: Tensor = vmap(lambda each: pull(each)[0], randomness="same")(weights)
        return sums.detach()

    def measure(self, parameters: Tensor, buffers: Tensor, inputs: Tensor) -> Tensor:
        """Give the outputs [b, C] in eval mode at θ and buffers, differentiable in both and in the inputs."""
        values = {**_views(self._slots, parameters), **_views(self._buffers, buffers)}
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            # In eval mode no counter changes, and within a transform none could be put back.
            with plain_norms(self.model), differentiable_attention():
                return logits_of(functional_call(self.model, values, (inputs,)))
        finally:
            for module, mode in modes.items():
                module.training = mode

    @property
    def kept_share(self) -> Tensor:
        """Give what a step leaves of each buffer's value before it [q]: 1 less the momentum of a running average."""
        share = torch.ones(_size(self._buffers))
        for name, norm in self._norms.items():
            for average in ("running_mean", "running_var"):
                share[self._buffers[f"{name}.{average}"][0]] = 1 - momentum_of(norm)
        return share

    def pull_averages(self, state: State, taken: Taken, cotangents: Tensor) -> Tensor:
        """Pull derivatives in the running averages after a step [K, q] back to the parameters before it [K, p]."""
        with self._training(), without_averages(self._norms.values()):
            pull = vjp(lambda theta: self._batch_averages(theta, state, taken.inputs), state.parameters)[1]
            pulled: Tensor = vmap(lambda each: pull(each)[0], randomness="same")(cotangents)
        return pulled.detach()

    def push_averages(self, state: State, taken: Taken, tangents: Tensor) -> Tensor:
        """Give the change of the running averages after a step [K, q] for one of the parameters before it [K, p]."""
        with self._training(), without_averages(self._norms.values()):

            def along(tangent: Tensor) -> Tensor:
                changed: Tensor = jvp(
                    lambda theta: self._batch_averages(theta, state, taken.inputs), (state.parameters,), (tangent,)
                )[1]
                return changed

            pushed: Tensor = vmap(along, randomness="same")(tangents)
        return pushed.detach()

    def _batch_averages(self, parameters: Tensor, state: State, inputs: Tensor) -> Tensor:
        """Give what a batch adds to each running average [q]: its momentum times the mean or variance of the batch."""
        values = {**_views(self._slots, parameters), **_views(self._buffers, state.buffers)}
        with inputs_of(self._norms.values()) as seen:
            functional_call(self.model, values, (inputs,))
        added = {}
        for name, norm in self._norms.items():
            channels = seen[norm].transpose(0, 1).flatten(1)
            added[f"{name}.running_mean"] = momentum_of(norm) * channels.mean(dim=1)
            added[f"{name}.running_var"] = momentum_of(norm) * channels.var(dim=1)
        parts = [added.get(name, torch.zeros_like(values[name]).reshape(-1)) for name in self._buffers]
        return torch.cat(parts)

    def _losses(self, parameters: Tensor, buffers: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        values = {**_views(self._slots, parameters), **buffers}
        return self.loss(logits_of(functional_call(self.model, values, (inputs,))), targets)

    @cached_property
    def _norms(self) -> dict[str, Norm]:
        return averaging_norms(self.model)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Keep the model's counters of batches as they are: the run knows the number of its steps."""
        counters = {name: value for name, value in self.model.named_buffers() if not value.is_floating_point()}
        before = {name: value.clone() for name, value in counters.items()}
        try:
            yield
        finally:
            for name, value in counters.items():
                value.copy_(before[name])


def _places(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, tuple[slice, torch.Size]]:
    places, start = {}, 0
    for name, value in tensors:
        places[name] = (slice(start, start + value.numel()), value.shape)
        start += value.numel()
    return places


def _size(places: dict[str, tuple[slice, torch.Size]]) -> int:
    return max((place.stop for place, _ in places.values()), default=0)


def _views(places: dict[str, tuple[slice, torch.Size]], vector: Tensor) -> dict[str, Tensor]:
    return {name: vector[place].view(shape) for name, (place, shape) in places.items()}


def _flat(tensors: list[Tensor], model: nn.Module) -> Tensor:
    if not tensors:
        return next(model.parameters()).new_zeros(0)
    return torch.cat([each.detach().reshape(-1) for each in tensors])
