"""Take out of a recorded text what differs from run to run, and nothing else: times, versions, places, processes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping

Replacement = str | Callable[[re.Match[str]], str]

# A time as the package writes it for people: 8 s, 3.2 s, 3 min 20 s, 2 h 5 min.
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DURATION = rf"(?:{_WHOLE} h \d+ min|\d+ min \d+ s|{_WHOLE}(?:\.\d+)? s)"


def _picture(match: re.Match[str]) -> str:
    return f"base64:{len(match[1])}:{hashlib.sha256(match[1].encode()).hexdigest()[:16]}"


# In this order. Each line: what it is, where it stands, what stands there instead.
RULES: tuple[tuple[str, Replacement], ...] = (
    # A picture inside a page becomes its hash, so that a difference fits on a line. Nothing is lost.
    (r"base64,([A-Za-z0-9+/=]{40,})", _picture),
    # Times of the clock: of the log of moves, of pages and run files.
    (r"\b20\d\d-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?)?", "<date>"),
    # The checksum of a line of the log of moves, which covers the time before it.
    (r'("<date>"),"[0-9a-f]{16}"', r'\1,"<checksum>"'),
    # Times that something took or may take.
    (rf"\b{_DURATION}(?![\w/])", "<time>"),
    # The same as numbers of a JSON file: "seconds": 1.5, "search_seconds": 0.2.
    (r'("(?:\w+_)?seconds": ?)-?[\d.]+(?:e-?\d+)?', r"\1<seconds>"),
    # The same as a row of check: the number, then the words; the padding of a table goes with them.
    (r"(time to fill it, about\W+)[\d.e-]+([,\t ]) *<time>", r"\1<seconds>\2<time>"),
    (r'("item": ?"time to fill it, about", ?"value": ?)"?[\d.e-]+"?', r"\1<seconds>"),
    # Rates: 1,234/s.
    (r"\b[\d,.]+/s\b", "<rate>"),
    # Versions of what was run: in run files, and in stores as attributes.
    (r'("(?:influence|influence_cli|python|torch|torchvision|numpy|h5py|faiss)": ?)"\d[\w.+]*"', r'\1"<version>"'),
    (r"\binfluence \d+\.\d+\.\d+\w*", "influence <version>"),
    # Memory that was free, as measured.
    (r"[\d.,]+ [kMGT]?B (?:is|are|of memory is|of memory are)? ?free\b", "<memory> free"),
    # Process ids.
    (r"\b(process|pid|PID) \d+\b", r"\1 <pid>"),
    # Temporary files of a random name.
    (r"/tmp/tmp[\w]{6,}", "<temporary>"),
    # The notes of torchrun: a letter, the date, the time, the process.
    (r"(?m)^([WIE])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ ", r"\1<date> <pid> "),
)
_COMPILED = tuple((re.compile(pattern), replacement) for pattern, replacement in RULES)


def normalise(text: str, places: Mapping[str, str] | None = None) -> str:
    """Apply the rules to a text.

    Args:
        text: what a command printed or wrote.
        places: folders of the recording, and the words that stand for them.
    """
    # The longest first: one may lie in another.
    for folder, word in sorted((places or {}).items(), key=lambda item: -len(item[0])):
        text = text.replace(folder, word)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text
