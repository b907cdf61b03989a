"""guess_timm: the architecture and the options of timm's training script."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from influence_cli.config.load import parse_config
from influence_cli.data.transforms import build_transform
from influence_cli.errors import InfluenceError
from influence_cli.setup.architecture import guess_model
from influence_cli.setup.timm_models import is_timm_name
from influence_cli.setup.write_config import flow


def test_a_name_that_is_more_than_a_name_is_not_timms() -> None:
    assert is_timm_name("vit_tiny_patch16_224.augreg_in21k")
    for name in ("hf-hub:a/b", "local-dir:x", "a/b", "", 3, None, "a b"):
        assert not is_timm_name(name)


def test_without_timm_the_file_is_named_and_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "timm" else find(name))
    torch.save({"arch": "vit_tiny", "version": 2, "state_dict": {"w": torch.zeros(2, 2)}}, tmp_path / "x.pth.tar")
    with pytest.raises(InfluenceError, match=r"arch in x\.pth\.tar is timm's vit_tiny, but timm is not installed"):
        guess_model(tmp_path / "x.pth.tar", None)


def saved(folder: Path, arch: str, **options: object) -> Path:
    timm = pytest.importorskip("timm")
    model = timm.create_model(arch, num_classes=3, in_chans=options.pop("in_chans", 3))
    args = argparse.Namespace(model=arch, num_classes=3, opt="sgd", weight_decay=1e-3, gp=None, **options)
    content = {"epoch": 1, "arch": arch, "version": 2, "args": args, "state_dict": model.state_dict(), "metric": 0.5}
    average = {key: value.clone() + 1 for key, value in model.state_dict().items()}
    torch.save({**content, "state_dict_ema": average}, folder / "model_best.pth.tar")
    return folder / "model_best.pth.tar"


def test_the_script_of_timm(tmp_path: Path) -> None:
    path = saved(tmp_path, "mobilenetv3_small_050", img_size=64, mean=[0.1, 0.2, 0.3], crop_pct=1.0)
    guess, inside = guess_model(path, None)
    assert guess.factory == "timm.create_model"
    assert guess.factory_why == "arch in model_best.pth.tar"
    assert guess.args == {"model_name": "mobilenetv3_small_050", "num_classes": 3}
    assert "state_dict_ema fits too" in guess.checkpoint_why
    assert guess.transform is not None
    args = guess.transform.value["args"]
    assert (args["input_size"], args["mean"], args["crop_pct"]) == ([3, 64, 64], [0.1, 0.2, 0.3], 1.0)
    text = f"model: {{factory: a.b}}\ntrain:\n  dataset: c.d\n  transform: {flow(guess.transform.value)}\n"
    config = parse_config(text, tmp_path / "influence.yaml")
    transform, _ = build_transform(config, "train", config.train, None)
    assert transform is not None
    assert transform(torch.zeros(3, 80, 80)).shape == (3, 64, 64)
    assert inside.settings["opt"] == "sgd"


def test_grey_images_and_a_name_that_timm_lacks(tmp_path: Path) -> None:
    guess, _ = guess_model(saved(tmp_path, "mobilenetv3_small_050", in_chans=1), None)
    assert guess.args["in_chans"] == guess.channels == 1
    content = torch.load(tmp_path / "model_best.pth.tar", weights_only=False)
    torch.save(content | {"arch": "mobilenetv3_smal_050"}, tmp_path / "x.pth")
    with pytest.raises(InfluenceError, match="which is no model of timm") as raised:
        guess_model(tmp_path / "x.pth", None)
    assert "did you mean 'mobilenetv3_small_050'?" in raised.value.hint
    torch.save(content | {"arch": "mobilenetv3_large_100"}, tmp_path / "x.pth")
    with pytest.raises(InfluenceError, match="the weights do not fit that model"):
        guess_model(tmp_path / "x.pth", None)


def test_a_folder_of_the_hub(tmp_path: Path) -> None:
    path = saved(tmp_path, "mobilenetv3_small_050")
    torch.save(torch.load(path, weights_only=False)["state_dict"], tmp_path / "pytorch_model.bin")
    config = {"architecture": "mobilenetv3_small_050", "num_classes": 3, "label_names": ["a", "b", "c"]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"pretrained_cfg": {"mean": [0.5] * 3}}))
    guess, _ = guess_model(tmp_path, None)
    assert guess.checkpoint == str(tmp_path / "pytorch_model.bin")
    assert guess.names == ("a", "b", "c")
    assert guess.transform is not None
    assert guess.transform.value["args"]["mean"] == [0.5] * 3
