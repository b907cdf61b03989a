"""What a store depends on, part by part: weights, data, labels, transform, layers, loss, basis, versions, code.

Every part is compared when a store is opened; if one differs, the error names it and the store is not used. Code is
different: an edit need not change a number, so a difference there has the numbers compared (staleness.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from influence_cli.config.source_code import PARSER
from influence_cli.curvature.choice import Choice
from influence_cli.errors import InfluenceError, few
from influence_cli.model.data_fingerprint import data_fingerprint
from influence_cli.model.fingerprint import MEANING, versions, weights_hash
from influence_cli.model.task import Task
from influence_cli.runtime.opened_files import stamps

# The parts that are no single text, but a JSON object: a hash per source file or argument, or per other file.
CODE, SIDE_FILES = "code", "side files"
# The files of a transform in its text.
_FILE_HASH = re.compile(r" [0-9a-f]{16}(?=[ ;]|$)")


@dataclass(frozen=True)
class Drift:
    """How the user's code differs from the code that a store was made with.

    Attributes:
        changed: source files and keys of the config that differ.
        files: other files that the code reads, or read then, and that differ.
        unknown: why nobody can tell whether sources have changed; empty where it can be told.
    """

    changed: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    unknown: str = ""

    @property
    def what(self) -> str:
        """Name what differs: ``the code in losses.py and model.args``."""
        if self.changed:
            sources = [name for name in self.changed if name.endswith(".py")]
            keys = [name for name in self.changed if name not in sources]
            return " and ".join([*([f"the code in {few(sources)}"] if sources else []), *keys])
        return f"{'a file' if len(self.files) == 1 else 'files'} that the code reads ({few(self.files)})"

    def __bool__(self) -> bool:
        """Say whether the numbers have to be compared."""
        return bool(self.changed or self.files or self.unknown)


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
        CODE: json.dumps(task.code.parts(), sort_keys=True),
        SIDE_FILES: json.dumps(stamps(task.side_files, task.code.folder), sort_keys=True),
    }


def _penalty(task: Task, choice: Choice) -> dict[str, str]:
    """Describe l2 where it is a part of the matrix that is decomposed: a joint basis, l2 by parameter."""
    l2 = task.objective.over(choice.network)
    if isinstance(l2, float) or not choice.is_joint:
        return {}
    return {"l2": xxhash.xxh3_64_hexdigest(l2.numpy().tobytes())}


def differing(stored: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """List the parts in which two fingerprints differ, code aside: an edited file of a transform is code."""
    return [name for name in MEANING if _but_for_files(name, stored) != _but_for_files(name, wanted)]


def _but_for_files(name: str, fingerprint: Mapping[str, str]) -> str | None:
    text = fingerprint.get(name)
    return _FILE_HASH.sub("", text) if text is not None and name == "transform" else text


def code_drift(stored: Mapping[str, str], wanted: Mapping[str, str]) -> Drift:
    """Compare the code, its arguments and the files that it reads with those of a store.

    A file that only one of the two lists shows in a file that both list, which imports it.
    """
    before, now = _object(stored, CODE), _object(wanted, CODE)
    if not before:
        return Drift(unknown="it was made before stores kept a hash of the code")
    if before.get(PARSER) != now.get(PARSER):
        return Drift(unknown=f"it was made with Python {before.get(PARSER)}, which reads sources in another way")
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if not changed and stored.get("transform") != wanted.get("transform"):
        changed = ["train.transform"]
    then, read = _object(stored, SIDE_FILES), _object(wanted, SIDE_FILES)
    files = sorted(name for name, stamp in read.items() if SIDE_FILES in stored and then.get(name) != stamp)
    return Drift(tuple(changed), tuple(files))


def changed_side_files(stored: Mapping[str, str], wanted: Mapping[str, str], folder: Path) -> list[str]:
    """List the files that the data set's code read when a store was made and that have changed or are gone."""
    now = _object(wanted, SIDE_FILES)
    before = _object(stored, SIDE_FILES)
    # One that is read only once a process is described here.
    now = {**stamps([folder / name for name in before if name not in now], folder), **now}
    return sorted(name for name, stamp in before.items() if now.get(name) != stamp)


def _object(fingerprint: Mapping[str, str], part: str) -> dict[str, str]:
    try:
        read = json.loads(fingerprint.get(part, "{}"))
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def compare(stored: Mapping[str, str], wanted: Mapping[str, str], path: str, folder: Path) -> None:
    """Refuse a store that belongs to another run, naming what differs.

    Args:
        stored: the fingerprint in the store.
        wanted: that of this run.
        path: of the store.
        folder: of the config, which the names of side files are relative to.

    Raises:
        InfluenceError: naming every part that differs.
    """
    different = differing(stored, wanted)
    files = changed_side_files(stored, wanted, folder)
    if not different and not files:
        return
    said = []
    for name in different:
        readable = name in ("basis", "seed", "precision", "store_dtype", "versions", "loss")
        said.append(
            f"{MEANING[name]} ({stored.get(name)} in the store, {wanted.get(name)} now)" if readable else MEANING[name]
        )
    if files:
        said.append(f"{'a file' if len(files) == 1 else 'files'} that the code of the data set reads ({few(files)})")
    grown = "; a store grows by itself only if the new images come after all old ones" if "count" in different else ""
    raise InfluenceError(
        f"{path} belongs to another run; what differs: {'; '.join(said)}",
        "keep it and write another one: -s gradients.store=OTHER.h5, or replace it: influence gradients --overwrite"
        + grown,
    )
