"""look_inside: weights, options and class names in what a checkpoint holds."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from influence_cli.errors import InfluenceError
from influence_cli.setup.inside import beside, look_inside, names_by_output
from tests.support.brightness import state


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["a", "b"], ("a", "b")),
        ({"b": 1, "a": 0}, ("a", "b")),
        ({0: "a", 1: "b"}, ("a", "b")),
        ({"0": "a", "1": "b"}, ("a", "b")),
        ({"a": 0, "b": 0}, None),
        ({"a": 0, "b": 2}, None),
        ({"a": True, "b": False}, None),
        ([1, 2], None),
        (["a"], None),
        ("ab", None),
        (None, None),
    ],
)
def test_class_names_come_in_several_forms(value: object, names: tuple[str, ...] | None) -> None:
    assert names_by_output(value) == names


def test_options_and_names_are_read_from_the_usual_places(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, class_names=["x", "y", "z"])
    torch.save({"net": state(), "args": args, "config": {"lr": 5, "width": 3}}, tmp_path / "model.pt")
    inside = look_inside(tmp_path / "model.pt")
    assert inside.settings == {"lr": 0.1, "class_names": ["x", "y", "z"], "width": 3}
    assert inside.class_names() == (("x", "y", "z"), "class_names")
    assert set(inside.state) == {"fc.weight", "fc.bias"}


def test_what_holds_no_weights_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "model.pt")
    with pytest.raises(InfluenceError, match="holds a mapping with the keys 'epoch', not a state dict"):
        look_inside(tmp_path / "model.pt")


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("touched"),)  # type: ignore[return-value]


def test_nothing_in_a_checkpoint_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state(), "args": Evil(), "optimizer": Evil()}, "model.pt")
    assert look_inside(Path("model.pt")).settings == {}
    Path("hub").mkdir()
    torch.save(Evil(), "hub/training_args.bin")
    torch.save({"optimizer": Evil()}, "hub/optimizer.pt")
    assert beside(Path("hub")).settings == {"optim": "adamw"}
    assert not Path("touched").exists()
