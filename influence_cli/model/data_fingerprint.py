"""What distinguishes data sets: labels, count, files with size, time and contents, a sample of inputs."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import xxhash

from influence_cli.data.batches import read_batches
from influence_cli.data.file_sets import near
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, describe

# Examples hashed to recognise a data set that is not in files.
SAMPLED = 64
# What files hold is hashed as well where that takes seconds; of more, size and time have to do.
FILES, CONTENTS, CONTENT_BYTES = "files", "contents", 4 * 10**9


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


def with_contents(
    wanted: Mapping[str, str], recorded: Mapping[str, str], split: Split, prefix: str = ""
) -> dict[str, str]:
    """Let the contents of files decide where their times differ, as they do in a copy of a project.

    Files are read only where nothing is recorded yet, or where sizes or times differ.

    Args:
        wanted: describes the examples, each part's name after the prefix.
        recorded: what a store or a run was made from; empty if it is yet to be made.
        split: whose examples they are.
        prefix: ``train.`` or ``test.``, where a fingerprint is of both.

    Returns:
        ``wanted`` with the hash of the contents; and with the recorded files where these hold the same.
    """
    files, contents = prefix + FILES, prefix + CONTENTS
    if files not in wanted or (recorded and contents not in recorded):
        return dict(wanted)
    if recorded and recorded.get(files) == wanted[files]:
        return {**wanted, contents: recorded[contents]}
    said = contents_hash(split)
    if said is None:
        return dict(wanted)
    same = recorded.get(contents) == said
    return {**wanted, contents: said, **({files: recorded[files]} if same else {})}


def contents_hash(split: Split) -> str | None:
    """Hash paths and bytes of all files in use; None where there are none, too many bytes, or one cannot be read."""
    listed = _listed(split)
    if listed is None:
        return None
    root, named = listed
    state, total = xxhash.xxh3_128(), 0
    for _, path in named:
        try:
            total += Path(path).stat().st_size
            if total > CONTENT_BYTES:
                return None
            state.update(os.path.relpath(path, root).encode(errors="surrogateescape") + b"\0")
            with Path(path).open("rb") as file:
                state.update(hashlib.file_digest(file, xxhash.xxh3_128).digest())
        except OSError:
            return None
    return state.hexdigest()


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
    listed = _listed(split)
    if listed is None:
        return None
    state, (root, named) = xxhash.xxh3_128(), listed
    for title, path in named:
        try:
            status = _status(Path(path))
        except OSError as error:
            raise InfluenceError(f"{title} cannot be read: {describe(error)}") from error
        fact = f"{os.path.relpath(path, root)}\0{status.st_size}\0{status.st_mtime_ns}\n"
        state.update(fact.encode(errors="surrogateescape"))
    return state.hexdigest()


def _listed(split: Split) -> tuple[str, Iterable[tuple[str, str]]] | None:
    """Give the common folder of all files, and the title and path of each one in use; None without files."""
    whole: Sequence[str]
    named: Iterable[tuple[str, str]]
    if split.files is not None:
        whole, named = split.files.names, ((near(name), name) for name in split.files.used(split.indices))
    elif split.paths is not None:
        whole, paths = split.paths, split.paths
        named = ((split.title(int(index)), paths[int(index)]) for index in split.indices)
    else:
        return None
    return os.path.commonpath([os.path.dirname(path) for path in whole]), named  # noqa: PTH120 (50,000 of them)


def _sample(split: Split) -> str:
    # Always the same examples: a store does not depend on the config's seed.
    chosen = np.random.default_rng(0).choice(split.indices, min(SAMPLED, len(split)), replace=False)
    state = xxhash.xxh3_128()
    for batch in read_batches(split, np.sort(chosen), SAMPLED):
        state.update(batch.digest().to_bytes(8, "little"))
    return state.hexdigest()
