"""From the config to a transform: torchvision's by name, any object by dotted name or file, a folder's processor.

A step that names an object is that object itself, if it is an instance or a function of one required argument (the
image). A class, a function without required arguments, and whatever is given arguments is called first, and what it
returns is the step.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from PIL import Image
from torch import Tensor

from influence_cli.config.quick_torchvision import import_torchvision
from influence_cli.config.schema import Config, DataConfig, TransformStep
from influence_cli.config.source_code import is_installed, source_hash
from influence_cli.config.user_code import accepts, call, import_object
from influence_cli.errors import InfluenceError, describe, did_you_mean

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode

Step = Callable[[Any], Any]
# What a folder holds where transformers saved its image processor.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def build_transform(config: Config, name: str, section: DataConfig, factory: Any) -> tuple[Step | None, str]:
    """Make the transform of a split.

    Args:
        config: the run, for lines of messages and the folder of relative paths.
        name: ``train`` or ``test``.
        section: its section.
        factory: of the data set, which must not take a transform too.

    Returns:
        The transform, None where the section has none; a text that changes when the transform does.
    """
    if section.transform is None:
        return None, ""
    made = fixed_steps(section.transform, config.folder, lambda number: config.where(name, "transform", number))
    if accepts(factory, "transform") and "transform" in section.args:
        raise InfluenceError(f"{config.where(name, 'args', 'transform')}: give the transform under {name}.transform")
    return made


def fixed_steps(given: tuple[TransformStep, ...], folder: Path, where: Callable[[int], str]) -> tuple[Step | None, str]:
    """Make a list of steps one transform, none of them random.

    Args:
        given: the steps.
        folder: that relative paths start from.
        where: the config's line of each step, for errors.

    Returns:
        The transform, None for no step; a text that changes when it does.
    """
    steps: list[Step] = []
    texts = []
    for number, step in enumerate(given):
        made, origin = _make(step, folder, where(number))
        steps.append(made)
        texts.append(f"{step.name} {step.args}{origin}")
    return _joined(steps, given), "; ".join(texts)


def build_steps(given: tuple[TransformStep, ...], folder: Path, where: Callable[[int], str]) -> Step | None:
    """Make a list of steps one transform, such as an augmentation: random ones too; None if it is empty.

    Args:
        given: the steps.
        folder: that relative paths start from.
        where: the config's line of each step, for errors.
    """
    return _joined([_make(step, folder, where(number), random=True)[0] for number, step in enumerate(given)], given)


def _joined(steps: list[Step], given: tuple[TransformStep, ...]) -> Step | None:
    if len(steps) == 1 and not _is_torchvision_name(given[0]):
        return steps[0]  # as its maker gave it, with the attributes that say what it does
    if not steps:
        return None
    import_torchvision()
    from torchvision.transforms import v2

    whole: Step = v2.Compose(steps)
    return whole


def _make(step: TransformStep, folder: Path, at: str, *, random: bool = False) -> tuple[Step, str]:
    """Make one step, and say where it comes from, if that is not torchvision."""
    if step.name == "processor":
        return _processor(step, folder, at)
    if _is_torchvision_name(step):
        return _torchvision(step, folder, at, random=random), ""
    called = step.name.endswith("()")
    name = step.name.removesuffix("()")
    given = import_object(name, folder, at)
    args = _converted(step.args, at) if str(getattr(given, "__module__", "")).startswith("torchvision") else step.args
    made = given
    if args or called or _is_called_first(given, name, at):
        made = call(given, args, folder, name, lambda *_: at)
    if type(made).__module__.partition(".")[0] == "albumentations":
        made = Albumentations(made)
    if not callable(made):
        said = "is" if made is given else "returned an object"
        raise InfluenceError(
            f"{at}: {step.name} {said} of type {type(made).__name__}, not a transform that takes an image",
            _advice(made, name),
        )
    return made, _origin(made, name, folder)


def _is_torchvision_name(step: TransformStep) -> bool:
    return not any(letter in step.name for letter in ".:/") and step.name != "processor"


def _is_called_first(given: Any, name: str, at: str) -> bool:
    """Say whether an object makes the transform rather than being it."""
    if isinstance(given, type):
        return True
    if not (inspect.isroutine(given) or isinstance(given, functools.partial)):
        return False
    try:
        parameters = inspect.signature(given).parameters.values()
    except (TypeError, ValueError):
        return False
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise InfluenceError(
            f"{at}: {name} needs the arguments {', '.join(required)}, so it is neither a transform (one argument, the "
            "image) nor made without arguments",
            f"to call it first: {{factory: {name}, args: {{{required[0]}: …}}}}",
        )
    return not required


def _advice(made: Any, name: str) -> str:
    if hasattr(made, "transforms") and not isinstance(made, type):  # a member of torchvision's weights
        return f"name its transforms: {name}.transforms"
    return "a transform is a function of one image, or an object that can be called with one"


def _torchvision(step: TransformStep, folder: Path, at: str, *, random: bool) -> Step:
    import_torchvision()
    from torchvision.transforms import v2

    made = getattr(v2, step.name, None)
    if not isinstance(made, type):
        known = [word for word in dir(v2) if isinstance(getattr(v2, word), type)]
        raise InfluenceError(f"{at}: torchvision.transforms.v2 has no {step.name!r}", did_you_mean(step.name, known))
    if step.name.startswith("Random") and not random:
        raise InfluenceError(
            f"{at}: {step.name} is random: an example's gradient would change with every reading",
            "give the evaluation transform, without augmentation",
        )
    transform: Step = call(made, _converted(step.args, at), folder, step.name, lambda *_: at)
    return transform


def _converted(args: dict[str, Any], at: str) -> dict[str, Any]:
    """Turn the words for a dtype and an interpolation into torch's objects."""
    args = dict(args)
    for key, value in args.items():
        if key == "dtype" and isinstance(value, str):
            args[key] = _dtype(value, at)
        if key == "interpolation" and isinstance(value, str):
            args[key] = _interpolation(value, at)
    return args


def _interpolation(name: str, where: str) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode

    known = [mode.value for mode in InterpolationMode]
    if name.lower() not in known:
        raise InfluenceError(f"{where}: there is no interpolation {name!r}", did_you_mean(name.lower(), known))
    return InterpolationMode(name.lower())


def _dtype(name: str, where: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise InfluenceError(
            f"{where}: there is no dtype {name!r}", did_you_mean(name, ["float32", "float64", "uint8"])
        )
    return dtype


@dataclass(frozen=True)
class Albumentations:
    """A transform of albumentations, which takes an array by keyword."""

    transform: Any

    def __call__(self, image: Any) -> Tensor:
        """Transform an image.

        Raises:
            ValueError: the result is no tensor.
        """
        array = np.array(image) if isinstance(image, Image.Image) else image
        result = self.transform(image=array)["image"]
        if not isinstance(result, Tensor):
            raise ValueError(
                f"albumentations gives {type(result).__name__}, not a tensor: end its Compose with ToTensorV2()"
            )
        return result


@dataclass(frozen=True)
class Processor:
    """An image processor of transformers, which returns a batch."""

    processor: Any

    def __call__(self, image: Any) -> Tensor:
        """Transform an image to its ``pixel_values``."""
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def _processor(step: TransformStep, folder: Path, at: str) -> tuple[Step, str]:
    path = folder / os.path.expanduser(str(step.args["folder"]))  # noqa: PTH111 (leaves unknown homes as they are)
    save = "AutoImageProcessor.from_pretrained(NAME).save_pretrained(FOLDER) of transformers saves one"
    if not path.is_dir():
        if path.name in PROCESSOR_FILES and path.is_file():
            raise InfluenceError(f"{at}: {path} is a file", f"name its folder: processor: {step.args['folder']}/..")
        raise InfluenceError(f"{at}: there is no folder {path}, and a processor is read from a folder", save)
    files = [path / name for name in PROCESSOR_FILES if (path / name).is_file()]
    if not files:
        above = any((path.parent / name).is_file() for name in PROCESSOR_FILES)
        raise InfluenceError(
            f"{at}: {path} has no {PROCESSOR_FILES[0]}, so it says nothing about the images",
            f"the folder above has one: processor: {step.args['folder']}/.." if above else save,
        )
    try:
        from transformers import AutoImageProcessor
    except ImportError as error:
        raise InfluenceError(
            f"{at}: a processor needs transformers, which cannot be imported: {describe(error)}",
            "pip install transformers",
        ) from error
    try:
        # Nothing is downloaded, and code beside the file is not run.
        processor = AutoImageProcessor.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InfluenceError(f"{at}: transformers cannot read the processor in {path}: {describe(error)}") from error
    # The file is what counts, wherever the folder is.
    content = " ".join(xxhash.xxh3_64_hexdigest(file.read_bytes()) for file in files)
    return Processor(processor), f" {content} {_release('transformers')}"


def _origin(made: Any, name: str, folder: Path) -> str:
    """Say what a transform is made of: the release of its package, its files, and what it shows of itself."""
    if ":" in name:
        release, first = "", str(folder / os.path.expanduser(name.partition(":")[0]))  # noqa: PTH111
    else:
        parts = name.split(".")
        modules = (sys.modules.get(".".join(parts[:cut])) for cut in range(len(parts), 0, -1))
        release, first = _release(parts[0]), _file(next((module for module in modules if module is not None), None))
    # Where it is named and where it is defined: often one file.
    files = dict.fromkeys((first, _file(sys.modules.get(getattr(made, "__module__", None) or ""))))
    content = [_content(Path(file)) for file in files if file and Path(file).is_file()]
    shown = repr(made)
    # A plain function shows where it lies in memory, which differs from process to process.
    return " ".join(["", *filter(None, [release, *content]), *([] if " at 0x" in shown else [shown])])


def _content(file: Path) -> str:
    return xxhash.xxh3_64_hexdigest(file.read_bytes()) if is_installed(file.resolve()) else source_hash(file)


def _file(module: Any) -> str:
    return getattr(module, "__file__", None) or ""


def _release(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return ""
