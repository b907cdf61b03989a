"""Networks of each library, as small as its own arguments make them, trained for a second."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.ecosystem.pictures import CLASSES, batch

OWN = """
from torch import nn


def build(outputs=3):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, outputs),
    )
"""
NAMES = f"""
    names = dict(enumerate({CLASSES}))
    names = {{"id2label": names, "label2id": {{name: number for number, name in names.items()}}}}
"""
VIT = f"""
from transformers import ViTConfig, ViTForImageClassification


def build():{NAMES}
    return ViTForImageClassification(ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **names,
    ))
"""
RESNET = f"""
from transformers import ResNetConfig, ResNetForImageClassification


def build():{NAMES}
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **names)
    )
"""
DINOV2 = f"""
from transformers import Dinov2Config, Dinov2ForImageClassification


def build():{NAMES}
    return Dinov2ForImageClassification(Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8, **names
    ))
"""
CONVNEXT = f"""
from transformers import ConvNextConfig, ConvNextForImageClassification


def build():{NAMES}
    return ConvNextForImageClassification(
        ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, **names)
    )
"""
FASTAI = """
from fastai.vision.learner import create_vision_model
from torch import nn


def small(pretrained=False):
    body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(2), nn.Linear(2, 2))


def build():
    return create_vision_model(small, 3, pretrained=False, cut=-2, lin_ftrs=[8], ps=0.0)
"""
YOLO = """
from ultralytics.nn.tasks import ClassificationModel

LAYERS = {
    "nc": 3, "depth_multiple": 1.0, "width_multiple": 1.0,
    "backbone": [[-1, 1, "Conv", [8, 3, 4]], [-1, 1, "C2f", [8, True]]], "head": [[-1, 1, "Classify", ["nc"]]],
}


def build():
    return ClassificationModel(LAYERS, ch=3, nc=3, verbose=False)
"""
ONE_LOGIT = OWN.replace("outputs=3", "outputs=1")
SMALL_TIMM = {"num_classes": 3, "layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "stem_width": 8}
SMALL_MOBILENET = {
    "num_classes": 3, "width_mult": 0.1, "dropout": 0.0,
    "inverted_residual_setting": [[1, 8, 1, 1], [2, 8, 1, 2], [2, 16, 1, 2]],
}  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network as a config names it.

    Attributes:
        library: where it comes from.
        factory: ``model.factory``.
        args: ``model.args``.
        source: of ``model.py``, if the factory is there.
        output: ``model.output``, if it gives more than logits.
        loss: ``loss``, if it is another than cross-entropy.
    """

    library: str
    factory: str = "./model.py:build"
    args: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    output: int | None = None
    loss: str = ""

    def config(self) -> dict[str, Any]:
        """Give the section ``model`` without a checkpoint."""
        section: dict[str, Any] = {"factory": self.factory}
        if self.args:
            section["args"] = dict(self.args)
        if self.output is not None:
            section["output"] = self.output
        return section

    def build(self) -> nn.Module:
        """Make it untrained."""
        factory: Callable[..., nn.Module]
        if self.source:
            scope: dict[str, Any] = {}
            exec(self.source, scope)  # our text above
            factory = scope["build"]
        else:
            module, _, name = self.factory.rpartition(".")
            factory = getattr(importlib.import_module(module), name)
        return factory(**self.args)


NETWORKS = {
    "own": Network("torch", source=OWN),
    "own of 8": Network("torch", args={"outputs": 8}, source=OWN),
    "one logit": Network("torch", source=ONE_LOGIT),
    "mobilenet_v2": Network("torchvision", "torchvision.models.mobilenet_v2", SMALL_MOBILENET),
    "timm resnet18": Network("timm", "timm.create_model", {"model_name": "resnet18", **SMALL_TIMM}),
    "timm vit": Network(
        "timm",
        "timm.create_model",
        {
            "model_name": "vit_tiny_patch16_224", "num_classes": 3, "img_size": 32, "patch_size": 8,
            "embed_dim": 16, "depth": 2, "num_heads": 2,
        },
    ),
    "timm convnext": Network(
        "timm",
        "timm.create_model",
        {"model_name": "convnext_atto", "num_classes": 3, "depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]},
    ),
    "ViT": Network("transformers", source=VIT),
    "ResNet": Network("transformers", source=RESNET),
    "Dinov2": Network("transformers", source=DINOV2),
    "ConvNext": Network("transformers", source=CONVNEXT),
    "fastai": Network("fastai", source=FASTAI),
    "YOLO": Network("ultralytics", source=YOLO, output=1),
}  # fmt: skip


def logits(outputs: object) -> torch.Tensor:
    """Take the logits out of what a network of one of the libraries returns."""
    if isinstance(outputs, tuple):  # ultralytics: softmax, logits
        return outputs[1]
    return getattr(outputs, "logits", outputs)  # type: ignore[return-value]


@cache
def _trained(name: str) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the libraries
        model = NETWORKS[name].build()
    if name == "YOLO":  # its own trainer trains it: library_checkpoints.py
        return model
    model.train()
    inputs, labels = batch("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(40):
        outputs = logits(model(inputs))
        if outputs.shape[1] == 1:
            loss = functional.binary_cross_entropy_with_logits(outputs[:, 0], (labels > 0).float())
        else:
            loss = functional.cross_entropy(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def trained(name: str) -> nn.Module:
    """Give a copy of a network after 40 steps over all pictures, in eval mode."""
    return copy.deepcopy(_trained(name))
