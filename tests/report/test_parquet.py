"""Parquet: typed columns that pyarrow and pandas read back, whatever is null, and a row group held at a time."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from influence_cli.errors import InfluenceError
from influence_cli.report.parquet import GROUP
from influence_cli.report.writer import write_rows
from influence_cli.runtime.outputs import open_output
from tests.conftest import Command
from tests.support import fork_server

NASTY = "=a\tb\nc\rd\\e\x1b[2J,\"f\" 'g' ünï 漢字 \u202e \U0001f600"


def table(rows, columns) -> pa.Table:
    """Write rows as the commands do, and read them with pyarrow."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw)
    write_rows(iter(rows), columns, "parquet", stream)
    return pq.read_table(io.BytesIO(raw.getvalue()))


def test_a_round_trip_by_pyarrow_and_pandas(tmp_path: Path) -> None:
    rows = [
        {"index": np.int64(3), "loss": np.float32(0.1), "flagged": np.bool_(True), "path": Path("a/b"), "label": NASTY},
        {"index": 2**62, "loss": 5e-324, "flagged": False, "path": None, "label": ""},
    ]
    path = tmp_path / "rows.parquet"
    with open_output(path) as stream:
        assert write_rows(rows, tuple(rows[0]), "parquet", stream) == 2
    assert list(tmp_path.iterdir()) == [path]
    read = pq.read_table(path)
    kinds = {
        "index": pa.int64(),
        "loss": pa.float64(),
        "flagged": pa.bool_(),
        "path": pa.string(),
        "label": pa.string(),
    }
    assert dict(zip(read.column_names, read.schema.types, strict=True)) == kinds
    plain = [
        {"index": 3, "loss": float(np.float32(0.1)), "flagged": True, "path": "a/b", "label": NASTY},
        {"index": 2**62, "loss": 5e-324, "flagged": False, "path": None, "label": ""},
    ]
    assert read.to_pylist() == plain
    frame = pd.read_parquet(path)
    assert frame["index"].tolist() == [3, 2**62]
    assert frame["flagged"].dtype == bool
    assert frame["label"].tolist() == [NASTY, ""]


def test_null_columns_have_the_type_of_their_name() -> None:
    columns = ("test", "test_path", "self_influence", "new")
    read = table([dict.fromkeys(columns)] * 3, columns)
    assert read.schema.types == [pa.int64(), pa.string(), pa.float64(), pa.string()]
    assert [column.null_count for column in read.columns] == [3] * 4
    assert table([], columns).schema == read.schema


def test_a_column_that_is_null_for_a_whole_row_group() -> None:
    def rows() -> Iterator[dict[str, object]]:
        for number in range(GROUP + 5):
            late = number >= GROUP
            yield {"path": "x" if late else None, "loss": 0.5 if late else None, "new": number if late else None}

    read = table(rows(), ("path", "loss", "new"))
    assert read.slice(GROUP - 1, 2).to_pylist() == [
        {"path": None, "loss": None, "new": None},
        {"path": "x", "loss": 0.5, "new": str(GROUP)},
    ]


def test_whole_numbers_first_and_text_beside_numbers() -> None:
    assert table([{"loss": 0}, {"loss": 0.5}], ("loss",))["loss"].to_pylist() == [0.0, 0.5]
    assert table([{"x": 1}, {"x": 0.5}], ("x",))["x"].to_pylist() == [1.0, 0.5]
    assert table([{"x": 1}, {"x": "a"}, {"x": None}], ("x",))["x"].to_pylist() == ["1", "a", None]


@pytest.mark.parametrize(("first", "later"), [(1, 0.5), (1, 2**63), (True, 2), (0.5, "a")])
def test_a_later_value_of_another_type_is_an_error(first: object, later: object) -> None:
    rows = ({"x": first if number < GROUP else later} for number in range(GROUP + 1))
    with pytest.raises(InfluenceError, match=r"x is .*, but the first rows of this column are "):
        table(rows, ("x",))


def test_a_name_that_is_not_utf8_is_spelt_as_in_json() -> None:
    name = os.fsdecode(b"bad-\xff.png")
    assert table([{"path": name}], ("path",))["path"].to_pylist() == ["bad-\\udcff.png"]
    assert "\\udcff" in json.dumps(name)


def test_row_groups_are_written_before_the_next_rows_are_asked_for() -> None:
    raw, sizes = io.BytesIO(), []
    stream = io.TextIOWrapper(raw)

    def rows() -> Iterator[dict[str, object]]:
        for number in range(2 * GROUP + 2):
            if number % GROUP == 1:
                sizes.append(len(raw.getvalue()))
            yield {"index": number}

    write_rows(rows(), ("index",), "parquet", stream)
    assert sizes[0] == 0
    assert 0 < sizes[1] < sizes[2]
    assert pq.ParquetFile(io.BytesIO(raw.getvalue())).num_row_groups == 3


def test_a_failure_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, object]]:
        yield {"x": 1}
        raise InfluenceError("mid-way")

    with pytest.raises(InfluenceError, match="mid-way"), open_output(tmp_path / "a.parquet") as stream:
        write_rows(rows(), ("x",), "parquet", stream)
    assert list(tmp_path.iterdir()) == []


def test_rank_writes_the_same_numbers_as_jsonl(influence: Command, stored: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in influence("rank", 3, 5, "-q", cwd=stored).out.splitlines()]
    influence("rank", 3, 5, "-q", "-o", tmp_path / "rows.parquet", cwd=stored)
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == lines
    assert (tmp_path / "rows.parquet.run.json").is_file()


@pytest.mark.slow
def test_a_pipe_takes_it_and_may_close(stored: Path) -> None:
    command = [sys.executable, "-m", "influence_cli", "rank", "3", "-q", "--format", "parquet"]
    done = fork_server.run(command, cwd=stored, capture_output=True, check=True)
    assert pq.read_table(io.BytesIO(done.stdout)).num_rows == 20
    with fork_server.Popen(command, cwd=stored, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0


def test_it_is_not_for_a_terminal_and_its_package_is_named_before_any_work(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    done = influence("rank", 3, "-o", "rows.parquet", cwd=project, code=2)
    assert done.err.splitlines() == [
        "error: parquet needs pyarrow, which is not installed",
        "  pip install 'influence-cli[parquet]'",
    ]
    assert not list(project.glob("*.h5"))
