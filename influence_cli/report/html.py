"""A result as one HTML file that works offline: embedded thumbnails, no library, no request, at most 5 MB."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup, escape

from influence_cli.errors import InfluenceError, printable
from influence_cli.report.charts import Chart, ClassBars, Histogram, Scatter
from influence_cli.runtime.outputs import open_output

MAX_BYTES = 5_000_000
SUFFIXES = (".html", ".htm")

Tone = Literal["helpful", "harmful", "suspect", "entered", "left", "plain"]

_NUMBER = re.compile(r"[+−-]?(\d[\d,]*)?\.?\d+(e[+-]?\d+)?\s?%?", re.IGNORECASE)
_MISSING = ("", "–", "-")
# A line may end after an underscore, or after a hyphen between letters: where the words of a class name meet.
_SEAM = re.compile(r"_(?=\w)|(?<=[^\W\d_])-(?=[^\W\d_])")
# Rows of a table that are shown at first; a few more are not worth a button.
FOLDED, FEW = 20, 5


@dataclass(frozen=True)
class Review:
    """The example of a card whose label the reader decides on.

    Attributes:
        index: its position in the data set.
        path: its file, or None.
        label: as given.
        suggested: by the evidence.
    """

    index: int
    path: str | None
    label: str
    suggested: str


@dataclass(frozen=True)
class Neighbour:
    """An image similar to that of a card, shown small next to it.

    Attributes:
        image: a data URI, or None.
        alt: the image in words.
        label: its label.
        agrees: whether the card has the same label.
    """

    image: str | None
    alt: str
    label: str
    agrees: bool


@dataclass(frozen=True)
class Card:
    """An image and what is known about it.

    Attributes:
        image: a data URI, such as `thumbnail` gives; None if there is no image to show.
        alt: the image in words, for those who cannot see it.
        title: the line under the image.
        facts: (name, value) pairs.
        tone: what its colour, sign and word say.
        group: what the label filter compares, such as the class; empty if the filter ignores the card.
        neighbours: similar images, nearest first.
        review: what a decision would be about, on a page with a `Desk`.
        mark: a warning about the example, such as that its own label looks wrong; empty for none.
    """

    image: str | None
    alt: str
    title: str
    facts: tuple[tuple[str, str], ...]
    tone: Tone
    group: str = ""
    neighbours: tuple[Neighbour, ...] = ()
    review: Review | None = None
    mark: str = ""

    def weight(self, *, own: bool) -> int:
        """Count the bytes of its own image, or of its neighbours' images."""
        return len(self.image or "") if own else sum(len(other.image or "") for other in self.neighbours)

    def without(self, *, own: bool) -> Card:
        """Leave out its own image, or its neighbours' images."""
        if own:
            return replace(self, image=None)
        return replace(self, neighbours=tuple(replace(other, image=None) for other in self.neighbours))


@dataclass(frozen=True)
class CardRow:
    """Cards of one kind, strongest first."""

    heading: str
    note: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Section:
    """A part of the gallery: one leading image, such as a test example, above rows of others.

    Attributes:
        heading: of the part.
        lead: the leading image.
        rows: below it.
        bars: where the influence on it comes from, below the rows.
        columns: whether the rows stand side by side, like two results that are compared.
        beside: a second image next to the leading one, such as the pixels that matter in it.
        scatters: scatter plots below these, side by side.
        table: what is counted in this part, below everything else.
        folded: whether the reader has to open it. Folded parts are the last ones of a page.
    """

    heading: str
    lead: Card | None
    rows: tuple[CardRow, ...]
    bars: ClassBars | None = None
    columns: bool = False
    beside: Card | None = None
    scatters: tuple[Scatter, ...] = ()
    table: PageTable | None = None
    folded: bool = False


@dataclass(frozen=True)
class PageTable:
    """A table that the reader can sort. Columns of numbers are detected.

    Of many rows the first twenty are shown, and a button shows the rest: what matters most comes first.
    """

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def folded(self) -> bool:
        """Tell whether only the first rows are shown at first."""
        return len(self.rows) > FOLDED + FEW

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Tell per column whether all its values are numbers."""
        values = [[row[number].strip() for row in self.rows] for number in range(len(self.columns))]
        return tuple(
            any(value not in _MISSING for value in column)
            and all(value in _MISSING or _NUMBER.fullmatch(value) for value in column)
            for column in values
        )


@dataclass(frozen=True)
class ServedDesk:
    """What a desk has that a server keeps: its cards come from there, and its decisions go there.

    Attributes:
        reviews: of all cards, in order.
        file: the decisions, as a reader would name the file.
    """

    reviews: tuple[Review, ...]
    file: str


@dataclass(frozen=True)
class Desk:
    """Turns the cards with a `Review` into a review desk: decisions by mouse or keys, kept in the browser.

    Attributes:
        key: names the data set and its labels: pages with the same key share their decisions.
        split: ``train`` or ``test``.
        count: examples of the data set, including those not shown.
        classes: every class that a label can be.
        served: where the page is that of a server.
    """

    key: str
    split: str
    count: int
    classes: tuple[str, ...]
    served: ServedDesk | None = None


@dataclass(frozen=True)
class Page:
    """A whole report, in reading order.

    Attributes:
        title: the name of the page.
        sentence: what was run on what.
        meaning: what the numbers mean, one paragraph per entry.
        classes: a table of the classes, above the images.
        sections: the gallery.
        histogram: of the scores, below the gallery.
        charts: curves below that.
        tables: the other numbers.
        notes: what the page does not show.
        command: the command that makes the page.
        config: the resolved config.
        desk: makes the gallery a review desk.
        answer: what was found, in a few words: the heading of a page that begins with its images, above everything
            that explains them. A page without one begins with what was run and what the numbers mean.
        lead: one sentence below the answer.
        more: what the folded parts are.
    """

    title: str
    sentence: str
    meaning: tuple[str, ...]
    classes: PageTable | None
    sections: tuple[Section, ...]
    histogram: Histogram | None
    charts: tuple[Chart, ...]
    tables: tuple[PageTable, ...]
    notes: tuple[str, ...]
    command: str
    config: str
    desk: Desk | None = None
    answer: str = ""
    lead: str = ""
    more: str = ""

    @property
    def groups(self) -> list[str]:
        """List the labels that the gallery can be filtered by."""
        if self.desk is not None and self.desk.served is not None:
            return sorted({review.label for review in self.desk.served.reviews})
        return sorted({card.group for card in self.cards} - {""})

    @property
    def cards(self) -> list[Card]:
        """List the cards of all rows."""
        return [card for section in self.sections for row in section.rows for card in row.cards]

    @property
    def desk_data(self) -> dict[str, object]:
        """Give the data of the desk's script: names as they are, and as they can be shown."""
        if self.desk is None:
            raise ValueError("a page without a desk")
        served = self.desk.served
        reviews = served.reviews if served else [card.review for card in self.cards if card.review is not None]
        examples = {review.index: vars(review) for review in reviews}
        return {
            "key": self.desk.key,
            "split": self.desk.split,
            "count": self.desk.count,
            "classes": [[name, printable(name)] for name in self.desk.classes],
            "examples": list(examples.values()),
            **({"served": served.file} if served else {}),
        }


def render_page(page: Page) -> str:
    """Fill the template. Everything that comes from data is escaped.

    Args:
        page: what to show.

    Returns:
        A whole HTML document.
    """
    return _template().render(page=page)


def page_parts(page: Page) -> tuple[str, Callable[[Sequence[Card]], str]]:
    """Fill the template once, for a server that sends the cards of a desk as they are asked for.

    Args:
        page: with a served desk.

    Returns:
        The HTML document, and a function from cards to the HTML of their list items.
    """
    module: Any = _template().make_module({"page": page})
    return str(module), lambda cards: "".join(str(module.item_of(card)) for card in cards)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("influence_cli", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A file name may have characters that HTML cannot: control characters, bytes that are not UTF-8.
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
    )
    environment.filters["seams"] = seams
    return environment.get_template("report.html.j2")


def seams(text: str) -> Markup:
    """Let a line end at the underscores and hyphens of a name, so that it need not end inside a word."""
    return Markup(_SEAM.sub(r"\g<0><wbr>", str(escape(printable(text, keep="\n\t")))))


def check_page(path: Path | None) -> None:
    """Refuse a file name that is not that of a page, before any work.

    Args:
        path: of ``--report``, or None for none.
    """
    if path is not None and path.suffix.lower() not in SUFFIXES:
        raise InfluenceError(f"--report {path}: a page must be .html", f"name it {path.with_suffix('.html').name}")


def write_page(page: Page, path: Path, most: int | None = None) -> int:
    """Write a page of at most 5 MB. If it would be larger, the last images of the rows are left out, and it says so.

    Args:
        page: what to show.
        path: a file that ends in .html; it appears when it is complete.
        most: bytes, instead of 5 MB.

    Returns:
        The size in bytes.

    Raises:
        InfluenceError: the file cannot be written, or its text alone is larger than that.
    """
    check_page(path)
    text = _fitting(page, path, MAX_BYTES if most is None else most)
    with open_output(path) as stream:
        stream.write(text)
    return len(text.encode())


def _fitting(page: Page, path: Path, most: int) -> str:
    """Render the page, leaving out as many images as needed, the lowest places of all rows first.

    Neighbours are left out before images: the images to decide on stay as long as possible.
    """
    text, left = render_page(page), page
    # (own image, place in its row, section, row): the last of the list go first.
    pictures = sorted(
        (own, -place, -number, -line)
        for number, section in enumerate(page.sections)
        for line, row in enumerate(section.rows)
        for place, card in enumerate(row.cards)
        for own in (False, True)
        if card.weight(own=own)
    )
    dropped: set[tuple[bool, int, int, int]] = set()
    while (excess := len(text.encode()) - most) > 0:
        if len(dropped) == len(pictures):
            raise InfluenceError(
                f"{path}: the page has {most + excess:,} bytes even without the images of its rows, "
                f"and the limit is {most:,}",
                "show less: a smaller --top, or fewer test examples",
            )
        for own, place, number, line in pictures[len(dropped) :]:
            dropped.add((own, place, number, line))
            excess -= page.sections[-number].rows[-line].cards[-place].weight(own=own)
            if excess <= 0:
                break
        left = _without(page, dropped)
        text = render_page(replace(left, notes=(*page.notes, *_left_out(dropped, most))))
    return text


def _left_out(dropped: set[tuple[bool, int, int, int]], most: int) -> Iterator[str]:
    for own, what in ((True, "images"), (False, "their similar images")):
        count = sum(entry[0] == own for entry in dropped)
        if count:
            noun = "example is" if count == 1 else "examples are"
            yield f"{count:,} {noun} shown without {what}, to keep the page under {most / 1e6:g} MB."


def _without(page: Page, dropped: set[tuple[bool, int, int, int]]) -> Page:
    def card_of(card: Card, place: int, number: int, line: int) -> Card:
        for own in (False, True):
            if (own, -place, -number, -line) in dropped:
                card = card.without(own=own)
        return card

    sections = []
    for number, section in enumerate(page.sections):
        rows = [
            replace(row, cards=tuple(card_of(card, place, number, line) for place, card in enumerate(row.cards)))
            for line, row in enumerate(section.rows)
        ]
        sections.append(replace(section, rows=tuple(rows)))
    return replace(page, sections=tuple(sections))
