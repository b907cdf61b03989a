"""The index of a store, a file next to it: faiss's data, then a description of what the index belongs to.

    influence.h5.index    the index, as faiss writes it: any program that has faiss opens it
                          xxh3 of every MB of that
                          JSON: what it belongs to, how it is searched, the recall that was measured
                          the lengths of these three, xxh3 of the last two, and the name of the format

It is written under another name and renamed when it is complete. No byte is used before it is verified; the lists are
mapped, and each is verified when a search reads it. An index is valid for the store that it was made from, and for one
λ, which whitens its rows.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from influence_cli.errors import InfluenceError
from influence_cli.influence.inverse import Inverse
from influence_cli.model.fingerprint import MEANING
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime import disk
from influence_cli.store.store import READ, Store

FORMAT = b"influence-index1"
TAIL = struct.Struct("<QQQQ16s")
ANEW = "influence index rebuilds it"
# Bytes per checksum.
PIECE = 2**20


@dataclass(frozen=True)
class Index:
    """An index, open.

    Attributes:
        path: the file.
        rows: int64, the rows of the store that are in it, in its order.
        description: JSON-able: ``kind``, ``lists``, ``probes`` (lists that are looked into), ``factor`` (candidates, by
            what is asked for), and what was measured.
        search: faiss's index, its lists mapped.
        before: called with the lists [m, probes] before they are read.
    """

    path: Path
    rows: np.ndarray
    description: dict[str, Any]
    search: Any
    before: Callable[[np.ndarray], None] = lambda _: None

    def candidates(self, queries: np.ndarray, count: int) -> list[np.ndarray]:
        """Find approximately the rows of largest inner product with each query; reads more lists if these hold too few.

        Args:
            queries: whitened coordinates, float32 [m, k].
            count: rows per query.

        Returns:
            Rows of the store, int64, of each query; fewer than ``count`` where there are no more.

        Raises:
            InfluenceError: a list that is read is damaged.
        """
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        search, count = self.search, min(count, len(self.rows))
        queries = padded(queries, search.d)
        if not self.description["lists"]:
            positions = search.search(queries, count)[1]
        else:
            # Multiplies how far a list reaches beyond its centre; for the rows themselves this number is 0.
            queries[:, -1] = np.linalg.norm(queries, axis=1)
            probes = int(self.description["probes"])
            while True:
                search.nprobe = probes = min(probes, search.nlist)
                near, lists = search.quantizer.search(queries, probes)
                self.before(lists)
                positions = search.search_preassigned(queries, count, lists, near)[1]
                if probes == search.nlist or (positions >= 0).all():
                    break
                probes *= 2
        return [self.rows[of_query[(of_query >= 0) & (of_query < len(self.rows))]] for of_query in positions]


def padded(vectors: np.ndarray, width: int) -> np.ndarray:
    """Give vectors [b, k] as faiss takes them: float32 [b, width], zeros behind."""
    if vectors.shape[1] < width:
        vectors = np.pad(vectors, ((0, 0), (0, width - vectors.shape[1])))
    return np.ascontiguousarray(vectors, dtype=np.float32)


def index_path(store: Path) -> Path:
    """Name the index of a store."""
    return store.with_name(store.name + ".index")


def belongings(prepared: Prepared, inverse: Inverse) -> dict[str, Any]:
    """Say what an index belongs to: the rows of a store, and what they were whitened by.

    Args:
        prepared: the complete store.
        inverse: its curvature, λ chosen.
    """
    with Store.open(prepared.path) as store:
        rows = xxhash.xxh3_64_hexdigest(store.checksums().tobytes())
        fingerprint = store.fingerprint
    return {
        "fingerprint": fingerprint,
        "rows": rows,
        "method": prepared.choice.method,
        "l2": prepared.l2 if prepared.has_one_l2 else prepared.task.objective.text(),
        "damping": list(inverse.damping.values) if inverse.damping else [],
    }


def write_index(part: Path, search: Any) -> Any:
    """Write faiss's data to a file without a seal, and open it again with its lists mapped.

    Raises:
        InfluenceError: the disk is full or gone.
    """
    import faiss

    try:
        faiss.write_index(search, str(part))
        return faiss.read_index(str(part), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise _unwritten(part, "the disk is full or gone") from error


def seal_index(index: Index, path: Path, belongs: Mapping[str, Any]) -> None:
    """Append the checksums and the description to an index, and give it its name, replacing an older one.

    Args:
        index: of ``write_index``.
        path: its name.
        belongs: of ``belongings``.

    Raises:
        InfluenceError: the disk is full or gone; what was there stays.
    """
    try:
        with index.path.open("r+b", buffering=0) as raw:
            pieces = iter(lambda: raw.read(PIECE), b"")
            checksums = np.array([xxhash.xxh3_64_intdigest(piece) for piece in pieces], dtype="<u8").tobytes()
            size = raw.tell()
            places = list(_places(index.search, range(index.description["lists"]))) or [(size, size)]
            extent = (min(start for start, _ in places), max(stop for _, stop in places))
            seal = {"belongs": dict(belongs), "facts": index.description, "lists_at": extent}
            sealed = checksums + json.dumps(seal).encode()
            length = len(sealed) - len(checksums)
            disk.append(raw, sealed)
            disk.append(raw, TAIL.pack(size, len(checksums), length, xxhash.xxh3_64_intdigest(sealed), FORMAT))
            disk.flush(raw)
        disk.replace(index.path, path)
    except OSError as error:
        raise _unwritten(path, disk.failure(error, index.path, 0)) from error


def _unwritten(path: Path, reason: str) -> InfluenceError:
    return InfluenceError(f"{path} cannot be written: {reason}", "free disk space, and run influence index again")


def open_index(path: Path, prepared: Prepared, inverse: Inverse) -> Index:
    """Open the index of a store: verify that it belongs to it and to this λ, and all of it but its lists.

    Args:
        path: the file.
        prepared: the complete store of whose rows it should be.
        inverse: its curvature, λ chosen.

    Raises:
        InfluenceError: no such file, damaged, or older than its store, naming what differs.
    """
    import faiss

    checked, seal = _read_seal(path)
    _compare(seal["belongs"], belongings(prepared, inverse), path, prepared.path)
    start, stop = seal["lists_at"]
    checked.check([(0, start), (stop, checked.size)])
    try:
        search = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise InfluenceError(
            f"{path} cannot be opened by faiss {faiss.__version__}: faiss {seal['facts']['faiss']} wrote it", ANEW
        ) from error
    with Store.open(prepared.path) as store:
        rows = np.flatnonzero(store.column("state") == READ)
    return Index(path, rows, seal["facts"], search, lambda lists: checked.check(_places(search, np.unique(lists))))


class _Verified:
    """The bytes that faiss wrote, each MB verified once, when it is first used."""

    def __init__(self, path: Path, data: memoryview, checksums: np.ndarray) -> None:
        self._path, self._data, self._checksums = path, data, checksums
        self._known = np.zeros(len(checksums), dtype=bool)

    @property
    def size(self) -> int:
        """Count them."""
        return len(self._data)

    def check(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Verify the bytes from start to stop of each range.

        Raises:
            InfluenceError: a checksum does not match.
        """
        for start, stop in ranges:
            for piece in range(start // PIECE, -(-stop // PIECE)):
                if self._known[piece]:
                    continue
                data = self._data[piece * PIECE : (piece + 1) * PIECE]
                if xxhash.xxh3_64_intdigest(data) != self._checksums[piece]:
                    raise InfluenceError(
                        f"{self._path} is damaged: the checksum of its MB {piece} does not match", ANEW
                    )
                self._known[piece] = True


def _places(search: Any, lists: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Give the bytes that some lists of a mapped index have in its file."""
    import faiss

    for number in lists:
        mapped = faiss.downcast_InvertedLists(search.invlists)
        block = mapped.lists.at(int(number))
        if block.size:
            yield (
                block.offset,
                block.offset + block.size * (mapped.code_size + 8),
            )  # codes, and a number of 8 bytes each


def _read_seal(path: Path) -> tuple[_Verified, dict[str, Any]]:
    """Map the file, verify its end, and give the checksums and the JSON in it."""
    try:
        with path.open("rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            if size < TAIL.size:
                raise InfluenceError(f"{path} is not an index of influence, or it is truncated", ANEW)
            data = memoryview(disk.mapped(raw, 0, size, writable=False)).toreadonly()
    except FileNotFoundError as error:
        raise missing(path) from error
    except OSError as error:
        raise InfluenceError(f"{path} cannot be opened: {error.strerror}", ANEW) from error
    indexed, many, length, digest, name = TAIL.unpack(data[-TAIL.size :])
    if name != FORMAT:
        raise InfluenceError(f"{path} is not an index of influence, or it is truncated", ANEW)
    sealed = data[indexed : -TAIL.size]
    fits = indexed + many + length + TAIL.size == size and many == 8 * -(-indexed // PIECE)
    if not fits or xxhash.xxh3_64_intdigest(sealed) != digest:
        raise InfluenceError(f"{path} is damaged: its footer (checksums and origin) does not match", ANEW)
    checksums = np.frombuffer(sealed[:many], dtype="<u8")
    return _Verified(path, data[:indexed], checksums), json.loads(bytes(sealed[many:]))


def missing(path: Path) -> InfluenceError:
    """Give the error of an index that is not there."""
    return InfluenceError(f"there is no index {path}", "influence index creates it")


def _compare(recorded: Mapping[str, Any], wanted: Mapping[str, Any], path: Path, store: Path) -> None:
    """Refuse an index of other rows or for another λ."""
    before, now = recorded["fingerprint"], wanted["fingerprint"]
    different = [meaning for name, meaning in MEANING.items() if before.get(name) != now.get(name)]
    if different or recorded["rows"] != wanted["rows"]:
        said = "; ".join(different) or "the rows, or their kept coordinates"
        raise InfluenceError(f"{path} is older than its store {store}; what differs: {said}", ANEW)
    if recorded["method"] != wanted["method"]:
        said = f"curvature.method: {recorded['method']}, but it is {wanted['method']} now"
    elif recorded["l2"] != wanted["l2"]:
        said = f"l2 = {recorded['l2']:g}, but it is {wanted['l2']:g} now"
    elif not _alike(recorded["damping"], wanted["damping"]):
        said = f"λ = {_range(recorded['damping'])}, but it is {_range(wanted['damping'])} now"
    else:
        return
    raise InfluenceError(f"{path} was made for {said}", "influence index rebuilds it for this one")


def _alike(a: list[float], b: list[float]) -> bool:
    """Say whether these are the same λ up to the rounding of a second moment summed by another run."""
    return len(a) == len(b) and all(abs(x - y) <= 1e-9 * max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))


def _range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.6g}" if low == high else f"{low:.3g} to {high:.3g} by layer"
