"""What ``--reviewed`` and ``--sample`` add to `influence mislabels`: decisions that teach, and a random sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from influence_cli.errors import InfluenceError, near_path, typed_path
from influence_cli.results.label_records import EvidenceRecord
from influence_cli.runtime.outputs import run_file

if TYPE_CHECKING:
    from influence_cli.data.split import Split
    from influence_cli.mislabels.find import Mislabels
    from influence_cli.mislabels.sample import Sample
    from influence_cli.mislabels.teaching import Taught
    from influence_cli.relabel.reviewed import Reviewed
    from influence_cli.results.run import Session

ReviewedOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--reviewed",
        metavar="FILE",
        help="Decisions so far (decisions.csv of the page, or a folder of them; repeatable): the list learns of them.",
    ),
]
SampleOption = Annotated[
    str | None,
    typer.Option(
        "--sample",
        metavar="N|RUN.json",
        help="Add N images drawn at random to the page; with the run file of that run: count the wrong labels by the "
        "decisions on them.",
    ),
]


@dataclass(frozen=True)
class DecidedOptions:
    """The two options, read and checked as far as that goes without the data set.

    Attributes:
        files: of ``--reviewed``.
        draw: how many images ``--sample N`` draws, or None.
        drawn: the run file of ``--sample FILE``, or None.
    """

    files: tuple[Path, ...] = ()
    draw: int | None = None
    drawn: Path | None = None


def decided_options(
    reviewed: Sequence[Path] | None,
    sample: str | None,
    signal: str,
    *,
    output: Path | None,
    report: Path | None,
    truth: Path | None,
) -> DecidedOptions:
    """Read ``--reviewed`` and ``--sample``.

    Raises:
        InfluenceError: a file that is not there, a number that is too small, or an option that either of them needs.
    """
    from influence_cli.mislabels.sample import SMALLEST
    from influence_cli.mislabels.signals import PROBABILITY_SIGNALS
    from influence_cli.relabel.reviewed import reviewed_files

    files = reviewed_files(reviewed or ())
    if files and signal not in PROBABILITY_SIGNALS and ":" not in signal:
        raise InfluenceError(
            f"--reviewed teaches the evidence, and --signal {signal} uses none",
            f"known: {', '.join(PROBABILITY_SIGNALS)}",
        )
    if files and truth is not None:
        raise InfluenceError(
            "--reviewed cannot be combined with --truth: decided labels are no longer those that the truth is about",
            "leave one of them out",
        )
    if sample is None:
        return DecidedOptions(files)
    if not sample.isdecimal():
        path = Path(sample)
        if not path.is_file():
            raise InfluenceError(
                f"--sample {sample}: neither a number nor a run file",
                "--sample 100 draws 100 images; --sample FILE.run.json reads the draw of an earlier run",
            )
        return DecidedOptions(files, drawn=path)
    if int(sample) < SMALLEST:
        raise InfluenceError(
            f"--sample {sample}: too few to say how many labels are wrong", f"draw {SMALLEST} at least; 100 is usual"
        )
    for option, file in (("--report FILE.html, where the images are decided", report), ("-o FILE", output)):
        if file is None:
            raise InfluenceError(
                f"--sample {sample} needs {option}" + ("" if report is None else ": FILE.run.json keeps the draw"),
                f"influence mislabels --sample {sample} --report labels.html -o suspects.csv",
            )
    return DecidedOptions(files, draw=int(sample))


@dataclass(frozen=True)
class Decided:
    """What a person has decided about the labels of a split, and the sample that some of it is about.

    Attributes:
        reviewed: the decisions.
        taught: the same by position; None where there are none.
        sample: an earlier draw, or None.
        draw: how many images are to be drawn, or None.
    """

    reviewed: Reviewed | None = None
    taught: Taught | None = None
    sample: Sample | None = None
    draw: int | None = None


def read_decided(session: Session, options: DecidedOptions, split: Split, classes: tuple[str, ...], on: str) -> Decided:
    """Read the decisions and the draw, and check that they fit the data set and each other.

    Raises:
        InfluenceError: at the first row that does not fit.
    """
    from influence_cli.mislabels.sample_file import read_sample
    from influence_cli.relabel.reviewed import read_reviewed

    sample = None if options.drawn is None else read_sample(options.drawn, split, classes)
    if not options.files:
        return Decided(sample=sample, draw=options.draw)
    section = session.config.train if on == "train" else session.config.test
    labels, exclude = (
        session.config.where(on, key) if getattr(section, key, None) is not None else ""
        for key in ("labels", "exclude")
    )
    reviewed = read_reviewed(options.files, split, classes, session.config.folder, places=(labels, exclude))
    if sample is not None:
        _refuse_changed(sample, reviewed, classes)
    taught = taught_by(reviewed, split)
    _tell_empty(session, reviewed, taught, split, classes)
    return Decided(reviewed, taught, sample, options.draw)


def taught_by(reviewed: Reviewed, split: Split) -> Taught:
    """Spread decisions over the positions of a split."""
    import numpy as np

    from influence_cli.mislabels.teaching import Taught

    given, labels = split.labels.copy(), split.labels.copy()
    decided, left_out = np.zeros((2, len(given)), dtype=bool)
    wrong = np.full(len(given), np.nan)
    for row in reviewed.rows:
        decided[row.index], given[row.index] = True, row.label
        labels[row.index] = row.label if row.new_label is None else row.new_label
        left_out[row.index] = row.decision in ("drop", "unsure")
        if row.decision != "unsure":
            wrong[row.index] = row.decision != "keep"
    return Taught(decided, given, labels, wrong, left_out)


def _refuse_changed(sample: Sample, reviewed: Reviewed, classes: Sequence[str]) -> None:
    """Refuse a decision about an image of the sample that had another label when it was drawn."""
    drawn = dict(zip(sample.drawn.tolist(), sample.labels.tolist(), strict=True))
    for row in reviewed.rows:
        label = drawn.get(row.index, row.label)
        if label != row.label:
            raise InfluenceError(
                f"{reviewed.place(row.index)}: index {row.index} is labelled {classes[row.label]}, but was "
                f"{classes[label]} when the sample was drawn",
                "draw a new sample: --sample 100",
            )


def _tell_empty(session: Session, reviewed: Reviewed, taught: Taught, split: Split, classes: Sequence[str]) -> None:
    """Name classes of which the decisions leave no image, by the last row that took one; refuse one class alone."""
    import numpy as np

    left = split.indices[~taught.left_out[split.indices]]
    after = np.bincount(taught.labels[left], minlength=len(classes))
    emptied = [
        (name, [row for row in reviewed.rows if row.label == number and row.decision in ("relabel", "drop")])
        for number, name in enumerate(classes)
        if not after[number]
    ]
    texts = [
        f"{reviewed.place(rows[-1].index)}: no image is left of the class {name}" for name, rows in emptied if rows
    ]
    if (after > 0).sum() < 2:
        raise InfluenceError(
            texts[0] if texts else f"{near_path(reviewed.files[0])}: no image is left after the decisions",
            "mislabels needs two classes or more; influence relabel applies the decisions",
        )
    for text in texts:
        session.terminal.warn(f"{text} after the decisions")


def note_decided(
    session: Session, result: Mislabels, decided: Decided, split: Split, classes: tuple[str, ...]
) -> Mislabels:
    """Draw the sample that was asked for, or estimate from the decisions on an earlier one; note all for the run."""
    import numpy as np

    from influence_cli.mislabels.sample import Listed, draw_sample, estimate
    from influence_cli.mislabels.sample_file import sample_facts
    from influence_cli.pages.wrong_labels import reviewed_record, sampled_record

    sample, sampled = decided.sample, None
    if decided.draw is not None:
        rows = np.sort(result.order)
        if not len(rows):
            raise InfluenceError(f"--sample {decided.draw}: every label is decided", "there is nothing left to draw")
        sample = draw_sample(
            Listed(
                result.facts.indices[rows],
                result.facts.labels[rows],
                result.score[rows],
                None if result.noise is None else result.noise.wrong[rows],
            ),
            decided.draw,
            split,
            classes,
            before=np.empty(0, dtype=np.int64) if decided.taught is None else np.flatnonzero(decided.taught.decided),
            seed=session.config.seed,
        )
    elif sample is not None and decided.taught is not None:
        if np.isnan(decided.taught.wrong[sample.drawn]).all():
            raise InfluenceError(
                f"none of the {len(sample.drawn):,} images of the sample is decided by --reviewed",
                "decide them on the page of the run that drew them, and export decisions.csv",
            )
        sampled = estimate(sample, decided.taught.wrong)
    if sample is not None:
        session.run.sample = sample_facts(sample)
    result = replace(result, sample=sample, sampled=sampled)
    session.run.reviewed = reviewed_record(result, decided.reviewed.files if decided.reviewed is not None else ())
    session.run.sampled = sampled_record(result, classes)
    session.run.scores = result.scores
    session.run.evidence = EvidenceRecord(result.evidence.summary, result.evidence.memorised)
    return result


def say_next(session: Session, result: Mislabels) -> None:
    """Say how the decisions on a sample become a number."""
    if result.sample is not None and result.sampled is None and session.output is not None:
        session.terminal.say(
            f"next: decide the {len(result.sample.drawn):,} images drawn at random on the page and export them; then "
            f"influence mislabels --reviewed decisions.csv --sample {typed_path(run_file(session.output))}"
        )
