"""A result as one HTML file that opens offline: thumbnails inside, no library, no request, at most 5 MB."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from PIL import Image

from influence_cli.errors import InfluenceError, printable
from influence_cli.report.formats import open_output

MAX_BYTES = 5_000_000
SUFFIXES = (".html", ".htm")

Tone = Literal["helpful", "harmful", "suspect", "plain"]

_NUMBER = re.compile(r"[+−-]?(\d[\d,]*)?\.?\d+(e[+-]?\d+)?\s?%?", re.IGNORECASE)
_MISSING = ("", "–", "-")


@dataclass(frozen=True)
class Card:
    """An image and what is known of it.

    Attributes:
        image: a data URI, such as `thumbnail` gives; None where there is no image to show.
        alt: the image in words, for those who do not see it.
        title: the line under the image.
        facts: (name, value) pairs.
        tone: what its colour, sign and word say.
        group: what the label filter goes by, such as the class; empty to stay out of it.
    """

    image: str | None
    alt: str
    title: str
    facts: tuple[tuple[str, str], ...]
    tone: Tone
    group: str = ""


@dataclass(frozen=True)
class Row:
    """Cards of one kind, strongest first."""

    heading: str
    note: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Section:
    """A part of the gallery: one leading image, such as a test example, above rows of others."""

    heading: str
    lead: Card | None
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort; columns of numbers are found by themselves."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Tell for each column whether all its values are numbers."""
        values = [[row[number].strip() for row in self.rows] for number in range(len(self.columns))]
        return tuple(
            any(value not in _MISSING for value in column)
            and all(value in _MISSING or _NUMBER.fullmatch(value) for value in column)
            for column in values
        )


@dataclass(frozen=True)
class Chart:
    """Curves over shares: what a ranking finds of something, by how much of it is looked at.

    Attributes:
        heading: of the chart.
        x: what the axis to the right counts, from 0 to the largest x of all curves.
        y: what the axis up counts, from 0 to 1.
        curves: by name, (x, y) pairs with rising x; the first is drawn strongest, the fifth and later look like it.
    """

    heading: str
    x: str
    y: str
    curves: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]

    @property
    def span(self) -> float:
        """Give the largest x."""
        return max((x for _, points in self.curves for x, _ in points), default=1.0) or 1.0

    def path(self, points: tuple[tuple[float, float], ...]) -> str:
        """Place a curve in a box 400 wide and 200 high, y upwards: the points of an SVG polyline."""
        return " ".join(f"{400 * x / self.span:.1f},{200 * (1 - y):.1f}" for x, y in points)


@dataclass(frozen=True)
class Page:
    """A whole report, in reading order.

    Attributes:
        title: the name of the page.
        sentence: what was run on what.
        meaning: what the numbers mean, a paragraph each.
        tables: numbers beside the images.
        charts: curves beside them.
        sections: the gallery.
        notes: what was left out.
        command: what makes the page again.
        config: the resolved config.
    """

    title: str
    sentence: str
    meaning: tuple[str, ...]
    tables: tuple[Table, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    command: str
    config: str
    charts: tuple[Chart, ...] = ()

    @property
    def groups(self) -> list[str]:
        """List what the gallery can be filtered by."""
        return sorted({card.group for section in self.sections for row in section.rows for card in row.cards} - {""})


def thumbnail(image: Image.Image, size: int = 96) -> str:
    """Make a small picture of an image, as the model's loader sees it: no EXIF rotation, transparency dropped.

    Args:
        image: of any mode; 16-bit, integer and float images are stretched from their darkest to their lightest value.
        size: of the longer side in pixels; a smaller image is enlarged by a whole factor to at least this.

    Returns:
        A data URI: JPEG where the image was shrunk, else PNG.
    """
    picture = _eight_bit(image)
    # An ICC profile or a comment would travel into every thumbnail.
    picture.info.clear()
    longest = max(picture.size)
    buffer = io.BytesIO()
    if longest > size:
        picture.thumbnail((size, size), reducing_gap=3.0)
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    else:
        factor = -(-size // longest)
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def render_page(page: Page) -> str:
    """Fill the template; whatever comes from data is escaped.

    Args:
        page: what to show.

    Returns:
        A whole HTML document.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("influence_cli", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # A file name may hold what HTML cannot: control characters, bytes that are not UTF-8.
        finalize=lambda value: printable(value, keep="\n\t") if type(value) is str else value,
    )
    return environment.get_template("report.html.j2").render(page=page)


def write_page(page: Page, path: Path) -> int:
    """Write a page of at most 5 MB: where it is larger, the last images of the rows are left out, and it says so.

    Args:
        page: what to show.
        path: a file that ends in .html; it appears when it is complete.

    Returns:
        The size in bytes.

    Raises:
        InfluenceError: the file cannot be written, or its text alone is larger than 5 MB.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise InfluenceError(f"{path}: a page is HTML", f"name it {path.with_suffix('.html').name}")
    text = _fitting(page, path)
    with open_output(path) as stream:
        stream.write(text)
    return len(text.encode())


def _eight_bit(image: Image.Image) -> Image.Image:
    """Copy an image of any mode into mode L or RGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        known = values[np.isfinite(values)]
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
        values = (np.nan_to_num(values, nan=low, posinf=high, neginf=low) - low) / ((high - low) or 1.0)
        return Image.fromarray((values * 255).round().astype(np.uint8))
    if image.mode in ("1", "L", "LA", "La"):
        return image.convert("LA").convert("L") if image.mode == "La" else image.convert("L")
    if image.mode in ("P", "PA", "RGBa"):
        # Straight to RGB, Pillow warns of a palette with transparency, and cannot do RGBa.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _fitting(page: Page, path: Path) -> str:
    """Render the page without as many images as it takes, the lowest places of all rows first."""
    text = render_page(page)
    # (place in its row, section, row): the first of a row is the last to go.
    images = sorted(
        (place, number, line)
        for number, section in enumerate(page.sections)
        for line, row in enumerate(section.rows)
        for place, card in enumerate(row.cards)
        if card.image is not None
    )
    dropped: set[tuple[int, int, int]] = set()
    while (excess := len(text.encode()) - MAX_BYTES) > 0:
        if not images:
            raise InfluenceError(
                f"{path}: the page would have {MAX_BYTES + excess:,} bytes without the images of its rows, "
                f"the limit is {MAX_BYTES:,}",
                "show less of it: a smaller --top, or fewer test examples",
            )
        while images and excess > 0:
            place, number, line = images.pop()
            excess -= len(page.sections[number].rows[line].cards[place].image or "")
            dropped.add((place, number, line))
        noun = "image was" if len(dropped) == 1 else "images were"
        note = f"{len(dropped):,} {noun} left out to keep the page under 5 MB."
        text = render_page(replace(_without(page, dropped), notes=(*page.notes, note)))
    return text


def _without(page: Page, dropped: set[tuple[int, int, int]]) -> Page:
    sections = []
    for number, section in enumerate(page.sections):
        rows = []
        for line, row in enumerate(section.rows):
            cards = tuple(
                replace(card, image=None) if (place, number, line) in dropped else card
                for place, card in enumerate(row.cards)
            )
            rows.append(replace(row, cards=cards))
        sections.append(replace(section, rows=tuple(rows)))
    return replace(page, sections=tuple(sections))
