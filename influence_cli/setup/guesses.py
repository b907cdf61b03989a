"""What was guessed of a model, of data and of a transform: the lines of the config, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelGuess:
    """The model of a checkpoint.

    Attributes:
        factory: as in ``model.factory``.
        factory_why: what says so.
        args: as in ``model.args``.
        args_why: what says so.
        outputs: number of outputs; None where nothing shows it.
        checkpoint: as in ``model.checkpoint``; None where the factory loads the weights.
        checkpoint_why: a remark on the weights.
        names: class names by output, or None.
        names_why: where the names stand.
        channels: colour channels of an input: 1 or 3, or None where nothing shows it.
        sizes: (height, width) of the inputs that fit; empty where nothing shows it.
        crops: (resize, crop) that the library evaluates its own weights with.
        transform: the transform that the checkpoint names, or None.
        output: as in ``model.output``: where the logits are, if the model returns more; None for the usual place.
        output_why: what says so.
    """

    factory: str
    factory_why: str
    args: dict[str, Any]
    args_why: str
    outputs: int | None
    checkpoint: Any
    checkpoint_why: str = ""
    names: tuple[str, ...] | None = None
    names_why: str = ""
    channels: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    crops: tuple[tuple[int, int], ...] = ()
    transform: TransformGuess | None = None
    output: int | str | None = None
    output_why: str = ""


@dataclass(frozen=True)
class TransformGuess:
    """A transform that may be the one of the training.

    Attributes:
        value: as in ``train.transform``.
        name: in words, such as ``Resize 256, CenterCrop 224, ImageNet's mean and std``.
        why: what says so; empty for one that is only plausible.
    """

    value: Any
    name: str
    why: str = ""


@dataclass(frozen=True)
class DataGuess:
    """Training and test data by their form.

    Attributes:
        train: the keys of the section ``train``, without the transform.
        train_why: what says so.
        test: the keys of the section ``test``, or None.
        test_why: what says so.
    """

    train: dict[str, Any]
    train_why: str
    test: dict[str, Any] | None = None
    test_why: str = ""


@dataclass(frozen=True)
class PenaltyGuess:
    """λ₂ of the training objective.

    Attributes:
        value: λ₂ ≥ 0.
        why: what says so, and what it means for the optimiser.
    """

    value: float
    why: str
