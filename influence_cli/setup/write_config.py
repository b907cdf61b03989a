"""Write a config with a comment on every line that was guessed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from influence_cli.config.yaml_reader import scalar
from influence_cli.errors import one_line
from influence_cli.setup.class_order import Order
from influence_cli.setup.guesses import DataGuess, ModelGuess, PenaltyGuess, TransformGuess

WORD = re.compile(r"[A-Za-z_./0-9][A-Za-z0-9_./ +*-]*[A-Za-z0-9_./*]|[A-Za-z_.]")
# Comments start in this column, or two spaces after a longer line.
COLUMN = 45
WIDTH = 120


def config_text(
    command: str,
    model: ModelGuess,
    data: DataGuess,
    l2: PenaltyGuess,
    order: Order,
    transform: TransformGuess | None,
    transform_why: str = "",
) -> str:
    """Write the config.

    Args:
        command: what was typed.
        model: the section ``model``.
        data: the sections ``train`` and ``test``.
        l2: λ₂.
        order: the output of each class.
        transform: of the training and test examples; None before one is chosen.
        transform_why: what says so.
    """
    lines = [
        "# influence check        (a config is code: it imports and runs what it names)",
        f"# Written by {one_line(command, 200)}. A comment says what a line was guessed from; correct what is wrong.",
        "model:",
        *_line("  factory", model.factory, model.factory_why),
        *(_line("  args", model.args, model.args_why) if model.args else []),
        *(_line("  checkpoint", model.checkpoint, model.checkpoint_why) if model.checkpoint is not None else []),
        *(_line("  output", model.output, model.output_why) if model.output is not None else []),
        *_line("l2", l2.value, l2.why),
        "train:",
        *_section(data.train, data.train_why),
        *(_line("  classes", order.outputs, order.why) if order.outputs is not None else []),
    ]
    if transform is not None:
        if isinstance(transform.value, list) and transform.value:
            lines += _heading("  transform:", transform_why)
            lines += [f"    - {flow(step)}" for step in transform.value]
        else:
            lines += _line("  transform", transform.value, transform_why)
    if data.test is not None:
        lines += ["test:", *_section(data.test, data.test_why)]
    return "\n".join(lines) + "\n"


def flow(value: Any) -> str:
    """Write a value on one line, so that the config's reader gives exactly it back."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    plain = WORD.fullmatch(text) is not None and not text.startswith(("- ", "~"))
    if plain and isinstance(read := scalar(text, ""), str) and read == text:
        return text
    return '"' + "".join(map(_letter, text)) + '"'


def _letter(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    return letter if letter.isprintable() else f"\\U{ord(letter):08x}"


def _section(section: Mapping[str, Any], why: str) -> list[str]:
    lines: list[str] = []
    for key, value in section.items():
        lines += _line(f"  {key}", value, "" if lines else why)
    return lines


def _line(key: str, value: Any, why: str) -> list[str]:
    """Write a key and its value on one line; a longer mapping key by key."""
    line = f"{key}: {flow(value)}"
    if len(line) <= WIDTH or not isinstance(value, Mapping) or not value:
        return _heading(line, why)
    indent = " " * (len(key) - len(key.lstrip()) + 2)
    lines = [inner for name, item in value.items() for inner in _line(f"{indent}{flow(name)}", item, "")]
    return [*_heading(f"{key}:", why), *lines]


def _heading(text: str, why: str) -> list[str]:
    """Put a comment behind a line, or before it where both are too long."""
    if not why:
        return [text]
    comment = f"# {one_line(why, 400)}"
    line = f"{text.ljust(COLUMN)}{comment}" if len(text) < COLUMN - 1 else f"{text}  {comment}"
    if len(line) <= WIDTH:
        return [line]
    indent = " " * (len(text) - len(text.lstrip()))
    return [*_wrapped(comment, indent), text]


def _wrapped(comment: str, indent: str) -> list[str]:
    lines, line = [], indent + "#"
    for word in comment.removeprefix("# ").split(" "):
        if len(line) + 1 + len(word) > WIDTH and line != indent + "#":
            lines.append(line)
            line = indent + "#"
        line += f" {word}"
    return [*lines, line]
