"""config_text: what is written is read back as it was, whatever a file or a folder is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_cli.config.load import parse_config
from influence_cli.config.yaml_reader import read_yaml
from influence_cli.setup.class_order import Order
from influence_cli.setup.guesses import DataGuess, ModelGuess, PenaltyGuess, TransformGuess
from influence_cli.setup.write_config import config_text, flow

WORDS = (
    "cat", "no", "1e-3", "007", "null", "a: b", "# c", "- d", "~/e", "[f", "g}", "'h'", '"i"', "k\\l", "m\nn: 1", "ö",
    "\u2028", "\x85", "{", "*", "&p", "!q", "|", "", " r ", "s,t", "@u", "`v", "%w", "x\t", "y#", "z #", "🐈",
)  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_a_value_comes_back(word: str) -> None:
    text = f"key: {flow({'a': [word, 1, 0.1, 1e-05, True, None], word: word})}\n"
    assert read_yaml(text, "x").values == {"key": {"a": [word, 1, 0.1, 1e-05, True, None], word: word}}
    assert "\n" not in text[:-1]


def text_of(why: str) -> str:
    return config_text(
        f"influence init {why}",
        ModelGuess("a.b", why, {"n": 3}, why, 3, "model.pt", why),
        DataGuess({"dataset": "c.d", "args": {"root": "data"}}, why, {"dataset": "c.d"}, why),
        PenaltyGuess(1e-5, why),
        Order(None),
        TransformGuess(["ToImage"], "none"),
        why,
    )


@pytest.mark.parametrize(
    "why", ["from arch in model.pt", "x\nseed: 7", "x\r\nseed: 7", "x\u2028seed: 7", "y " * 300, "z" * 300]
)
def test_a_comment_stays_one(why: str, tmp_path: Path) -> None:
    text = text_of(why)
    config = parse_config(text, tmp_path / "influence.yaml")
    assert config.seed == 0
    assert config.l2 == 1e-5
    assert config.model.args == {"n": 3}
    assert [step.name for step in config.train.transform or ()] == ["ToImage"]
    assert text.count("#") >= 7


def test_a_long_mapping_is_written_key_by_key(tmp_path: Path) -> None:
    args = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "x": {"y z": "w" * 70}}
    text = config_text(
        "influence init",
        ModelGuess("a.b", "", args, "the reason", 3, None),
        DataGuess({"dataset": "c.d"}, ""),
        PenaltyGuess(0.0, ""),
        Order({f"class {number}": number for number in range(20)}, "names"),
        TransformGuess({"factory": "t.make", "args": args}, ""),
    )
    config = parse_config(text, tmp_path / "influence.yaml")
    assert config.model.args == args
    assert config.train.classes == {f"class {number}": number for number in range(20)}
    assert [(step.name, step.args) for step in config.train.transform or ()] == [("t.make", args)]
    assert "  args:                                      # the reason\n    mean: [0.485, 0.456, 0.406]\n" in text
    assert max(map(len, text.splitlines())) <= 120
