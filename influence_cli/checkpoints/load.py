"""From a checkpoint to a model with its weights: which weights are taken, and what is said of the rest.

Nothing of a checkpoint is run. A file is read by the restricted reader (``restricted_pickle.py``), the weights are
found by the names and shapes of the model (``weights.py``), and where a library changes names while it loads, its own
loading has the last word (``libraries.py``).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from influence_cli.checkpoints.folder import read_folder, read_index, read_part
from influence_cli.checkpoints.libraries import by_library, is_adapter, with_adapter
from influence_cli.checkpoints.restricted_pickle import Stand, entries_of
from influence_cli.checkpoints.torch_file import SAVE, ArchiveError, read_torch_file
from influence_cli.checkpoints.weights import (
    NESTS,
    Fit,
    choose,
    find_modules,
    find_weights,
    fits,
    narrowed,
    place_of,
    told,
)
from influence_cli.config.schema import CheckpointConfig
from influence_cli.errors import InfluenceError, counted, few, one_line, typed_path
from influence_cli.runtime.terminal import Terminal, or_silent

# Files of other tools, by suffix, and how their weights come here.
_FOREIGN = {
    ".onnx": "an ONNX graph, whose names and layers are not the model's",
    ".keras": "a Keras model",
    ".h5": "an HDF5 file, as of Keras",
}
# What stands beside a model in training, and has weights of its own.
_BESIDE = re.compile(r"loss|criterion|metric|(^|_)acc(uracy)?|n_averaged|total_(ops|params)", re.IGNORECASE)
_TRAINED = "(pretrained: true, from_pretrained)"


def read_content(path: Path, where: str) -> object:
    """Read what a checkpoint holds: a file of torch.save, safetensors, or a folder of them.

    Args:
        path: a file or a folder.
        where: the start of errors.

    Returns:
        Plain values and tensors, as they were saved. Any other object is a ``Stand`` with its name, its arguments and
        its state: nothing was imported or called for it.

    Raises:
        InfluenceError: it does not exist, is damaged, or is of another kind.
    """
    if path.is_dir():
        return read_folder(path, where)
    if not path.is_file():
        raise InfluenceError(
            f"{where}: the checkpoint {path} does not exist", "a path is relative to the YAML file's folder"
        )
    if path.name.endswith(".index.json"):
        return read_index(path, where)
    if path.suffix == ".safetensors":
        return read_part(path, where)
    if path.suffix in _FOREIGN:
        raise InfluenceError(
            f"{where}: {path} is {_FOREIGN[path.suffix]}; it cannot be read",
            "in the program that made the model: torch.save(model.state_dict(), FILE)",
        )
    try:
        return read_torch_file(path, where)
    except ArchiveError as archive:
        raise _whole(path, where, archive.kind) from archive


def _whole(path: Path, where: str, kind: str) -> InfluenceError:
    """Say that a file holds a program, not only weights, and what makes a checkpoint of it."""
    target = path.with_suffix(".safetensors")
    return InfluenceError(
        f"{where}: {path} is {kind}: code, of which nothing was run",
        f"if you trust the file: influence convert {typed_path(path)} -o {typed_path(target)} --trust",
    )


def trained_model(
    build: Callable[[], nn.Module],
    wanted: CheckpointConfig | None,
    where: str,
    terminal: Terminal | None = None,
    *,
    section: str = "model",
) -> nn.Module:
    """Make the model and give it its weights.

    Args:
        build: makes a fresh model; called twice where the factory itself has to give the weights.
        wanted: the checkpoint; None if the factory returns the trained model.
        where: the config's line, for errors.
        terminal: told which weights were taken and what was left out.
        section: of the config, which has the keys ``factory`` and ``checkpoint``.

    Returns:
        The model, its parameters in float32.

    Raises:
        InfluenceError: the checkpoint cannot be read or does not fit; without one, the weights are random.
    """
    terminal = or_silent(terminal)
    if wanted is not None and is_adapter(wanted.file):
        folder = wanted.file
        model = _same_twice(
            lambda: with_adapter(build(), folder, where),
            where,
            f"the adapter {folder.name} needs its trained base model",
            section,
        )
    elif wanted is None:
        model = _same_twice(build, where, f"{section}.checkpoint is left out", section)
    else:
        model = build()
        load_checkpoint(model, wanted, where, terminal)
    return in_float32(model, terminal)


def in_float32(model: nn.Module, terminal: Terminal | None = None) -> nn.Module:
    """Put a model in float32, and say so where it is not."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if kinds - {torch.float32}:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}))
        or_silent(terminal).say(f"The model has {names} parameters; everything is computed in float32.")
        model = model.float()
    return model


def _same_twice(build: Callable[[], nn.Module], where: str, why: str, section: str) -> nn.Module:
    """Make a model whose weights come from its factory; random ones differ from call to call."""
    model = build()
    _refuse_lazy(model, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() ^ 1)
        again = build().state_dict()
    random = [
        name
        for name, value in model.state_dict().items()
        # What an adapter of peft replaces may be anything.
        if ".original_module." not in name and (name not in again or not torch.equal(value, again[name]))
    ]
    if random:
        raise InfluenceError(
            f"{where}: {why}, but {section}.factory makes other weights at every call: {few(random)}",
            f"name the file of the trained weights: {section}.checkpoint: runs/best.pt, or use a factory that returns "
            f"the trained model {_TRAINED}",
        )
    return model


def load_checkpoint(model: nn.Module, wanted: CheckpointConfig, where: str, terminal: Terminal | None = None) -> None:
    """Copy a checkpoint's weights into a model; every parameter of the model must be there.

    Prefixes left by wrappers and by modules around the model are taken off. BatchNorm's ``num_batches_tracked`` may be
    missing: nothing in eval mode reads it. Of several weights that fit, the usual key is taken, and said.

    Args:
        model: gets the weights; left as it is if anything does not fit.
        wanted: the file, and what the config says of it.
        where: the start of errors.
        terminal: told which weights were taken and what was left out.

    Raises:
        InfluenceError: naming every missing, unexpected and misshapen key (the first few of many).
    """
    _refuse_lazy(model, where)
    content = read_content(wanted.file, where)
    candidates = find_weights(content)
    if not candidates:
        raise without_weights(content, wanted.file, where)
    candidates = narrowed(candidates, wanted, where)
    whole_state, modules = model.state_dict(), {name for name, _ in model.named_modules()}
    state = {name: value for name, value in whole_state.items() if isinstance(value, torch.Tensor)}
    options = [option for item in candidates for option in fits(item, state, modules)]
    complete = [option for option in options if option.complete]
    if not complete:
        firsts: dict[int, Fit] = {}
        for option in options:
            firsts.setdefault(id(option.candidate), option)
        nearest = sorted(firsts.values(), key=lambda option: -len(option.values))
        changed = (by_library(model, option) for option in nearest[:3])
        complete = [option for option in changed if option is not None]
        if not complete:
            raise _misfit(nearest[0], content, wanted.file, where)
    taken, others = choose(complete, where, str(wanted.file))
    terminal = or_silent(terminal)
    if others:
        terminal.say(one_line(told(taken, others)))
    _say_left_out(taken, others, wanted, terminal)
    broken = [
        key for key, value in taken.values.items() if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if broken:
        raise InfluenceError(
            f"{where}: {wanted.file} holds NaN or infinity in {few(broken)}", "use an earlier checkpoint"
        )
    _refuse_untied(taken, state, where, wanted.file)
    whole = OrderedDict(taken.values)
    # Some modules read the version that torch keeps with the weights; the keys fit, so the model's own is right.
    whole._metadata = whole_state._metadata  # type: ignore[attr-defined]
    model.load_state_dict(whole, strict=False)


def _refuse_untied(taken: Fit, state: Mapping[str, torch.Tensor], where: str, path: Path) -> None:
    """Refuse other values under two names that are one tensor in the model: only the last of them would stay."""
    first: dict[tuple[object, ...], str] = {}
    for key, value in taken.values.items():
        other = first.setdefault(place_of(state[key]), key)
        if other != key and not torch.equal(value, taken.values[other]):
            raise InfluenceError(
                f"{where}: {other} and {key} differ in {path}, but are one tensor in the model",
                "the model that was trained does not tie them: do not tie them in model.factory either",
            )


def _refuse_lazy(model: nn.Module, where: str) -> None:
    lazy = [
        key
        for key, value in model.state_dict().items()
        if isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer)
    ]
    if lazy:
        raise InfluenceError(
            f"{where}: the model does not know the shape of {few(lazy)} before it has run once",
            "run it on one input inside the factory, or give the sizes (Linear instead of LazyLinear)",
        )


def _say_left_out(taken: Fit, others: Sequence[Fit], wanted: CheckpointConfig, terminal: Terminal) -> None:
    """Name the entries that are no part of the model, once; those of other weights were named with their prefix."""
    told_of = tuple(other.prefix for other in others if other.candidate is taken.candidate and other.prefix)
    names = [name for name in taken.left_out if not (told_of and name.startswith(told_of))]
    if names:
        line = (
            f"{wanted.file.name}: {counted(len(names), 'entry').replace('entrys', 'entries')} left out, "
            f"not in the model: {few(names)}"
        )
        harmless = all(_BESIDE.search(name) for name in names)
        (terminal.say if harmless else terminal.warn)(one_line(line))


def _misfit(nearest: Fit, content: object, path: Path, where: str) -> InfluenceError:
    """Name what is missing, unexpected and misshapen; a file of whole modules is called that."""
    modules = find_modules(content)
    if not nearest.values and modules:
        return _module(modules, path, where)
    unknown = {*nearest.unexpected, *nearest.left_out}
    stray = [name for name in nearest.candidate.tensors if name in unknown]
    parts = (("missing", nearest.missing), ("unexpected", stray), ("misshapen", nearest.misshapen))
    problems = [f"{len(keys)} {kind} ({few(keys)})" for kind, keys in parts if keys]
    hint = "is model.factory (and its args) the model that was trained?"
    if nearest.misshapen and not nearest.missing and not stray:
        hint += " a last layer of another size usually means another number of classes"
    if stray and not nearest.missing and not nearest.misshapen:
        hint += f" if the rest is not needed: model.checkpoint.ignore: [{', '.join(stray[:3])}]"
    key = f" (under {nearest.candidate.key})" if nearest.candidate.key else ""
    return InfluenceError(f"{where}: {path}{key} does not fit the model: {'; '.join(problems)}", hint)


def _module(modules: dict[str, str], path: Path, where: str) -> InfluenceError:
    key, name = next(iter(modules.items()))
    return _whole(path, where, f"a whole pickled module ({name}{f' under {key}' if key else ''})")


def without_weights(content: object, path: Path, where: str) -> InfluenceError:
    """Say what is in a checkpoint that has no weights."""
    modules = find_modules(content)
    if modules:
        return _module(modules, path, where)
    entries = entries_of(content)
    while entries is not None:
        inner = next((entries_of(entries[key]) for key in NESTS if entries_of(entries.get(key))), None)
        if inner is None:
            break
        entries = inner
    if entries is not None:
        keys = [
            (repr(key[:80]) if isinstance(key, str) else str(key) if key in range(1000) else type(key).__name__)
            + (f" ({value.name}, not run)" if isinstance(value, Stand) else "")
            for key, value in list(entries.items())[:6]
        ]
        description = f"a mapping with the keys {', '.join(keys)}"
    else:
        description = f"the object {content.name}" if isinstance(content, Stand) else f"a {type(content).__name__}"
    return InfluenceError(f"{where}: {path} holds {description}, not a state dict", SAVE)
