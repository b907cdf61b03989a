"""What distinguishes data sets: labels, count, files with size and time, a sample of inputs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from influence_cli.data.batches import read_batches
from influence_cli.data.file_sets import near
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, describe

# Examples hashed to recognise a data set that is not in files.
SAMPLED = 64


def data_fingerprint(split: Split) -> dict[str, str]:
    """Describe the examples of a split: which, their labels, the transform, and the files or a sample of inputs."""
    files = files_hash(split)
    return {
        "count": f"{len(split)} {xxhash.xxh3_64_hexdigest(split.indices.tobytes())}",
        "labels": xxhash.xxh3_64_hexdigest(split.labels[split.indices].tobytes()),
        "transform": split.transform_text,
        **_weights(split),
        **({"examples": _sample(split)} if files is None else {"files": files}),
    }


def _weights(split: Split) -> dict[str, str]:
    """Describe the weights of the examples, where there are any."""
    if split.weights is None:
        return {}
    return {"example_weights": xxhash.xxh3_64_hexdigest(split.weights[split.indices].tobytes())}


def _status(path: Path) -> os.stat_result:
    """Look at a file; a broken link counts as present: whoever reads it names it or continues without it."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise
        return path.lstat()


def files_hash(split: Split) -> str | None:
    """Hash path, size and time of change of every file in use; None where the examples are not in files.

    Paths are relative to the common folder of all files, so moving a project as a whole changes nothing.
    """
    whole: Sequence[str]
    named: Iterable[tuple[str, str]]
    if split.files is not None:
        whole, named = split.files.names, ((near(name), name) for name in split.files.used(split.indices))
    elif split.paths is not None:
        whole, paths = split.paths, split.paths
        named = ((split.title(int(index)), paths[int(index)]) for index in split.indices)
    else:
        return None
    state = xxhash.xxh3_128()
    root = os.path.commonpath([os.path.dirname(path) for path in whole])  # noqa: PTH120 (50,000 of them)
    for title, path in named:
        try:
            status = _status(Path(path))
        except OSError as error:
            raise InfluenceError(f"{title} cannot be read: {describe(error)}") from error
        fact = f"{os.path.relpath(path, root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        state.update(fact.encode(errors="surrogateescape"))
    return state.hexdigest()


def _sample(split: Split) -> str:
    # Always the same examples: a store does not depend on the config's seed.
    chosen = np.random.default_rng(0).choice(split.indices, min(SAMPLED, len(split)), replace=False)
    state = xxhash.xxh3_128()
    for batch in read_batches(split, np.sort(chosen), SAMPLED):
        state.update(batch.digest().to_bytes(8, "little"))
    return state.hexdigest()
