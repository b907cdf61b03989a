"""From a config to what the mathematics takes: model, loss, data, device. The config stops here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.checkpoint import load_weights, read_checkpoint
from influence_cli.config.schema import Config, DataConfig
from influence_cli.config.user_code import accepts, call, import_object
from influence_cli.data import Loading, Split, raw_item, to_input
from influence_cli.data_files import DataFiles
from influence_cli.errors import InfluenceError, describe, did_you_mean
from influence_cli.image_files import refuse_folder_loops
from influence_cli.label_files import read_indices, read_labels
from influence_cli.losses import Loss, load_loss
from influence_cli.runtime import distributed
from influence_cli.runtime.terminal import Terminal

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode


@dataclass(frozen=True)
class Task:
    """One checkpoint and its data.

    Attributes:
        model: on ``device``, in eval mode.
        loss: (outputs [b, C], targets [b]) to losses [b].
        loss_name: the loss and its arguments, for fingerprints and reports.
        train: training examples.
        test: test examples, or None.
        classes: class names by output number.
        l2: λ₂ of the training objective.
        n: number of training examples that the checkpoint was trained on.
        checkpoint: the file.
        device: where the model is.
        convex_loss: whether the loss is known to be convex in the outputs.
        seed: of everything random here.
        explained: whether predictions and losses are reported of this checkpoint: of all independent models their
            mean, of a run's checkpoints only the last.
        terminal: told how data will be read.
    """

    model: nn.Module
    loss: Loss
    loss_name: str
    train: Split
    test: Split | None
    classes: tuple[str, ...]
    l2: float
    n: int
    checkpoint: Path
    device: torch.device
    convex_loss: bool
    seed: int
    explained: bool = True
    terminal: Terminal = field(default_factory=lambda: Terminal(quiet=True), compare=False)

    @cached_property
    def loading(self) -> Loading:
        """Plan the loader processes, from a measurement of a second at most when they are first asked for."""
        from influence_cli.loader_plan import plan_loading  # which stands on the layers, and they on this file

        return plan_loading(
            self.train, lambda inputs: logits_of(self.model(inputs)), self.device, self.seed, self.terminal
        )

    def test_split(self) -> Split:
        """Give the test examples; an error where the config names none."""
        if self.test is None:
            raise InfluenceError("the config has no test data set", "add a section test: {dataset: …, args: {…}}")
        return self.test


def load_tasks(config: Config, terminal: Terminal | None = None) -> list[Task]:
    """Load everything that the config names: a task a checkpoint, the data shared by all of them.

    Args:
        config: the run's config.
        terminal: told how data will be read.

    Raises:
        InfluenceError: at the config's line, for whatever does not exist, fit or load.
    """
    device = choose_device(config.device, config.where("device"))
    torch.manual_seed(config.seed)
    set_precision("float32")
    # The fused attention path of eval mode has no derivative for torch.func.
    torch.backends.mha.set_fastpath_enabled(False)
    train, test = load_splits(config)
    loss, convex = load_loss(config)
    if isinstance(loss, nn.Module):
        loss.to(device)
    loss_name = config.loss.factory + (f" {config.loss.args}" if config.loss.args else "")
    tasks = []
    for number, path in enumerate(config.model.checkpoint):
        model = build_model(config)
        where = config.where("model", "checkpoint", number)
        load_weights(model, read_checkpoint(path, where), path, where)
        model.to(device).eval()
        outputs = _count_outputs(model, train, device, config)
        classes = _class_names(train, test, outputs, config)
        n = config.train.n if config.train.n is not None else len(train)
        if n < len(train):
            raise InfluenceError(
                f"{config.where('train', 'n')}: train.n is {n}, but the data set has {len(train)} examples in use",
                "n is the size of the set that the checkpoint was trained on; leave it out if that is all of this one",
            )
        explained = not config.model.is_one_run or number + 1 == len(config.model.checkpoint)
        rest = (device, convex, config.seed, explained, terminal or Terminal(quiet=True))
        tasks.append(Task(model, loss, loss_name, train, test, classes, config.l2, n, path, *rest))
    return tasks


def choose_device(name: str, where: str = "device") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps`` into a device that exists here."""
    if name == "auto":
        if torch.cuda.is_available():
            if distributed.size() > 1:  # each process of a job has one of its own
                return torch.device("cuda", distributed.local_device(torch.cuda.device_count()))
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind == "cuda" and torch.cuda.device_count() <= (int(number) if number.isdigit() else 0):
        raise InfluenceError(
            f"{where}: there is no {name} here ({torch.cuda.device_count()} CUDA devices)", "use device: auto, or cpu"
        )
    if kind == "mps" and not torch.backends.mps.is_available():
        raise InfluenceError(f"{where}: there is no mps device here", "use device: auto, or cpu")
    return torch.device(name)


def set_precision(precision: str) -> None:
    """Allow TF32 products on CUDA, or forbid them: torch's default allows them for convolutions alone."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "float32"


def logits_of(outputs: Any) -> Tensor:
    """Take the logits out of what a model returns: a tensor, the first of a tuple, or ``logits``/``out`` of a dict."""
    if isinstance(outputs, Tensor):
        return outputs
    for key in ("logits", "out"):
        found = outputs.get(key) if isinstance(outputs, dict) else getattr(outputs, key, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    keys = f" with the keys {', '.join(map(repr, outputs))}" if isinstance(outputs, dict) else ""
    raise InfluenceError(
        f"the model returns a {type(outputs).__name__}{keys}, in which no logits are found",
        "let it return a tensor, a tuple whose first item is the logits, or a dict with 'logits'",
    )


def build_model(config: Config) -> nn.Module:
    """Call the model's factory; an error at the config's line where it is not what a config needs."""

    def where(*keys: str) -> str:
        return config.where("model", *(keys or ("factory",)))

    factory = import_object(config.model.factory, config.folder, where())
    model = call(factory, config.model.args, config.folder, config.model.factory, where)
    if not isinstance(model, nn.Module):
        raise InfluenceError(f"{where()}: {config.model.factory} returned a {type(model).__name__}, not a torch module")
    return model


def load_splits(config: Config) -> tuple[Split, Split | None]:
    """Build the training and the test examples, which have to agree on the classes; no model is needed."""
    train = load_split(config, "train", config.train)
    test = load_split(config, "test", config.test) if config.test is not None else None
    if test is not None:
        _check_mapping(train, test)
    return train, test


def load_split(config: Config, name: str, section: DataConfig) -> Split:
    """Build the training or the test examples: data set, transform, labels, exclusions."""

    def where(*keys: str) -> str:
        return config.where(name, *(keys or ("dataset",)))

    factory, root = import_object(section.dataset, config.folder, where()), section.args.get("root")
    if _is_folder_of_classes(factory) and isinstance(root, str):
        refuse_folder_loops(config.folder / root, where())
    source = call(factory, section.args, config.folder, section.dataset, where)
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise InfluenceError(
            f"{where()}: {section.dataset} returned a {type(source).__name__}, without a length or items by number",
            "a map-style data set is needed: __len__ and __getitem__",
        )
    if len(source) == 0:
        raise InfluenceError(f"{where()}: the {name} data set is empty", "check its args")
    transform = _build_transform(config, name, section, factory)
    classes = _source_classes(source)
    mapping = getattr(source, "class_to_idx", None)
    files = getattr(source, "files", None)
    files = files if isinstance(files, DataFiles) else None
    split = Split(
        name=name,
        source=source,
        transform=transform,
        labels=np.full(len(source), -1, dtype=np.int64),
        indices=np.arange(len(source), dtype=np.int64),
        paths=source.paths if files is not None else _source_paths(source, config.folder),
        classes=classes,
        mapping=dict(mapping) if isinstance(mapping, dict) else None,
        where=where(),
        transform_text="; ".join(f"{step.name} {step.args}" for step in section.transform or ()),
        folder=None if Path.cwd() == config.folder else config.folder,
        files=files,
    )
    labels = source_labels(split)
    if section.labels is not None:
        labels = read_labels(section.labels, labels, classes, where("labels"), split.paths)
    indices = split.indices
    if section.exclude is not None:
        indices = np.setdiff1d(indices, read_indices(section.exclude, len(source), where("exclude"), split.paths))
        if not len(indices):
            raise InfluenceError(f"{where('exclude')}: {section.exclude} leaves no {name} example")
    return replace(split, labels=labels, indices=indices)


def _is_folder_of_classes(factory: Any) -> bool:
    """Say whether this is torchvision's ImageFolder or like it, without importing that for other data sets."""
    base = getattr(sys.modules.get("torchvision.datasets"), "DatasetFolder", None)
    return base is not None and isinstance(factory, type) and issubclass(factory, base)


def _source_classes(source: Any) -> tuple[str, ...] | None:
    classes = getattr(source, "classes", None)
    if isinstance(classes, list | tuple) and classes:
        return tuple(" / ".join(map(str, c)) if isinstance(c, tuple | list) else str(c) for c in classes)
    return None


def _source_paths(source: Any, folder: Path) -> tuple[str, ...] | None:
    for attribute in ("samples", "imgs"):
        samples = getattr(source, attribute, None)
        if (
            isinstance(samples, list)
            and len(samples) == len(source)
            and all(isinstance(sample, tuple | list) and isinstance(sample[0], str | Path) for sample in samples)
        ):
            return tuple(str(folder / sample[0]) for sample in samples)
    return None


def source_labels(split: Split) -> np.ndarray:
    """Find the data set's own labels, without decoding an image where it allows that; check them on three examples."""
    source = split.source
    found = next((getattr(source, a) for a in ("targets", "labels", "_labels") if hasattr(source, a)), None)
    if found is None and isinstance(source, torch.utils.data.TensorDataset) and len(source.tensors) > 1:
        found = source.tensors[1]
    if found is not None:
        try:
            given = np.asarray(found).reshape(-1)
            labels = given.astype(np.int64) if given.dtype.kind in "biu" else np.empty(0, dtype=np.int64)
        except (TypeError, ValueError):
            labels = np.empty(0, dtype=np.int64)
        probes = {0, len(source) // 2, len(source) - 1}
        if len(labels) == len(source) and all(_agrees(split, i, int(labels[i])) for i in probes):
            return labels
    return np.array([_item_label(split, i) for i in range(len(source))], dtype=np.int64)


def _agrees(split: Split, index: int, label: int) -> bool:
    try:
        return _item_label(split, index) == label
    except InfluenceError:
        # An unreadable image says nothing about its label; the pass that needs the image will name it.
        return True


def _item_label(split: Split, index: int) -> int:
    _, label = raw_item(split, index)
    try:
        number = int(label)
        if number != label or abs(number) >= 2**63:
            raise ValueError("not a whole number that fits")
    except (TypeError, ValueError, OverflowError) as error:
        raise InfluenceError(
            f"{split.where}: {split.title(index)} has the label {label!r}, not a class number ({describe(error)})"
        ) from error
    return number


def _build_transform(config: Config, name: str, section: DataConfig, factory: Any) -> Callable[[Any], Any] | None:
    if section.transform is None:
        return None
    from torchvision.transforms import v2

    steps = []
    for number, step in enumerate(section.transform):
        at = config.where(name, "transform", number)
        made = getattr(v2, step.name, None)
        if not isinstance(made, type):
            known = [word for word in dir(v2) if isinstance(getattr(v2, word), type)]
            raise InfluenceError(
                f"{at}: torchvision.transforms.v2 has no {step.name!r}", did_you_mean(step.name, known)
            )
        if step.name.startswith("Random"):
            raise InfluenceError(
                f"{at}: {step.name} is random: an example would have another gradient each time it is read",
                "give the transform of evaluation, without augmentation",
            )
        args = dict(step.args)
        for key, value in args.items():
            if key == "dtype" and isinstance(value, str):
                args[key] = _dtype(value, at)
            if key == "interpolation" and isinstance(value, str):
                args[key] = _interpolation(value, at)
        steps.append(call(made, args, config.folder, step.name, lambda *_, at=at: at))
    if accepts(factory, "transform") and "transform" in section.args:
        raise InfluenceError(f"{config.where(name, 'args', 'transform')}: give the transform under {name}.transform")
    return v2.Compose(steps) if steps else None


def _interpolation(name: str, where: str) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode

    known = [mode.value for mode in InterpolationMode]
    if name.lower() not in known:
        raise InfluenceError(f"{where}: there is no interpolation {name!r}", did_you_mean(name.lower(), known))
    return InterpolationMode(name.lower())


def _dtype(name: str, where: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise InfluenceError(
            f"{where}: there is no dtype {name!r}", did_you_mean(name, ["float32", "float64", "uint8"])
        )
    return found


def _check_mapping(train: Split, test: Split) -> None:
    if train.mapping is not None and test.mapping is not None and train.mapping != test.mapping:
        only = [
            f"only in {split} {', '.join(sorted(mine.keys() - others.keys())[:6])}"
            for split, mine, others in (
                ("train", train.mapping, test.mapping),
                ("test", test.mapping, train.mapping),
            )
            if mine.keys() - others.keys()
        ]
        moved = sorted(name for name in train.mapping if train.mapping[name] != test.mapping.get(name))
        raise InfluenceError(
            f"{test.where}: class_to_idx differs between train and test: "
            + ("; ".join(only) or f"other numbers for {', '.join(moved[:6])}"),
            "both folders need the same class folders, so that a number means one class",
        )


def _count_outputs(model: nn.Module, train: Split, device: torch.device, config: Config) -> int:
    """Run one example through the model: does the input fit, and how many outputs are there?"""
    for index in train.indices[:8]:
        try:
            image, _ = raw_item(train, int(index))
        except InfluenceError:
            continue
        tensor = to_input(train, image, train.title(int(index)))
        try:
            with torch.no_grad():
                outputs = logits_of(model(tensor[None].to(device)))
        except InfluenceError as error:
            raise InfluenceError(f"{config.where('model', 'factory')}: {error.message}", error.hint) from error
        except Exception as error:
            raise InfluenceError(
                f"{config.where('model', 'factory')}: the model fails on {train.title(int(index))} of shape "
                f"{list(tensor.shape)}: {describe(error)}",
                "does train.transform give what the model was trained on?",
            ) from error
        if outputs.ndim != 2:
            raise InfluenceError(
                f"{config.where('model', 'factory')}: the model returns {list(outputs.shape)} for one example",
                "a classifier returns [batch, classes]",
            )
        return int(outputs.shape[1])
    # All of the first few are unreadable: the pass reports the first of them, by name.
    raw_item(train, int(train.indices[0]))
    raise InfluenceError(f"{train.where}: no training example can be read")


def _class_names(train: Split, test: Split | None, outputs: int, config: Config) -> tuple[str, ...]:
    where = config.where("model", "factory")
    if train.classes is not None and len(train.classes) != outputs:
        raise InfluenceError(
            f"{where}: the model has {outputs} outputs, the training data set {len(train.classes)} classes",
            f"give the model {len(train.classes)} outputs, such as args: {{num_classes: {len(train.classes)}}}",
        )
    for split in (train, test):
        if split is None:
            continue
        used = split.labels[split.indices]
        outside = split.indices[(used < 0) | (used >= outputs)]
        if len(outside):
            index = int(outside[0])
            raise InfluenceError(
                f"{split.where}: {split.title(index)} has the label {split.labels[index]}, the model has {outputs} "
                f"outputs (0 to {outputs - 1})",
                f"{len(outside)} examples are outside; are labels counted from 0, and is this the right model?",
            )
    return train.classes if train.classes is not None else tuple(str(number) for number in range(outputs))
