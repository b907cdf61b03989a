"""plan_config: from a checkpoint and data to a config that says what it was guessed from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from influence_cli.config.load import parse_config
from influence_cli.config.schema import Config
from influence_cli.errors import InfluenceError
from influence_cli.model.task import load_tasks
from influence_cli.precompute.check import check_run
from influence_cli.runtime.terminal import Terminal
from influence_cli.setup.plan import plan_config
from tests.support.brightness import LEVELS, project, state, write_images


def planned(
    folder: Path, checkpoint: str = "model.pt", data: str = "data", model: str | None = "net.py:Net"
) -> tuple[str, Config]:
    path = Path("influence.yaml")
    text = plan_config(path, "influence init", Path(checkpoint), Path(data), None, model, Terminal())
    assert not path.exists()
    return text, parse_config(text, path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project(tmp_path))
    return tmp_path


def accuracy(config: Config) -> object:
    return {finding.item: finding.value for finding in check_run(config)}["training accuracy"]


@pytest.mark.parametrize(("mean", "std", "name"), [(0.5, 0.5, "mean and std 0.5"), (0.0, 1.0, "values in [0, 1]")])
def test_the_normalisation_of_the_training_is_told_by_accuracy(
    folder: Path, capsys: pytest.CaptureFixture[str], mean: float, std: float, name: str
) -> None:
    torch.save(state(mean, std), "model.pt")
    text, config = planned(folder)
    said = capsys.readouterr().err
    assert f"transform: size as it is, {name}: 100.0% of 12 training images right" in said
    assert "% with size as it is, ImageNet's mean and std" in said
    assert "# 100% of 12 training images right; " in text
    assert accuracy(config) == 1


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1)])
def test_the_order_of_the_outputs_is_told_by_predictions(
    folder: Path, capsys: pytest.CaptureFixture[str], order: tuple[int, ...]
) -> None:
    torch.save(state(order=order), "model.pt")
    text, config = planned(folder)
    expected = {name: order.index(number) for number, name in enumerate(LEVELS)}
    assert config.train.classes == expected
    assert "the outputs of the model are not in the order of the classes" in capsys.readouterr().err
    assert "what the model says of 12 training images; nothing names its outputs" in text
    assert load_tasks(config)[0].classes == tuple(sorted(expected, key=lambda name: expected[name]))


def test_names_in_the_file_tell_the_order(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": state(order=(2, 0, 1)), "class_to_idx": {"cats": 0, "ants": 1, "bees": 2}}, "model.pt")
    text, config = planned(folder)
    assert config.train.classes == {"ants": 1, "bees": 2, "cats": 0}
    assert "# class_to_idx in model.pt" in text
    assert "warning" not in capsys.readouterr().err


def test_l2_and_the_options_of_the_run_are_taken(folder: Path) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, weight_decay=3e-4)
    options = {"width": 3, "num_classes": 3, "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save({"state_dict": state(), "optimizer": optimizer.state_dict(), "hyper_parameters": options}, "model.pt")
    text, config = planned(folder)
    assert config.l2 == 3e-4
    assert "# SGD's weight decay, from optimizer in model.pt" in text
    assert config.model.args == {"num_classes": 3, "width": 3}
    assert config.train.transform is not None
    assert config.train.transform[-1].args == {"mean": [0.5] * 3, "std": [0.5] * 3}


def test_test_data_beside_the_training_data_are_taken(folder: Path) -> None:
    text, config = planned(folder)
    assert config.test is not None
    assert "3 folders of images in data/val" in text
    assert len(load_tasks(config)[0].test_split()) == 6


def test_the_size_that_a_model_takes_is_searched_where_none_of_the_usual_fits(folder: Path) -> None:
    (folder / "fixed.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 1, 1), nn.Flatten(), nn.Linear(1024, 3))\n"
    )
    weights = {"0.weight": torch.full((1, 3, 1, 1), 1 / 3), "0.bias": torch.zeros(1)}
    levels = torch.tensor(list(LEVELS.values()))
    weights |= {"2.weight": 200 * levels[:, None].repeat(1, 1024) / 1024, "2.bias": -100 * levels.square()}
    torch.save(weights, "fixed.pt")
    write_images(Path("photos"), count=4, size=200)
    _, config = planned(folder, "fixed.pt", "photos", "fixed.py:build")
    assert config.train.transform is not None
    assert config.train.transform[0].args == {"size": [32, 32]}
    assert accuracy(config) == 1


def test_a_model_that_takes_no_size_is_refused_with_the_first_reason(folder: Path) -> None:
    (folder / "odd.py").write_text(
        "from torch import nn\n\n\nclass Odd(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.fc = nn.Linear(3, 3)\n\n    def forward(self, x):\n        raise ValueError('needs a label')\n"
    )
    with pytest.raises(InfluenceError) as raised:
        planned(folder, model="odd.py:Odd")
    assert "needs a label" in raised.value.message
    assert "influence.yaml" not in raised.value.message
    assert raised.value.hint.endswith("nothing was written")


def test_more_classes_than_outputs_are_refused(folder: Path) -> None:
    torch.save({key: value[:2] for key, value in state().items()}, "model.pt")
    with pytest.raises(InfluenceError) as raised:
        planned(folder)
    assert raised.value.message.startswith("the model has 2 outputs, but the data have 3 classes (ants, bees, cats)")


def test_a_wider_head_is_mapped_by_predictions_or_refused(folder: Path) -> None:
    weight, bias = state().values()
    wide = {"fc.weight": torch.cat([torch.zeros(2, 3), weight]), "fc.bias": torch.cat([torch.full((2,), -1e3), bias])}
    torch.save(wide, "model.pt")
    _, config = planned(folder)
    assert config.train.classes == {"ants": 2, "bees": 3, "cats": 4}
    torch.save({"fc.weight": torch.zeros(5, 3), "fc.bias": torch.zeros(5)}, "model.pt")
    with pytest.raises(InfluenceError, match="neither names nor predictions say which output is which class"):
        planned(folder)


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ("logits.softmax(1), logits", "output: 1"),
        ("{'out': logits.softmax(1), 'raw': logits}", "output: raw"),
    ],
)
def test_logits_beside_probabilities_are_taken(folder: Path, returned: str, line: str) -> None:
    source = f"""

class Both(Net):
    def forward(self, x):
        logits = super().forward(x)
        return {returned}
"""
    with Path("net.py").open("a", encoding="utf-8") as file:
        file.write(source)
    torch.save(state(), "model.pt")
    text, config = planned(folder, model="net.py:Both")
    assert any(row.strip().startswith(f"{line} ") for row in text.splitlines())
    assert "logits; the first output has their probabilities" in text
    assert accuracy(config) == 1


def test_probabilities_alone_are_refused(folder: Path) -> None:
    with Path("net.py").open("a", encoding="utf-8") as file:
        file.write("\n\nclass Soft(Net):\n    def forward(self, x):\n        return super().forward(x).softmax(1)\n")
    torch.save(state(), "model.pt")
    with pytest.raises(InfluenceError, match="the outputs are probabilities"):
        planned(folder, model="net.py:Soft")
