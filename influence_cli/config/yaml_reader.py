"""Read YAML with the line of every key: duplicates are errors, 1e-3 is a number, no is a word.

PyYAML follows YAML 1.1, in which `no` is False, `1e-3` a string and `1:30` a number; this reader takes the core
schema of YAML 1.2 instead. Anchors and tags have no use in a config and are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from influence_cli.errors import InfluenceError, quoted

Keys = tuple[str | int, ...]
MAX_DEPTH = 50
MAX_DIGITS = 1000


@dataclass(frozen=True)
class Document:
    """A YAML mapping and where its parts are.

    Attributes:
        values: the content, plain dicts, lists and scalars.
        lines: line numbers, from 1, by key path.
    """

    values: dict[str, Any]
    lines: dict[Keys, int] = field(default_factory=dict)


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema, without anchors, tags and deep nesting."""

    name = ""
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse what no config needs before any value is built from it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        where = f"{self.name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise InfluenceError(f"{where}: anchors and aliases are not supported", "write the values out")
        if getattr(event, "tag", None) not in (None, "!"):
            raise InfluenceError(f"{where}: the tag {event.tag} is not supported", "write a plain value")
        if self.depth > MAX_DEPTH:
            raise InfluenceError(f"{where}: nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (as PyYAML declares it)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), [*_first, ""] if _tag == "null" else list(_first)
    )


def read_yaml(text: str, name: str) -> Document:
    """Parse a mapping.

    Args:
        text: the YAML.
        name: what to call it in errors.

    Raises:
        InfluenceError: with the line: syntax, a duplicate key, an anchor or a tag, not a mapping.
    """
    node = compose(text, name)
    if node is None:
        raise InfluenceError(f"{name}: the file is empty", "influence init writes a starter")
    if not isinstance(node, yaml.MappingNode):
        raise InfluenceError(
            f"{name}:{_line(node)}: expected a mapping of keys at the top", "influence init writes a starter"
        )
    document = Document({})
    document.values.update(_construct(node, (), document.lines, name))
    return document


def compose(text: str, name: str) -> yaml.Node | None:
    """Parse to nodes; any syntax error becomes one line."""
    loader: Any = None
    try:
        loader = _Loader(text)
        loader.name = name
        root: yaml.Node | None = loader.get_single_node()
        return root
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}" if mark else ""
        raise InfluenceError(f"{name}{at}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InfluenceError(f"{name}: not valid YAML: {' '.join(str(error).split())[:160]}") from error
    except RecursionError as error:
        raise InfluenceError(f"{name}: nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def scalar(text: str, name: str) -> Any:
    """Parse one value, such as that of ``--set``."""
    node = compose(text, name)
    return None if node is None else _construct(node, (), {}, name)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _construct(node: yaml.Node, keys: Keys, lines: dict[Keys, int], name: str) -> Any:
    lines.setdefault(keys, _line(node))
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise InfluenceError(f"{name}:{_line(key_node)}: a key must be a word")
            key = _text(key_node, name)
            if key in result:
                first = lines[(*keys, key)]
                raise InfluenceError(
                    f"{name}:{_line(key_node)}: duplicate key {key!r} (first on line {first})", "remove one of them"
                )
            lines[(*keys, key)] = _line(key_node)
            result[key] = _construct(value_node, (*keys, key), lines, name)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*keys, position), lines, name) for position, item in enumerate(node.value)]
    return _scalar(node, name)


def _text(node: yaml.Node, name: str) -> str:
    """Give a scalar as text that can be written into results: escapes can spell invalid text."""
    text = str(node.value)
    if "\0" in text:  # no name, and no path, has one
        raise InfluenceError(f"{name}:{_line(node)}: a zero byte in {quoted(text)}", "remove it")
    try:
        # JSON spells a letter beyond the first 65,536 as two halves, which belong together.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        raise InfluenceError(
            f"{name}:{_line(node)}: half a character in {quoted(text)}", "write the whole character"
        ) from error


def _scalar(node: yaml.Node, name: str) -> Any:
    text, kind = _text(node, name), node.tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        if kind == "int":
            if len(text) > MAX_DIGITS:  # Python itself limits decimal ones, but not those it could not print
                raise ValueError("too many digits")
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if kind == "float":
            number = float(
                text.replace(".inf", "inf")
                .replace(".Inf", "inf")
                .replace(".INF", "inf")
                .replace(".nan", "nan")
                .replace(".NaN", "nan")
                .replace(".NAN", "nan")
            )
            if number != number or number in (float("inf"), float("-inf")):
                raise InfluenceError(f"{name}:{_line(node)}: {text} is not a finite number")
            return number
    except ValueError as error:  # such as an integer of 5,000 digits
        raise InfluenceError(f"{name}:{_line(node)}: {text[:40]} is not a usable number") from error
    return text
