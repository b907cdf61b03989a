"""One open file with rows of a store: written in place, past HDF5, and read by a scan."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import h5py
import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk
from influence_cli.runtime.locks import unlock
from influence_cli.store.layout import Layout, row_columns
from influence_cli.store.scan import Place, Reader, place_of


@dataclass(frozen=True)
class Part:
    """An open file with rows of a store: the store itself or one of its shards.

    Attributes:
        path: the file.
        absolute: its absolute path: one thread writes while another reads the user's data set, which changes the
            current folder of the whole process.
        raw: the open file, with its lock.
        file: the file, opened by HDF5.
        first: the number in the store of its first block.
        layout: the shape of the rows in use.
    """

    path: Path
    absolute: Path
    raw: BinaryIO
    file: h5py.File
    first: int
    layout: Layout

    @cached_property
    def places(self) -> dict[str, Place]:
        """Find the columns of the rows in the file."""
        return {name: place_of(self.file[name]) for name in row_columns(self.layout)}

    @property
    def blocks(self) -> range:
        """Give its blocks, by their numbers in the store."""
        return range(self.first, self.first + self.layout.blocks)

    def column(self, name: str, rows: slice) -> np.ndarray:
        """Read some rows of a data set."""
        return np.asarray(self.file[name][rows])

    def reader(self) -> Reader:
        """Make a reader of its rows; the data for checksums is read now."""
        blocks = slice(self.layout.blocks)
        digests, checksums = self.column("inputs", blocks), self.column("checksums", blocks)
        return Reader(self.path, self.first, self.raw, self.layout, self.places, digests, checksums)

    def put(self, name: str, row: int, values: np.ndarray | np.generic) -> None:
        """Write values at their place in the file, bypassing HDF5, which loses errors of delayed writes."""
        place = place_of(self.file[name])
        disk.write_at(self.raw, place.start + row * place.row_bytes, np.asarray(values, dtype=place.dtype))

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn disk errors into a message, and write only while the file is still at its path."""
        try:
            if not os.path.samestat(self.absolute.stat(), os.fstat(self.raw.fileno())):
                raise FileNotFoundError
            yield
        except FileNotFoundError as error:
            raise InfluenceError(
                f"{self.path} disappeared while {what} was being written: it was moved or removed, or its disk was "
                "unmounted",
                "it holds the finished blocks: put it back and run the same command to resume",
            ) from error
        except OSError as error:
            size = os.fstat(self.raw.fileno()).st_size
            raise InfluenceError(
                f"writing {what} of {self.path} failed: {disk.failure(error, self.absolute, size)}",
                "finished work is kept; free disk space and run the same command to resume",
            ) from error

    def close(self) -> None:
        """Close the file and release its lock; mapped parts stay valid."""
        self.file.close()
        unlock(self.raw)
        self.raw.close()
