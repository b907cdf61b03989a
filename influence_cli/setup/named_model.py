"""The model that ``--model`` names: a function or class of the user's, its arguments from the file's options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from influence_cli.config.user_code import call, import_object
from influence_cli.errors import InfluenceError
from influence_cli.setup.fitting import in_order, input_channels, last_rows, misfits, square_sizes
from influence_cli.setup.guesses import ModelGuess
from influence_cli.setup.inside import Inside

# What a factory may call the number of classes.
COUNTS = (
    "num_classes",
    "n_classes",
    "num_class",
    "nb_classes",
    "nclasses",
    "classes",
    "num_labels",
    "n_labels",
    "num_outputs",
    "output_dim",
    "out_features",
    "n_out",
    "outputs",
    "nc",
)
# Arguments that would download weights, which the file has.
DOWNLOADS = ("pretrained", "weights")


def factory_name(text: str) -> str:
    """Write ``module:Class`` as a config does: ``module.Class``, or ``./file.py:Class``.

    Raises:
        InfluenceError: it names no object.
    """
    module, _, name = text.rpartition(":")
    if not name or (not module and "." not in name) or name.endswith(".py"):
        raise InfluenceError(f"--model {text} names nothing in it", "write module:Class, or ./model.py:build")
    if not module:
        return name
    if module.endswith(".py"):
        return f"{module if module.startswith(('.', '/', '~')) else f'./{module}'}:{name}"
    return f"{module}.{name}"


def guess_named(text: str, inside: Inside) -> ModelGuess:
    """Call a factory with the options of the file that it takes, and hold the weights against what it makes.

    Args:
        text: of ``--model``.
        inside: the weights, and options of the run, such as Lightning's hyper-parameters; plain values are used.

    Raises:
        InfluenceError: there is no such object, it fails, or the weights do not fit.
    """
    name, file = factory_name(text), str(inside.path)
    factory = import_object(name, Path.cwd(), "--model")
    wrong: list[list[str]] = []
    failed: InfluenceError | None = None
    for candidate in inside.candidates:
        outputs = last_rows(candidate.tensors)
        attempts = _attempts(factory, inside.settings, outputs)
        for args in attempts:
            try:
                model = call(factory, args, Path.cwd(), name, lambda *_: "--model")
            except InfluenceError as error:
                failed = failed or error
                continue
            if not isinstance(model, nn.Module):
                raise InfluenceError(
                    f"--model {text} returned a {type(model).__name__}, not a torch module",
                    "name the function or class that makes the model",
                )
            wrong.append(misfits(model, candidate.tensors))
            # Which layer is the first and which the last is known for sure now.
            tensors = in_order(candidate.tensors, model)
            outputs = last_rows(tensors)
            if wrong[-1]:
                attempts += [more for more in _attempts(factory, inside.settings, outputs) if more not in attempts]
                continue
            checkpoint, remark = inside.checkpoint(candidate)
            return ModelGuess(
                factory=name,
                factory_why="--model",
                args=args,
                args_why=_why(args, inside.settings, outputs, file),
                outputs=outputs,
                checkpoint=checkpoint,
                checkpoint_why=remark,
                channels=input_channels(tensors),
                sizes=square_sizes(tensors),
            )
    if not wrong and failed is not None:
        raise failed
    least = min(wrong, key=len)
    raise InfluenceError(
        f"{file} does not fit the model of --model {text}: it lacks {', '.join(least[:3])}"
        f"{f' and {len(least) - 3} more' if len(least) > 3 else ''}, or has another shape there",
        "name the function or class that was trained",
    )


def _attempts(factory: Callable[..., Any], settings: Mapping[str, Any], outputs: int | None) -> list[dict[str, Any]]:
    """List arguments to try: the options, and with them the number of outputs where the factory takes that."""
    args, open_ended = _taken(factory, settings)
    count = next((word for word in COUNTS if word in _parameters(factory)), "")
    if outputs is not None and count and args.get(count) != outputs:
        return [args | {count: outputs}, args]
    if outputs is not None and open_ended and not any(word in args for word in COUNTS):
        return [args, {"num_classes": outputs}]
    return [args]


def _taken(factory: Callable[..., Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Give the options that a factory takes, and say whether it takes any."""
    parameters = _parameters(factory)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    # What takes any keyword and names none, such as a LightningModule that saves its hyper-parameters, takes them all.
    takes_all = open_ended and not any(
        parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY) for parameter in parameters.values()
    )
    args = {key: value for key, value in settings.items() if (takes_all or key in parameters) and _is_plain(value)}
    for key in DOWNLOADS:
        if args.get(key):
            args[key] = False if args[key] is True else None
    return args, open_ended


def _parameters(factory: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}


def _why(args: Mapping[str, Any], settings: Mapping[str, Any], outputs: int | None, file: str) -> str:
    counted = [key for key in args if key not in settings or (key in COUNTS and settings[key] != args[key])]
    parts = [f"the options in {file}"] if len(args) > len(counted) else []
    parts += [f"{outputs} rows of the last layer in {file}"] if counted else []
    return ", ".join(parts)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, str | int | float)
