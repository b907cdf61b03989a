"""guess_model: what the file says, what its names show, and what is said where neither helps."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
import torchvision

from influence_cli.errors import InfluenceError
from influence_cli.setup.architecture import guess_model
from tests.support.brightness import project, state


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def squeezenet() -> dict[str, torch.Tensor]:
    return dict(torchvision.models.squeezenet1_1(num_classes=3).state_dict())


def test_torchvisions_script_says_the_transform(folder: Path, squeezenet: dict[str, torch.Tensor]) -> None:
    args = argparse.Namespace(
        model="squeezenet1_1", val_resize_size=232, val_crop_size=224, interpolation="bicubic", weight_decay=1e-4
    )
    torch.save({"model": squeezenet, "args": args, "epoch": 3}, "model_3.pth")
    guess, inside = guess_model(Path("model_3.pth"), None)
    assert (guess.factory, guess.args) == ("torchvision.models.squeezenet1_1", {"num_classes": 3})
    assert guess.checkpoint == "model_3.pth"
    assert guess.transform is not None
    assert guess.transform.name == "Resize 232, CenterCrop 224, ImageNet's mean and std"
    assert guess.transform.why == "val_resize_size and val_crop_size in model_3.pth"
    assert inside.settings["weight_decay"] == 1e-4


def test_an_average_beside_the_weights_is_said(folder: Path, squeezenet: dict[str, torch.Tensor]) -> None:
    average = {f"module.{key}": value + 1 for key, value in squeezenet.items()} | {"n_averaged": torch.tensor(3)}
    torch.save({"model": squeezenet, "model_ema": average}, "model.pth")
    guess, _ = guess_model(Path("model.pth"), None)
    assert guess.checkpoint == "model.pth"
    assert guess.checkpoint_why == "model; model_ema fits too: key: model_ema takes it"


def test_of_two_networks_one_is_named(folder: Path, squeezenet: dict[str, torch.Tensor]) -> None:
    other = {key: value + 1 for key, value in squeezenet.items()}
    torch.save({"student": squeezenet, "teacher": other}, "model.pth")
    guess, _ = guess_model(Path("model.pth"), None)
    assert guess.checkpoint == {"file": "model.pth", "key": "student"}
    assert guess.checkpoint_why == "student; teacher fits too: key: teacher takes it"


def test_a_part_of_a_module_of_the_users_is_taken_out(folder: Path, squeezenet: dict[str, torch.Tensor]) -> None:
    names = {f"encoder.{key}": value for key, value in squeezenet.items()} | {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": names, "pytorch-lightning_version": "2.6.6", "hyper_parameters": {}}, "x.ckpt")
    guess, _ = guess_model(Path("x.ckpt"), None)
    assert guess.checkpoint == {"file": "x.ckpt", "strip": "encoder."}


def test_lightnings_hyper_parameters_go_to_the_class_that_is_named(folder: Path) -> None:
    names = state()
    hparams = {"width": 3, "num_classes": 3, "lr": 0.1}
    torch.save({"state_dict": names, "pytorch-lightning_version": "2.6.6", "hyper_parameters": hparams}, "x.ckpt")
    guess, _ = guess_model(Path("x.ckpt"), "net:Net")
    assert (guess.factory, guess.args) == ("net.Net", {"width": 3, "num_classes": 3})
    with pytest.raises(InfluenceError) as raised:
        guess_model(Path("x.ckpt"), None)
    assert raised.value.message == (
        "x.ckpt: the model is not recognised: 2 tensors (fc.weight, fc.bias) are no model of torchvision, a Lightning "
        "module's file names no architecture"
    )
    assert "--model module:Class; it gets the hyper-parameters" in raised.value.hint


def test_a_network_that_nothing_names(folder: Path) -> None:
    with pytest.raises(InfluenceError) as raised:
        guess_model(Path("model.pt"), None)
    assert "no model of torchvision, the file names no architecture" in raised.value.message
    assert raised.value.hint == "name the function or class that builds yours: --model ./model.py:build"


def test_what_nearly_fits_is_said(folder: Path, squeezenet: dict[str, torch.Tensor]) -> None:
    torch.save({**squeezenet, "features.0.weight": torch.zeros(64, 1, 3, 3)}, "grey.pt")
    with pytest.raises(InfluenceError) as raised:
        guess_model(Path("grey.pt"), None)
    assert "are nearly torchvision's squeezenet1_1, but features.0.weight is [64, 1, 3, 3]" in raised.value.message


def test_the_architecture_of_a_file_is_no_path_and_no_command(folder: Path) -> None:
    for arch in ("hf-hub:some/model", "local-dir:/tmp", "../x", "os.system"):
        torch.save({"arch": arch, "version": 2, "state_dict": {"w": torch.zeros(2, 2)}}, "model.pt")
        with pytest.raises(InfluenceError):
            guess_model(Path("model.pt"), None)


def test_a_folder_that_is_no_checkpoint_names_what_is_in_it(folder: Path) -> None:
    with pytest.raises(InfluenceError, match="is a folder without"):
        guess_model(Path("data"), None)
    with pytest.raises(InfluenceError, match="there is no checkpoint"):
        guess_model(Path("gone.pt"), None)


def test_a_config_of_the_hub_that_is_no_classifier(folder: Path) -> None:
    for config, said in (
        ({"architectures": ["ViTModel"]}, "says ViTModel, which is no image classifier"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": ["XForImageClassification"], "auto_map": {"a": "b"}}, "needs code of its own"),
    ):
        Path("hub").mkdir(exist_ok=True)
        Path("hub/config.json").write_text(json.dumps(config))
        with pytest.raises(InfluenceError, match=said):
            guess_model(Path("hub"), None)
    Path("hub/config.json").write_text("{")
    with pytest.raises(InfluenceError, match="is not readable JSON"):
        guess_model(Path("hub"), None)
