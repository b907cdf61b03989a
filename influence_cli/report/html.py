"""Pages to look at: one self-contained HTML file, no network, thumbnails only."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Literal

import jinja2
from PIL import Image

from influence_cli.errors import InfluenceError
from influence_cli.report.formats import open_output

MAX_BYTES = 5_000_000
Tone = Literal["helpful", "harmful", "suspect", "plain"]


@dataclass(frozen=True)
class Card:
    """An image with what is known of it.

    Attributes:
        image: a data URI, or None.
        alt: the image in words.
        title: the line under it.
        facts: (name, value) pairs.
        tone: how it is marked.
        group: what the filter selects by, such as the label.
    """

    image: str | None
    alt: str
    title: str
    facts: tuple[tuple[str, str], ...]
    tone: Tone
    group: str = ""


@dataclass(frozen=True)
class Row:
    """Cards side by side under a heading."""

    heading: str
    note: str
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Section:
    """A part of the gallery: one image on top, rows below it."""

    heading: str
    lead: Card | None
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A table that the reader can sort."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report, in reading order."""

    title: str
    sentence: str
    meaning: tuple[str, ...]
    tables: tuple[Table, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    command: str
    config: str

    @property
    def groups(self) -> list[str]:
        """List what the gallery can be filtered by."""
        return sorted({card.group for section in self.sections for row in section.rows for card in row.cards} - {""})


def thumbnail(image: Image.Image, size: int = 96) -> str:
    """Make a data URI: a photo shrunk to ``size`` (JPEG), a smaller image enlarged by whole pixels (PNG).

    Args:
        image: of any mode.
        size: of the longer side.
    """
    if image.mode.startswith("I") or image.mode == "F":
        low, high = image.getextrema()
        span = float(high) - float(low) or 1.0  # type: ignore[arg-type]
        image = image.convert("F").point(lambda value: (value - float(low)) * (255.0 / span))  # type: ignore[arg-type]
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    if max(image.size) > size:
        image.thumbnail((size, size))
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    else:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render_page(page: Page) -> str:
    """Fill the template; everything that comes from data is escaped."""
    source = files("influence_cli.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(page=page)


def write_page(page: Page, path: Path) -> int:
    """Write a page, at most 5 MB: the last images of each row are left out until it fits, and that is said.

    Returns:
        Its size in bytes.

    Raises:
        InfluenceError: the file cannot be written, or its name does not end in .html.
    """
    if path.suffix not in (".html", ".htm"):
        raise InfluenceError(f"--report {path}: the page is HTML", f"name it {path.with_suffix('.html').name}")
    text = render_page(page)
    dropped = 0
    for lighter, left_out in _lighter(page):
        if len(text.encode("utf-8", "replace")) <= MAX_BYTES:
            break
        dropped += left_out
        text = render_page(replace(lighter, notes=(*page.notes, f"{dropped} images were left out to keep the page under 5 MB.")))
    data = text.encode("utf-8", "replace").decode()
    with open_output(path) as stream:
        stream.write(data)
    return len(data.encode())


def _lighter(page: Page) -> Iterator[tuple[Page, int]]:
    """Give the page with fewer and fewer images: the last half of every row's, again and again."""
    longest = max((len(row.cards) for section in page.sections for row in section.rows), default=0)
    while longest > 0:
        longest //= 2
        count = 0
        sections = []
        for section in page.sections:
            rows = []
            for row in section.rows:
                kept, bare = row.cards[:longest], row.cards[longest:]
                count += sum(card.image is not None for card in bare)
                rows.append(replace(row, cards=kept + tuple(replace(card, image=None) for card in bare)))
            sections.append(replace(section, rows=tuple(rows)))
        page = replace(page, sections=tuple(sections))
        yield page, count
