"""A small smooth network that answers for a run that is chaotic, or that was never recorded: ``--proxy``.

It is trained on the same images by a recipe of its own, and its run is replayed. What it gives is influence on *its*
loss. GELU, average pooling and batches of 256 make a run that answers smoothly to its data (bench/results/replay.md);
whether this one does is measured like that of any other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn
from torch.nn.functional import cross_entropy

from influence_cli.config.schema import Config, CurvatureConfig, LossConfig, ModelConfig, RecipeConfig, TrainingConfig
from influence_cli.data.split import raw_item, to_input
from influence_cli.errors import InfluenceError
from influence_cli.model.objective import Objective
from influence_cli.model.task import Task, build_model

FACTORY = "influence_cli.replay.proxy.build"
# Sizes of the images that it takes, in pixels; from the second one on it pools a third time.
SMALLEST, POOLED, LARGEST = 28, 56, 96
# Numbers of a side of what its last layers see.
SIDE = 7
# Fewer images have more epochs, so that there are as many steps.
BATCH, EPOCHS, STEPS = 256, 20, 160


def build(channels: int, size: int, classes: int) -> nn.Module:
    """Make the network.

    Args:
        channels: 1 for grey images, 3 for colour.
        size: the larger side of an image, in pixels.
        classes: how many there are.
    """
    width = 16 if channels == 1 else 32
    third = [nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)] if size >= POOLED else []
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.GELU(),
        nn.AvgPool2d(2),
        *third,
        nn.AdaptiveAvgPool2d(SIDE),
        nn.Flatten(),
        nn.Linear(2 * width * SIDE**2, 2 * width),
        nn.GELU(),
        nn.Linear(2 * width, classes),
    )


def proxy_recipe(examples: int, seed: int) -> RecipeConfig:
    """Give the recipe that the proxy trains by on so many examples."""
    epochs = max(EPOCHS, -(-STEPS // -(-examples // BATCH)))
    return RecipeConfig(
        optimizer="sgd",
        lr=0.05,
        momentum=0.9,
        weight_decay=1e-3,
        schedule="cosine",
        batch=BATCH,
        epochs=epochs,
        seed=seed,
    )


def proxy_config(config: Config, task: Task) -> Config:
    """Give the config in which the proxy has the place of the user's network, on the same data.

    Its loss is the cross-entropy, whatever that of the network is. Its record lies beside the store:
    ``influence.proxy.run`` for ``influence.h5``.

    Raises:
        InfluenceError: the images have another size, some label is no class, or the examples have weights.
    """
    if config.train.weights is not None:
        raise InfluenceError(
            f"--proxy: the proxy trains on every image alike, but {config.where('train', 'weights')} gives weights",
            "leave --proxy out",
        )
    labels = task.train.labels[task.train.indices]
    if ignored := int(((labels < 0) | (labels >= len(task.classes))).sum()):
        raise InfluenceError(
            f"--proxy: the proxy trains on classes, but the labels of {ignored:,} training images are none",
            "list them under train.exclude",
        )
    channels, size = _shape(task)
    store = config.gradients.store
    args = {"channels": channels, "size": size, "classes": len(task.classes)}
    return config.model_copy(
        update={
            "model": ModelConfig(factory=FACTORY, args=args),
            "loss": LossConfig(factory="cross_entropy"),
            "l2": 0.0,
            "training": TrainingConfig(recipe=proxy_recipe(len(labels), config.seed)),
            "gradients": config.gradients.model_copy(update={"store": store.with_name(f"{store.stem}.proxy.h5")}),
            "curvature": CurvatureConfig(method="replay"),
            "precision": "float32",
        }
    )


def proxy_task(proxied: Config, task: Task) -> Task:
    """Give the task with the proxy, untrained, in the place of the user's network and loss."""
    model = build_model(proxied).to(task.device).eval()
    return replace(
        task,
        model=model,
        loss=partial(cross_entropy, reduction="none"),
        loss_name="cross_entropy",
        n=len(task.train),
        checkpoint=Path(FACTORY),
        convex_loss=True,
        smooth_loss=True,
        softmax_loss=True,
        curved_loss=True,
        output="",
        objective=Objective(),
        looked=set(),
        samples={},
    )


def _shape(task: Task) -> tuple[int, int]:
    """Give channels and larger side of the images, as the first one has them.

    Raises:
        InfluenceError: the proxy does not take them.
    """
    index = int(task.train.indices[0])
    image, _ = raw_item(task.train, index)
    shape = tuple(to_input(task.train, image, task.train.title(index)).shape)
    fits = len(shape) == 3 and shape[0] in (1, 3) and all(SMALLEST <= side <= LARGEST for side in shape[1:])
    if not fits:
        raise InfluenceError(
            f"--proxy: the proxy takes grey or colour images of {SMALLEST} to {LARGEST} pixels, but train.transform "
            f"gives {' × '.join(map(str, shape))}",
            "leave --proxy out, or name a config whose train.transform resizes to 64 pixels",
        )
    return shape[0], max(shape[1:])
