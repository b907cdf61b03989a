"""Tables for people: nothing moves the cursor, nothing is cut off a terminal, no number is cut on one."""

from __future__ import annotations

import io
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence_cli.errors import printable
from influence_cli.report import table
from influence_cli.report.writer import write_rows

RANK = (
    "test",
    "test_path",
    "test_label",
    "test_predicted",
    "effect",
    "rank",
    "index",
    "path",
    "label",
    "predicted",
    "loss",
    "influence",
)
NASTY = "a\tb\nc\rd\\e\x1b[2J,\"f\" 'g' ünï 漢字 \u202e"
NOT_UTF8 = os.fsdecode(b"bad-\xff.png")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")


def written(rows, columns, format, stream=None) -> str:
    stream = stream or io.StringIO()
    assert write_rows(iter(rows), columns, format, stream) == len(rows)
    return stream.getvalue()


def rank_rows(tests: int = 2, count: int = 3) -> list[dict[str, object]]:
    return [
        {
            "test": test,
            "test_path": f"/home/someone/project/data/test/ants/{test:06d}.png",
            "test_label": "Ankle boot",
            "test_predicted": "T-shirt/top",
            "effect": effect,
            "rank": rank,
            "index": 1000 * rank,
            "path": f"/home/someone/project/data/train/ants/{rank:06d}_a7831e9ff0.png",
            "label": "Ankle boot",
            "predicted": "T-shirt/top",
            "loss": 0.25 / rank,
            "influence": sign * 0.0123456789 / rank,
        }
        for test in range(tests)
        for effect, sign in (("helpful", 1), ("harmful", -1))
        for rank in range(1, count + 1)
    ]


def without_colour(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("make", [io.StringIO, Terminal])
def test_table_spells_out_what_moves_the_cursor(make) -> None:
    rows = [{"path": NASTY}, {"path": NOT_UTF8}, {"path": "\x9b2J\u2028\x7f"}]
    text = without_colour(written(rows, ("path",), "table", make()))
    assert len(text.splitlines()) == 4
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\ud800-\udfff]", text)
    for spelt in (r"a\tb\nc\rd", r"\x1b[2J", "漢字", r"\u202e", r"bad-\xff.png", r"\x9b2J\u2028\x7f"):
        assert spelt in text


@given(st.text(alphabet=st.characters(codec=None)))
def test_printable_is_one_line_of_utf8(text: str) -> None:
    spelt = printable(text)
    spelt.encode("utf-8")
    assert len(spelt.splitlines()) <= 1
    assert printable(spelt) == spelt


def test_plain_table_is_aligned_and_never_cut() -> None:
    rows = [
        {"n": 5, "path": "p" * 300, "w": "漢字", "x": 0.123456789, "none": None, "some": None},
        {"n": 12345, "path": "q", "w": "ab", "x": -2.0, "none": None, "some": 1},
    ]
    lines = written(rows, ("n", "path", "w", "x", "none", "some"), "table").split("\n")
    assert lines[0].split() == ["n", "path", "w", "x", "some"]
    assert lines[1].startswith("    5  " + "p" * 300 + "  漢字  ")
    assert lines[1].split() == ["5", "p" * 300, "漢字", "0.1235", "–"]
    assert lines[2].split() == ["12345", "q", "ab", "-2.000", "1"]
    assert "\x1b" not in "".join(lines)


def test_numbers_have_four_digits_and_influence_a_sign() -> None:
    rows = [{"influence": value} for value in (0.012345678, -0.012345678, 0.0, 1.5e-7, 1234.5678)]
    lines = written(rows, ("influence",), "table").split()
    assert lines == ["influence", "+0.01235", "-0.01235", "0", "+1.500e-07", "+1235"]


def test_terminal_table_says_the_test_once_and_fits() -> None:
    text = written(rank_rows(), RANK, "table", Terminal())
    plain = without_colour(text)
    lines = plain.splitlines()
    assert [line.split(" · ")[0] for line in lines if line.startswith("test")] == ["test 0", "test 1"]
    assert max(map(len, lines)) <= 80
    assert "…" in plain
    assert plain.count("a7831e9ff0.png"[-8:]) >= 12
    assert plain.count("T-shirt/top") == 14
    assert "\x1b[32mhelpful" in text
    assert "\x1b[31mharmful" in text


def test_terminal_table_of_one_training_example() -> None:
    rows = [row | {"index": 7, "path": "a.png", "loss": 0.5, "test": n} for n, row in enumerate(rank_rows())]
    lines = without_colour(written(rows, RANK, "table", Terminal())).splitlines()
    assert lines[0].startswith("index 7 · a.png · label Ankle boot")
    assert sum(line.startswith("index") for line in lines) == 1


@pytest.mark.parametrize("columns", ["200", "60", "20"])
def test_terminal_table_loses_no_number(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    plain = without_colour(written(rank_rows(1), RANK, "table", Terminal()))
    for number in ("+0.01235", "-0.006173", "1000", "3000", "0.2500", "0.08333"):
        assert number in plain


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = written(rank_rows(), RANK, "table", Terminal())
    assert "helpful" in text
    assert not re.search(r"\x1b\[(?:\d+;)*3[0-7]m", text)


def test_markup_in_a_name_is_text() -> None:
    assert "[red]x[/red]" in without_colour(written([{"label": "[red]x[/red]"}], ("label",), "table", Terminal()))


def test_long_terminal_table_comes_in_pieces_with_one_heading(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rank_rows(1, 10)
    whole = written(rows, RANK, "table", Terminal())
    monkeypatch.setattr(table, "CHUNK", 3)
    assert written(rows, RANK, "table", Terminal()) == whole
