"""``run.json`` of a recorded loop: what its steps have in common."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from influence_cli.recording.optimizers import Kind
from influence_cli.runtime import disk

FACTS = "run.json"
LABELS = "labels.npy"
KINDS: dict[str, Kind] = {"sgd": "sgd", "adam": "adam", "adamw": "adamw"}


@dataclass(frozen=True)
class Facts:
    """What the steps of a recorded loop have in common.

    Attributes:
        kind: of the optimiser: ``sgd``, ``adam`` or ``adamw``.
        nesterov: SGD looks ahead.
        clip: the largest norm of a batch's gradient; None for any.
        parameters: name, shape and optimiser group of each trained parameter.
        still: modules in eval mode while the model trained; the empty name is the model itself.
        steps: T, once the record is closed; None before.
        name: of this record, unlike any other's.
        torch: its version.
    """

    kind: Kind
    nesterov: bool
    clip: float | None
    parameters: tuple[tuple[str, tuple[int, ...], int], ...]
    still: tuple[str, ...]
    steps: int | None = None
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    torch: str = torch.__version__

    def described(self) -> dict[str, str]:
        """Give them as text, part by part."""
        return {
            "loop": self.name,
            "optimizer": self.kind,
            "nesterov": json.dumps(self.nesterov),
            "clip": json.dumps(self.clip),
            "parameters": json.dumps(self.parameters),
            "still": json.dumps(self.still),
            "steps": json.dumps(self.steps),
            "torch": self.torch,
        }

    def write(self, folder: Path) -> None:
        """Write them."""
        disk.write_whole(folder / FACTS, (json.dumps(self.described(), indent=2) + "\n").encode())


def read_facts(described: Mapping[str, str]) -> Facts:
    """Read what ``described`` gave.

    Raises:
        KeyError, ValueError or TypeError: it is no recorded loop's.
    """
    return Facts(
        KINDS[described["optimizer"]],
        bool(json.loads(described["nesterov"])),
        json.loads(described["clip"]),
        tuple((name, tuple(shape), group) for name, shape, group in json.loads(described["parameters"])),
        tuple(json.loads(described["still"])),
        json.loads(described["steps"]),
        described["loop"],
        described["torch"],
    )
