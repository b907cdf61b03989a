"""What transformers and peft do with weights is left to them, where they are installed; their absence is told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from influence_cli.checkpoints.load import load_checkpoint, trained_model
from influence_cli.config.schema import CheckpointConfig
from influence_cli.errors import InfluenceError

WHERE = "influence.yaml:4"


def base() -> nn.Module:
    """Make the same trained model every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def test_an_adapter_without_peft_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InfluenceError, match="needs peft, which is not installed") as caught:
        trained_model(base, CheckpointConfig(file=tmp_path), WHERE)
    assert caught.value.hint == "pip install peft"


def test_an_adapter_is_put_on_the_model_of_the_factory(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["1"], modules_to_save=["3"], r=2)
    adapted = peft.get_peft_model(base(), settings)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    adapted.save_pretrained(tmp_path)
    wanted = CheckpointConfig(file=tmp_path)
    model = trained_model(base, wanted, WHERE).eval()
    x = torch.randn(2, 16)
    assert torch.equal(model(x), adapted.eval()(x))
    tracked = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name or "modules_to_save" in name for name in tracked)
    assert len(tracked) == 4
    with pytest.raises(InfluenceError, match=r"needs its trained base model, but model.factory makes other weights"):
        trained_model(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)), wanted, WHERE)


def test_names_that_transformers_changes_are_left_to_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    kind = transformers.ViTForImageClassification
    source = kind(settings)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    source.save_pretrained(tmp_path)
    model = kind(settings)
    load_checkpoint(model, CheckpointConfig(file=tmp_path), WHERE)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
