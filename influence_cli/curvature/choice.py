"""Choose the curvature: `auto` by size, and which methods the model and the loss allow."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from influence_cli.errors import InfluenceError
from influence_cli.model.network import Network, output_layer

# About 5,000, with room for the 10-class head of a ResNet-18 (5,130).
AUTO_PARAMETERS = 6_000
# Methods that need one solve per right-hand side; all others divide by a spectrum.
SOLVERS = ("cg", "nystrom", "lissa", "neumann")
JOINT, LAYERED, RAW = ("explicit", "arnoldi"), ("ekfac", "kfac"), ("identity", "fisher", *SOLVERS)


@dataclass(frozen=True)
class Choice:
    """A curvature, decided.

    Attributes:
        method: a name of ``JOINT``, ``LAYERED`` or ``RAW``.
        matrix: ``ggn``, ``empirical`` or ``hessian``.
        network: the model with the parameters that count.
        output: the output layer, where it holds all of them.
        note: what ``auto`` chose, in one line; empty if the user chose.
    """

    method: str
    matrix: str
    network: Network
    output: nn.Linear | None
    note: str = ""

    @property
    def is_joint(self) -> bool:
        """Say whether rows of the store are coordinates in one basis over all parameters."""
        return self.method in JOINT

    @property
    def is_layered(self) -> bool:
        """Say whether they are coordinates in one basis per layer."""
        return self.method in LAYERED

    @property
    def has_basis(self) -> bool:
        """Say whether rows are coordinates in a basis (else raw gradients)."""
        return self.method not in RAW

    @property
    def solves(self) -> bool:
        """Say whether each right-hand side needs an iterative solver."""
        return self.method in SOLVERS

    @property
    def is_preconditioned(self) -> bool:
        """Say whether the solver uses a preconditioner made of gradients."""
        return self.method in ("cg", "neumann")


def choose_curvature(method: str, matrix: str, network: Network, inputs: Tensor, where: str) -> Choice:
    """Resolve the method: ``auto`` is explicit up to 6,000 parameters (10,500 of an output layer), EK-FAC past that.

    Args:
        method: ``auto`` or a name.
        matrix: ``ggn``, ``empirical`` or ``hessian``.
        network: the model and its tracked parameters, its layers decided.
        inputs: a few examples, to see where the output comes from.
        where: the config's line, for errors.

    Raises:
        InfluenceError: the method cannot hold that many parameters, or does not support the matrix.
    """
    output = output_layer(network, inputs)
    note = ""
    if method == "auto":
        # For an output layer the exact curvature is cheap.
        limit = AUTO_PARAMETERS if output is None else MAX_PARAMETERS
        method = "explicit" if network.size <= limit and matrix != "empirical" else "ekfac"
        if method == "ekfac":
            note = f"curvature auto: EK-FAC over {network.size:,} parameters in {len(network.layers)} layers"
    if method == "explicit" and network.size > MAX_PARAMETERS:
        raise InfluenceError(
            f"{where}: curvature explicit over {network.size:,} parameters is too large "
            f"(a matrix of {8 * network.size**2 / 1e9:,.1f} GB; the limit is {MAX_PARAMETERS:,} parameters)",
            "use curvature.method: ekfac, or choose fewer layers (gradients.layers)",
        )
    if method in LAYERED and matrix == "hessian":
        raise InfluenceError(
            f"{where}: curvature {method} cannot use the Hessian: it factors the GGN",
            "use curvature.matrix: ggn, or a method for the Hessian: explicit (fewer layers), arnoldi, cg, nystrom, "
            "lissa or neumann",
        )
    if method not in LAYERED and matrix == "empirical":
        raise InfluenceError(
            f"{where}: curvature {method} takes matrix ggn or hessian; empirical is for ekfac and kfac",
            "use curvature.matrix: ggn",
        )
    if method in LAYERED and not any(layer.is_matrix for layer in network.layers):
        raise InfluenceError(
            f"{where}: curvature {method} needs a linear or convolutional layer; none of the tracked parameters "
            "is in one that the layer pass covers",
            "track other layers (gradients.layers), or use curvature.method: identity",
        )
    return Choice(method, matrix, network, output, note)


# Beyond this the matrix (8 p² bytes) and its eigenvectors (about 10 p³ operations) are too large for a workstation.
MAX_PARAMETERS = 10_500
