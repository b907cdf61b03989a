"""influence index."""

from __future__ import annotations

from influence_cli.commands.options import DEFAULT_CONFIG, ConfigFile, Quiet, Set, SkipUnreadable, Verbose


def command(
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make an index of the store for rank --approximate.

    With the index, rank finds the strongest influences without a scan of all rows. It pays from about a million
    training images, and for a few test images at a time. The index is a file next to the store and is valid for that
    store and its λ only. The command measures what the index finds, compared with the exact scan of 64 random test
    images: half of them choose how wide to search, the other half measure the share of the strongest influences found.

    Needs faiss: pip install 'influence-cli[index]'.

    Examples:

      influence index && influence rank 17 --approximate
    """
    from influence_cli.errors import require_extra
    from influence_cli.results.session import begin, load

    require_extra("faiss", "index", "influence index")
    session = begin(config, set_, quiet=quiet, verbose=verbose, rows=False)
    from influence_cli.influence.ensemble import make_closed_forms, refuse_source
    from influence_cli.precompute.prepare import prepare_all
    from influence_cli.ranking.index_build import build_indexes
    from influence_cli.ranking.index_search import check_method

    check_method(session.config.curvature.method, "influence index")
    refuse_source(session.config.model.ensemble, "influence index", "a row has no preconditioner of its own")
    stores = prepare_all(session.config, load(session), session.terminal, skip_unreadable=skip_unreadable)
    inverses = make_closed_forms(stores, session.terminal)
    build_indexes(stores, inverses, terminal=session.terminal, skip_unreadable=skip_unreadable)
    session.terminal.say("next: influence rank 17 --approximate")
