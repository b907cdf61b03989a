"""Does a store still describe this model and this data? Checks beyond the hashes of weights and labels.

A few examples, spread over the classes and over the set, are run forward and compared with what the store holds, by
every command. Where the user's code differs from the code that made the store, or nobody can tell, the gradients of
some of them are compared too. A store whose numbers all agree is used, and remembers the new code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.choice import Choice
from influence_cli.curvature.coordinates import Basis, coordinates
from influence_cli.data.batches import Batch, read_batches
from influence_cli.data.split import spread, take
from influence_cli.errors import InfluenceError, counted
from influence_cli.model.data_fingerprint import FILES, with_contents
from influence_cli.model.network import evaluate
from influence_cli.model.task import Task, measure_loading
from influence_cli.precompute.fingerprint import CODE, SIDE_FILES, Drift, code_drift
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.store import READ, Store

# Examples whose outputs and losses are compared, by every command and by --fsck; and whose gradients are.
EXAMPLES, MANY, GRADIENTS = 24, 256, 4
# The largest relative difference between two runs of the same code on two devices; by an edit that changes nothing.
SAME_CODE, EDITED = 1e-2, 1e-3
# Of gradients, relative to their norm; of those from a pass that is not in float32.
ALIKE, ROUGH = 1e-2, 0.1
REMEDY = (
    "influence gradients --overwrite rebuilds the store; to keep it, write another one: -s gradients.store=OTHER.h5"
)


def check_code(
    task: Task,
    choice: Choice,
    path: Path,
    wanted: Mapping[str, str],
    basis: Callable[[], Basis],
    terminal: Terminal,
    *,
    thorough: bool = False,
    without: np.ndarray | None = None,
) -> None:
    """Compare outputs, losses and, where the code differs, gradients of some examples with those of the store.

    Args:
        task: model and data.
        choice: the curvature, and the parameters that count.
        path: the store.
        wanted: its fingerprint for this run.
        basis: opens the basis of its coordinates.
        terminal: told what was compared, where the code differs or ``thorough`` is set.
        thorough: compare more examples, and their gradients in any case.
        without: blocks that are known to be damaged.

    Raises:
        InfluenceError: a number differs, or no example can be compared.
    """
    with Store.open(path) as store:
        drift = code_drift(store.fingerprint | store.settled, wanted)
        rows = _spread_rows(task, store, MANY if thorough else EXAMPLES, without)
        if not len(rows):
            return  # nothing has been computed with any code
        # Not the positions in the store, which may be damaged: those of this run are known to be the same.
        positions = task.train.indices[rows]
        batch = next(read_batches(task.train, positions, len(rows)))
        rows = rows[np.isin(positions, batch.indices)]
        _say_unreadable(path, batch, drift, terminal)
        difference = _first_difference(choice, store, rows, batch, drift)
        if difference is None and (drift or thorough):
            difference = _first_gradient(choice, store, rows, batch, basis())
        if difference is not None:
            row, text = difference
            block = row // store.layout.block
            if len(store.damaged(np.array([block]))):
                raise InfluenceError(f"{path}: block {block} is damaged", "influence gradients --repair recomputes it")
            title = task.train.title(int(task.train.indices[row]))
            if not drift and _inputs_changed(task, store, block):
                raise InfluenceError(
                    f"{path} was made from other examples: {title}, or one beside it, is read differently now",
                    "influence gradients --fsck finds them all, and --repair computes them again",
                )
            raise _changed(path, drift, f"the {text} of {title}")
    compared = (
        f"outputs and losses of {counted(len(batch), 'example')} spread over the classes are the same, and so are the "
        f"gradients of {min(GRADIENTS, len(batch))} of them"
    )
    if drift.unknown:
        terminal.say(f"{path}: whether the code has changed is unknown, since {drift.unknown}; {compared}")
    elif drift:
        terminal.say(f"{path}: {drift.what} changed since the store was made; {compared}")
    elif thorough:
        terminal.say(f"{path}: {compared}")
    if drift:
        _remember(path, wanted)


def _spread_rows(task: Task, store: Store, count: int, without: np.ndarray | None) -> np.ndarray:
    """Choose rows of finished blocks over the classes and over the set."""
    sound = store.done()
    if without is not None:
        sound[without] = False
    rows = np.flatnonzero(np.repeat(sound, store.layout.block)[: store.layout.n] & (store.column("state") == READ))
    indices = task.train.indices[rows]
    return rows[np.isin(indices, spread(take(task.train, indices), count))] if len(rows) else rows


def _inputs_changed(task: Task, store: Store, block: int) -> bool:
    indices = task.train.indices[store.layout.rows(block)]
    return next(read_batches(task.train, indices, len(indices))).digest() != int(store.digests()[block])


def _say_unreadable(path: Path, batch: Batch, drift: Drift, terminal: Terminal) -> None:
    """Say which examples cannot be compared; refuse the store if that is so of all."""
    if not batch.unreadable:
        return
    count, reason = len(batch.unreadable), batch.unreadable[0][1]
    if not len(batch):
        raise InfluenceError(
            f"{path} cannot be compared with this model: none of {counted(count, 'example')} can be read now: {reason}",
            "make the examples readable again; " + REMEDY,
        )
    changed = f", though {drift.what} changed" if drift.changed or drift.files else ""
    terminal.warn(f"{path}: {counted(count, 'example')} could not be compared with the store{changed}: {reason}")


def _first_difference(
    choice: Choice, store: Store, rows: np.ndarray, batch: Batch, drift: Drift
) -> tuple[int, str] | None:
    """Compare outputs and losses; give the row with the largest difference, and what differs."""
    size = int(store.facts["batch"])
    pieces = [
        evaluate(choice.network, batch.inputs[start : start + size], batch.labels[start : start + size])
        for start in range(0, len(batch), size)
    ]
    edited = bool(drift) and choice.network.precision == "float32"
    for column, name in ((1, "outputs"), (0, "losses")):
        now = torch.cat([piece[column].float().cpu() for piece in pieces])
        then = torch.from_numpy(_column(store, name, rows))
        far = _distance(now, then, EDITED if edited else SAME_CODE)
        if bool((far > 1).any()):
            at = int(far.argmax())
            shown = f" ({float(then[at]):.4g} in the store, {float(now[at]):.4g} now)" if name == "losses" else ""
            return int(rows[at]), f"loss{shown}" if shown else "output"
    return None


def _column(store: Store, name: str, rows: np.ndarray) -> np.ndarray:
    """Read a few rows of a column: with a thousand classes all of them would fill the memory."""
    return np.concatenate([store.column(name, slice(row, row + 1)) for row in rows.tolist()])


def _distance(now: Tensor, then: Tensor, relative: float) -> Tensor:
    """Give the largest difference of each row in units of what is allowed; not finite counts as infinitely far."""
    allowed = relative * then.abs() + 0.1 * relative * float(then.abs().max()) + 1e-6
    return ((now - then).abs() / allowed).nan_to_num(nan=torch.inf).reshape(len(now), -1).amax(dim=1)


def _first_gradient(
    choice: Choice, store: Store, rows: np.ndarray, batch: Batch, basis: Basis
) -> tuple[int, str] | None:
    """Compare the coordinates of a few examples; give the first row that differs."""
    if not store.layout.k:
        return None
    some = np.unique(np.linspace(0, len(rows) - 1, min(GRADIENTS, len(rows))).astype(np.int64))
    then = torch.from_numpy(store.some_rows(rows[some].tolist()))
    allowed = ALIKE if choice.network.precision == "float32" else ROUGH
    for at, stored in zip(some.tolist(), then, strict=True):
        one = slice(at, at + 1)
        now = coordinates(choice.network, basis, batch.inputs[one], batch.targets[one])[0][0].float().cpu()
        rounding = float(stored.abs().max()) / 127 * len(stored) ** 0.5 if store.layout.dtype == "int8" else 0.0
        if not float((now - stored).norm()) <= allowed * float(stored.norm()) + rounding + 1e-6:
            return int(rows[at]), "gradient"
    return None


def _changed(path: Path, drift: Drift, what: str) -> InfluenceError:
    if drift.changed or drift.files:
        return InfluenceError(
            f"{path} belongs to another model: {drift.what} changed since the store was made, and {what} is different "
            "now, though the weights are the same",
            REMEDY,
        )
    if drift.unknown:
        because = f"was the code of the model, the loss or the data edited? That is unknown, since {drift.unknown}; "
    else:
        because = "no source file of the project has changed: is it a package, or the device? "
    return InfluenceError(
        f"{path} belongs to another model: {what} is different now, though the weights are the same", because + REMEDY
    )


def known_files(
    task: Task, path: Path, wanted: Mapping[str, str], terminal: Terminal, *, fresh: bool
) -> dict[str, str]:
    """Compare what the training files hold with the store's, where their times differ.

    Args:
        task: its training examples.
        path: the store, which need not be there.
        wanted: its fingerprint for this run.
        terminal: told where other times are of no account.
        fresh: the store is made anew, whatever is there.

    Returns:
        The fingerprint with the contents of the files, and with the store's times where these hold the same.
    """
    recorded: dict[str, str] = {}
    if path.exists() and not fresh:
        with contextlib.suppress(InfluenceError), Store.open(path, rows=False) as store:
            recorded = store.fingerprint | store.settled
        if not recorded:
            return dict(wanted)  # in use or damaged: opening it for its rows reports that
    known = with_contents(wanted, recorded, task.train)
    if known.get(FILES) == wanted.get(FILES):
        return known
    terminal.say(f"{path}: the training files have other times of change than then, and the same contents")
    with contextlib.suppress(InfluenceError, OSError), Store.open(path, write=True, rows=False) as store:
        store.settle({FILES: wanted[FILES]})
        return {**known, FILES: wanted[FILES]}
    return known


def _remember(path: Path, wanted: Mapping[str, str]) -> None:
    """Write the code's hash into the store; without it the next command compares the numbers again."""
    parts = {name: wanted[name] for name in (CODE, SIDE_FILES, "transform") if name in wanted}
    with contextlib.suppress(InfluenceError, OSError), Store.open(path, write=True, rows=False) as store:
        store.settle(parts)


def changed_blocks(task: Task, path: Path, terminal: Terminal) -> np.ndarray:
    """Read every example again and list the blocks whose inputs have changed."""
    with Store.open(path) as store:
        layout, digests = store.layout, store.digests()
        done = np.flatnonzero(store.done())
    if not len(done):
        return np.empty(0, dtype=np.int64)
    order = np.concatenate([task.train.indices[layout.rows(int(block))] for block in done])
    changed = []
    with terminal.progress(len(order), "comparing inputs") as advance:
        measure_loading(task, terminal)
        for block, batch in zip(done, read_batches(task.train, order, layout.block, task.loading), strict=True):
            if batch.digest() != int(digests[block]):
                changed.append(block)
            advance(layout.block)
    return np.array(changed, dtype=np.int64)
