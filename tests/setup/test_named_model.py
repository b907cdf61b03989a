"""--model: what it names, the options that it takes, and weights that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from influence_cli.checkpoints.weights import find_weights
from influence_cli.errors import InfluenceError
from influence_cli.setup.inside import Inside
from influence_cli.setup.named_model import factory_name, guess_named
from tests.support.brightness import MODEL, state

DEEP = """
from torch import nn


class Deep(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.a_depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.middle = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, num_classes)
"""


def inside(state: dict[str, Tensor], settings: dict[str, object] | None = None) -> Inside:
    content = {"state_dict": state, "hyper_parameters": settings or {}}
    return Inside(Path("model.pt"), content, tuple(find_weights(content)))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("net:Net", "net.Net"),
        ("a.b:Net", "a.b.Net"),
        ("a.b.Net", "a.b.Net"),
        ("net.py:Net", "./net.py:Net"),
        ("./net.py:Net", "./net.py:Net"),
        ("/x/net.py:Net", "/x/net.py:Net"),
    ],
)
def test_a_name_is_written_as_a_config_has_it(given: str, name: str) -> None:
    assert factory_name(given) == name


@pytest.mark.parametrize("given", ["net", "net.py", "net:", ":"])
def test_what_names_nothing_is_refused(given: str) -> None:
    with pytest.raises(InfluenceError, match="names nothing in it"):
        factory_name(given)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "net.py").write_text(
        MODEL + "\n\ndef bare():\n    return Net(3)\n\n\ndef number():\n    return 3\n"
        "\n\ndef pretrained(pretrained):\n    assert pretrained is False\n    return Net(3)\n"
        "\n\nclass Lit(Net):\n    def __init__(self, **words):\n        super().__init__(words['n'], words['width'])\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_options_of_the_file_that_it_takes_are_its_arguments(folder: Path) -> None:
    settings = {"width": 3, "num_classes": 5, "lr": 0.1, "loss": object()}
    guess = guess_named("net.py:Net", inside(state(), settings))
    # The weights say 3 classes, whatever the options do.
    assert (guess.factory, guess.args, guess.outputs) == ("./net.py:Net", {"num_classes": 3, "width": 3}, 3)
    assert guess.args_why == "the options in model.pt, 3 rows of the last layer in model.pt"
    assert guess_named("net.py:bare", inside(state(), settings)).args == {}
    assert guess_named("net.py:Net", inside(state(), {})).args == {"num_classes": 3}
    # What takes anything gets all that is plain.
    open_ended = guess_named("net.py:Lit", inside(state(), {"n": 3, "width": 3, "loss": object()}))
    assert open_ended.args == {"n": 3, "width": 3}


def test_weights_are_not_downloaded(folder: Path) -> None:
    guess = guess_named("net.py:pretrained", inside(state(), {"pretrained": True}))
    assert guess.args == {"pretrained": False}


def test_weights_behind_the_name_of_a_module_around_them_fit(folder: Path) -> None:
    behind = {f"backbone.{name}": value for name, value in state().items()}
    assert guess_named("net.py:Net", inside(behind)).checkpoint == "model.pt"


def test_the_first_and_the_last_layer_are_those_of_the_model_in_whatever_order_the_file_has_them(folder: Path) -> None:
    shapes = {"a_depthwise.weight": (8, 1, 3, 3), "head.bias": (3,), "head.weight": (3, 8), "middle.weight": (8, 8)}
    weights = {name: torch.zeros(shape) for name, shape in (shapes | {"stem.weight": (8, 3, 1, 1)}).items()}
    (folder / "deep.py").write_text(DEEP)
    guess = guess_named("deep.py:Deep", inside(weights))
    assert (guess.args, guess.outputs, guess.channels) == ({"num_classes": 3}, 3, 3)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    other = {"fc.weight": torch.zeros(3, 4), "fc.bias": torch.zeros(3)}
    with pytest.raises(InfluenceError) as raised:
        guess_named("net.py:Net", inside(other, {}))
    assert raised.value.message == (
        "model.pt does not fit the model of --model net.py:Net: it lacks fc.weight, or has another shape there"
    )
    with pytest.raises(InfluenceError, match="returned a int, not a torch module"):
        guess_named("net.py:number", inside(state(), {}))
    with pytest.raises(InfluenceError, match=r"--model: ./net.py has no 'Nett'") as raised:
        guess_named("./net.py:Nett", inside(state(), {}))
    assert "did you mean 'Net'?" in raised.value.hint
