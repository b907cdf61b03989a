"""What a fitted curvature is, and whether the one in a store still fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_cli.curvature.blocks import Block, from_arrays, keep
from influence_cli.curvature.choice import Choice
from influence_cli.curvature.coordinates import Basis, Blocks, Joint, block_penalties
from influence_cli.curvature.spectrum import Spectrum, joint, layered
from influence_cli.errors import InfluenceError
from influence_cli.precompute.fingerprint import CODE, code_drift
from influence_cli.store.store import Store

# Parts of a store's fingerprint that a fitted curvature depends on; the given labels count where they were used.
DEPENDS = (
    "weights",
    "count",
    "files",
    "examples",
    "transform",
    "example_weights",
    "output",
    "layers",
    "loss",
    "basis",
    "l2",
    "seed",
    "versions",
    "code",
    "side files",
)


@dataclass(frozen=True)
class Fitted:
    """A curvature as a store keeps it.

    Attributes:
        arrays: the basis and the spectrum, or the factors of each layer.
        facts: what is not an array, JSON-able.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def bytes(self) -> int:
        """Count the bytes of the arrays."""
        return sum(values.nbytes for values in self.arrays.values())

    def blocks(self) -> list[Block]:
        """Give the factors of each layer."""
        return from_arrays(self.facts["blocks"], self.arrays.get)


def curvature_fingerprint(wanted: Mapping[str, str], choice: Choice) -> dict[str, str]:
    """Describe what a fitted curvature depends on: fewer things than the rows, so it survives a change of labels."""
    # Among the known losses, only cross-entropy has the same second derivative for every label.
    free = choice.matrix == "ggn" and choice.is_layered and wanted.get("loss") == "cross_entropy"
    labels = () if free else ("labels",)
    return {name: wanted[name] for name in (*DEPENDS, *labels) if name in wanted}


def stored_curvature(path: Path, wanted: Mapping[str, str], choice: Choice) -> Fitted | None:
    """Take a curvature from a store's file, even if its rows belong to another run; None if none fits."""
    if not path.is_file():
        return None
    try:
        with Store.open(path, rows=False) as store:
            made_with = store.facts.get("curvature")
            if not isinstance(made_with, dict):
                return None
            # What was found to change no number of the store counts as the same.
            made_with |= {name: part for name, part in store.settled.items() if name in DEPENDS}
            depends = curvature_fingerprint(wanted, choice)
            if code_drift(made_with, depends) or made_with | {CODE: ""} != depends | {CODE: ""}:
                return None
            names = [*store.names("factor."), *store.names("basis"), *store.names("spectrum")]
            arrays = {name: store.array(name) for name in names}
            return Fitted({name: values for name, values in arrays.items() if values is not None}, store.facts)
    except InfluenceError:
        return None  # in use or damaged: opening it for its rows reports that


def first_columns(fitted: Fitted, k: int) -> Fitted:
    """Cut a joint basis to its first k coordinates; other runs can then no longer reuse it."""
    if k == len(fitted.arrays["spectrum"]):
        return fitted
    arrays = {"spectrum": fitted.arrays["spectrum"][:k], "basis": fitted.arrays["basis"][:, :k]}
    return Fitted(arrays, {name: fact for name, fact in fitted.facts.items() if name != "curvature"})


def open_basis(
    fitted: Fitted, choice: Choice, chosen: np.ndarray | None, device: torch.device, l2: float | torch.Tensor = 0.0
) -> tuple[Basis, Spectrum]:
    """Give the basis of the chosen coordinates, on the device, and their spectrum.

    Args:
        fitted: the curvature.
        choice: which one.
        chosen: int64 [k], positions of the coordinates of one basis per layer, or None for all; of a joint basis the
            first ``len(chosen)``.
        device: where the basis goes.
        l2: λ₂; [p] if it differs between parameters: it is then a part of Λ (a joint basis was fitted with it).
    """
    if choice.is_layered:
        blocks = fitted.blocks()
        penalties = None if isinstance(l2, float) else block_penalties(choice.network, blocks, l2)
        return Blocks(tuple(keep(blocks, chosen, device))), layered(blocks, chosen, penalties)
    k = len(fitted.arrays["spectrum"]) if chosen is None else len(chosen)
    vectors = torch.from_numpy(fitted.arrays["basis"][:, :k]).to(device)
    values = torch.from_numpy(np.array(fitted.arrays["spectrum"][:k]))
    facts = fitted.facts
    size = choice.network.size
    penalty = 0.0 if isinstance(l2, float) else float(l2.sum())
    trace, smallest = float(facts["trace"]), float(facts["smallest"])
    return Joint(vectors), joint(values, size=size, trace=trace, smallest=smallest, penalty=penalty)
