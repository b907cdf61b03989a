"""Text of a data set in a .csv: a spreadsheet must not take it for a formula, and what is read back is the text."""

from __future__ import annotations

import re

# What a spreadsheet takes for a formula, which could call a program or a page; apostrophes before it count, so that
# a name that begins so by itself is told from one that was guarded.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_GUARDED = re.compile(r"'+[=+\-@\t\r]")


def guarded(text: str) -> str:
    """Put an apostrophe before what a spreadsheet would take for a formula; other text stays."""
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(text: str) -> str:
    """Take that apostrophe off again; other text stays."""
    return text[1:] if _GUARDED.match(text) else text
