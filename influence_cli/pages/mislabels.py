"""From suspicious labels to a page: tables, a chart, the gallery. report/html.py draws it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from influence_cli.data.split import Split, rows_of
from influence_cli.errors import counted
from influence_cli.mislabels.find import Mislabels
from influence_cli.mislabels.noise import Noise
from influence_cli.model.task import Task
from influence_cli.pages.damping_sweep import sweep_parts
from influence_cli.pages.parts import config_text, example_thumbnail, path_fact, sentence
from influence_cli.pages.wrong_labels import class_table, wrong_label_lines
from influence_cli.precompute.prepared import Prepared
from influence_cli.report.charts import Chart, histogram, recovery_chart
from influence_cli.report.html import Card, CardRow, Desk, Neighbour, Page, PageTable, Review, Section
from influence_cli.results.label_records import (
    ConfusedClasses,
    DataIssuesRecord,
    ExpectedPrecision,
    NamedExample,
    NoiseRecord,
    WrongLabels,
)
from influence_cli.results.run import command_line

if TYPE_CHECKING:
    from influence_cli.results.run import Session

# Of --page-size, in MB, and what a card's own text and the rest of the page take of it at most, in bytes.
PAGE_SIZE = 25.0
CARD_TEXT, REST = 3_000, 200_000
# Of the longer side of a suspect's photo, in pixels.
PHOTO = 320
# Duplicate pairs, unusual images and pairs of classes on one page.
SHOWN = 20
# Classes of which the run file has the whole table of given and true labels; of more it has the pairs alone.
JOINT = 1_000
# Similar images shown next to each one.
NEIGHBOURS = 5

# What the score of a signal is; nothing for the default, whose score the reader only needs to compare.
_SIGNAL_MEANING = {
    "combined": "",
    "readout": "how unlikely the label is according to a linear readout of all layers that has not seen it.",
    "neighbours": "how unlikely the label is according to the labels of the most similar images.",
    "logistic": "how unlikely the label is according to a logistic readout that has not seen it (to first order).",
    "pred-probs": "how unlikely the label is according to the probabilities of the given file.",
    "loss": "the model's loss on the given label.",
    "margin": "the probability of the best other class minus that of the given label.",
    "trajectory": "the margin of the best other class over the given label, by the probabilities averaged over the "
    "checkpoints of the run.",
    "self-influence": "the estimated rise of an example's own loss if it were removed from training. "
    "A large value means that the model knows this label from this example alone.",
    "gradient-norm": "the norm of the example's gradient.",
    "tracin": "the squared norm of the example's gradient, mean over the checkpoints.",
    "test-influence": "the estimated fall of the mean test loss if the example were removed. "
    "A large value means that the example is harmful on average.",
}

# The same of the features of another network.
_FEATURES_MEANING = {
    "readout": "how unlikely the label is according to a linear readout, without it, of the features of {name}.",
    "neighbours": "how unlikely the label is according to the labels of the most similar images by {name}.",
    "probabilities": "how unlikely the label is according to the probabilities of {name}.",
}


def _meaning_of(signal: str) -> str:
    kind, _, name = signal.partition(":")
    return _FEATURES_MEANING[kind].format(name=name) if name else _SIGNAL_MEANING[kind]


def mislabels_page(
    session: Session,
    tasks: Sequence[Task],
    stores: Sequence[Prepared],
    result: Mislabels,
    split: Split,
    count: int,
    signal: str,
    page_size: int = int(PAGE_SIZE * 1e6),
) -> Page:
    """Lay out suspicious labels: tables of quality, noise and classes, the gallery, and other data issues.

    The gallery has the first ``count`` labels, or as many with their pictures as fit into ``page_size`` bytes.
    """
    classes = tasks[0].classes
    issues = _data_issues(result, split, classes)
    room = page_size - REST - sum(_weight(card) for section in issues for row in section.rows for card in row.cards)
    cards = _cards_that_fit(result, split, classes, count, room)
    meaning = [
        "Most suspicious first." + (f" The score is {signal}: {text}" if (text := _meaning_of(signal)) else ""),
        "suggested: the likeliest class"
        + (
            ", judged without the given label."
            if result.log_probabilities and signal not in ("loss", "margin", "trajectory")
            else "."
        ),
        "A high score is a reason to look, not a verdict: rare images with correct labels score high too.",
    ]
    if result.taught is not None:
        meaning.insert(1, "The score is the probability that the label is wrong, by what you have decided so far.")
    lines = wrong_label_lines(result, session.run.reviewed, session.run.sampled)
    meaning[1:1] = [f"{line[:1].upper()}{line[1:]}." for line in lines]
    meaning.append(
        "Decide below with the mouse or the keyboard. This browser keeps your decisions. Export saves decisions.csv; "
        "influence relabel decisions.csv turns it into new labels."
    )
    sections = [
        *_sample(result, split, classes),
        Section("Most suspicious labels", None, (CardRow("", "", cards),)),
        *issues,
    ]
    tables, charts = sweep_parts(session)
    scored = ~np.isnan(result.score)
    return Page(
        title="influence mislabels",
        sentence=sentence(session, tasks, stores, f"{len(result.order):,} {split.name} labels ranked by {signal}"),
        meaning=tuple(meaning),
        classes=_class_table(result, classes),
        sections=tuple(sections),
        histogram=histogram(
            "Scores by label",
            f"score by {signal}",
            result.score[scored],
            result.facts.labels[scored],
            classes,
            (0.0, 1.0),
        ),
        charts=(*_recovery_chart(session, signal), *charts),
        tables=(*_truth_table(session), *class_table(session.run.sampled), *_noise_table(session), *tables),
        notes=(f"The page shows the {len(cards)} most suspicious of {len(result.order):,} examples.",),
        command=command_line(),
        config=config_text(session),
        desk=Desk(desk_key(split, classes), split.name, len(split.labels), tuple(classes)),
    )


def _cards_that_fit(result: Mislabels, split: Split, classes: Sequence[str], count: int, room: int) -> tuple[Card, ...]:
    """Make the cards of the most suspicious labels, until the next one would not fit into so many bytes."""
    cards: list[Card] = []
    for number, row in enumerate(result.order[:count], 1):
        card = _card(result, split, classes, row, number)
        room -= _weight(card)
        if room < 0 and cards:
            break
        cards.append(card)
    return tuple(cards)


def _weight(card: Card) -> int:
    """Count the bytes of a card on the page, with its text and what the desk's script knows of it."""
    names = sum(len(text.encode(errors="surrogatepass")) for text in (card.title, card.alt, card.group))
    named = 6 * names + sum(4 * len(value.encode(errors="surrogatepass")) for _, value in card.facts)
    return card.weight(own=True) + card.weight(own=False) + CARD_TEXT + named


def desk_key(split: Split, classes: Sequence[str]) -> str:
    """Name a data set and its labels: pages share their decisions until a label changes."""
    state = xxhash.xxh3_128("\0".join((split.name, *classes)).encode(errors="surrogatepass"))
    state.update(split.labels.tobytes())
    # Relative to the folder that all files are in: moving the whole project changes nothing.
    root = os.path.commonpath([os.path.dirname(path) for path in split.paths]) if split.paths else ""  # noqa: PTH120
    state.update("\0".join(path.removeprefix(root) for path in split.paths or ()).encode(errors="surrogatepass"))
    return state.hexdigest()


def noise_record(result: Mislabels, noise: Noise, classes: Sequence[str]) -> NoiseRecord:
    """Gather the estimate of the label noise for the run file: rate, count, pairs of classes, expected precision."""
    n, cut = len(noise.wrong), len(result.flagged)
    ways = list(result.ways.values()) or [noise.count]
    given, true = np.nonzero(noise.joint * n >= 0.5)
    given, true = given[given != true], true[given != true]
    counts = noise.joint[given, true]
    order = np.argsort(-counts, kind="stable")
    expected = noise.expected_precision(result.order)
    cuts = sorted({max(1, round(n * share)) for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)} | {max(1, cut)})
    cuts = [cut for cut in cuts if cut <= len(expected)]
    return NoiseRecord(
        cut / max(1, len(result.order)),
        cut,
        tuple(ExpectedPrecision(cut, float(expected[cut - 1])) for cut in cuts),
        tuple(WrongLabels(classes[given[at]], classes[true[at]], round(float(counts[at]) * n)) for at in order),
        tuple(classes),
        noise.joint.tolist() if len(classes) <= JOINT else None,
        min(ways),
        max(ways),
        dict(result.ways),
    )


def issues_record(result: Mislabels, split: Split, classes: Sequence[str]) -> DataIssuesRecord:
    """Gather the data issues beyond single labels for the run file, by position in the data set."""
    issues, indices = result.issues, result.facts.indices

    def named(row: int) -> NamedExample:
        index = int(indices[row])
        return NamedExample(index, split.path(index), classes[int(result.facts.labels[row])])

    return DataIssuesRecord(
        tuple((named(a), named(b)) for a, b in issues.duplicates),
        tuple((named(a), named(b)) for a, b in issues.alike),
        tuple(named(row) for row in issues.outliers),
        tuple(ConfusedClasses((classes[a], classes[b]), (there, back)) for a, b, there, back in issues.confused),
    )


def _sample(result: Mislabels, split: Split, classes: Sequence[str]) -> list[Section]:
    """Show what is to be decided of the sample, in the order of the draw, so that any first part is random too."""
    if result.sample is None:
        return []
    open_ = result.sample.drawn
    if result.taught is not None:
        open_ = open_[~result.taught.decided[open_]]
    rows = rows_of(result.facts.indices, open_[np.isin(open_, result.facts.indices)])
    if not len(rows):
        return []
    cards = tuple(_card(result, split, classes, int(row), number) for number, row in enumerate(rows, 1))
    note = "decide all of them, or the first ones: from these follows how many labels are wrong"
    return [Section("Drawn at random", None, (CardRow("", note, cards),))]


def _card(
    result: Mislabels, split: Split, classes: Sequence[str], row: int, number: int | None = None, note: str = ""
) -> Card:
    facts = result.facts
    index, label, suggested = int(facts.indices[row]), int(facts.labels[row]), int(result.suggested[row])
    decided = result.taught is not None and bool(result.taught.decided[index])
    differs, judged = not decided and suggested not in (label, -1), not np.isnan(result.score[row])
    likely = f"{classes[suggested]} ({result.confidence[row]:.0%})" if suggested >= 0 else "not judged"
    title = (f"{number}. " if number else "") + classes[label] + (f" → {classes[suggested]}?" if differs else "")
    return Card(
        image=example_thumbnail(split, index, PHOTO),
        alt=f"{split.name} example {index}, labelled {classes[label]}",
        title=title,
        facts=(
            *((("", note),) if note else ()),
            *((("", "decided"),) if decided else ()),
            ("suggested", likely),
            *((("score", f"{result.score[row]:.4f}"),) if judged else ()),
            ("loss", f"{facts.losses[row]:.4g}"),
            ("index", str(index)),
            *path_fact(split, index),
        ),
        tone="suspect" if differs else "plain",
        group=classes[label],
        neighbours=tuple(
            _neighbour(result, split, classes, row, int(other))
            for other in result.evidence.nearest[row, :NEIGHBOURS]
            if other >= 0
        ),
        review=None
        if decided
        else Review(index, split.path(index), classes[label], classes[suggested if suggested >= 0 else label]),
    )


def _neighbour(result: Mislabels, split: Split, classes: Sequence[str], row: int, other: int) -> Neighbour:
    index, label = int(result.facts.indices[other]), int(result.facts.labels[other])
    return Neighbour(
        image=example_thumbnail(split, index, 48),
        alt=f"{split.name} example {index}, labelled {classes[label]}",
        label=classes[label],
        agrees=label == int(result.facts.labels[row]),
    )


def _data_issues(result: Mislabels, split: Split, classes: Sequence[str]) -> list[Section]:
    """Show pairs of the same or nearly the same image with different labels, and images far from every other."""
    issues, sections = result.issues, []
    pairs = [*issues.duplicates[:SHOWN], *issues.alike[: SHOWN - len(issues.duplicates[:SHOWN])]]
    if pairs:
        cards = tuple(_card(result, split, classes, row) for pair in pairs for row in pair)
        total = len(issues.duplicates) + len(issues.alike)
        note = f"the first {len(pairs):,} of {counted(total, 'pair')}, side by side"
        sections.append(Section("Duplicates with different labels", None, (CardRow("", note, cards),)))
    if len(issues.outliers):
        cards = tuple(_card(result, split, classes, row) for row in issues.outliers[:SHOWN])
        note = f"the first {len(cards)} of {len(issues.outliers):,}, farthest from every other example"
        sections.append(Section("Unusual images", None, (CardRow("", note, cards),)))
    return sections


def _class_table(result: Mislabels, classes: Sequence[str]) -> PageTable:
    facts, rows = result.facts, []
    differs = (result.suggested != facts.labels) & (result.suggested >= 0)
    flagged = np.zeros(len(facts.labels), dtype=bool)
    flagged[result.flagged] = True
    for number, name in enumerate(classes):
        labelled = facts.labels == number
        others = np.bincount(result.suggested[labelled & differs], minlength=len(classes))
        common = classes[int(others.argmax())] if others.any() else "–"
        rows.append(
            (name, str(int(labelled.sum())), str(int((labelled & flagged).sum())), str(int(others.sum())), common)
        )
    return PageTable(
        "Classes",
        ("label", "examples", "probably wrong", "differ from suggested", "most common suggestion"),
        tuple(rows),
        "over all examples, not only those shown",
    )


def _noise_table(session: Session) -> tuple[PageTable, ...]:
    noise, issues = session.run.noise, session.run.issues
    if noise is None or issues is None or not noise.pairs:
        return ()
    both = {frozenset(pair.classes) for pair in issues.confused}
    rows = tuple(
        (p.label, p.true, str(p.count), "yes" if frozenset((p.label, p.true)) in both else "–")
        for p in noise.pairs[:SHOWN]
    )
    return (
        PageTable(
            "Which classes are mixed up",
            ("label", "probably", "examples", "in both directions"),
            rows,
            "estimated by confident learning",
        ),
    )


def _recovery_chart(session: Session, signal: str) -> tuple[Chart, ...]:
    """Draw what the ranking finds, next to the loss, the best other signal and random order."""
    recovery, truth = session.run.recovery, session.run.truth
    if recovery is None or truth is None:
        return ()
    best = [q.signal for q in truth if q.signal not in (signal, "loss", "random")]
    names = [name for name in dict.fromkeys((signal, "loss", *best[:1])) if name in recovery.recovered]
    return (recovery_chart("Wrong labels found", {name: recovery.recovered[name] for name in names}, recovery.checked),)


def _truth_table(session: Session) -> tuple[PageTable, ...]:
    from influence_cli.mislabels.evaluation import CHECKED

    if session.run.truth is None:
        return ()
    rows = tuple(
        (
            q.signal,
            f"{q.average_precision:.3f}",
            *(f"{end:.3f}" for end in q.interval),
            f"{q.auroc:.3f}",
            *(f"{share:.3f}" for share in q.found),
            "–" if q.suggested is None else f"{q.suggested:.3f}",
        )
        for q in session.run.truth
    )
    columns = ("signal", "AP", "from", "to", "AUROC", *(f"{share:.0%}" for share in CHECKED), "suggestion right")
    return (
        PageTable(
            "Measured against the truth",
            columns,
            rows,
            "average precision with its 95% interval; share of the wrong labels found per share of examples checked; "
            "share of right suggestions",
        ),
    )
