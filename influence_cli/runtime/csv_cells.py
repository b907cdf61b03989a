"""Text of a data set in a .csv: spreadsheets must not read it as a formula, and it must read back unchanged."""

from __future__ import annotations

import re

# What a spreadsheet reads as a formula, which could start a program or open a page. Leading apostrophes are included,
# so that a name that already begins with one differs from a guarded one.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_GUARDED = re.compile(r"'+[=+\-@\t\r]")


def guarded(text: str) -> str:
    """Put an apostrophe before text that a spreadsheet would read as a formula; other text stays unchanged."""
    return f"'{text}" if _FORMULA.match(text) else text


def unguarded(text: str) -> str:
    """Remove that apostrophe; other text stays unchanged."""
    return text[1:] if _GUARDED.match(text) else text
