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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the store by a new one.")] = False,
    fsck: Annotated[
        bool,
        typer.Option(
            "--fsck",
            help="Verify every checksum, that every example is still the one that the store was made from, and on a "
            "sample that the code still gives its numbers.",
        ),
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Compute the damaged blocks again.")] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Afterwards merge the shards of several processes into one file.")
    ] = False,
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compute the training gradients and keep them in the store.

    The command first prints how large the store becomes and how long it takes. After a kill, run it again: it resumes.
    A complete store is left as it is. If examples were added at the end of the training set, only their rows are
    computed. Under torchrun several processes share the work, and the store consists of shards.

    Examples:

      influence gradients

      influence gradients --fsck --repair

      torchrun --nproc-per-node 2 -m influence_cli gradients

      influence gradients --compact
    """
    from influence_cli.results.session import begin, load
    from influence_cli.runtime import distributed

    session = begin(config, with_precision(set_, precision), quiet=quiet, verbose=verbose, rows=False)
    from influence_cli.errors import human_bytes
    from influence_cli.precompute.prepare import Upkeep, prepare_all
    from influence_cli.replay.prepare import refuse_replay
    from influence_cli.store.compact import compact as merge
    from influence_cli.store.store import Store

    refuse_replay(
        session.config,
        "influence gradients fills a store",
        "influence rank needs none; for another method: -s curvature.method=auto",
    )
    stores = prepare_all(
        session.config,
        load(session),
        session.terminal,
        upkeep=Upkeep(overwrite=overwrite, fsck=fsck, repair=repair),
        skip_unreadable=skip_unreadable,
    )
    distributed.dissolve()
    for prepared in stores:
        if compact:
            merge(prepared.path, session.terminal)
        with Store.open(prepared.path) as store:
            parts = f" in {len(store.shards)} shards" if store.shards else ""
            session.terminal.say(f"{prepared.path} is complete ({human_bytes(store.size())}{parts})")
    if fsck:
        session.terminal.say("every checksum is right and every example is unchanged")
    session.terminal.say("next: influence rank misclassified, or influence mislabels")
