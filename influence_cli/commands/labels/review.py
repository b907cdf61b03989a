"""influence review."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.commands.options import DEFAULT_CONFIG, ConfigFile, Quiet, Set, SkipUnreadable, Verbose
from influence_cli.errors import InfluenceError, counted, near_path, require_extra, typed_path

if TYPE_CHECKING:
    from influence_cli.data.split import Split
    from influence_cli.results.run import Session
    from influence_cli.review.ledger import Ledger
    from influence_cli.review.suspects import Suspect

# Beside the config: thumbnails, which can be deleted at any time.
THUMBNAILS = ".influence-thumbnails"


def command(
    result: Annotated[
        Path | None,
        typer.Argument(
            metavar="RESULT", help="What influence mislabels -o FILE wrote. Default: the labels are judged now."
        ),
    ] = None,
    config: ConfigFile = DEFAULT_CONFIG,
    set_: Set = None,
    on: Annotated[str, typer.Option("--on", metavar="train|test", help="Which labels to decide on.")] = "train",
    decisions: Annotated[
        Path | None,
        typer.Option(
            "--decisions",
            metavar="FILE.csv",
            help="Where the decisions are kept. Default: decisions.csv next to the config (--on test: "
            "test-decisions.csv).",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=1, max=65_535, metavar="N", help="The port, or else the next free one.")
    ] = 8750,
    skip_unreadable: SkipUnreadable = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Decide on suspicious labels in the browser: a desk for any number of them.

    It serves the images of the data set on this computer alone, at an address with a secret part. Every decision is
    written to decisions.csv, with who and when, at the moment it is made. influence relabel reads that file. Ctrl-C
    ends it. Needs starlette and uvicorn: pip install 'influence-cli[review]'.

    Examples:

      influence review

      influence mislabels --all -o suspects.csv && influence review suspects.csv

      influence review suspects.csv --decisions second-round.csv --port 9000
    """
    from influence_cli.results.session import begin

    for package in ("starlette", "uvicorn"):
        require_extra(package, "review", "influence review")
    if on not in ("train", "test"):
        raise InfluenceError(f"--on {on}: there is no such set", "known: train, test")
    if result is not None and not result.is_file():
        raise InfluenceError(f"{result}: there is no such file", "write one with influence mislabels --all -o FILE")
    if decisions is not None and decisions.suffix != ".csv":
        raise InfluenceError(
            f"{decisions}: decisions must be a .csv file", f"name it {decisions.with_suffix('.csv').name}"
        )
    session = begin(config, set_, quiet=quiet, verbose=verbose, rows=False)
    file = decisions or session.config.folder / f"{'' if on == 'train' else 'test-'}decisions.csv"
    with session.terminal.status("loading data"):
        ledger = _ledger(session, on, file)
    if result is not None:
        from influence_cli.review.suspects import read_suspects

        suspects = read_suspects(result, ledger.split, ledger.classes, on)
    else:
        suspects = _judged(session, on, ledger, skip=skip_unreadable)
    _serve(session, suspects, ledger, port)
    _say_next(session, ledger, result, on)


def _ledger(session: Session, on: str, file: Path) -> Ledger:
    from influence_cli.relabel.labels import labelled_split
    from influence_cli.review.ledger import open_ledger

    split, classes, _, places = labelled_split(session.config, on)
    try:
        return open_ledger(file, split, tuple(classes), session.config.folder, places=places)
    except InfluenceError as error:
        if not file.is_file():
            raise
        raise InfluenceError(error.message, f"{error.hint}; or begin another file: --decisions FILE.csv") from error


def _judged(session: Session, on: str, ledger: Ledger, *, skip: bool) -> tuple[Suspect, ...]:
    """Judge the labels as `influence mislabels` does without options."""
    from influence_cli.mislabels.find import find_mislabels
    from influence_cli.results.session import load
    from influence_cli.review.suspects import judged_suspects

    tasks = load(session)
    judged: Split = tasks[0].train if on == "train" else tasks[0].labelled_tests()
    found = find_mislabels(tasks, on=on, terminal=session.terminal, skip_unreadable=skip)
    # Names can come from the checkpoint; the file of decisions has those of the data set, where it has as many.
    names = (*ledger.classes, *tasks[0].classes[len(ledger.classes) :])
    return judged_suspects(found, judged, names, ledger.classes)


def _serve(session: Session, suspects: tuple[Suspect, ...], ledger: Ledger, port: int) -> None:
    from influence_cli.pages.mislabels import desk_key
    from influence_cli.results.run import command_line
    from influence_cli.review.app import Served
    from influence_cli.review.desk_page import desk_page
    from influence_cli.review.photos import Photos
    from influence_cli.review.serve import serve

    say, split = session.terminal.say, ledger.split
    key = desk_key(split, ledger.classes)
    page, cards = desk_page(suspects, split, ledger.classes, key, command_line(), ledger.path.name)
    photos = Photos(split, session.config.folder / THUMBNAILS, key)

    def ready(address: str, opened: int) -> None:
        if opened != port:
            say(f"port {port} is in use: serving on {opened}")
        say(f"{counted(len(suspects), 'label')} to review, {len(ledger.rows):,} decided in {near_path(ledger.path)}")
        if not suspects[0].neighbours:
            say("without similar images: the result does not name them (write it again with influence mislabels -o)")
        if not ledger.writes:
            session.terminal.warn(
                f"{near_path(ledger.path)} is open in another influence review: this one only shows it"
            )
        # Also with --quiet: without the address there is nothing to open.
        session.terminal.console.print(f"open {address}", markup=False, highlight=False, soft_wrap=True)
        say("Ctrl-C ends it; every decision is on disk at once")

    serve(Served(page, cards, len(suspects), photos, ledger), port, ready)


def _say_next(session: Session, ledger: Ledger, result: Path | None, on: str) -> None:
    say, (_, rows) = session.terminal.say, ledger.state()
    say(f"{counted(len(rows), 'decision')} in {near_path(ledger.path)}")
    where = "" if on == "train" else f" --on {on}"
    if any(row.decision in ("relabel", "drop") for row in rows.values()):
        say(f"next: influence relabel {typed_path(ledger.path)}{where}")
    else:
        say(f"next: influence review{'' if result is None else f' {typed_path(result)}'}{where} goes on")
