"""λ of a solver's system H + (l2 + λ)I: from EK-FAC's trace where that is to be had, else from the spectrum's ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from influence_cli.curvature.blocks import Block
from influence_cli.curvature.damping import Damping, check_poles, choose_damping
from influence_cli.curvature.operator import Examples, mean_product
from influence_cli.curvature.preconditioner import by_parameter
from influence_cli.influence.layer_curvature import fit_layers
from influence_cli.model.objective import Objective
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal
from influence_cli.solvers.lanczos import lanczos


@dataclass(frozen=True)
class SystemShift:
    """λ of a system, and what was measured for it.

    Attributes:
        damping: λ of all parameters, or of each layer.
        groups: the names of the layers, or one empty name.
        total: l2 + λ, of all parameters or of each, float64 [p].
        least: the smallest l2 + λ anywhere.
        smallest: min Λ of a Hessian; None where it was not measured.
        blocks: EK-FAC, where it was fitted.
    """

    damping: Damping
    groups: tuple[str, ...]
    total: float | Tensor
    least: float
    smallest: float | None
    blocks: Sequence[Block] = ()

    @property
    def mean(self) -> float:
        """Give the mean of l2 + λ."""
        return self.total if isinstance(self.total, float) else float(self.total.mean())


def choose_shift(
    prepared: Prepared, examples: Examples, given: float | str, *, convex: bool, layered: bool, terminal: Terminal
) -> SystemShift:
    """Choose λ: of each layer for `cg`, from EK-FAC's trace where that is to be had; else from Lanczos' products.

    Args:
        prepared: a store of raw gradients, or none on the fly.
        examples: the training examples of the curvature.
        given: ``curvature.damping``: ``auto``, ``training`` or λ.
        convex: whether the objective is convex in the tracked parameters.
        layered: whether EK-FAC is to be had.
        terminal: progress and λ.

    Raises:
        InfluenceError: H + (l2 + λ)I is singular or indefinite, as far as that is visible here.
    """
    task, choice = prepared.task, prepared.choice
    network, matrix = choice.network, choice.matrix
    like = next(network.model.parameters()).detach()
    indefinite = matrix == "hessian" and not convex
    smallest = largest = 0.0
    groups: tuple[str, ...] = ("",)
    means, blocks = [0.0], list[Block]()
    l2 = task.objective.over(network)
    # λ = 0 is right if l2 determines what the data do not: all of it, or all that a gradient can have.
    least = l2 if isinstance(l2, float) else float(l2.max() if convex and task.curved_loss else l2.min())
    if layered and (choice.method == "cg" or given == "auto"):
        blocks = fit_layers(prepared, examples, terminal)
        means = [sum(block.trace for block in blocks) / network.size]
        if choice.method == "cg":
            groups, means = tuple(block.name for block in blocks), [block.mean for block in blocks]
    elif indefinite or (given != "training" and isinstance(given, str) and not (convex and least > 0)):
        with terminal.status("measuring the spectrum's ends (Lanczos)"):
            smallest, mean, largest = lanczos(
                mean_product(network, examples, matrix, 0.0), network.size, like=like, seed=task.seed
            )
        means = [mean]
    if indefinite:
        terminal.say(f"the Hessian's smallest eigenvalue is about {smallest:.3g}, its largest {largest:.3g}")
    damping = choose_damping(
        prepared.settings.given_damping(given, groups),
        convex=convex,
        l2=least,
        matrix=matrix,
        smallest=smallest,
        means=means,
        largest=largest,
        layered=False,
    )
    check_poles(smallest if indefinite else 0.0, least + min(damping.values))
    announce(damping, task.objective, terminal)
    values = damping.values[0] if damping.value is not None else by_parameter(network, blocks, damping.values)
    return SystemShift(
        damping, groups, l2 + values, least + min(damping.values), smallest if indefinite else None, blocks
    )


def announce(damping: Damping, objective: Objective, terminal: Terminal) -> None:
    """Print λ in absolute units and its reason."""
    terminal.say(f"damping λ = {damping.text()} ({damping.reason}); l2 = {objective.text()}")
    if damping.advice:
        terminal.warn(damping.advice)
