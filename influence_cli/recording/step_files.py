"""The steps of a recorded run on disk: HDF5 files of some steps each, every one written whole.

``steps-000032.h5`` begins with step 32. It has the rows of all its batches end to end (``rows``, ``sizes``), a number
per step and parameter group (``rates``, ``decays``), the columns of ``COLUMNS``, and where a step has them the state of
a random generator (``random/5``, ``cuda/5``) and the inputs as they were given (``inputs/5``). A file that is there is
complete, so a run that was killed can be read up to its last file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np
import torch
import xxhash
from torch import Tensor

from influence_cli.errors import InfluenceError, describe, near_path
from influence_cli.recording.optimizers import Settings
from influence_cli.runtime import disk

STEPS = re.compile(r"steps-(\d{6,})\.h5")
COLUMNS = ("momentum", "second", "eps", "number", "norm", "size", "trace")
# Types that numpy lacks, and the one of the same bits that HDF5 keeps.
BITS = {torch.bfloat16: torch.int16}
RECORD_ANEW = "record the training again"


@dataclass(frozen=True)
class Step:
    """What one step took.

    Attributes:
        rows: int64 [b], positions in the training set.
        settings: the optimiser's numbers.
        norm: of the gradient that it took.
        trace: of the inputs, (root mean square, sum), as ``trace_of`` gives them.
        random: the CPU generator's state before the pass, where the pass drew numbers.
        cuda: the CUDA generator's.
        inputs: [b, …], where they were given.
    """

    rows: np.ndarray
    settings: Settings
    norm: float
    trace: tuple[float, float]
    random: Tensor | None = None
    cuda: Tensor | None = None
    inputs: Tensor | None = None


def write_steps(folder: Path, first: int, steps: Sequence[Step]) -> None:
    """Write some steps, of which ``first`` is the first one's number."""
    arrays = {
        "rows": np.concatenate([step.rows for step in steps]),
        "sizes": np.array([len(step.rows) for step in steps]),
        "rates": np.array([step.settings.rates for step in steps]),
        "decays": np.array([step.settings.decays for step in steps]),
        **{name: np.array([_column(step, name) for step in steps]) for name in COLUMNS},
    }
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
        file.attrs["checksum"] = _checksum(arrays)
        for number, step in enumerate(steps):
            for part in ("random", "cuda", "inputs"):
                tensor = getattr(step, part)
                if tensor is not None:
                    _write_tensor(file, f"{part}/{first + number}", tensor)
    disk.write_whole(folder / f"steps-{first:06d}.h5", content.getvalue())


@dataclass(frozen=True)
class StepFiles:
    """The steps of a record.

    Attributes:
        folder: of the record.
    """

    folder: Path

    @cached_property
    def firsts(self) -> list[int]:
        """Give the first step of each file, rising."""
        matches = (STEPS.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Read all that is small of all steps: [T, …] each, and ``rows`` end to end.

        Raises:
            InfluenceError: a file is damaged, or steps are missing or there twice.
        """
        parts: list[dict[str, np.ndarray]] = []
        expected = 0
        for first in self.firsts:
            if first != expected:
                what = (
                    f"steps {expected:,} to {first - 1:,} are missing" if first > expected else "steps are there twice"
                )
                raise InfluenceError(f"{near_path(self.folder)} is not whole: {what}", RECORD_ANEW)
            parts.append(self._index(first))
            expected += len(parts[-1]["sizes"])
        if not parts:
            raise InfluenceError(f"{near_path(self.folder)} has no steps: its training stopped at once", RECORD_ANEW)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @property
    def count(self) -> int:
        """Count the steps."""
        return len(self.columns["sizes"])

    @cached_property
    def ends(self) -> np.ndarray:
        """Give where each step's rows end."""
        return np.cumsum(self.columns["sizes"])

    def rows(self, step: int) -> np.ndarray:
        """Give the positions of a step's batch: int64 [b]."""
        end, size = self.ends[step], self.columns["sizes"][step]
        return self.columns["rows"][end - size : end]

    def settings(self, step: int) -> Settings:
        """Give the optimiser's numbers at a step."""
        table = {name: self.columns[name][step] for name in ("rates", "decays", *COLUMNS)}
        return Settings(
            tuple(table["rates"].tolist()),
            tuple(table["decays"].tolist()),
            float(table["momentum"]),
            float(table["second"]),
            float(table["eps"]),
            int(table["number"]),
        )

    def tensor(self, part: str, step: int) -> Tensor | None:
        """Read ``random``, ``cuda`` or ``inputs`` of a step; None where it has none.

        Raises:
            InfluenceError: it is damaged.
        """
        first = self.firsts[int(np.searchsorted(self.firsts, step, side="right")) - 1]
        path = self.folder / f"steps-{first:06d}.h5"
        name = f"{part}/{step}"
        try:
            with h5py.File(path, "r") as file:
                if name not in file:
                    return None
                array, attributes = file[name][()], dict(file[name].attrs)
        except (OSError, KeyError, RuntimeError) as error:
            raise InfluenceError(f"{near_path(path)} cannot be read: {describe(error)}", RECORD_ANEW) from error
        if attributes["checksum"] != _checksum({"tensor": array}):
            raise InfluenceError(f"{near_path(path)} is damaged: the {part} of step {step:,} has changed", RECORD_ANEW)
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        dtype: torch.dtype = getattr(torch, str(attributes["dtype"]))
        return tensor.view(dtype) if dtype in BITS else tensor

    def _index(self, first: int) -> dict[str, np.ndarray]:
        path = self.folder / f"steps-{first:06d}.h5"
        try:
            with h5py.File(path, "r") as file:
                names = ("rows", "sizes", "rates", "decays", *COLUMNS)
                arrays = {name: file[name][()] for name in names}
                right = file.attrs["checksum"] == _checksum(arrays)
        except (OSError, KeyError, TypeError, RuntimeError) as error:
            raise InfluenceError(f"{near_path(path)} cannot be read: {describe(error)}", RECORD_ANEW) from error
        if not right:
            raise InfluenceError(f"{near_path(path)} is damaged: its checksum does not match", RECORD_ANEW)
        return arrays


def _column(step: Step, name: str) -> float:
    values: Mapping[str, float] = {"norm": step.norm, "size": step.trace[0], "trace": step.trace[1]}
    return values[name] if name in values else float(getattr(step.settings, name))


def _write_tensor(file: h5py.File, name: str, tensor: Tensor) -> None:
    bits = tensor.detach().cpu().contiguous()
    array = (bits.view(BITS[bits.dtype]) if bits.dtype in BITS else bits).numpy()
    data = file.create_dataset(name, data=array)
    data.attrs["dtype"] = str(tensor.dtype).removeprefix("torch.")
    data.attrs["checksum"] = _checksum({"tensor": array})


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    state = xxhash.xxh3_128()
    for name, array in arrays.items():
        state.update(f"{name} {array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).tobytes())
    return state.hexdigest()
