"""The progress of a curvature fit on disk: one safetensors file next to the store, always replaced as a whole.

A kill loses what was done since the last save, Ctrl-C the batch in hand; a file that is truncated or changed is not
used.
"""

from __future__ import annotations

import glob
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from influence_cli.curvature.progress import Progress
from influence_cli.errors import InfluenceError, Stopped
from influence_cli.runtime import disk, distributed
from influence_cli.runtime.terminal import Terminal

# Seconds between two saves of an unfinished fit.
SAVE_EVERY = 30.0


def fit_path(store: Path) -> Path:
    """Name the file of a store's unfinished fit; each of several processes has its own."""
    suffix = f".{distributed.rank()}-of-{distributed.size()}" if distributed.size() > 1 else ""
    return store.with_name(f"{store.name}.fit{suffix}")


def fit_files(store: Path) -> list[Path]:
    """List the files of a store's unfinished fits, for any number of processes."""
    return [file for file in store.parent.glob(f"{glob.escape(store.name)}.fit*") if not file.name.endswith(".part")]


def save_progress(path: Path, progress: Progress, fingerprint: Mapping[str, str]) -> None:
    """Write a fit's progress and what it belongs to, replacing what was there.

    Raises:
        InfluenceError: the disk is full or gone; what was there stays.
    """
    arrays = {name: tensor.detach().cpu().contiguous() for name, tensor in progress.arrays.items()}
    header = {
        "stage": progress.stage,
        "done": progress.done,
        "examples": progress.examples,
        "fingerprint": dict(fingerprint),
        "checksums": {name: _digest(tensor) for name, tensor in arrays.items()},
    }
    text = json.dumps(header)
    try:
        with disk.whole(path) as part:
            save_file(arrays, part, metadata={"progress": text, "xxh3": xxhash.xxh3_64_hexdigest(text.encode())})
    except (OSError, SafetensorError) as error:
        need = sum(tensor.nbytes for tensor in arrays.values()) + len(text)
        raise InfluenceError(
            f"{path} cannot be written: {disk.failure(error, disk.part_of(path), need)}",
            "free disk space; if the run is interrupted, work since the last write is lost",
        ) from error


def load_progress(path: Path, fingerprint: Mapping[str, str]) -> Progress | None:
    """Read a fit's progress; None if there is none, or if it is damaged or belongs to another run."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            text = metadata["progress"]
            if metadata["xxh3"] != xxhash.xxh3_64_hexdigest(text.encode()):
                return None
            header = json.loads(text)
            # Copies have torch's alignment, so that matrix products of the same bytes give the same bytes.
            arrays = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
    if header["fingerprint"] != dict(fingerprint) or header["checksums"].keys() != arrays.keys():
        return None
    if any(_digest(tensor) != header["checksums"][name] for name, tensor in arrays.items()):
        return None
    return Progress(header["stage"], header["done"], header["examples"], arrays)


@contextmanager
def saving(path: Path, fingerprint: Mapping[str, str], terminal: Terminal) -> Iterator[Callable[[Progress], None]]:
    """Give what a fit calls after every batch: it saves every SAVE_EVERY seconds, and on Ctrl-C.

    Args:
        path: of the file.
        fingerprint: what the fit belongs to.
        terminal: shows a warning if it cannot be written, which does not stop the fit.

    Raises:
        Stopped: Ctrl-C; finished batches are kept.
    """
    saved = time.monotonic()
    with _waiting() as asked:

        def save(state: Progress) -> None:
            nonlocal saved
            stop = asked()
            if not stop and time.monotonic() - saved <= SAVE_EVERY:
                return
            try:
                save_progress(path, state, fingerprint)
            except InfluenceError as error:
                if stop:
                    raise Stopped(f"{error.message}; work since the last write is lost") from None
                terminal.warn(f"{error.message}; {error.hint}")
            saved = time.monotonic()
            if stop:
                raise Stopped(f"{path}: finished work is kept; run the same command to resume")

        yield save
        if asked():  # after the last batch
            raise KeyboardInterrupt


@contextmanager
def _waiting() -> Iterator[Callable[[], bool]]:
    """Delay Ctrl-C until the batch is finished: half a batch would be saved, and the next run would add it again.

    A second Ctrl-C does not wait, and nothing is saved then.

    Yields:
        A function that says whether Ctrl-C was pressed.
    """
    came = False
    before = signal.getsignal(signal.SIGINT)

    def note(_number: int, _frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    # In other threads, and with another handler of Ctrl-C, it stops at once, without saving.
    ours = threading.current_thread() is threading.main_thread() and before is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


def _digest(tensor: Tensor) -> str:
    state = xxhash.xxh3_64(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    state.update(tensor.reshape(-1).numpy().data if tensor.numel() else b"")
    return state.hexdigest()
