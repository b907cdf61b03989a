"""influence gradients."""

from __future__ import annotations

from typing import Annotated

import typer

from influence_cli.commands.options import (
    DEFAULT_CONFIG,
    ConfigFile,
    Precision,
    Quiet,
    Set,
    SkipUnreadable,
    Verbose,
    with_precision,
)


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make the store anew.")] = False,
    fsck: Annotated[
        bool,
        typer.Option("--fsck", help="Verify every checksum, and every example against what the store was made of."),
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Compute damaged blocks again.")] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Then merge the shards that several processes have written into one file.")
    ] = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fill the store of training gradients; goes on after a kill.

    The size and the time are announced before anything is written. A store that is complete is left as it is; of one
    whose training set has grown at its end, the new rows are computed. Started by torchrun, several processes share
    the work, and the store lies in shards.

    Examples:

      influence gradients

      influence gradients --fsck --repair

      torchrun --nproc-per-node 2 -m influence_cli gradients

      influence gradients --compact
    """
    from influence_cli.commands.session import begin, load
    from influence_cli.runtime import distributed

    session = begin(config, with_precision(set_, precision), quiet=quiet, verbose=verbose, rows=False)
    from influence_cli.errors import human_bytes
    from influence_cli.precompute.prepare import prepare_all
    from influence_cli.store.compact import compact as merge
    from influence_cli.store.store import Store

    stores = prepare_all(
        session.config,
        load(session),
        session.terminal,
        overwrite=overwrite,
        skip_unreadable=skip_unreadable,
        fsck=fsck,
        repair=repair,
    )
    distributed.dissolve()
    for prepared in stores:
        if compact:
            merge(prepared.path, session.terminal)
        with Store.open(prepared.path) as store:
            parts = f" in {len(store.shards)} shards" if store.shards else ""
            session.terminal.say(f"{prepared.path} is complete ({human_bytes(store.size())}{parts})")
    if fsck:
        session.terminal.say("every checksum and every example fits")
    session.terminal.say("next: influence rank misclassified, or influence mislabels")
