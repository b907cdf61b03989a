"""Rows in every format: round trips, names that are not UTF-8, and files that appear only when complete."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence_cli.errors import InfluenceError
from influence_cli.report.writer import FORMATS, choose_format, write_rows
from influence_cli.runtime.outputs import check_output, open_output

NASTY = "a\tb\nc\rd\\e\x1b[2J,\"f\" 'g' ünï 漢字 \u202e"
NOT_UTF8 = os.fsdecode(b"bad-\xff.png")
FORMULA = set("=+-@\t\r")


def written(rows, columns, format, stream=None) -> str:
    stream = stream or io.StringIO()
    assert write_rows(iter(rows), columns, format, stream) == len(rows)
    return stream.getvalue()


# choose_format


@pytest.mark.parametrize(
    ("format", "output", "terminal", "expected"),
    [
        (None, None, True, "table"),
        (None, None, False, "jsonl"),
        ("csv", None, True, "csv"),
        (None, "a.jsonl", True, "jsonl"),
        (None, "a.json", True, "json"),
        (None, "a.CSV", True, "csv"),
        (None, "a.tsv", False, "tsv"),
        (None, "a.txt", False, "table"),
        (None, "a.parquet", True, "parquet"),
        ("parquet", None, False, "parquet"),
        ("json", "a.csv", True, "json"),
        ("tsv", "nosuffix", True, "tsv"),
    ],
)
def test_choose_format(format, output, terminal, expected) -> None:
    assert choose_format(format, Path(output) if output else None, terminal=terminal) == expected


@pytest.mark.parametrize(
    ("format", "output", "says"),
    [
        ("jsn", None, "did you mean"),
        ("CSV", None, "known: csv"),
        (None, "a.cvs", "did you mean '.csv'"),
        (None, "a", "add one of"),
        ("cleanlab", None, "known here: table"),
    ],
)
def test_choose_format_refuses(format, output, says) -> None:
    with pytest.raises(InfluenceError) as caught:
        choose_format(format, Path(output) if output else None, terminal=False)
    assert says in caught.value.hint


def test_a_dialect_is_for_the_rows_that_fit_it() -> None:
    assert choose_format("cleanlab", None, terminal=True, dialects=("cleanlab",)) == "cleanlab"
    with pytest.raises(InfluenceError) as caught:
        choose_format("cleanlb", None, terminal=True, dialects=("cleanlab",))
    assert "did you mean 'cleanlab'" in caught.value.hint


def test_parquet_needs_its_package_and_is_not_for_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InfluenceError, match="not text for a terminal"):
        choose_format("parquet", None, terminal=True)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InfluenceError, match="parquet needs pyarrow") as caught:
        choose_format(None, Path("a.parquet"), terminal=False)
    assert caught.value.hint == "pip install 'influence-cli[parquet]'"


# round trips

ROWS = [
    {"i": 1, "x": 0.1, "s": NASTY, "none": None, "b": True},
    {"i": -(2**60), "x": 1e-300, "s": "", "none": "x", "b": False},
    {"i": 0, "x": -0.0, "s": "plain", "none": None, "b": True},
]
COLUMNS = ("s", "x", "i", "none", "b")


def test_jsonl_round_trip() -> None:
    text = written(ROWS, COLUMNS, "jsonl")
    lines = text.split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == ROWS
    assert list(json.loads(lines[0])) == list(COLUMNS)
    assert "ünï" in text


def test_json_round_trip() -> None:
    assert json.loads(written(ROWS, COLUMNS, "json")) == ROWS


def test_csv_round_trip() -> None:
    text = written(ROWS, COLUMNS, "csv")
    assert not re.search("\r\n", text)
    head, *rest = csv.reader(io.StringIO(text, newline=""))
    assert tuple(head) == COLUMNS
    assert [row[0] for row in rest] == [row["s"] for row in ROWS]
    assert [float(row[1]) for row in rest] == [row["x"] for row in ROWS]
    assert [int(row[2]) for row in rest] == [row["i"] for row in ROWS]
    assert [row[3:] for row in rest] == [["", "true"], ["x", "false"], ["", "true"]]


def test_tsv_round_trip() -> None:
    text = written(ROWS, COLUMNS, "tsv")
    lines = text.split("\n")
    assert len(lines) == len(ROWS) + 2
    assert "\r" not in text
    assert all(line.count("\t") == len(COLUMNS) - 1 for line in lines[:-1])
    unescape = {"\\\\": "\\", "\\t": "\t", "\\n": "\n", "\\r": "\r"}
    strings = [re.sub(r"\\.", lambda m: unescape[m.group()], line.split("\t")[0]) for line in lines[1:-1]]
    assert strings == [row["s"] for row in ROWS]


@given(st.floats(allow_nan=False, allow_infinity=False), st.text())
def test_floats_and_text_survive(number: float, text: str) -> None:
    row = {"x": number, "s": text}
    assert json.loads(written([row], ("x", "s"), "jsonl")) == row
    assert json.loads(written([row], ("x", "s"), "json")) == [row]
    _, values = csv.reader(io.StringIO(written([row], ("x", "s"), "csv"), newline=""))
    assert (float(values[0]), values[1].removeprefix("'") if text[:1] in FORMULA else values[1]) == (number, text)
    assert float(written([row], ("x", "s"), "tsv").split("\n")[1].split("\t")[0]) == number


@pytest.mark.parametrize("format", ["csv", "fiftyone", "cleanlab"])
@pytest.mark.parametrize("letter", sorted(FORMULA))
def test_text_that_a_spreadsheet_would_run_is_quoted(format: str, letter: str) -> None:
    """An apostrophe goes before text, never before a number; every other format is exact."""
    row = {"label": f"{letter}cmd|' /C calc'!A0", "influence": -0.5, "rank": -3, "path": "a=b"}
    _, cells = csv.reader(io.StringIO(written([row], tuple(row), format), newline=""))
    assert cells == ["'" + row["label"], "-0.5", "-3", "a=b"]
    assert json.loads(written([row], tuple(row), "jsonl")) == row
    if letter not in "\t\r":
        assert written([row], tuple(row), "tsv").split("\n")[1].split("\t")[0] == row["label"]


@pytest.mark.parametrize(
    ("format", "expected"),
    [("csv", "a,b\n"), ("tsv", "a\tb\n"), ("json", "[]\n"), ("jsonl", ""), ("table", "(no rows)\n")],
)
def test_no_rows(format: str, expected: str) -> None:
    assert written([], ("a", "b"), format) == expected


def test_numpy_scalars_and_paths() -> None:
    row = {
        "i": np.int64(3),
        "x": np.float32(0.5),
        "y": np.float64(0.1),
        "b": np.bool_(True),
        "s": np.str_("n"),
        "p": Path("a/b"),
    }
    plain = {"i": 3, "x": 0.5, "y": 0.1, "b": True, "s": "n", "p": "a/b"}
    assert json.loads(written([row], tuple(row), "jsonl")) == plain
    assert written([row], tuple(row), "csv").split("\n")[1] == "3,0.5,0.1,true,n,a/b"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_non_finite_is_refused(format: str, value: float) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, write_through=True)
    with pytest.raises(InfluenceError, match="row 1: loss"):
        write_rows([{"loss": value}], ("loss",), format, stream)
    assert raw.getvalue() == b""


def test_unknown_format_and_type() -> None:
    with pytest.raises(InfluenceError):
        write_rows([], ("a",), "xml", io.StringIO())
    with pytest.raises(TypeError, match="a is a list"):
        write_rows([{"a": [1]}], ("a",), "jsonl", io.StringIO())


@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "tsv"])
def test_rows_stream(format: str) -> None:
    """Each row is written before the next but one is asked for."""
    stream, seen = io.StringIO(), []

    def rows() -> Iterator[dict[str, object]]:
        for _ in range(5):
            seen.append(stream.getvalue().count("row"))
            yield {"s": "row"}

    write_rows(rows(), ("s",), format, stream)
    assert seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("format", FORMATS)
def test_an_error_in_the_first_row_leaves_stdout_empty(format: str) -> None:
    def rows() -> Iterator[dict[str, object]]:
        raise InfluenceError("no")
        yield {}

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, write_through=True)
    with pytest.raises(InfluenceError):
        write_rows(rows(), ("a",), format, stream)
    assert raw.getvalue() == b""


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_an_error_of_ours_and_a_closed_pipe_is_not(format: str) -> None:
    class Full(io.StringIO):
        name = "out"
        error: OSError = OSError(errno.ENOSPC, "No space left on device")

        @property
        def buffer(self) -> Full:
            return self

        def write(self, text: str | bytes) -> int:
            raise self.error

    with pytest.raises(InfluenceError, match="out cannot be written: No space left"):
        write_rows([{"a": 1}], ("a",), format, Full())
    broken = Full()
    broken.error = BrokenPipeError()
    with pytest.raises(BrokenPipeError):
        write_rows([{"a": 1}], ("a",), format, broken)


# names that are not UTF-8


@pytest.mark.parametrize("format", ["csv", "tsv"])
def test_bytes_of_a_name_survive(tmp_path: Path, format: str) -> None:
    with open_output(tmp_path / "out") as stream:
        write_rows([{"path": NOT_UTF8}], ("path",), format, stream)
    assert (tmp_path / "out").read_bytes() == b"path\nbad-\xff.png\n"


@pytest.mark.parametrize("format", ["jsonl", "json"])
def test_json_escapes_bytes_of_a_name(tmp_path: Path, format: str) -> None:
    with open_output(tmp_path / "out") as stream:
        write_rows([{"path": NOT_UTF8}], ("path",), format, stream)
    text = (tmp_path / "out").read_text(encoding="utf-8", errors="strict")
    assert "\\udcff" in text
    loaded = json.loads(text)
    assert (loaded if format == "jsonl" else loaded[0]) == {"path": NOT_UTF8}


# open_output


def test_file_appears_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with open_output(path) as stream:
        stream.write("é\n")
        assert not path.exists()
        assert (tmp_path / "out.csv.part").exists()
    assert path.read_bytes() == "é\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, InfluenceError])
def test_failure_keeps_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "out.csv"
    path.write_text("old")

    def rows() -> Iterator[dict[str, object]]:
        yield {"a": 1}
        raise error("mid-way")

    with pytest.raises(error), open_output(path) as stream:
        write_rows(rows(), ("a",), "csv", stream)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unwritable_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "out.csv", "there is no folder"),
        (tmp_path / "file" / "out.csv", "is a file, not a folder"),
        (tmp_path / ("x" * 300), "cannot be written"),
    ):
        with pytest.raises(InfluenceError, match=says), open_output(path):
            pytest.fail("opened")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InfluenceError, match="no permission"):
        check_output(tmp_path / "out.csv")


def test_a_disk_that_fills_up_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_self: Path, _target: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InfluenceError, match="No space left"), open_output(tmp_path / "out.csv") as stream:
        stream.write("x")
    assert list(tmp_path.iterdir()) == []


def test_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to("real.csv")
    with open_output(tmp_path / "link.csv") as stream:
        stream.write("new")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "new"


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no /dev/null")
def test_device_is_written_in_place() -> None:
    with open_output(Path("/dev/null")) as stream:
        stream.write("x")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert not Path("/dev/null.part").exists()


def test_stdout_takes_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe gets UTF-8 and a name's own bytes, whatever the locale; stdout stays open."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with open_output(None) as stream:
        write_rows([{"path": NOT_UTF8 + "é"}], ("path",), "csv", stream)
    assert raw.getvalue() == b"path\nbad-\xff.png" + "é\n".encode()
    assert not sys.stdout.closed


def test_terminal_without_a_letter_spells_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", Screen(raw, encoding="ascii"))
    with open_output(None) as stream:
        write_rows([{"label": "é"}], ("label",), "table", stream)
    assert b"\\xe9" in raw.getvalue()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_stdout_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(InfluenceError, match="stdout cannot be written"), open_output(None) as stream:
            stream.write("x")
        # What is left in the buffer would fail once more on closing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


class OnTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("count", "lines"), [(3, 4), (9, 10), (10, 10), (3000, 10)])
def test_a_long_table_can_be_cut_after_ten_lines_that_say_where_the_rest_is(count: int, lines: int) -> None:
    rows = [{"index": number, "label": "a"} for number in range(count)]
    stream = OnTerminal()
    assert write_rows(rows, ("index", "label"), "table", stream, lines=10) == count
    shown = stream.getvalue().splitlines()
    assert len(shown) == lines
    assert ("-o FILE writes all rows" in shown[-1]) == (count > 9)


def test_files_and_pipes_get_all_rows_beside_a_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from influence_cli.results.session import begin_without_config, emit

    rows = [{"index": number} for number in range(50)]
    for output, format in ((tmp_path / "rows.txt", None), (None, "table"), (None, "csv")):
        session = begin_without_config(quiet=True, format=format, output=output)
        emit(session, rows, ("index",), brief=True)
        text = capsys.readouterr().out if output is None else output.read_text()
        assert len(text.splitlines()) == 51
