"""A few cards of a page as HTML for a notebook: no script, no style sheet, the colours of the notebook's own theme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from influence_cli.errors import printable
from influence_cli.report.html import Card, CardRow, Section

# Told apart with every kind of colour vision, on light and dark ground; the words stand beside them.
_COLOURS = {"helpful": "#3f8fd0", "harmful": "#d0604a", "suspect": "#d0604a"}
_CARD = "display:inline-block;vertical-align:top;width:128px;margin:0 8px 8px 0;padding:4px 6px"
_PICTURE = "display:block;width:116px;height:116px;object-fit:contain;image-rendering:{}"
# A picture this small is enlarged pixel by pixel.
_PNG = "data:image/png"


def gallery(title: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """Draw sections of a page.

    Args:
        title: what the result is.
        notes: a line each, below the title.
        sections: whose leading images and cards are shown.
    """
    parts = [f"<p><b>{_text(title)}</b></p>", *(f"<p>{_text(note)}</p>" for note in notes if note)]
    for section in sections:
        if section.heading:
            parts.append(f"<p>{_text(section.heading)}</p>")
        if section.lead is not None:
            parts.append(f"<div>{_card(section.lead)}</div>")
        parts += [_row(row) for row in section.rows if row.cards]
    return f"<div>{''.join(parts)}</div>"


def _row(row: CardRow) -> str:
    heading = f"<p>{_text(row.heading)}</p>" if row.heading else ""
    return f"{heading}<div>{''.join(map(_card, row.cards))}</div>"


def _card(card: Card) -> str:
    if card.image is None:
        picture = f'<div style="{_PICTURE.format("auto")};opacity:.6">no picture</div>'
    else:
        drawn = "pixelated" if card.image.startswith(_PNG) else "auto"
        picture = f'<img style="{_PICTURE.format(drawn)}" src="{escape(card.image)}" alt="{_text(card.alt)}">'
    title = f"<b>{_text(card.title)}</b><br>" if card.title else ""
    lines = "".join(f"{_text(name)}: {_text(value)}<br>" for name, value in card.facts)
    colour = _COLOURS.get(card.tone, "#888888")
    return (
        f'<div style="{_CARD};border-left:3px solid {colour}">{picture}'
        f'<div style="font-size:11px;line-height:1.35;overflow-wrap:anywhere">{title}{lines}</div></div>'
    )


def _text(text: str) -> str:
    return escape(printable(text))
