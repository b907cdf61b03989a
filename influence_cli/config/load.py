"""The config of a run: YAML to frozen, typed values, with the file and line of every mistake."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from influence_cli.config.mistakes import (
    data_mistake,
    ensemble_mistake,
    features_mistake,
    first_mistake,
    replay_mistake,
    training_mistake,
)
from influence_cli.config.schema import (
    CheckpointConfig,
    Config,
    CurvatureConfig,
    DataConfig,
    EvidenceConfig,
    FeaturesConfig,
    GradientsConfig,
    LossConfig,
    ModelConfig,
    RecipeConfig,
    TrainingConfig,
    place_of,
)
from influence_cli.config.yaml_reader import Keys, read_yaml, scalar
from influence_cli.errors import InfluenceError, describe, did_you_mean, near_path

# Largest file: a hundred times what a config needs, and read in seconds with any content.
MAX_BYTES = 100_000
# Arguments of these names are paths, taken relative to the YAML file.
PATH_NAME = re.compile(r"(^|_)(root|path|dir|directory|folder|file|filename)s?$", re.IGNORECASE)
OWN_PATHS = {("model", "checkpoint"), ("train", "classes"), ("gradients", "store"), ("training", "record")} | {
    (section, key) for section in ("train", "test") for key in ("csv", "folder", "root", "labels", "exclude")
}
FEATURES, FEATURE_PATHS = ("evidence", "features"), ("file", "probabilities", "checkpoint")
# These may be a path, or a name on the Hub, which has a slash too.
NAMES_OR_PATHS = {("train", "huggingface"), ("test", "huggingface")}


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config and check every key.

    Args:
        path: the YAML file; its relative paths are taken from its folder.
        overrides: ``a.b=v``, split at the first ``=``, v parsed as YAML; paths in them are relative to the
            current folder.

    Raises:
        InfluenceError: the first mistake, with file and line.
    """
    return parse_config(_read(path, str(near_path(path.absolute()))), path, overrides)


def parse_config(text: str, path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the text of a config, which need not be written yet, as ``load_config`` reads a file."""
    name = str(near_path(path.absolute()))
    document = read_yaml(text, name)
    places = {keys: f"{name}:{line}" for keys, line in document.lines.items()}
    places[()] = name
    folder = path.absolute().parent
    values: dict[str, Any] = _anchored((), document.values, folder)
    for override in overrides:
        _override(values, places, override, folder)
    gradients = values.setdefault("gradients", {})
    if isinstance(gradients, dict) and gradients.get("store") is None:
        gradients["store"] = str(folder / GradientsConfig().store)
    if "path" in values:
        raise InfluenceError(f"{places[('path',)]}: unknown key 'path'", did_you_mean("path", _known(())))
    try:
        config = Config.model_validate(values | {"path": path.absolute()})
    except ValidationError as error:
        raise first_mistake(error, values, places, _known) from error
    if config.test is not None and config.test.n is not None:
        raise InfluenceError(f"{places[('test', 'n')]}: test.n has no meaning", "n belongs under train")
    if config.test is not None and config.test.weights is not None:
        raise InfluenceError(f"{places[('test', 'weights')]}: test.weights has no meaning", "they belong under train")

    def where(*keys: str) -> str:
        return place_of(keys, places)

    if config.test is not None and config.test.classes is not None:
        raise InfluenceError(
            f"{where('test', 'classes')}: test.classes has no meaning", "train.classes holds for the test examples too"
        )
    checks = (data_mistake, training_mistake, replay_mistake, ensemble_mistake, features_mistake)
    mistake = next((wrong for check in checks if (wrong := check(config, where)) is not None), None)
    if mistake is not None:
        raise mistake
    if config.model.ensemble == "tracin":
        identity = config.curvature.model_copy(update={"method": "identity"})
        config = config.model_copy(update={"curvature": identity})
    if config.test is not None and config.test.transform is None:
        config = config.model_copy(
            update={"test": config.test.model_copy(update={"transform": config.train.transform})}
        )
    config._places.update(places)
    return config


def _read(path: Path, name: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            # A pipe or a device has no size, and may have no end.
            size = max(path.stat().st_size, len(content))
            raise InfluenceError(f"{name}: {size:,} bytes or more; a config is a few kB", "is this the right file?")
        return content.decode("utf-8")
    except FileNotFoundError as error:
        raise InfluenceError(
            f"there is no config {name}",
            "influence init writes a starter, influence demo writes a whole project; -c FILE names another config",
        ) from error
    except UnicodeDecodeError as error:
        raise InfluenceError(f"{name}: not a text file in UTF-8", "is this the right file?") from error
    except OSError as error:
        raise InfluenceError(f"{name} cannot be read: {describe(error)}") from error


def _anchored(keys: Keys, value: Any, folder: Path, home: Path | None = None) -> Any:
    """Make the paths in a value absolute: our own keys, and arguments whose names say that they are paths.

    Args:
        keys: where the value stands.
        value: as it was read.
        folder: what its paths are relative to.
        home: the folder of the YAML file, where that is another: a name that is beside it is a path too, not a hub's.
    """
    if keys == ("train", "classes") and not isinstance(value, str):  # the names themselves
        return value
    # Some of them may say more than their file.
    if (keys[:2] == ("model", "checkpoint") or keys == FEATURES) and isinstance(value, list):
        return [_anchored((*keys, number), item, folder, home) for number, item in enumerate(value)]
    if _holds_path(keys) and not isinstance(value, dict):
        return _each(value, lambda text: _absolute(text, folder))
    depth = len(keys) - (len(FEATURES) + isinstance(keys[2], int) if keys[:2] == FEATURES and len(keys) > 2 else 1)
    if keys in NAMES_OR_PATHS or (depth == 2 and keys[-2] == "args" and PATH_NAME.search(str(keys[-1]))):
        return _each(value, lambda text: _absolute(text, folder) if _is_path(text, folder, home) else text)
    if isinstance(value, dict):
        return {key: _anchored((*keys, key), inner, folder, home) for key, inner in value.items()}
    return value


def _holds_path(keys: Keys) -> bool:
    """Say whether a key of our own holds a path: of a checkpoint that says more than its file, only the file."""
    if keys[:2] == ("model", "checkpoint") and len(keys) > 2 and isinstance(keys[-1], str):
        return keys[-1] == "file"
    if keys[:2] == FEATURES:  # a mapping, one of a list of them, or the file alone
        names = [key for key in keys[2:] if isinstance(key, str)]
        return names in ([], *([key] for key in FEATURE_PATHS), ["checkpoint", "file"], ["transform", "processor"])
    if keys[1:] == ("transform", "processor"):
        return True
    return keys[:2] in OWN_PATHS


def _is_path(text: str, folder: Path, home: Path | None) -> bool:
    """Tell a path from a name on a hub, an address, or a folder that its owner will make: those arrive as written.

    A factory runs in the folder of the YAML file, so a path that is left as it is still works.
    """
    if "://" in text:
        return False
    if text.startswith((".", "~", "/")) or re.search(r"[*?\[{]", text):
        return True
    return any(os.path.lexists(place / text) for place in (folder, home) if place is not None)


def _each(value: Any, make: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_each(item, make) for item in value]
    return make(value) if isinstance(value, str) and value else value


def _absolute(text: str, folder: Path) -> str:
    # Not Path.expanduser: the home of an unknown user stays a file name, as in a shell.
    return os.path.normpath(folder / os.path.expanduser(text))  # noqa: PTH111


def _override(values: dict[str, Any], places: dict[Keys, str], text: str, home: Path) -> None:
    key_text, equals, value_text = text.partition("=")
    where = f"--set {text}"
    if not equals or not all(key_text.split(".")):
        raise InfluenceError(f"{where}: expected KEY=VALUE", "such as --set curvature.damping=0.01")
    value = scalar(value_text, where)
    keys = key_text.split(".")
    holder: Any = values
    path: list[str | int] = []
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(holder, list):
            if not (key.isascii() and key.isdecimal()) or int(key) >= len(holder):
                raise InfluenceError(
                    f"{where}: {'.'.join(map(str, path))} is a list of {len(holder)}",
                    f"give a number below {len(holder)}",
                )
            path.append(int(key))
        elif isinstance(holder, dict):
            path.append(key)
        else:
            raise InfluenceError(f"{where}: {'.'.join(map(str, path))} holds a value, not keys")
        step = path[-1]
        if last:
            holder[step] = _anchored(tuple(path), value, Path.cwd(), home)
        elif isinstance(holder, list):
            holder = _mapped(holder, int(step), path)
        else:
            if holder.get(step) is None:
                holder[step] = {}
            holder = _mapped(holder, step, path)
    # What the override replaced, and everything below it, now comes from the command line.
    for known in [place for place in places if place[: len(path)] == tuple(path)]:
        del places[known]
    places[tuple(path)] = where


def _mapped(holder: Any, step: str | int, path: Sequence[str | int]) -> Any:
    """Go one key down; the file of a checkpoint becomes the mapping that an override adds a key to."""
    if tuple(path[:2]) == ("model", "checkpoint") and isinstance(holder[step], str):
        holder[step] = {"file": holder[step]}
    return holder[step]


def _known(keys: Sequence[str | int]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "model": ModelConfig,
        "loss": LossConfig,
        "train": DataConfig,
        "test": DataConfig,
        "gradients": GradientsConfig,
        "curvature": CurvatureConfig,
        "training": TrainingConfig,
        "evidence": EvidenceConfig,
    }
    if not keys:
        return [name for name in Config.model_fields if name != "path"]
    if tuple(keys[:2]) == ("model", "checkpoint"):
        return list(CheckpointConfig.model_fields)
    if tuple(keys[:2]) == FEATURES:
        return list((CheckpointConfig if "checkpoint" in keys else FeaturesConfig).model_fields)
    if tuple(keys) == ("training", "recipe"):
        return list(RecipeConfig.model_fields)
    section = sections.get(str(keys[0])) if len(keys) == 1 else None
    return list(section.model_fields) if section is not None else []
