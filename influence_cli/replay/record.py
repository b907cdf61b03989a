"""The record of a run on disk: a folder with one HDF5 file per kept state, each written whole, and what the run is.

``influence.run/run.json``            what the run depends on, part by part
``influence.run/state-000032.h5``     the state before step 32: parameters, slots, buffers, and a checksum
``influence.run/replays/…npz``        finished replays, one per measure
``influence.run/verdict/…npz``        trainings without a few examples, for the verdict

A file is there complete or not at all, so a run that was killed goes on from its last kept state.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError, describe, near_path
from influence_cli.recording.states import kept_states, read_state, state_path, write_state
from influence_cli.runtime import disk
from influence_cli.steps.run import State

FACTS = "run.json"
AGAIN = "influence train --overwrite runs the recipe again, which gives the same states"


@dataclass(frozen=True)
class Record:
    """The folder of a run.

    Attributes:
        folder: it need not exist.
        again: what makes it again, for the hint about a damaged file.
    """

    folder: Path
    again: str = AGAIN

    @property
    def shown(self) -> Path:
        """Name it in messages."""
        return near_path(self.folder)

    @property
    def kept(self) -> list[int]:
        """Give the numbers of the steps before which a state is kept, rising."""
        return kept_states(self.folder)

    def made_of(self) -> dict[str, str]:
        """Read what the run depends on; empty where there is no record.

        Raises:
            InfluenceError: the file is damaged.
        """
        path = self.folder / FACTS
        if not path.exists():
            return {}
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
            return {str(key): str(value) for key, value in facts.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise InfluenceError(f"{self.shown}/{FACTS} cannot be read: {describe(error)}", self.again) from error

    def begin(self, made_of: Mapping[str, str]) -> None:
        """Make the folder, and write down what the run depends on."""
        disk.make_folder(self.folder)
        disk.write_whole(self.folder / FACTS, (json.dumps(dict(made_of), indent=2) + "\n").encode())

    def write(self, step: int, state: State) -> None:
        """Keep the state before a step."""
        write_state(self.folder, step, _vectors(state))

    def read(self, step: int, device: torch.device) -> State:
        """Read a kept state.

        Raises:
            InfluenceError: it is missing or damaged.
        """
        path = state_path(self.folder, step)
        try:
            vectors, right = read_state(path)
        except (OSError, KeyError, TypeError, RuntimeError) as error:
            raise InfluenceError(f"{self.shown}/{path.name} cannot be read: {describe(error)}", self.again) from error
        if not right:
            raise InfluenceError(f"{self.shown}/{path.name} is damaged: its checksum does not match", self.again)
        vectors = {name: vector.to(device) for name, vector in vectors.items()}
        slots = tuple(vectors[name] for name in sorted(vectors) if name.startswith("slot"))
        return State(vectors["parameters"], slots, vectors["buffers"])

    def clear(self) -> None:
        """Remove the folder and all in it."""
        if self.folder.exists():
            disk.remove_tree(self.folder)


def stride_of(steps: int) -> int:
    """Choose every how many steps a state is kept: ⌈√T⌉, so that as many are kept as are rebuilt at once.

    More would save no time: a rebuilt step computes the gradient that the way back needs of it in any case.
    """
    return max(1, math.ceil(math.sqrt(steps)))


def kept_steps(steps: int) -> list[int]:
    """Give the steps before which a state is kept; 0 and T are among them."""
    return sorted({*range(0, steps, stride_of(steps)), steps})


def state_bytes(state: State) -> int:
    """Give the size of a state."""
    return sum(vector.numel() * vector.element_size() for vector in _vectors(state).values())


def check_budget(steps: int, state: State, budget: int, where: str) -> None:
    """Refuse a budget that cannot hold the states, before anything is trained.

    Args:
        steps: T.
        state: one of them.
        budget: bytes.
        where: the config's line.
    """
    check_states(steps, len(kept_steps(steps)), state, budget, where)


def check_states(steps: int, count: int, state: State, budget: int, where: str) -> None:
    """Refuse a budget that cannot hold a number of states.

    Args:
        steps: T.
        count: of the states.
        state: one of them.
        budget: bytes.
        where: the config's line.
    """
    each = state_bytes(state)
    if count * each > budget:
        raise InfluenceError(
            f"{where}: the record of {steps:,} steps keeps {count:,} states of {each:,} bytes, {count * each:,} in "
            f"all, but gradients.budget is {budget:,}",
            f"-s gradients.budget={count * each}; the least that a replay takes",
        )


def _vectors(state: State) -> dict[str, Tensor]:
    slots = {f"slot{number}": slot for number, slot in enumerate(state.slots)}
    return {"parameters": state.parameters, **slots, "buffers": state.buffers}
