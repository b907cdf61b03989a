"""What a store depends on, part by part: weights, data, labels, transform, layers, loss, basis, versions.

Every part is compared when a store is opened; if one differs, the error names it and the store is not used.
"""

from __future__ import annotations

from collections.abc import Mapping

import xxhash

from influence_cli.curvature.choice import Choice
from influence_cli.errors import InfluenceError
from influence_cli.model.data_fingerprint import data_fingerprint
from influence_cli.model.fingerprint import MEANING, versions, weights_hash
from influence_cli.model.task import Task


def fingerprint(task: Task, choice: Choice, store_dtype: str) -> dict[str, str]:
    """Describe what the rows of a store depend on.

    Args:
        task: model and data.
        choice: curvature and tracked parameters.
        store_dtype: ``float32``, ``float16`` or ``int8``.
    """
    return {
        "weights": weights_hash(task.model),
        **data_fingerprint(task.train),
        **({"output": task.output} if task.output else {}),
        "layers": f"{choice.network.size} {xxhash.xxh3_64_hexdigest(' '.join(choice.network.names).encode())}",
        "loss": task.loss_name,
        "basis": f"{choice.method} {choice.matrix}" if choice.has_basis else "raw gradients",
        **_penalty(task, choice),
        # Which examples choose a basis per layer, and which labels are drawn for them.
        **({"seed": str(task.seed)} if choice.is_layered else {}),
        "precision": choice.network.precision,
        "store_dtype": store_dtype,
        "versions": versions(),
    }


def _penalty(task: Task, choice: Choice) -> dict[str, str]:
    """Describe l2 where it is a part of the matrix that is decomposed: a joint basis, l2 by parameter."""
    l2 = task.objective.over(choice.network)
    if isinstance(l2, float) or not choice.is_joint:
        return {}
    return {"l2": xxhash.xxh3_64_hexdigest(l2.numpy().tobytes())}


def differing(stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """List the parts in which two fingerprints differ."""
    return [name for name in MEANING if stored.get(name) != wanted.get(name)]


def compare(stored: Mapping[str, str], wanted: Mapping[str, str], path: str) -> None:
    """Refuse a store that belongs to another run, naming what differs.

    Raises:
        InfluenceError: naming every part that differs.
    """
    different = differing(stored, wanted)
    if not different:
        return
    said = []
    for name in different:
        readable = name in ("basis", "seed", "precision", "store_dtype", "versions", "loss")
        said.append(
            f"{MEANING[name]} ({stored.get(name)} in the store, {wanted.get(name)} now)" if readable else MEANING[name]
        )
    grown = "; a store grows by itself only if the new images come after all old ones" if "count" in different else ""
    raise InfluenceError(
        f"{path} belongs to another run; what differs: {'; '.join(said)}",
        "keep it and write another one: -s gradients.store=OTHER.h5, or replace it: influence gradients --overwrite"
        + grown,
    )
