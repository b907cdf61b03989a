"""What a store remembers of the probe: which way each parameter's example gradients were computed.

Another command on a complete store then decides nothing again, and takes the same way.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from influence_cli.model.network import Layer, Network
from influence_cli.store.store import Store


def describe_network(network: Network) -> dict[str, Any]:
    """Give what ``make_network`` decided, JSON-able."""
    return {
        "layers": [asdict(layer) for layer in network.layers],
        "rest": list(network.rest),
        "unused": list(network.unused),
        "vectorised": network.vectorised,
        "obstacle": network.obstacle,
    }


def remembered_description(path: Path, network: Network) -> dict[str, Any] | None:
    """Read what a complete store remembers of the probe.

    Args:
        path: of the store.
        network: from ``track``.

    Returns:
        None where there is no complete store, where it was made before this was kept, or where it is about other
        parameters.
    """
    if not path.exists():
        return None
    with Store.open(path) as store:
        described: dict[str, Any] | None = store.facts.get("network")
        if described is None or not store.facts.get("rows", True) or not store.done().all():
            return None
    layers = [Layer(**layer) for layer in described["layers"]]
    names = {*(name for layer in layers for name in layer.names), *described["rest"], *described["unused"]}
    return described if names == set(network.names) else None


def remembered_network(network: Network, described: dict[str, Any]) -> Network:
    """Give a network as it was decided when its store was made."""
    return replace(
        network,
        layers=tuple(Layer(**layer) for layer in described["layers"]),
        rest=tuple(described["rest"]),
        unused=tuple(described["unused"]),
        vectorised=described["vectorised"],
        obstacle=described["obstacle"],
    )
