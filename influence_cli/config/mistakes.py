"""What is wrong with a config, in one line: where, what was given, what is allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from influence_cli.config.schema import DATA_KEYS, place_of
from influence_cli.config.yaml_reader import Keys
from influence_cli.errors import InfluenceError, did_you_mean

if TYPE_CHECKING:
    from influence_cli.config.schema import Config

# Curvatures with a basis and a spectrum, which is what SOURCE works on.
SPECTRAL = ("auto", "explicit", "ekfac", "kfac", "arnoldi")

Known = Callable[[Sequence[str | int]], list[str]]


def first_mistake(
    error: ValidationError, values: Mapping[str, Any], places: Mapping[Keys, str], known: Known
) -> InfluenceError:
    """Turn pydantic's findings into the first one by line, in plain words.

    Args:
        error: what pydantic found.
        values: what the YAML and the overrides hold.
        places: where each key stands: ``influence.yaml:12``.
        known: the keys that may stand under some others.
    """

    def line(mistake: Any) -> int:
        at = place_of(_keys(mistake["loc"], values, known), places)
        return int(at.rpartition(":")[2]) if at.rpartition(":")[2].isdigit() else 0

    # A misspelt key is also reported as missing; the misspelling is the cause.
    mistake = min(error.errors(), key=lambda mistake: (mistake["type"] != "extra_forbidden", line(mistake)))
    keys = _keys(mistake["loc"], values, known)
    where = place_of(keys, places)
    dotted = ".".join(map(str, keys))
    kind = mistake["type"]
    if kind == "extra_forbidden":
        parent = ".".join(map(str, keys[:-1]))
        inside = f" in {parent!r}" if parent else ""
        return InfluenceError(
            f"{where}: unknown key {str(keys[-1])!r}{inside}", did_you_mean(str(keys[-1]), known(keys[:-1]))
        )
    if kind == "missing":
        return InfluenceError(f"{where}: {dotted} is missing", "influence init shows a whole config")
    if dotted == "curvature.damping":
        return InfluenceError(f"{where}: {dotted} is {mistake['input']!r}: expected auto, training or a number ≥ 0")
    given = mistake["input"]
    shown = "empty" if given is None else repr(given)[:80]
    return InfluenceError(f"{where}: {dotted} is {shown}: {_expected(mistake)}", _near(mistake))


def _near(mistake: Any) -> str:
    """Name the allowed word nearest to a misspelt one; nothing if none is near."""
    if mistake["type"] != "literal_error" or not isinstance(mistake["input"], str):
        return ""
    hint = did_you_mean(mistake["input"], re.findall(r"'([^']*)'", mistake["ctx"]["expected"]))
    return hint.partition("? ")[0] + "?" if "? known" in hint else ""


def _expected(mistake: Any) -> str:
    kind, context = mistake["type"], mistake.get("ctx", {})
    if kind == "literal_error":
        return f"expected {context['expected']}"
    bounds = {
        "greater_than_equal": ("≥", "ge"),
        "less_than_equal": ("≤", "le"),
        "greater_than": ("above", "gt"),
        "less_than": ("below", "lt"),
    }
    if kind in bounds:
        word, key = bounds[kind]
        return f"expected a number {word} {context[key]}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "string_pattern_mismatch":
        return "expected auto, cpu, cuda, cuda:N or mps"
    plain = {
        "float_type": "expected a number",
        "int_type": "expected a whole number",
        "string_type": "expected a word",
        "bool_type": "expected true or false",
        "dict_type": "expected keys with values",
        "tuple_type": "expected a list",
        "too_short": "expected at least one",
        "is_instance_of": "expected a path",
        "path_type": "expected a path",
    }
    if kind in plain:
        return plain[kind]
    if kind in ("model_type", "model_attributes_type"):
        return "expected a section with keys"
    return str(mistake["msg"])


def _keys(location: Sequence[str | int], values: Any, known: Known) -> Keys:
    """Keep the part of pydantic's location that is in the YAML: branches of a union are not."""
    keys: list[str | int] = []
    holder = values
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if (
            isinstance(holder, dict)
            and (part in holder or last or part in ("model", "train"))
            and isinstance(part, str)
        ):
            if part not in holder and part not in known(keys):
                continue
            keys.append(part)
            holder = holder.get(part)
        elif isinstance(holder, list) and isinstance(part, int) and part < len(holder):
            keys.append(part)
            holder = holder[part]
    return tuple(keys)


def data_mistake(config: Config, where: Callable[..., str]) -> InfluenceError | None:
    """Find a section that names no data set or two, or a key that has no meaning for the kind that it names.

    Args:
        config: every key by itself is right.
        where: names the line of a key.
    """
    extra = {key for keys in DATA_KEYS.values() for key in keys}
    for name in ("train", "test"):
        section = getattr(config, name)
        if section is None:
            continue
        kinds = [key for key in DATA_KEYS if getattr(section, key)]
        if not kinds:
            return InfluenceError(
                f"{where(name)}: {name}.dataset is missing",
                "or name the data by folder: (with a folder for each class), csv: (a table of files) or huggingface:",
            )
        if len(kinds) > 1:
            return InfluenceError(
                f"{where(name, kinds[1])}: {name} has both {kinds[0]} and {kinds[1]}",
                "keep the one that is meant",
            )
        allowed = DATA_KEYS[kinds[0]]
        wrong = sorted(key for key in extra.difference(allowed) if getattr(section, key))
        if wrong:
            return InfluenceError(
                f"{where(name, wrong[0])}: {name}.{wrong[0]} has no meaning with {name}.{kinds[0]}",
                f"{kinds[0]} goes with {', '.join(allowed)}"
                if allowed
                else f"folder takes none of {', '.join(sorted(extra))}",
            )
    return None


def training_mistake(config: Config, where: Callable[..., str]) -> InfluenceError | None:
    """Find a section ``training`` that does not say what trained the checkpoint."""
    training = config.training
    if training is None or training.factory or training.recipe is not None or training.record is not None:
        return None
    return InfluenceError(
        f"{where('training')}: training.factory is missing",
        "factory: ./model.py:train names a function; recipe: {…} is for influence train; record: FOLDER names what "
        "influence_cli.Recorder wrote",
    )


def replay_mistake(config: Config, where: Callable[..., str]) -> InfluenceError | None:
    """Find what contradicts ``curvature.method: replay``: several checkpoints, another matrix, a part of the layers.

    Args:
        config: every key by itself is right.
        where: names the line of a key.
    """
    if config.curvature.method != "replay":
        return None
    model, matrix = config.model, config.curvature.matrix
    if model.is_one_run:
        return InfluenceError(
            f"{where('model', 'ensemble')}: curvature.method replay goes through the run itself, and takes no "
            f"model.ensemble {model.ensemble}",
            "remove model.ensemble, and name the last checkpoint alone",
        )
    if model.count > 1:
        return InfluenceError(
            f"{where('model', 'checkpoint')}: curvature.method replay explains the end of one run, but "
            f"model.checkpoint names {model.count} files",
            "name the last one alone",
        )
    if matrix == "empirical" or (matrix == "ggn" and "matrix" in config.curvature.model_fields_set):
        return InfluenceError(
            f"{where('curvature', 'matrix')}: curvature.method replay has no matrix {matrix}: it differentiates each "
            "step, which gives the Hessian",
            "remove curvature.matrix",
        )
    if config.gradients.layers != ("*",):
        return InfluenceError(
            f"{where('gradients', 'layers')}: curvature.method replay differentiates the whole run, and cannot keep to "
            "some layers",
            "remove gradients.layers; what the model's factory freezes stays as it is",
        )
    return None


def ensemble_mistake(config: Config, where: Callable[..., str]) -> InfluenceError | None:
    """Find contradictions in what the config says about several checkpoints.

    Args:
        config: every key by itself is right.
        where: names the line of a key.
    """
    model, kind, count = config.model, config.model.ensemble, config.model.count
    given = {"learning_rates": model.learning_rates, "steps": model.steps}
    first = next((key for key in (*given, "segments") if getattr(model, key)), None)
    by_training = config.curvature.damping == "training"
    recipe = None if config.training is None or any(given.values()) else config.training.recipe
    if by_training and recipe is not None and recipe.optimizer != "sgd":
        return InfluenceError(
            f"{where('curvature', 'damping')}: curvature.damping training needs the second moments of "
            f"{recipe.optimizer}, and the checkpoint that a recipe writes has only weights",
            "set curvature.damping to auto or to a number",
        )
    if by_training and recipe is None and not (model.learning_rates and model.steps):
        absent = "model.learning_rates" if not model.learning_rates else "model.steps"
        return InfluenceError(
            f"{where('curvature', 'damping')}: curvature.damping training is 3/(η·K), but {absent} is not given",
            "set model.learning_rates (the mean η; under momentum β it is η/(1 − β)) and model.steps (all steps of the "
            "optimiser), or curvature.damping: auto",
        )
    if first is not None and "ensemble" not in model.model_fields_set and not by_training:
        return InfluenceError(
            f"{where('model', first)}: model.{first} is given without model.ensemble",
            "set model.ensemble: tracin or source (checkpoints of one run); mean (independent models) does not use it",
        )
    for key, numbers in given.items():
        if len(numbers) not in (0, 1, count):
            return InfluenceError(
                f"{where('model', key)}: model.{key} has {len(numbers)} numbers, but there are {count} checkpoints",
                "give one per checkpoint, in the same order, or a single number for all of them",
            )
    if model.segments is not None and model.segments > count:
        return InfluenceError(
            f"{where('model', 'segments')}: model.segments is {model.segments}, but model.checkpoint has {count} files",
            "use at most one segment per checkpoint, which is also the default",
        )
    if kind == "mean":
        return None
    needed = ("learning_rates",) if kind == "tracin" else ("learning_rates", "steps")
    missing = next((key for key in needed if not given[key]), None)
    if missing is not None:
        return InfluenceError(
            f"{where('model', 'ensemble')}: model.ensemble {kind} needs model.{missing}",
            "learning_rates: η at each checkpoint; steps: the optimiser's steps since the previous checkpoint",
        )
    method, matrix = config.curvature.method, config.curvature.matrix
    if kind == "tracin" and method not in ("auto", "identity"):
        return InfluenceError(
            f"{where('curvature', 'method')}: model.ensemble tracin has no curvature, but curvature.method is {method}",
            "remove curvature.method, or use model.ensemble: source, which has one",
        )
    if kind == "source" and method not in SPECTRAL:
        return InfluenceError(
            f"{where('curvature', 'method')}: model.ensemble source needs a spectrum, but {method} has none",
            f"curvature.method: one of {', '.join(SPECTRAL)}",
        )
    if kind == "source" and matrix == "hessian":
        return InfluenceError(
            f"{where('curvature', 'matrix')}: model.ensemble source cannot use the Hessian: a change "
            "along a negative eigenvalue grows without bound",
            "use curvature.matrix: ggn",
        )
    return None


def features_mistake(config: Config, where: Callable[..., str]) -> InfluenceError | None:
    """Find features that come from nowhere or from two places, that have no transform, or that share a name.

    Args:
        config: every key by itself is right.
        where: names the line of a key.
    """
    names: set[str] = set()
    for number, item in enumerate(config.evidence.features):
        at = where("evidence", "features", number)
        sources = [key for key in ("factory", "file", "probabilities") if getattr(item, key)]
        if len(sources) != 1:
            both = f"{sources[0]} and {sources[1]}" if sources else "no source"
            return InfluenceError(
                f"{at}: these features have {both}",
                "name one: factory: (a network), file: (.npy, .npz, .parquet, .h5), probabilities: (.npy, .csv)",
            )
        stray = [key for key in ("args", "checkpoint", "transform") if key in item.model_fields_set]
        if sources != ["factory"] and stray:
            return InfluenceError(f"{at}: {stray[0]} has no meaning with {sources[0]}", "remove it")
        if sources == ["factory"] and item.transform is None:
            return InfluenceError(
                f"{at}: {item.factory} has no transform; it has to see the images as it did in its training",
                "transform: [{Resize: {size: [224, 224]}}, ToImage, {ToDtype: {dtype: float32, scale: true}}, "
                "{Normalize: {mean: […], std: […]}}]; [] if the data set gives its inputs already",
            )
        if item.title in names:
            return InfluenceError(f"{at}: two features have the name {item.title}", "name: gives one of them another")
        names.add(item.title)
    return None
