"""Two results side by side: overlap and correlation against sets and scipy, and every file that is no result."""

from __future__ import annotations

import contextlib
import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from influence_cli import load_config, load_tasks
from influence_cli.commands import compare as compare_command
from influence_cli.data.batches import read_batches
from influence_cli.errors import InfluenceError
from influence_cli.report import parquet
from influence_cli.report.table import Row
from influence_cli.report.writer import write_rows
from influence_cli.results import rank_rows
from influence_cli.results.compare import compare_results, comparison_rows, labels_changed, quality_change
from influence_cli.results.mislabel_rows import COLUMNS as MISLABEL_COLUMNS
from influence_cli.results.reader import KINDS, NUMBERS, WHOLE, Result, read_result
from tests.conftest import Command

MISLABELS = ("rank", "index", "path", "label", "suggested", "score")
RANK = ("test", "test_path", "effect", "rank", "index", "path", "label", "influence")


def mislabels(indices: list[int], scores: list[float], labels: dict[int, str] | None = None) -> Result:
    rows: list[Row] = [
        {
            "rank": place,
            "index": index,
            "path": f"/old/{index}.png",
            "label": (labels or {}).get(index, "ant"),
            "suggested": "bee",
            "score": score,
        }
        for place, (index, score) in enumerate(zip(indices, scores, strict=True), start=1)
    ]
    return Result(Path("a.csv"), "mislabels", tuple(rows), tuple(f"a.csv:{n + 2}" for n in range(len(rows))))


def ranking(tests: list[int | None], seed: int, path: str = "r.csv", test_path: str | None = None) -> Result:
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    for test in tests:
        values = random.normal(size=12)
        for effect, order in (("helpful", np.argsort(-values)), ("harmful", np.argsort(values))):
            for place, index in enumerate(order[:5], start=1):
                head: Row = {"test": test, "test_path": test_path, "effect": effect, "rank": place}
                rows.append({**head, "index": int(index), "path": None, "label": "ant", "influence": values[index]})
    return Result(Path(path), "rank", tuple(rows), tuple(f"{path}:{n + 2}" for n in range(len(rows))))


def test_kept_entered_and_left_are_those_of_the_sets() -> None:
    a, b = mislabels([5, 3, 9, 1], [0.9, 0.8, 0.7, 0.6]), mislabels([9, 5, 2, 4], [0.95, 0.9, 0.5, 0.4])
    (found,), notes = compare_results(a, b)
    assert notes == []
    assert (found.top, found.overlap, found.common) == (4, 0.5, 2)
    assert [(pair.change, pair.row["index"]) for pair in found.pairs] == [
        ("kept", 9),
        ("kept", 5),
        ("entered", 2),
        ("entered", 4),
        ("left", 3),
        ("left", 1),
    ]
    assert (found.correlation, found.count("entered")) == (None, 2)
    rows = comparison_rows([found], "mislabels")
    assert rows[0] == {
        "test": None,
        "test_path": None,
        "effect": None,
        "change": "kept",
        "index": 9,
        "path": "/old/9.png",
        "label_a": "ant",
        "label_b": "ant",
        "rank_a": 3,
        "rank_b": 1,
        "value_a": 0.7,
        "value_b": 0.95,
    }
    assert (rows[2]["rank_a"], rows[4]["rank_b"]) == (None, None)


def test_top_cuts_both_and_what_lies_beyond_still_has_its_place() -> None:
    a, b = mislabels([5, 3, 9, 1], [0.9, 0.8, 0.7, 0.6]), mislabels([9, 5, 2, 3], [0.95, 0.9, 0.5, 0.4])
    (found,), _ = compare_results(a, b, 2)
    rows = comparison_rows([found], "mislabels")
    assert [(row["change"], row["index"], row["rank_a"], row["rank_b"]) for row in rows] == [
        ("kept", 5, 1, 2),
        ("entered", 9, 3, 1),
        ("left", 3, 2, 4),
    ]
    assert found.overlap == 0.5


def test_a_longer_list_is_cut_to_the_shorter() -> None:
    (found,), _ = compare_results(mislabels([1, 2, 3], [0.9, 0.8, 0.7]), mislabels([2, 1], [0.9, 0.8]))
    assert (found.top, found.overlap) == (2, 1.0)


@pytest.mark.parametrize("seed", range(4))
def test_every_test_example_and_effect_is_compared_alone(seed: int) -> None:
    a, b = ranking([3, 7, 8], seed), ranking([7, 3], seed + 100, "s.csv")
    found, notes = compare_results(a, b)
    assert notes == ["s.csv lacks 1 test example of r.csv"]
    assert [(own.test, own.effect) for own in found] == [
        (3, "helpful"),
        (3, "harmful"),
        (7, "helpful"),
        (7, "harmful"),
    ]
    for own in found:
        values = []
        sets = []
        for result in (a, b):
            rows = [row for row in result.rows if row["test"] == own.test]
            values.append({row["index"]: float(row["influence"] or 0) for row in rows if row["effect"] == own.effect})
            sets.append({row["index"] for row in rows if row["effect"] == own.effect})
        assert own.overlap == len(sets[0] & sets[1]) / 5
        both = [index for index in values[0] if index in values[1]]
        assert own.common == len(both)
        if len(both) > 2:
            expected = spearmanr([values[0][i] for i in both], [values[1][i] for i in both]).statistic
            assert own.correlation == pytest.approx(expected)


def test_the_same_result_is_the_same() -> None:
    found, _ = compare_results(ranking([1, 2], 0), ranking([1, 2], 0))
    assert all(own.overlap == 1 and own.correlation == pytest.approx(1) for own in found)
    assert {pair.change for own in found for pair in own.pairs} == {"kept"}


def test_files_and_aggregates_are_test_examples_too() -> None:
    for path in ("x.png", None):
        found, _ = compare_results(ranking([None], 0, test_path=path), ranking([None], 1, test_path=path))
        assert [(own.test, own.test_path, own.effect) for own in found] == [
            (None, path, "helpful"),
            (None, path, "harmful"),
        ]


def test_the_other_way_round_compares_test_examples(stored: Path, influence: Command, tmp_path: Path) -> None:
    for name, lam in (("a.csv", "0.01"), ("b.csv", "10")):
        influence("rank", "--train", 5, "-s", f"curvature.damping={lam}", "-o", tmp_path / name, cwd=stored)
    done = influence("compare", "a.csv", "b.csv", "--format", "csv", cwd=tmp_path)
    rows = list(csv.DictReader(done.out.splitlines()))
    assert {row["index"] for row in rows} == {"5"}
    assert len({row["test"] for row in rows}) > 5
    assert done.err.startswith("helpful, first 10: ")


def test_labels_may_have_changed_between_the_two() -> None:
    a, b = mislabels([1, 2], [0.9, 0.8], {1: "ant"}), mislabels([1, 2], [0.3, 0.2], {1: "bee"})
    (found,), _ = compare_results(a, b)
    assert [(row["label_a"], row["label_b"]) for row in comparison_rows([found], "mislabels")] == [
        ("ant", "bee"),
        ("ant", "ant"),
    ]


def test_a_data_set_may_move_as_a_whole_but_not_change_its_order() -> None:
    a, b = mislabels([1, 2], [0.9, 0.8]), mislabels([1, 2], [0.9, 0.8])
    moved = tuple({**row, "path": str(row["path"]).replace("/old/", "/new/here/")} for row in b.rows)
    compare_results(a, Result(b.path, b.kind, moved, b.places))
    other = ({**b.rows[0], "path": "/old/7.png"}, b.rows[1])
    with pytest.raises(InfluenceError, match=r"a\.csv:2: example 1 is 7\.png, but in a\.csv it is 1\.png"):
        compare_results(a, Result(b.path, b.kind, other, b.places))


def test_kinds_do_not_mix_and_nothing_in_common_is_refused() -> None:
    with pytest.raises(InfluenceError, match=r"a result of influence mislabels, r\.csv of influence rank"):
        compare_results(mislabels([1], [0.5]), ranking([1], 0))
    with pytest.raises(InfluenceError, match="no test example in common"):
        compare_results(ranking([1], 0), ranking([2], 0))


def test_top_beyond_the_shorter_list_compares_what_both_have_and_says_so() -> None:
    a, b = mislabels([1, 2, 3, 4], [0.9, 0.8, 0.7, 0.6]), mislabels([2, 1], [0.9, 0.8])
    (found,), notes = compare_results(a, b, 3)
    assert (found.top, found.overlap, found.listed, len(found.pairs)) == (2, 1.0, (4, 2), 2)
    assert notes == ["a.csv has only 2 of the 3 rows of --top: only as many are compared"]


def only(result: Result, effect: str, tests: tuple[int, ...] = (1, 2)) -> Result:
    kept = [n for n, row in enumerate(result.rows) if row["effect"] == effect or row["test"] not in tests]
    return Result(
        result.path, "rank", tuple(result.rows[n] for n in kept), tuple(result.places[n] for n in kept), result.on
    )


def test_correlation_is_within_an_effect() -> None:
    # Either effect is in reverse order in the other result; over both effects the two would seem to agree.
    def result(sign: int) -> Result:
        rows: list[Row] = [
            {
                "test": 1,
                "test_path": None,
                "effect": effect,
                "rank": place,
                "index": index,
                "path": None,
                "label": "ant",
                "influence": way * (10 - place),
            }
            for way, effect, items in ((1, "helpful", (1, 2, 3)), (-1, "harmful", (4, 5, 6)))
            for place, index in enumerate(items[::sign], start=1)
        ]
        return Result(Path("r.csv"), "rank", tuple(rows), tuple(f"r.csv:{n + 2}" for n in range(6)))

    found, _ = compare_results(result(1), result(-1))
    assert [(own.effect, own.common) for own in found] == [("helpful", 3), ("harmful", 3)]
    assert [own.correlation for own in found] == pytest.approx([-1, -1])


def test_lists_that_only_one_has_are_said_and_an_empty_comparison_is_refused() -> None:
    a, b = ranking([1, 2], 0), ranking([1, 2], 1, "s.csv")
    found, notes = compare_results(a, only(b, "helpful", (2,)))
    assert len(found) == 3
    assert notes == ["s.csv lacks 1 list of r.csv (helpful or harmful)"]
    with pytest.raises(InfluenceError, match=r"r\.csv and s\.csv have no list in common"):
        compare_results(only(a, "helpful"), only(b, "harmful"))


def test_an_example_that_is_in_a_list_twice_is_named() -> None:
    a = mislabels([1, 2, 1], [0.9, 0.8, 0.7])
    with pytest.raises(InfluenceError, match=r"a\.csv:4: example 1 is already in the same list at a\.csv:2"):
        compare_results(a, a)


def test_positions_that_have_changed_are_told_from_other_files() -> None:
    a, b = mislabels([1, 2], [0.9, 0.8]), mislabels([1, 2], [0.9, 0.8])
    swapped = tuple({**row, "path": f"/old/{3 - int(row['index'] or 0)}.png"} for row in b.rows)
    with pytest.raises(InfluenceError) as raised:
        compare_results(a, Result(b.path, b.kind, swapped, b.places))
    assert raised.value.hint.startswith("positions have changed (relabel --apply-moves, or a renamed class folder); ")
    other = ({**b.rows[0], "path": "/old/7.png"}, b.rows[1])
    with pytest.raises(InfluenceError) as raised:
        compare_results(a, Result(b.path, b.kind, other, b.places))
    assert raised.value.hint.startswith("files were added or removed")


def test_test_examples_of_other_files_are_refused() -> None:
    a, b = ranking([1], 0, test_path="x.png"), ranking([1], 1, "s.csv", test_path="y.png")
    with pytest.raises(InfluenceError, match=r"s\.csv:2: test example 1 is y\.png, but in r\.csv it is x\.png"):
        compare_results(a, b)


# Files


def written(path: Path, rows: tuple[Row, ...], /, **run: object) -> Path:
    """Write rows of mislabels as CSV, and a run file where there are facts for one."""
    with path.open("w", encoding="utf-8", newline="\n") as stream:
        write_rows(rows, MISLABELS, path.suffix[1:], stream)
    if run:
        path.with_name(path.name + ".run.json").write_text(json.dumps(run))
    return path


def test_train_and_test_labels_are_told_apart_by_the_run_files(tmp_path: Path) -> None:
    rows = mislabels([1, 2], [0.9, 0.8]).rows
    a = read_result(written(tmp_path / "a.csv", rows, command=["influence", "mislabels"]))
    for number, words in enumerate((["--on", "test"], ["--on=test"])):
        b = read_result(written(tmp_path / f"b{number}.csv", rows, command=["influence", "mislabels", *words]))
        assert (a.on, b.on) == ("train", "test")
        with pytest.raises(InfluenceError, match="is about the train labels"):
            compare_results(a, b)
        compare_results(b, b)
    compare_results(a, read_result(written(tmp_path / "c.csv", rows)))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_a_file_that_was_cut_off_is_told_by_its_run_file(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path / f"a.{suffix}", mislabels([1, 2], [0.9, 0.8]).rows, rows=5)
    assert len(read_result(path).rows) == 2  # cut with head: the last line has its end
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InfluenceError, match="has 2 rows, but its run file says 5: the file was cut off"):
        read_result(path)
    path.with_name(path.name + ".run.json").write_text('{"rows": 2}')
    assert len(read_result(path).rows) == 2


def test_a_line_of_json_that_is_cut_short_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", mislabels([1, 2], [0.9, 0.8]).rows)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InfluenceError, match=r"a\.jsonl:2 cannot be read: "):
        read_result(path)


def test_every_number_of_a_result_is_finite(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = dict(zip(MISLABELS, (1, 2, "p", "ant", "bee", 0.5), strict=True))
    path.write_text(json.dumps(row | {"loss": float("inf")}) + "\n")
    with pytest.raises(InfluenceError, match=r"a\.jsonl:1: loss is inf, which is not a finite number"):
        read_result(path)


def test_the_columns_agree_wherever_they_are_listed() -> None:
    columns = {"rank": set(rank_rows.COLUMNS), "mislabels": set(MISLABEL_COLUMNS)}
    assert columns.keys() == KINDS.keys()
    assert all(set(KINDS[kind]) <= columns[kind] for kind in KINDS)
    typed = {column for names in parquet.KINDS.values() for column in names}
    assert columns["rank"] | columns["mislabels"] | set(compare_command.COLUMNS) <= typed
    assert set(WHOLE) <= set(parquet.KINDS["int64"])
    assert set(NUMBERS) <= set(parquet.KINDS["double"])


@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_reads_back_as_it_was(stored: Path, influence: Command, tmp_path: Path, format: str) -> None:
    exact = tmp_path / "exact.json"
    path = tmp_path / f"rows.{format}"
    for output in (exact, path):
        influence("rank", 3, "--top", 3, "-o", output, cwd=stored)
    found = read_result(path)
    assert found.kind == "rank"
    assert [{column: row[column] for column in RANK} for row in found.rows] == [
        {column: row[column] for column in RANK} for row in json.loads(exact.read_text())
    ]


def test_text_that_csv_and_tsv_have_to_escape_reads_back(tmp_path: Path) -> None:
    texts = ["=1+1", "'=x", "a\tb\\n\nc\\", 'q"u,o', "عربי", "-", "+5"]
    rows = [dict(zip(MISLABELS, (n + 1, n, text, text, text, 0.5), strict=True)) for n, text in enumerate(texts)]
    for format in ("csv", "tsv"):
        path = tmp_path / f"a.{format}"
        with path.open("w", encoding="utf-8", newline="\n") as stream:
            write_rows(rows, MISLABELS, format, stream)
        assert [row["label"] for row in read_result(path).rows] == texts


BAD = [
    ("a.csv", "index,label\n1,ant\n", "not a result of influence rank or mislabels: it has the columns index, label"),
    ("a.csv", ",".join(MISLABELS) + "\n", "has no rows"),
    ("a.csv", "", "has no rows"),
    ("a.csv", ",".join(MISLABELS) + "\n1,2,p,ant,bee\n", "a.csv:2: 5 fields, but the header has 6"),
    ("a.csv", ",".join(MISLABELS) + "\n1,2,p,ant,bee,high\n", "a.csv:2: score is 'high', not a number"),
    ("a.csv", ",".join(MISLABELS) + "\n1,2.5,p,ant,bee,1\n", "a.csv:2: index is '2.5', not a number"),
    ("a.csv", ",".join(MISLABELS) + "\n,2,p,ant,bee,1\n", "a.csv:2: rank is None, not a number"),
    ("a.jsonl", '{"rank": 1}\n', "is not a result of influence rank or mislabels: it has the columns rank"),
    ("a.jsonl", "[1]\n", "a.jsonl:1 is a list, not an object with columns"),
    ("a.jsonl", "{oops\n", "a.jsonl:1 cannot be read: "),
    ("a.jsonl", '{"rank": NaN}\n', "is not a result of influence rank or mislabels"),
    ("a.csv", ",".join(MISLABELS) + "\n1,2,p,ant,bee,nan\n", "a.csv:2: score is nan, which is not a finite number"),
    ("a.csv", ",".join(MISLABELS) + "\n1,2,p,ant,bee,1e999\n", "a.csv:2: score is inf, which is not a finite number"),
    ("a.json", "3", "a.json: row 1 is a int, not an object with columns"),
    ("a.txt", "rank index\n", "a.txt: a result cannot be read from this format"),
    ("a.parquet", "no", "a.parquet cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_what_is_no_result_is_refused_in_one_line(
    tmp_path: Path, influence: Command, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    done = influence("compare", name, name, "-o", "out.csv", cwd=tmp_path, code=2)
    assert done.err.startswith("error: ")
    assert message in done.err
    assert len(done.err.splitlines()) <= 2
    assert not (tmp_path / "out.csv").exists()


def test_a_row_without_a_column_is_named(tmp_path: Path, influence: Command) -> None:
    row = dict(zip(MISLABELS, (1, 2, "p", "ant", "bee", 0.5), strict=True))
    short = {column: row[column] for column in MISLABELS if column != "score"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(short) + "\n")
    done = influence("compare", "a.jsonl", "a.jsonl", cwd=tmp_path, code=2)
    assert done.err == "error: a.jsonl:2: the column score is missing\n  write the result again\n"


def test_a_file_that_is_not_there(tmp_path: Path, influence: Command) -> None:
    assert "no.csv: there is no such file" in influence("compare", "no.csv", "no.csv", cwd=tmp_path, code=2).err


# The command


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("-o", "a.csv", "a.csv would be both an input and the file of -o"),
        ("-o", "./b.csv", "b.csv would be both an input and the file of -o"),
        ("-o", "link.csv", "link.csv would be both an input and the file of -o"),
        ("-o", "b.csv.run.json", "would be both the run file of an input and the file of -o"),
        ("--report", "a.csv", "a.csv would be both an input and the page of --report"),
        ("--report", "a.csv.run.json", "would be both the run file of an input and the page of --report"),
    ],
)
def test_an_input_is_never_written(tmp_path: Path, influence: Command, option: str, name: str, message: str) -> None:
    for own in ("a.csv", "b.csv"):
        written(tmp_path / own, mislabels([1, 2], [0.9, 0.8]).rows, rows=2)
    (tmp_path / "link.csv").symlink_to("a.csv")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = influence("compare", "a.csv", "b.csv", option, name, cwd=tmp_path, code=2)
    assert message in done.err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_test_example_0_has_its_number(tmp_path: Path, influence: Command) -> None:
    with (tmp_path / "r.csv").open("w", encoding="utf-8", newline="\n") as stream:
        write_rows(ranking([0], 0, test_path="x.png").rows, RANK, "csv", stream)
    done = influence("compare", "r.csv", "r.csv", "--top", 7, cwd=tmp_path)
    assert "test 0, helpful, first 5: 100% in both" in done.err
    assert "warning: r.csv has only 5 of the 7 rows of --top" in done.err


@pytest.fixture
def results(stored: Path, influence: Command, tmp_path: Path) -> Path:
    influence("mislabels", "--top", 20, "-o", tmp_path / "a.csv", cwd=stored)
    influence("mislabels", "--signal", "loss", "--top", 20, "-o", tmp_path / "b.csv", cwd=stored)
    return tmp_path


def test_rows_go_out_and_what_is_alike_is_said(results: Path, influence: Command) -> None:
    done = influence("compare", "a.csv", "b.csv", "-o", "c.csv", "--report", "c.html", cwd=results)
    rows = list(csv.DictReader((results / "c.csv").read_text().splitlines()))
    sets = [
        {row["index"] for row in csv.DictReader((results / name).read_text().splitlines())}
        for name in ("a.csv", "b.csv")
    ]
    both = sets[0] & sets[1]
    assert {row["index"] for row in rows if row["change"] == "kept"} == both
    assert {row["index"] for row in rows if row["change"] == "entered"} == sets[1] - both
    assert {row["index"] for row in rows if row["change"] == "left"} == sets[0] - both
    assert done.err.startswith(f"first 20: {len(both) / 20:.0%} in both, {20 - len(both)} newly suspicious, ")
    facts = json.loads((results / "c.csv.run.json").read_text())
    assert facts["comparisons"][0]["kept"] == len(both)
    page = (results / "c.html").read_text()
    assert page.count("<img ") == 40
    changed = ("No longer suspicious (left: only in A)", "Newly suspicious (entered: only in B)")
    kept = ("In both lists (kept): A", "In both lists (kept): B")
    headings = [page.index(text) for text in (*changed, *kept)]
    assert headings == sorted(headings)
    assert "most suspicious labels" in page


def test_images_that_have_moved_are_named_and_nothing_is_written(results: Path, influence: Command) -> None:
    text = (results / "a.csv").read_text().splitlines()
    text[3] = text[3].replace("/train/", "/elsewhere/")
    (results / "a.csv").write_text("\n".join(text) + "\n")
    done = influence("compare", "a.csv", "b.csv", "-o", "c.csv", "--report", "c.html", cwd=results, code=2)
    assert done.err.splitlines()[-2].startswith("error: a.csv:4: the image ")
    assert not (results / "c.csv").exists()
    assert not (results / "c.html").exists()


def test_without_files_the_images_come_from_the_configs_data_set(
    results: Path, stored: Path, influence: Command
) -> None:
    for name in ("a.csv", "b.csv"):
        without(results / name, "path")
    influence("compare", "a.csv", "b.csv", cwd=results)
    done = influence("compare", "a.csv", "b.csv", "--report", "c.html", cwd=results, code=2)
    assert "these results name no files, so --report needs the data set" in done.err
    influence("compare", "a.csv", "b.csv", "--report", "c.html", "-c", stored / "influence.yaml", cwd=results)
    assert (results / "c.html").read_text().count("<img ") == 40


def test_what_changed_far_down_a_long_list_is_on_the_page(
    tmp_path: Path, influence: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_cli.pages.compare.PLACES", 3)
    for index in range(12):
        Image.new("L", (8, 8)).save(tmp_path / f"{index}.png")
    for name, indices in (("a.csv", range(11)), ("b.csv", [*range(10), 11])):
        rows = mislabels(list(indices), [1 - place / 20 for place in range(11)]).rows
        written(tmp_path / name, tuple({**row, "path": str(tmp_path / f"{row['index']}.png")} for row in rows))
    influence("compare", "a.csv", "b.csv", "--report", "c.html", cwd=tmp_path)
    page = (tmp_path / "c.html").read_text()
    assert page.count("<img ") == 2 + 3 + 3
    assert page.index('alt="example 10, ') < page.index('alt="example 11, ') < page.index('alt="example 0, ')
    assert "The page shows the first 3 per list that were kept" in page


@pytest.mark.parametrize("files", [True, False])
def test_the_page_of_rank_train_shows_the_test_examples(
    stored: Path, influence: Command, tmp_path: Path, files: bool
) -> None:
    for name, lam in (("a.csv", "0.01"), ("b.csv", "10")):
        influence("rank", "--train", 5, "-s", f"curvature.damping={lam}", "-o", tmp_path / name, cwd=stored)
        if not files:
            without(tmp_path / name, "path", "test_path")
    config = stored / "influence.yaml"
    influence("compare", "a.csv", "b.csv", "-o", "c.csv", "--report", "c.html", "-c", config, cwd=tmp_path)
    page = (tmp_path / "c.html").read_text()
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    for row in rows:
        assert f'alt="test example {row["test"]}, labelled ' in page
    assert "no image" not in page.partition("<main>")[2]
    assert "Training example 5: test examples to which it is most helpful" in page


def test_images_by_position_are_of_the_data_set_of_the_results(results: Path, stored: Path, influence: Command) -> None:
    for name in ("a.csv", "b.csv"):
        without(results / name, "path")
    text = (results / "b.csv").read_text().splitlines()
    fields = text[2].split(",")
    fields[3] = "else"
    (results / "b.csv").write_text("\n".join([*text[:2], ",".join(fields), *text[3:]]) + "\n")
    config = stored / "influence.yaml"
    done = influence("compare", "a.csv", "b.csv", "--report", "c.html", "-c", config, cwd=results, code=2)
    assert f"error: b.csv:3: example {fields[1]} is labelled else, but in the train data set of " in done.err
    assert "these results are from another data set (or from --on test)" in done.err
    assert not (results / "c.html").exists()


def without(path: Path, *columns: str) -> None:
    """Empty columns of a result."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, **dict.fromkeys(columns, "")} for row in rows)


def test_comparing_leaves_torch_alone(results: Path) -> None:
    code = "import sys; from influence_cli.cli import app; app(['compare', 'a.csv', 'b.csv'], standalone_mode=False); "
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"],
        cwd=results,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "False"


def test_accuracy_loss_and_changed_labels_of_two_runs_are_compared() -> None:
    before, after = mislabels([5, 3, 9, 1], [0.9, 0.8, 0.7, 0.6]), mislabels([9, 5, 2], [0.95, 0.9, 0.5])
    assert quality_change(before, after) is None
    before = replace(before, quality=(0.85, 0.4119))
    after = replace(after, quality=(0.9125, 0.4))
    assert quality_change(before, after) == "test accuracy rose from 85.0% to 91.2%, loss fell from 0.412 to 0.4"
    assert quality_change(before, before) == "test accuracy stayed at 85.0%, loss stayed at 0.412"
    rows = tuple(row | {"label": "bee"} if row["index"] in (5, 2) else row for row in after.rows)
    (found,), _ = compare_results(before, replace(after, rows=rows))
    # Of the first three of each: 5 has another label now, 2 has entered, and 3 is not listed any more.
    assert labels_changed(found) == 1


@pytest.mark.slow
def test_a_run_over_all_errors_notes_what_the_model_predicts(stored: Path, influence: Command, tmp_path: Path) -> None:
    influence("rank", "misclassified", "--top", 2, "-o", tmp_path / "a.csv", cwd=stored)
    result = read_result(tmp_path / "a.csv")
    # The same numbers by a loop over all test images.
    influence("rank", "0:", "--top", 1, "-o", tmp_path / "b.csv", cwd=stored)
    tests = {row["test"]: row for row in read_result(tmp_path / "b.csv").rows}
    assert result.quality is not None
    assert result.quality[0] == pytest.approx(
        np.mean([row["test_label"] == row["test_predicted"] for row in tests.values()])
    )
    assert read_result(tmp_path / "b.csv").quality is None  # not all errors were asked for
    config = load_config(stored / "influence.yaml")
    with contextlib.chdir(stored), torch.no_grad():
        (task,) = load_tasks(config)
        tests_of = task.test_split()
        losses = [
            float(task.loss(task.model(batch.inputs), batch.targets).sum())
            for batch in read_batches(tests_of, tests_of.indices, 16)
        ]
    assert result.quality[1] == pytest.approx(sum(losses) / len(tests), rel=1e-5)
