"""The tables of docs/bring-your-own.md, from the combinations that are tested: python -m tests.ecosystem.tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.ecosystem.checkpoint import Checkpoint
from tests.ecosystem.combinations import COMBINATIONS, INIT, SET, Combination
from tests.ecosystem.networks import NETWORKS

PAGE = Path(__file__).parents[2] / "docs" / "bring-your-own.md"
Tables = dict[str, str]


def _table(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|" + "---|" * columns, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def _by(what: Callable[[Combination], object]) -> dict[object, str]:
    """Name the first tests of each part, in the order of the list."""
    tests: dict[object, list[str]] = {}
    for combination in COMBINATIONS:
        tests.setdefault(what(combination), []).append(f"`{combination.name}`")
    return {
        part: ", ".join(names[:3]) + (f", {len(names) - 3} more" if len(names) > 3 else "")
        for part, names in tests.items()
    }


def _config(checkpoint: Checkpoint) -> str:
    text = f"`model: {checkpoint.model if checkpoint.model.startswith('{') else f'{{{checkpoint.model}, …}}'}`"
    if checkpoint.convert:
        written = checkpoint.model.partition(": ")[2]
        return f"`influence convert {checkpoint.convert} -o {written} --trust`, then {text}"
    return text


def make_tables() -> Tables:
    """Give the tables by their names in the page."""
    checkpoints, networks = _by(lambda c: c.checkpoint), _by(lambda c: c.network)
    data, transforms = _by(lambda c: c.data), _by(lambda c: c.transform)
    return {
        "checkpoints": _table(
            "written by | what is in it | influence.yaml | tests",
            ((c.writer, c.layout, _config(c), tests) for c, tests in checkpoints.items()),  # type: ignore[attr-defined]
        ),
        "networks": _table(
            "library | network | `model.factory` | tests",
            (
                (NETWORKS[name].library, name, f"`{NETWORKS[name].factory}`", tests)  # type: ignore[index]
                for name, tests in networks.items()
            ),
        ),
        "data": _table(
            "written by | what it is | influence.yaml | tests",
            ((d.writer, d.layout, f"`train: {d.train}`", tests) for d, tests in data.items()),  # type: ignore[attr-defined]
        ),
        "transforms": _table(
            "library | what it is | influence.yaml | tests",
            ((t.library, t.kind, f"`transform: {t.lines}`", tests) for t, tests in transforms.items()),  # type: ignore[attr-defined]
        ),
        "init": _table(
            "influence init | test | set besides `l2`",
            ((f"`{words}`", f"`{name}`", ", ".join(f"`{key}`" for key in SET[name])) for name, words in INIT.items()),
        ),
    }


def fill(text: str, tables: Tables) -> str:
    """Put tables between their comments of a page."""
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text)
        assert count == 1, name
    return text


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), make_tables()), encoding="utf-8")
