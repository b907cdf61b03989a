"""What a checkpoint of a library is: what it writes, what stands in the config, and what makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

State = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A layout of a checkpoint.

    Attributes:
        writer: the library, and what of it writes the file.
        layout: what is in the file or folder.
        model: the lines of the section ``model`` in YAML, with ``factory`` only where the network's does not hold.
        make: writes it into a folder from a trained network that it may change, and gives the state dict that it
            stands for.
        convert: the file that ``influence convert FILE -o MODEL --trust`` makes a state dict of first.
        reference: Python that defines ``build``, the model that the state dict is of, where it is not the network.
    """

    writer: str
    layout: str
    model: str
    make: Callable[[Path, nn.Module], State]
    convert: str = ""
    reference: str = ""
