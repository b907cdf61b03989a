"""The page of the desk: the template of the offline page, with cards that are sent as the reader comes to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from influence_cli.report.html import Card, Desk, Neighbour, Page, ServedDesk, page_parts

if TYPE_CHECKING:
    from collections.abc import Callable

    from influence_cli.data.split import Split
    from influence_cli.review.suspects import Suspect

# Cards that one request may ask for.
MOST = 200


def desk_page(
    suspects: Sequence[Suspect], split: Split, classes: tuple[str, ...], key: str, command: str, file: str
) -> tuple[str, Callable[[Sequence[int]], str]]:
    """Lay out the desk.

    Args:
        suspects: most suspicious first.
        split: the examples.
        classes: class names by number.
        key: of the data set.
        command: that started the server.
        file: the decisions, as the page names them.

    Returns:
        The page without its cards, and a function from places in ``suspects`` to the HTML of their cards.
    """
    kind = "training" if split.name == "train" else split.name
    served = ServedDesk(tuple(suspect.review for suspect in suspects), file)
    shell = Page(
        title="influence review",
        sentence=f"{len(suspects):,} {kind} labels, most suspicious first. Every decision is in {file} at once.",
        meaning=(),
        classes=None,
        sections=(),
        histogram=None,
        charts=(),
        tables=(),
        notes=(),
        command=command,
        config="",
        desk=Desk(key, split.name, len(split.labels), classes, served),
    )
    text, items = page_parts(shell)

    def cards(places: Sequence[int]) -> str:
        return items([_card(suspects[place], place + 1, split, classes) for place in places])

    return text, cards


def _card(suspect: Suspect, number: int, split: Split, classes: Sequence[str]) -> Card:
    review = suspect.review
    differs = review.suggested != review.label
    return Card(
        image=f"thumbnail/{review.index}",
        alt=f"{split.name} example {review.index}, labelled {review.label}",
        title=f"{number:,}. {review.label}" + (f" → {review.suggested}?" if differs else ""),
        facts=suspect.facts,
        tone="suspect" if differs else "plain",
        group=review.label,
        neighbours=tuple(_neighbour(index, review.label, split, classes) for index in suspect.neighbours),
        review=review,
    )


def _neighbour(index: int, label: str, split: Split, classes: Sequence[str]) -> Neighbour:
    name = classes[int(split.labels[index])]
    return Neighbour(f"thumbnail/{index}", f"{split.name} example {index}, labelled {name}", name, agrees=name == label)
