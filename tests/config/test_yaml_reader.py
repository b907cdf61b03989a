"""YAML as a config needs it: scalars of YAML 1.2, a line for every key, and one line for whatever is refused."""

from __future__ import annotations

import json
import re
import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_cli.config.yaml_reader import Keys, read_yaml, scalar
from influence_cli.errors import InfluenceError

SCALARS: list[tuple[str, object]] = [
    # YAML 1.1 reads these as something else.
    *((word, word) for word in ("no", "No", "NO", "yes", "Yes", "on", "off", "y", "n", "Off")),
    *((word, word) for word in ("1:30", "1:30.5", "0b11", "1_000", "1_0.5", "<<", "=")),
    *((word, word) for word in ("2020-01-01", "2020-01-01 10:00:00")),
    ("010", 10),
    ("0o17", 15),
    ("1e-3", 0.001),
    ("1E5", 100000.0),
    ("5e+2", 500.0),
    # booleans and null
    *((word, True) for word in ("true", "True", "TRUE")),
    *((word, False) for word in ("false", "False", "FALSE")),
    *((word, word) for word in ("tRUE", "fALSE", "truely", "nULL", "none", "None", "nil", "nan", "inf")),
    *((word, None) for word in ("~", "null", "Null", "NULL", "")),
    # whole numbers
    ("0", 0),
    ("-1", -1),
    ("+12", 12),
    ("007", 7),
    ("0x1F", 31),
    ("12345678901234567890", 12345678901234567890),
    *((word, word) for word in ("0o8", "-0x1F", "0xG", "1-2", "--1", "1 2", "12a")),
    # other numbers
    ("1.5", 1.5),
    (".5", 0.5),
    ("5.", 5.0),
    ("-1.5e+3", -1500.0),
    ("+0.1", 0.1),
    ("-0.0", -0.0),
    *((word, word) for word in ("1e", "e3", ".", "1.2.3", "1e3.5", "+.e1", "v1.0")),
    # quotes and blocks make words of anything
    *((f'"{word}"', word) for word in ("1", "1e-3", "true", "null", "", "a: b")),
    *((f"'{word}'", word) for word in ("1", ".5", "no", "~")),
    ("|\n  1\n  2", "1\n2\n"),
    (">-\n  a\n  b", "a b"),
    ("a b # comment", "a b"),
    ("a#b", "a#b"),
    # lists and mappings
    ("[1, a, [2.5, null], {x: no}]", [1, "a", [2.5, None], {"x": "no"}]),
    ("{1: a, no: b, null: c, 1e-3: d, '': e}", {"1": "a", "no": "b", "null": "c", "1e-3": "d", "": "e"}),
    ("[]", []),
    ("{}", {}),
    ('{"a":1}', {"a": 1}),
    ('"\\ud83d\\ude00"', "\U0001f600"),
]  # fmt: skip


def typed(value: Any) -> Any:
    """Keep 1, 1.0 and True, and 0.0 and -0.0, apart in a comparison."""
    if isinstance(value, dict):
        return {key: typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    return type(value).__name__, repr(value)


@pytest.mark.parametrize(("text", "expected"), SCALARS)
def test_a_value_is_read_by_the_core_schema_of_yaml_1_2(text: str, expected: object) -> None:
    assert typed(read_yaml(f"key: {text}\n", "f.yaml").values) == typed({"key": expected})


@pytest.mark.parametrize(("text", "expected"), [pair for pair in SCALARS if "\n" not in pair[0]])
def test_a_single_value_is_read_alike(text: str, expected: object) -> None:
    assert typed(scalar(text, "--set")) == typed(expected)


def test_every_key_and_item_has_its_line() -> None:
    text = """\
# a comment

a: 1
b:
  c: [x,
      y]
  d: {e: 1, f: {g: 2}}

  "h":
    - i: 1
      j: 2
    # in between
    - 3
k: |
  text
  text
l: >-
  folded


m:
"""
    document = read_yaml(text, "f.yaml")
    assert document.values == {
        "a": 1,
        "b": {"c": ["x", "y"], "d": {"e": 1, "f": {"g": 2}}, "h": [{"i": 1, "j": 2}, 3]},
        "k": "text\ntext\n",
        "l": "folded",
        "m": None,
    }
    assert {keys: line for keys, line in document.lines.items() if keys} == {
        ("a",): 3,
        ("b",): 4,
        ("b", "c"): 5,
        ("b", "c", 0): 5,
        ("b", "c", 1): 6,
        ("b", "d"): 7,
        ("b", "d", "e"): 7,
        ("b", "d", "f"): 7,
        ("b", "d", "f", "g"): 7,
        ("b", "h"): 9,
        ("b", "h", 0): 10,
        ("b", "h", 0, "i"): 10,
        ("b", "h", 0, "j"): 11,
        ("b", "h", 1): 13,
        ("k",): 14,
        ("l",): 17,
        ("m",): 21,
    }


DUPLICATES = [
    ("a: 1\nb: 2\na: 3\n", 3, "a", 1),
    ("x:\n  a: 1\n  b: 2\n  a: 1\n", 4, "a", 2),
    ("x: {a: 1,\n  a: 2}\n", 2, "a", 1),
    ("x:\n- b: 1\n- a: 1\n  a: 2\n", 4, "a", 3),
    ("1: a\n'1': b\n", 2, "1", 1),
    ('"no": a\n\n# c\nno: b\n', 4, "no", 1),
    ("a: {b: 1}\nc: 1\na: {d: 2}\n", 3, "a", 1),
]


@pytest.mark.parametrize(("text", "line", "key", "first"), DUPLICATES)
def test_a_duplicate_key_is_refused_with_both_lines(text: str, line: int, key: str, first: int) -> None:
    with pytest.raises(InfluenceError) as caught:
        read_yaml(text, "f.yaml")
    assert caught.value.message == f"f.yaml:{line}: duplicate key {key!r} (first on line {first})"
    assert caught.value.hint == "remove one of them"


def test_the_same_key_in_two_places_is_no_duplicate() -> None:
    values = {"a": {"a": 1}, "b": [{"a": 1}, {"a": 2}]}
    assert read_yaml("a: {a: 1}\nb:\n- a: 1\n- a: 2\n", "f.yaml").values == values


REFUSED = [
    ("a: 1\nb: &x 2\n", 2, "anchors and aliases are not supported"),
    ("a: 1\nb: *x\n", 2, "anchors and aliases are not supported"),
    ("a: &x\n  b: 1\nc:\n  <<: *x\n", 1, "anchors and aliases are not supported"),
    ("a:\n- &x [1]\n", 2, "anchors and aliases are not supported"),
    ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "the tag tag:yaml.org,2002:python/object/apply:os.system"),
    ("a: !!str 1\n", 1, "the tag tag:yaml.org,2002:str is not supported"),
    ("a: !mine {b: 1}\n", 1, "the tag !mine is not supported"),
    ("a: !!set {b, c}\n", 1, "is not supported"),
    ("a:\n\tb: 1\n", 2, "not valid YAML"),
    ("a: 1\n\tb: 1\n", 2, "not valid YAML"),
    ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
    ("a: 1\n b: 2\n", 2, "not valid YAML"),
    ("a: b: c\n", 1, "not valid YAML"),
    ("a: 1\n- b\n", 2, "not valid YAML"),
    ("a: 'open\nb: 1\n", 3, "not valid YAML"),
    ("a: @b\n", 1, "not valid YAML"),
    ("a: `b`\n", 1, "not valid YAML"),
    ('a: "\\q"\n', 1, "not valid YAML"),
    ("a: 1\nb\n", 3, "not valid YAML"),
    ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
    ("a: 1\n? [b]\n: 2\n", 2, "a key must be a word"),
    ("a: 1\n{b: 1}: 2\n", 2, "a key must be a word"),
    ("a: 1\nb: .inf\n", 2, ".inf is not a finite number"),
    ("a: [1,\n -.INF]\n", 2, "-.INF is not a finite number"),
    ("a: .NaN\n", 1, ".NaN is not a finite number"),
    ("a: 1e999\n", 1, "1e999 is not a finite number"),
    (f"a: 1\nb: {'9' * 5000}\n", 2, "is not a usable number"),
    (f"a: 1\nb: 0x{'f' * 5000}\n", 2, "is not a usable number"),
    ('a: 1\nb: "x\\0y"\n', 2, "a zero byte in 'x\\x00y'"),
    ('a: 1\n"b\\0": 2\n', 2, "a zero byte in"),
    ('a: 1\nb: "\\ud83d"\n', 2, "half a character in '\\ud83d'"),
    ('a: 1\n"\\ude00": 2\n', 2, "half a character in"),
    ("\n- a\n- b\n", 2, "expected a mapping of keys at the top"),
    ("# c\nhello\n", 2, "expected a mapping of keys at the top"),
    ("a: 1\nb: " + "[" * 60 + "]" * 60, 2, "nested too deeply"),
    ("a: 1\nb: " + "[" * 100_000, 2, "nested too deeply"),
    ("".join(" " * i + f"k{i}:\n" for i in range(60)), 51, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "line", "message"), REFUSED, ids=range(len(REFUSED)))
def test_odd_input_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(InfluenceError) as caught:
        read_yaml(text, "f.yaml")
    assert caught.value.message.startswith(f"f.yaml:{line}: ")
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", ["", "\n\n", "# nothing\n", "---\n", "\ufeff"])
def test_an_empty_file_is_refused(text: str) -> None:
    with pytest.raises(InfluenceError, match=r"^f\.yaml") as caught:
        read_yaml(text, "f.yaml")
    assert "influence init" in caught.value.hint


@pytest.mark.parametrize("text", ["a: \x00\n", "a: \x1b[31m\n", "a: \ud800\n"])
def test_control_characters_are_refused(text: str) -> None:
    with pytest.raises(InfluenceError, match=r"^f\.yaml.*not valid YAML"):
        read_yaml(text, "f.yaml")


def test_forty_nested_lists_are_read() -> None:
    value = read_yaml("a: " + "[" * 40 + "1" + "]" * 40, "f.yaml").values["a"]
    for _ in range(40):
        (value,) = value
    assert value == 1


def test_a_directive_a_byte_order_mark_and_windows_line_ends_are_read() -> None:
    document = read_yaml("\ufeff%YAML 1.2\r\n---\r\na: 1\r\nb: no\r\n", "f.yaml")
    assert document.values == {"a": 1, "b": "no"}
    assert (document.lines["a",], document.lines["b",]) == (3, 4)


# Documents made up at random


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp"), exclude_characters="\u00a0\ufeff"), max_size=12
)
PLAIN = st.sampled_from(["no", "yes", "on", "off", "y", "cross_entropy", "./model.py:build", "a b", "cuda:1", "8GB"])
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LEAVES = st.none() | st.booleans() | st.integers() | FLOATS | TEXT | PLAIN
KEYS = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=8) | TEXT | PLAIN
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
DOCUMENTS = st.dictionaries(KEYS, VALUES, min_size=1, max_size=5)


def word(text: str) -> str:
    """Write a string plainly where it is one of the harmless ones, else in quotes."""
    return (
        text
        if re.fullmatch(r"no|yes|on|off|y|[a-z]+_[a-z]+|\./[a-z.:]+|a b|8GB", text)
        else json.dumps(text, ensure_ascii=False)
    )


def write(value: Any, indent: int, keys: Keys, out: list[str], lines: dict[Keys, int], gaps: list[int]) -> None:
    """Write block YAML, with blank and comment lines between, and note on which line each key comes."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        gap = gaps[len(out) % len(gaps)]
        out.extend(["", " " * indent + "# a: comment"][:gap])
        lead = " " * indent + (f"{word(key)}:" if isinstance(value, dict) else "-")
        if isinstance(item, dict | list) and item:
            out.append(lead)
            if isinstance(value, dict):
                lines[*keys, key] = len(out)
            write(item, indent + 1 + gap, (*keys, key), out, lines, gaps)
        else:
            plain = word(item) if isinstance(item, str) else "~" if item is None and gap else json.dumps(item)
            out.append(f"{lead} {plain}")
            lines[*keys, key] = len(out)


@settings(deadline=None, max_examples=150)
@given(document=DOCUMENTS, gaps=st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_what_is_written_in_blocks_is_read_back_with_its_lines(document: dict[str, Any], gaps: list[int]) -> None:
    out: list[str] = []
    lines: dict[Keys, int] = {}
    write(document, 0, (), out, lines, gaps)
    found = read_yaml("\n".join(out), "f.yaml")
    assert typed(found.values) == typed(document)
    assert {keys: found.lines[keys] for keys in lines} == lines


@settings(deadline=None, max_examples=150)
@given(document=DOCUMENTS)
def test_json_is_read_as_json(document: dict[str, Any]) -> None:
    text = json.dumps(document, ensure_ascii=False)
    assert typed(read_yaml(text, "f.yaml").values) == typed(json.loads(text))


@settings(deadline=None, max_examples=300)
@given(
    text=st.text(st.sampled_from("ab01 \n\t:-?[]{},#&*!|>'\"%@`.~<=e+\\\x00é\ud800"), max_size=40)
    | st.text(max_size=60)
)
def test_any_text_is_a_mapping_or_one_line_of_error(text: str) -> None:
    try:
        found = read_yaml(text, "f.yaml")
    except InfluenceError as error:
        message = error.message
        assert message.startswith("f.yaml")
        assert "\n" not in message
    else:
        assert found.values.keys() == {keys[0] for keys in found.lines if keys}
