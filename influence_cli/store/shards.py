"""A store in several files: shards that are stores themselves, and a small main file that joins them.

The main file has the header, the curvature and the summary; its rows are virtual data sets over the shards, so that any
HDF5 tool reads them as one. A shard holds whole blocks. Several processes write one shard each at a time, and a store
that grows gets more shards. Shards are in their own folder next to the main file; the main file's header lists them,
with a checksum that detects a shard of another store.
"""

from __future__ import annotations

import contextlib
import glob
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from influence_cli.errors import InfluenceError
from influence_cli.runtime import disk
from influence_cli.store.header import SHARD, open_file
from influence_cli.store.layout import (
    ANEW,
    FIXED,
    PER_BLOCK,
    SEAL_BYTES,
    Layout,
    create,
    data_sets,
    encoded,
    lay_out_rest,
    make_whole,
    row_columns,
    seal_size,
    side_arrays,
    side_bytes,
)
from influence_cli.store.part import Part

# Bytes of the main file for the virtual data sets, per shard.
MAP_BYTES = 4096
# Open files of a process in addition to those of a store.
OTHER_FILES = 64


@dataclass(frozen=True)
class Shard:
    """A shard, as listed in the main file's header.

    Attributes:
        file: its name, relative to the main file's folder.
        first: the number in the store of its first block.
        blocks: how many of its blocks belong to the store: only the full ones, after the store has grown.
        header: xxh3 of its header, which no other shard has.
    """

    file: str
    first: int
    blocks: int
    header: str

    def rows(self, layout: Layout) -> slice:
        """Give its rows in the store."""
        return layout.span(range(self.first, self.first + self.blocks))


@dataclass(frozen=True)
class _Contents:
    """What is the same in every shard of a store, and what each takes its rows from.

    Attributes:
        fingerprint: what the store belongs to.
        facts: of the store.
        labels: int64 [n], of all rows.
        indices: int64 [n].
    """

    fingerprint: Mapping[str, str]
    facts: Mapping[str, Any]
    labels: np.ndarray
    indices: np.ndarray


def shards_of(header: Mapping[str, Any]) -> list[Shard]:
    """Read the shards from a main file's header; none for a store in one file."""
    return [Shard(**entry) for entry in header.get("shards", [])]


def _new_folder(path: Path) -> Path:
    """Name a folder for the shards of a new store."""
    return path.with_name(f"{path.name}.shards-{secrets.token_hex(4)}")


def _header_hash(file: h5py.File) -> str:
    """Give the checksum of a store's header, by which the main file knows its shards."""
    return format(int(file["header"].attrs["xxh3"]), "016x")


def create_sharded(
    path: Path,
    layout: Layout,
    *,
    count: int,
    fingerprint: Mapping[str, str],
    facts: Mapping[str, Any],
    labels: np.ndarray,
    indices: np.ndarray,
    arrays: Mapping[str, np.ndarray],
) -> None:
    """Make a store in several files with every byte reserved and no block done, replacing what was at ``path``.

    Args:
        path: the main file; it appears when every shard is there.
        layout: the shape of all of it.
        count: shards, at most one per block.
        fingerprint: what the store belongs to.
        facts: as for a store in one file.
        labels: int64 [n].
        indices: int64 [n].
        arrays: side arrays.

    Raises:
        InfluenceError: the folder is missing or not writable, or the disk is too small.
    """
    disk.check_space(path, layout.bytes() + side_bytes(arrays))
    folder = _new_folder(path)
    made = _add_shards(folder, layout, range(layout.blocks), count, 0, _Contents(fingerprint, facts, labels, indices))
    _write_main(path, layout, fingerprint, facts, arrays, made)
    remove_orphans(path)


def extend(
    path: Path,
    layout: Layout,
    *,
    count: int,
    fingerprint: Mapping[str, str],
    labels: np.ndarray,
    indices: np.ndarray,
) -> None:
    """Add room for more rows to a store; finished blocks stay, except the last one if it was not full.

    A store in one file becomes the first shard. Its curvature is not refitted on the new rows.

    Args:
        path: the store.
        layout: the new shape: more rows, the rest as before.
        count: new shards, at most one per new block.
        fingerprint: what the larger store belongs to.
        labels: int64 [n], of all rows.
        indices: int64 [n].

    Raises:
        InfluenceError: the disk is too small, or the folder is not writable.
    """
    raw, file, header = open_file(path)
    with raw, file:
        arrays = {name: np.asarray(file[name][()]) for name in side_arrays(data_sets(file))}
        header_hash = _header_hash(file)
    old, facts = Layout(**header["layout"]), header["facts"]
    full = old.n // old.block
    known = shards_of(header)
    folder = (path.parent / known[0].file).parent if known else _new_folder(path)
    disk.check_space(path, layout.bytes() - old.bytes() + side_bytes(arrays))
    if not known and full:
        disk.make_folder(folder)
        first = folder / "0000.h5"
        try:
            disk.link(str(path), str(first))
        except OSError:  # a file system without hard links
            disk.copy(path, first)
        known = [Shard(f"{folder.name}/{first.name}", 0, full, header_hash)]
    kept = [
        Shard(shard.file, shard.first, min(shard.blocks, full - shard.first), shard.header)
        for shard in known
        if shard.first < full
    ]
    number = 1 + max((int(Path(shard.file).stem) for shard in known), default=-1)
    contents = _Contents(fingerprint, facts, labels, indices)
    made = _add_shards(folder, layout, range(full, layout.blocks), count, number, contents)
    _write_main(path, layout, fingerprint, facts, arrays, [*kept, *made])
    remove_orphans(path)


def _add_shards(
    folder: Path,
    layout: Layout,
    blocks: range,
    count: int,
    number: int,
    contents: _Contents,
) -> list[Shard]:
    """Make shards for some blocks of a store, as equal as can be."""
    try:
        disk.make_folder(folder)
    except OSError as error:
        raise InfluenceError(
            f"{folder} cannot be created: {error.strerror}", "make its folder writable, or set gradients.store"
        ) from error
    count = max(1, min(count, len(blocks)))
    made = []
    for part in range(count):
        start, stop = (blocks.start + len(blocks) * edge // count for edge in (part, part + 1))
        rows = layout.span(range(start, stop))
        file = folder / f"{number + part:04d}.h5"
        create(
            file,
            Layout(rows.stop - rows.start, layout.k, layout.classes, layout.block, layout.dtype),
            fingerprint=contents.fingerprint,
            facts={"rows": True, "batch": contents.facts["batch"], "shard": f"{folder.name} {number + part}"},
            labels=contents.labels[rows],
            indices=contents.indices[rows],
            arrays={},
        )
        raw, opened, _ = open_file(file)
        with raw, opened:
            header = _header_hash(opened)
        made.append(Shard(f"{folder.name}/{file.name}", start, stop - start, header))
    return made


def _write_main(
    path: Path,
    layout: Layout,
    fingerprint: Mapping[str, str],
    facts: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    shards: Sequence[Shard],
) -> None:
    header = {
        "layout": asdict(layout),
        "fingerprint": dict(fingerprint),
        "facts": dict(facts),
        "shards": [asdict(shard) for shard in shards],
    }
    columns = row_columns(layout)

    def lay_out(part: Path) -> None:
        room = max(SEAL_BYTES, seal_size(len(FIXED) + len(columns) + len(arrays)))
        with h5py.File(
            part, "w", userblock_size=room, alignment_threshold=1, alignment_interval=64, locking=False
        ) as file:
            lay_out_rest(file, layout, encoded(header), arrays)
            for name, (shape, dtype) in columns.items():
                whole = h5py.VirtualLayout((layout.n, *shape), dtype)
                for shard in shards:
                    rows = shard.rows(layout)
                    source = h5py.VirtualSource(shard.file, name, (shard.blocks * layout.block, *shape), dtype)
                    whole[rows] = source[: rows.stop - rows.start]
                file.create_virtual_dataset(name, whole)
            for name, dtype in PER_BLOCK.items():
                whole = h5py.VirtualLayout((layout.blocks,), dtype)
                for shard in shards:
                    source = h5py.VirtualSource(shard.file, name, (shard.blocks,), dtype)
                    # A part of the source, which is longer if the store has grown over its last block.
                    whole[shard.first : shard.first + shard.blocks] = source[: shard.blocks]
                file.create_virtual_dataset(name, whole)

    make_whole(path, side_bytes(arrays) + MAP_BYTES * (1 + len(shards)), lay_out)


def open_shards(path: Path, header: Mapping[str, Any], *, write: bool) -> list[Part]:
    """Open the shards of a store; each is checked like a store, and that it belongs to this one.

    Raises:
        InfluenceError: one is missing (with the rows that it held), damaged, or of another store.
    """
    layout, shards = Layout(**header["layout"]), shards_of(header)
    # Each is open twice, once by HDF5, and once more per mapped column.
    _allow_files((2 + len(row_columns(layout))) * len(shards) + OTHER_FILES)
    opened: list[Part] = []
    try:
        for shard in shards:
            file = path.parent / shard.file
            rows = shard.rows(layout)
            held = f"rows {rows.start:,} to {rows.stop - 1:,} of {layout.n:,}"
            if not file.exists():
                raise InfluenceError(
                    f"{path} is missing its shard {shard.file}, which held {held}",
                    f"put it back, or {ANEW}; the curvature is kept",
                )
            raw, content, header = open_file(file, write=write)
            used = replace(layout, n=rows.stop - rows.start)
            opened.append(Part(file, file.absolute(), raw, content, shard.first, used))
            if _header_hash(content) != shard.header or not _fits(header, layout, shard):
                raise InfluenceError(
                    f"{file} is a shard of another store: {path} was made with a different shard for {held}",
                    f"put the right one back, or {ANEW}; the curvature is kept",
                )
    except BaseException:
        for part in opened:
            part.close()
        raise
    return opened


def _fits(header: Mapping[str, Any], layout: Layout, shard: Shard) -> bool:
    shape = Layout(**header["layout"])
    rows = shard.rows(layout)
    same = (shape.k, shape.classes, shape.block, shape.dtype) == (layout.k, layout.classes, layout.block, layout.dtype)
    return same and shape.n >= rows.stop - rows.start and shape.blocks >= shard.blocks


def _allow_files(need: int) -> None:
    """Raise the limit of open files of this process, within what the system allows."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != resource.RLIM_INFINITY and soft < need:
            most = need if hard == resource.RLIM_INFINITY else min(need, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def remove_orphans(path: Path) -> None:
    """Remove the old shards of a store that the file at ``path`` no longer names."""
    used: set[str] = set()
    if path.exists():
        try:
            raw, file, header = open_file(path)
        except InfluenceError:
            return  # what it names is unknown, so nothing is removed
        with raw, file:
            used = {shard.file for shard in shards_of(header)}
    for folder in path.parent.glob(f"{glob.escape(path.name)}.shards-*"):
        if not SHARD.fullmatch(f"{folder.name}/0000.h5"):
            continue
        if not any(Path(name).parent.name == folder.name for name in used):
            disk.remove_tree(folder)
            continue
        for shard in folder.glob("*.h5"):  # from a store that has grown over its last block
            if f"{folder.name}/{shard.name}" not in used:
                disk.remove(shard)
