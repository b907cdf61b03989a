"""guess_hugging_face: a folder as transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from influence_cli.errors import InfluenceError
from influence_cli.setup.architecture import guess_model
from influence_cli.setup.class_order import guess_order
from influence_cli.setup.hugging_face import folder_of
from influence_cli.setup.training import guess_l2


def test_a_file_of_the_folder_stands_for_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in ("model.safetensors", "best.pt"):
        (tmp_path / name).write_bytes(b"")
    assert folder_of(tmp_path) == folder_of(tmp_path / "model.safetensors") == tmp_path
    assert folder_of(tmp_path / "best.pt") is None
    assert folder_of(tmp_path / "gone") is None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("runs") / "checkpoint-5"
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], id2label={0: "cats", 1: "ants", 2: "bees"}
    )
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(path)
    groups = [
        {"params": [model.classifier[1].weight], "weight_decay": 0.01},
        {"params": [model.classifier[1].bias], "weight_decay": 0.0},
    ]
    torch.save(torch.optim.AdamW(groups).state_dict(), path / "optimizer.pt")
    return path


def test_weights_names_and_transform_are_left_to_the_library(folder: Path) -> None:
    guess, inside = guess_model(folder, None)
    assert guess.factory == "transformers.AutoModelForImageClassification.from_pretrained"
    assert guess.args == {"pretrained_model_name_or_path": str(folder)}
    assert guess.checkpoint is None
    assert guess.names == ("cats", "ants", "bees")
    assert guess_order(guess, ("ants", "bees", "cats"), 3).outputs == {"ants": 1, "bees": 2, "cats": 0}
    assert guess.transform is not None
    assert guess.transform.value == {"processor": str(folder)}
    penalty = guess_l2(inside)
    assert penalty.value == 0
    assert penalty.why.startswith("AdamW's weight decay 0.01 (other parameters have less) acts beside the objective")


def test_without_transformers_the_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else find(name))
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"]}')
    with pytest.raises(InfluenceError, match="says ViTForImageClassification, but transformers is not installed"):
        guess_model(tmp_path, None)


def test_an_adapter_is_put_on_its_base_model(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {
        "base_model.model.classifier.1.weight": torch.zeros(5, 8),
        "base_model.model.resnet.x.lora_A.weight": torch.zeros(2, 8),
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    guess, _ = guess_model(tmp_path, None)
    assert guess.checkpoint == str(tmp_path)
    assert guess.outputs == 5
    assert guess.names is None
    assert guess.args == {
        "pretrained_model_name_or_path": str(folder),
        "num_labels": 5,
        "ignore_mismatched_sizes": True,
    }


def test_an_adapter_of_a_model_that_is_not_here_needs_a_function(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "google/vit"}')
    with pytest.raises(InfluenceError, match="names the base model 'google/vit', which is no folder") as raised:
        guess_model(tmp_path, None)
    assert "--model" in raised.value.hint
    assert guess_model(tmp_path, "net:base")[0].factory == "net.base"
