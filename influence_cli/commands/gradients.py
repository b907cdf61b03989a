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
    precision: Precision = None,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Fill the store of training gradients; goes on after a kill.

    The size and the time are announced before anything is written. A store that is complete is left as it is.

    Examples:

      influence gradients

      influence gradients --fsck --repair
    """
    from influence_cli.commands.session import begin, load

    session = begin(config, with_precision(set_, precision), quiet=quiet, verbose=verbose, rows=False)
    from influence_cli.errors import human_bytes
    from influence_cli.precompute import prepare_all

    stores = prepare_all(
        session.config,
        load(session),
        session.terminal,
        overwrite=overwrite,
        skip_unreadable=skip_unreadable,
        fsck=fsck,
        repair=repair,
    )
    for prepared in stores:
        session.terminal.say(f"{prepared.path} is complete ({human_bytes(prepared.path.stat().st_size)})")
    if fsck:
        session.terminal.say("every checksum and every example fits")
    session.terminal.say("next: influence rank misclassified, or influence mislabels")
