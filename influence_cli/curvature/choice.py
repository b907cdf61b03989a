"""Which curvature, over which parameters: the method ``auto`` and what it names on stderr."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from influence_cli.curvature.explicit import MAX_PARAMETERS
from influence_cli.errors import InfluenceError
from influence_cli.layers import Network, layers_in_order, output_layer, restrict

# About 5,000, with room for the 10-class head of a ResNet-18 (5,130).
AUTO_PARAMETERS = 6_000


@dataclass(frozen=True)
class Choice:
    """A curvature, decided.

    Attributes:
        method: ``explicit``, ``identity``, ``cg`` or ``lissa``.
        matrix: ``ggn`` or ``hessian``.
        network: the model with the parameters that count.
        output: the output layer, where it holds all of them.
        note: what ``auto`` did, in a line; empty where nothing was chosen for the user.
    """

    method: str
    matrix: str
    network: Network
    output: nn.Linear | None
    note: str = ""

    @property
    def has_basis(self) -> bool:
        """Say whether rows of the store are coordinates in a basis (else raw gradients)."""
        return self.method == "explicit"


def choose_curvature(method: str, matrix: str, network: Network, inputs: Tensor, where: str) -> Choice:
    """Resolve ``auto`` and refuse what does not fit.

    ``auto`` is explicit over all tracked parameters up to about 5,000; past that the explicit GGN over the last
    layers that fit.

    Args:
        method: ``auto``, ``explicit``, ``identity``, ``cg`` or ``lissa``.
        matrix: ``ggn`` or ``hessian``.
        network: the model and its tracked parameters.
        inputs: a few examples, to see in which order the layers run.
        where: the config's line, for errors.
    """
    if method != "auto":
        if method == "explicit" and network.size > MAX_PARAMETERS:
            raise InfluenceError(
                f"{where}: curvature explicit over {network.size:,} parameters is too large "
                f"(a matrix of {8 * network.size**2 / 1e9:,.1f} GB; the limit is {MAX_PARAMETERS:,} parameters)",
                "choose fewer layers (gradients.layers), or curvature.method: auto, cg or identity",
            )
        return Choice(method, matrix, network, output_layer(network, inputs))
    if network.size <= AUTO_PARAMETERS:
        return Choice("explicit", matrix, network, output_layer(network, inputs))
    kept: list[str] = []
    owners: list[str] = []
    size = 0
    own = network.parameters()
    for owner, names in reversed(layers_in_order(network, inputs)):
        extra = sum(own[name].numel() for name in names)
        if size + extra > (AUTO_PARAMETERS if kept else MAX_PARAMETERS):
            break
        kept += names
        owners.insert(0, owner)
        size += extra
    if not kept:
        owner, names = layers_in_order(network, inputs)[-1]
        raise InfluenceError(
            f"{where}: curvature auto needs a last layer of at most {MAX_PARAMETERS:,} parameters; "
            f"{owner} has {sum(own[name].numel() for name in names):,}",
            f"for rank: -s curvature.method=cg -s 'gradients.layers={owner}'; "
            "for gradient similarity, without a unit: -s curvature.method=identity",
        )
    if size == network.size:
        return Choice("explicit", matrix, network, output_layer(network, inputs))
    reduced = restrict(network, kept)
    note = (
        f"curvature auto: explicit {matrix.upper() if matrix == 'ggn' else 'Hessian'} over the last layers that fit, "
        f"{', '.join(owners)} ({size:,} of {network.size:,} parameters); influence is restricted to them"
    )
    return Choice("explicit", matrix, reduced, output_layer(reduced, inputs), note)
