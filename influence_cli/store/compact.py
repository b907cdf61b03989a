"""Merge a store in shards into one file: its blocks are verified and copied; nothing is computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xxhash

from influence_cli.errors import InfluenceError, Stopped, human_bytes
from influence_cli.runtime import disk
from influence_cli.runtime.locks import claim
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.layout import create
from influence_cli.store.shards import remove_orphans
from influence_cli.store.store import Store


def compact(path: Path, terminal: Terminal) -> None:
    """Merge the shards of a complete store into one file, which replaces the main file when it is complete.

    A kill leaves the store unchanged, and the copied part next to it: the next call resumes there.

    Args:
        path: the store's main file.
        terminal: progress, and what was done.

    Raises:
        InfluenceError: it is not complete, damaged, in use, or the disk has no room for a second copy.
        Stopped: Ctrl-C; the store is unchanged.
    """
    with claim(path):
        with Store.open(path) as store:
            if not store.shards:
                terminal.say(f"{path} is already one file")
                return
            store.require_complete()
            merged = _begun(path, store)
            with terminal.progress(store.layout.n, f"merging {len(store.shards)} shards") as advance:
                try:
                    with Store.open(merged, write=True) as whole:
                        for block in np.flatnonzero(~whole.done()).tolist():
                            whole.copy(block, store)
                            rows = store.layout.rows(block)
                            advance(rows.stop - rows.start)
                        if (summary := store.summary()) is not None:
                            whole.write_summary(summary)
                        size = whole.size()
                except KeyboardInterrupt:
                    raise Stopped(f"{path} is unchanged; run the same command to resume") from None
            count = len(store.shards)
        disk.replace(merged, path)
        remove_orphans(path)
    terminal.say(f"merged {count:,} shards into {path} ({human_bytes(size)})")


def _begun(path: Path, store: Store) -> Path:
    """Give the file for the copies: one that an earlier call started for the same store, or a new one."""
    merged = path.with_name(path.name + ".merged")
    # The same rows have the same bytes in any shards.
    origin = {"merged_from": xxhash.xxh3_64_hexdigest(store.digests().tobytes() + store.checksums().tobytes())}
    if merged.exists():
        try:
            with Store.open(merged) as begun:
                if begun.facts.get("merged_from") == origin["merged_from"] and begun.layout == store.layout:
                    return merged
        except InfluenceError:
            pass  # truncated: it is made again
        disk.remove(merged)
    create(
        merged,
        store.layout,
        fingerprint=store.fingerprint | store.settled,
        facts=store.facts | origin,
        labels=store.column("labels"),
        indices=store.column("indices"),
        arrays={name: values for name in store.names() if (values := store.array(name)) is not None},
    )
    return merged
