"""Compare two recordings: what each command printed and wrote, after times and places are taken out."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from pathlib import Path

from normalise import normalise

# Of one text, the lines of difference that are shown, and the characters of each.
LINES, WIDTH = 40, 400


def compare(a: Path, b: Path, only: str = "") -> tuple[list[str], int, int]:
    """Compare two recordings.

    Args:
        a: one.
        b: the other.
        only: names of groups, with commas between; "" is all.

    Returns:
        The lines to print, how many commands there are, and how many of them differ.
    """
    first, second = _commands(a, only), _commands(b, only)
    places = _places(a), _places(b)
    lines, differ = [], 0
    names = list(dict.fromkeys([*first, *second]))
    for name in names:
        found = list(_differences(first.get(name), second.get(name), places))
        if found:
            differ += 1
            lines += [f"=== {name}", *found, ""]
    return lines, len(names), differ


def _commands(recording: Path, only: str) -> dict[str, Path]:
    """Find what was recorded, in its order: a group and a line of the shell to a folder."""
    if not (recording / "recording.json").is_file():
        raise SystemExit(f"{recording} is not a recording, or no group of it was finished")
    found: dict[str, Path] = {}
    for group in json.loads((recording / "recording.json").read_text(encoding="utf-8"))["groups"]:
        if only and group not in only.split(","):
            continue
        for folder in sorted((recording / "commands" / group).iterdir()):
            command = json.loads((folder / "command.json").read_text(encoding="utf-8"))
            name = f"[{group}] {command['line']}" + (" (terminal)" if command["terminal"] else "")
            # The same line again, such as a second undo.
            number = sum(known.rpartition(" #")[0] == name or known == name for known in found)
            found[f"{name} #{number + 1}" if number else name] = folder
    return found


def _places(recording: Path) -> dict[str, str]:
    places: dict[str, str] = json.loads((recording / "recording.json").read_text(encoding="utf-8"))["places"]
    return places


def _differences(a: Path | None, b: Path | None, places: tuple[dict[str, str], dict[str, str]]) -> Iterator[str]:
    if a is None or b is None:
        yield f"only in {'B' if a is None else 'A'}"
        return
    files = [{str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()} for folder in (a, b)]
    for name in sorted(files[0].keys() | files[1].keys()):
        if name == "command.json":
            continue
        one, other = (found.get(name) for found in files)
        if one is None or other is None:
            yield f"{name} is only in {'B' if one is None else 'A'}"
            continue
        texts = [
            normalise(path.read_bytes().decode("utf-8", "backslashreplace"), where)
            for path, where in zip((one, other), places, strict=True)
        ]
        if texts[0] != texts[1]:
            yield from _diff(name, *texts)


def _diff(name: str, a: str, b: str) -> Iterator[str]:
    # With their ends: a missing last newline is a difference.
    one, other = ([_shown(line) for line in text.splitlines(keepends=True)] for text in (a, b))
    lines = difflib.unified_diff(one, other, f"A/{name}", f"B/{name}", n=1, lineterm="")
    for number, line in enumerate(lines):
        if number == LINES:
            yield "… more lines differ"
            return
        yield line if len(line) <= WIDTH else line[:WIDTH] + f"… ({len(line):,} characters)"


def _shown(line: str) -> str:
    """Show the end of a line only where it is not the usual one."""
    if line.endswith("\n") and not line.endswith("\r\n"):
        return line[:-1]
    return repr(line)[1:-1] + ("" if line.endswith("\n") else " (no end of line)")
