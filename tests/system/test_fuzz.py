"""Made-up bytes for all that reads files of strangers: a result that is sound, or one line of error, and nothing else.

The targets are those of fuzz/targets.py, which `make fuzz` also runs by coverage, for longer.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz.run import counts, main
from fuzz.targets import CLASSES, PATHS, SEEDS, TARGETS, YAML, folder, forged, read_store, whole_store
from influence_cli.errors import InfluenceError, one_line
from influence_cli.relabel.decisions import COLUMNS, DECISIONS

# The same inputs on every run: what fails once fails always. `make test-slow` takes more of them.
MORE = 3 if os.environ.get("INFLUENCE_TEST_EXAMPLES") == "more" else 1
few = settings(derandomize=True, deadline=None, max_examples=15 * MORE, database=None)
many = settings(few, max_examples=50 * MORE)

SOUP = st.binary(max_size=200)
# Bytes that mean something to one of the readers.
WORDS = st.sampled_from([
    b"\n", b"\r\n", b":", b",", b"\t", b"\0", b'"', b"'", b"[", b"]", b"{", b"}", b"&a ", b"*a", b"!!", b"- ", b"-",
    b"|", b"#", b"=", b"1e999", b"-1", b"9" * 5000, b"0x" + b"f" * 5000, b"2:1", b"misclassified", b"index", b"label",
    b"relabel", b"\xff", b"\xef\xbb\xbf", "λ\u2028\u202e".encode(), b"\x1b[31m", b"null", b"nan", b"~", b"../..",
    b"/dev/zero", b"x" * 300, b'"\\ud800"', b'"\\0"',
])  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Cut, repeat and overwrite parts of something valid."""
    text = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, len(text)))
        size = draw(st.sampled_from([0, 0, 1, 2, 5, 20]))
        put = draw(st.one_of(WORDS, st.binary(max_size=3), st.just(bytes(text[at : at + 30]))))
        text[at : at + size] = put
    return bytes(text)


def inputs(name: str) -> st.SearchStrategy[bytes]:
    return mutated(tuple(SEEDS[name])) | st.lists(WORDS | st.binary(max_size=4), max_size=20).map(b"".join) | SOUP


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_fuzzer_begins_with_is_read(name: str) -> None:
    for seed in SEEDS[name]:
        TARGETS[name](seed)


@many
@given(inputs("config"))
def test_any_config_is_read_or_refused(data: bytes) -> None:
    TARGETS["config"](data)


@many
@given(inputs("tests"))
def test_any_tests_are_found_or_refused(data: bytes) -> None:
    TARGETS["tests"](data)


@many
@given(inputs("decisions"))
def test_any_decisions_are_read_or_refused(data: bytes) -> None:
    TARGETS["decisions"](data)


@many
@given(inputs("labels"))
def test_any_labels_are_read_or_refused(data: bytes) -> None:
    TARGETS["labels"](data)


@many
@given(inputs("store"))
def test_any_store_is_read_or_refused(data: bytes) -> None:
    TARGETS["store"](data)


# --- values where a key takes others

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["auto", "ekfac", "8GB", "*", 2**70, -1, 0, "", "a\0b", "~root/x", "\udcff", "cuda:9"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
WHOLE: dict[str, Any] = yaml.safe_load(YAML)


def places(values: Any, keys: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """List every place of a config."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [found for key, value in items for found in ((*keys, key), *places(value, (*keys, key)))]


@pytest.mark.parametrize("keys", places(WHOLE), ids=lambda keys: ".".join(map(str, keys)))
@settings(few, max_examples=4 * MORE)
@given(value=VALUES)
def test_any_value_of_any_key_is_read_or_refused(keys: tuple[str | int, ...], value: Any) -> None:
    text = json.dumps(value, allow_nan=True).replace("NaN", ".nan").replace("Infinity", ".inf")
    override = b"\0" + f"{'.'.join(map(str, keys))}={text}".encode()
    TARGETS["config"](YAML + override)
    changed = json.loads(json.dumps(WHOLE))
    holder = changed
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    TARGETS["config"](json.dumps(changed).encode())


# --- tables that are nearly right

CELLS = st.sampled_from(
    ["0", "1", "8", "9", "-1", "1.0", "1e3", "", " ", *CLASSES, "'=owl", *DECISIONS, *PATHS[:2], "x"]
)


@many
@given(header=st.permutations(COLUMNS), rows=st.lists(st.lists(CELLS, min_size=5, max_size=5), max_size=4))
def test_any_cells_are_decisions_or_refused(header: list[str], rows: list[list[str]]) -> None:
    TARGETS["decisions"]("\n".join(map(",".join, [header, *rows])).encode())


# --- a store


@st.composite
def edits(draw: st.DrawFn) -> bytes:
    """Change, insert and cut bytes of a store, often where there are some that matter."""
    content = bytearray(whole_store()[0])
    used = [at for at, byte in enumerate(content) if byte]
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.sampled_from(used) | st.integers(0, len(content)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            del content[at:]
        elif kind == 1:
            del content[at : at + draw(st.integers(1, 300))]
        elif kind == 2:
            content[at:at] = draw(st.binary(min_size=1, max_size=30))
        else:
            content[at : at + 1] = bytes([draw(st.integers(0, 255))])
    return bytes(content)


@many
@given(content=edits())
def test_an_edited_store_gives_what_was_stored_or_an_error(content: bytes) -> None:
    read_store(content)


def test_a_store_cut_anywhere_is_refused() -> None:
    whole = whole_store()[0]
    assert opens(whole)
    assert not any(opens(whole[:size]) for size in range(0, len(whole), 97))


def opens(content: bytes) -> bool:
    from influence_cli.store.store import Store

    path = folder() / "cut.h5"
    path.write_bytes(content)
    try:
        with Store.open(path):
            return True
    except InfluenceError:
        return False


FORGED: list[dict[str, Any]] = [
    {},
    {"layout": None},
    {"layout": {"n": -5}},
    {"layout": {"n": 10**15}},
    {"layout": {"n": 6}},
    {"layout": {"k": 10**6}},
    {"layout": {"k": 0}},
    {"layout": {"block": 0}},
    {"layout": {"block": True}},
    {"layout": {"dtype": "object"}},
    {"layout": {"dtype": "int8"}},
    {"layout": {"more": 1}},
    {"fingerprint": []},
    {"facts": 1},
]


@pytest.mark.parametrize("change", FORGED, ids=json.dumps)
def test_a_header_whose_checksum_was_made_to_fit_must_fit_the_rows(change: dict[str, Any]) -> None:
    """Found by the fuzzer: a header that names rows outside the file ended in an exception of the memory map."""
    layout = {"n": 5, "k": 3, "classes": 2, "block": 2, "dtype": "float32"}
    header: dict[str, Any] = {"layout": layout, "fingerprint": {}, "facts": {}}
    if isinstance(change.get("layout"), dict):
        change = {"layout": layout | change["layout"]}
    content = forged(json.dumps(header | change).encode(), header=True)
    read_store(content, trusted=True)
    assert opens(content) == (not change)


SEALS = (
    "",
    "[]",
    "1" * 5000,
    "[" * 4000,
    '{"bytes": 1}',
    '{"bytes": 0, "metadata": [[0, 9e99]], "xxh3": ""}',
    '{"bytes": 99999999999, "metadata": [[0, 99999999999]], "xxh3": ""}',
)


@pytest.mark.parametrize("text", SEALS, ids=range(len(SEALS)))
def test_a_seal_whose_checksum_was_made_to_fit_is_refused(text: str) -> None:
    TARGETS["store"](b"S" + text.encode())


# --- one line


@many
@given(st.text(max_size=3000))
def test_any_text_is_one_line_of_bounded_length(text: str) -> None:
    line = one_line(text)
    assert len(line) <= 1000
    assert len(line.splitlines()) <= 1
    line.encode()


def test_of_a_long_line_both_ends_are_shown() -> None:
    assert re.fullmatch(r"a{498} … b{498}", one_line("a" * 5000 + "b" * 5000))


# --- the fuzzer


def test_the_counts_of_a_run_are_read_from_its_log() -> None:
    log = """
#5	INITED cov: 125 ft: 125 corp: 4/1b exec/s: 0 rss: 561Mb
#203	NEW    cov: 143 ft: 150 corp: 6/7b lim: 6 exec/s: 101 rss: 561Mb L: 6/6 MS: 1 InsertRepeatedBytes-
stat::number_of_executed_units: 22400
stat::slowest_unit_time_sec:    1
stat::peak_rss_mb:              561
"""
    assert counts(log) == "22,400 inputs, coverage 143 (18 new), 6 inputs kept, slowest 1 s, peak 561 MB"


def test_a_target_that_does_not_exist_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py", "nothing"])
    with pytest.raises(SystemExit):
        main()
    assert "no target nothing; there are config, tests, decisions, labels, store" in capsys.readouterr().err
