"""Find the weights in what a checkpoint holds, and the ones that fit a model.

Everything that could be weights is a candidate: a mapping from names to tensors, at the top or one or two keys deep.
Which of them is meant is decided by the model: its names and shapes.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from influence_cli.checkpoints.restricted_pickle import Stand, entries_of
from influence_cli.config.schema import CheckpointConfig
from influence_cli.errors import InfluenceError, did_you_mean

# Keys that people save the trained weights under, in the order in which they are taken where several fit.
NESTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "params",
    "state",
    "weights",
    "module",
)
# What wrappers put before a name, and DataParallel, Lightning or a class of one's own.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
# What torch.compile, FSDP and activation checkpointing put into a name, wherever the wrapped module is.
_INFIX = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Numbers that tools keep among the weights.
_COUNTERS = ("n_averaged", "total_ops", "total_params", "num_batches_tracked")
_DEEPEST = 2
# Entries that are looked at in search of weights: a file may have a mapping under very many keys.
_MOST_ENTRIES = 2_000_000
# A prefix that is no wrapper's must stand before so large a part of a file: it is the model's, not that of one layer.
_LEAST_SHARE = 1 / 3


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something in a checkpoint that could be the weights.

    Attributes:
        key: where it is, such as ``state_dict`` or ``state.model``; empty at the top.
        tensors: by name, as the file has them.
        others: the names of entries that are neither tensors nor mappings of them, and what they are.
        metadata: the versions of modules that torch keeps with a state dict.
    """

    key: str
    tensors: Mapping[str, Tensor]
    others: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Fit:
    """How a candidate fits a model.

    Attributes:
        candidate: the candidate.
        prefix: what was taken off its names.
        names: what its names are to the model, None for what lies outside the prefix.
        values: what goes into the model, by the model's names.
        missing: names of the model that it does not have.
        unexpected: its names that would be part of the model.
        misshapen: what is wrong with the shape or type of entries.
        left_out: its names that are no part of the model.
    """

    candidate: Candidate
    prefix: str
    names: Mapping[str, str | None]
    values: Mapping[str, Tensor]
    missing: Sequence[str]
    unexpected: Sequence[str]
    misshapen: Sequence[str]
    left_out: Sequence[str]

    @property
    def complete(self) -> bool:
        """Say whether every entry has its place."""
        return not (self.missing or self.unexpected or self.misshapen)

    @property
    def is_plain(self) -> bool:
        """Say whether it lies where people save the trained weights, not an average or one of two networks."""
        parts = [*self.candidate.key.split("."), *self.prefix.split(".")]
        return all(part in ("", "_orig_mod", *NESTS) for part in parts)


def find_weights(content: object) -> list[Candidate]:
    """Find every mapping from names to tensors in what a checkpoint holds, the usual keys first.

    Args:
        content: as ``read_content`` gives it.
    """
    found: list[Candidate] = []
    seen = 0

    def search(value: object, path: tuple[str, ...]) -> None:
        nonlocal seen
        entries = entries_of(value)
        if entries is None or seen > _MOST_ENTRIES:
            return
        seen += len(entries)
        tensors = {key: item for key, item in entries.items() if isinstance(item, Tensor)}
        if tensors and all(isinstance(key, str) for key in tensors):
            others = {
                key: item.name for key, item in entries.items() if isinstance(key, str) and isinstance(item, Stand)
            }
            found.append(Candidate(".".join(path), tensors, others, getattr(value, "_metadata", None)))
        if len(path) < _DEEPEST:
            for key, item in entries.items():
                if isinstance(key, str):
                    search(item, (*path, key))

    search(content, ())
    return sorted(found, key=lambda item: [_rank(part) for part in item.key.split(".")])


def find_modules(content: object) -> dict[str, str]:
    """Find whole pickled modules: the name of the class by the key or the attribute that it lies under."""
    found = {}
    values = {"": content, **(entries_of(content) or {})}
    if isinstance(content, Stand) and isinstance(content.state, dict):  # an object around it, such as a Learner
        values |= content.state
    for key, value in values.items():
        if isinstance(value, Stand) and isinstance(value.state, dict) and "_modules" in value.state:
            found[str(key)] = value.name
    return found


def _rank(word: str) -> int:
    return NESTS.index(word) if word in NESTS else -1 if word == "" else len(NESTS)


def narrowed(candidates: Sequence[Candidate], wanted: CheckpointConfig, where: str) -> list[Candidate]:
    """Apply what the config says of the weights: the key, what to ignore, what to take off names and put before them.

    Args:
        candidates: all of them.
        wanted: a checkpoint of the config.
        where: the start of errors.

    Raises:
        InfluenceError: a key, glob or prefix that nothing in the file has.
    """
    chosen = list(candidates)
    if wanted.key is not None:
        chosen = [item for item in chosen if item.key == wanted.key or item.key.startswith(f"{wanted.key}.")]
        known = [item.key for item in candidates if item.key]
        hint = did_you_mean(wanted.key, known) if known else "its weights are not under a key: leave that out"
        _require(chosen, f"{where}: model.checkpoint.key: there are no weights under {wanted.key!r}", hint)
    names = {name for item in chosen for name in item.tensors}
    for pattern in wanted.ignore:
        hits = {name for name in names if fnmatch.fnmatchcase(name, pattern)}
        hint = did_you_mean(pattern, names, listed=6)
        _require(hits, f"{where}: model.checkpoint.ignore: nothing has the name {pattern!r}", hint)
    if wanted.strip:
        begun = [name for name in names if name.startswith(wanted.strip)]
        hint = did_you_mean(wanted.strip, {name.partition(".")[0] + "." for name in names})
        _require(begun, f"{where}: model.checkpoint.strip: no name begins with {wanted.strip!r}", hint)
    return [item for item in (_renamed(item, wanted) for item in chosen) if item.tensors]


def _require(hits: Collection[object], message: str, hint: str) -> None:
    if not hits:
        raise InfluenceError(message, hint)


def _renamed(candidate: Candidate, wanted: CheckpointConfig) -> Candidate:
    strip, add = wanted.strip or "", wanted.add or ""
    kept = {
        add + name.removeprefix(strip): value
        for name, value in candidate.tensors.items()
        if name.startswith(strip) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted.ignore)
    }
    return replace(candidate, tensors=kept)


def fits(candidate: Candidate, model_state: Mapping[str, Tensor], modules: Collection[str]) -> list[Fit]:
    """Say how a candidate fits a model, under each prefix that may be taken off its names: the best first.

    Args:
        candidate: the candidate.
        model_state: the model's state dict.
        modules: the names of the modules that the model consists of.
    """
    wanted = {_clean(name): name for name in model_state}
    names = {name: _clean(name) for name in candidate.tensors}
    options: list[tuple[str, Mapping[str, str | None]]] = [("", names), *_unprefixed(names, wanted)]
    made = [_fit(candidate, prefix, option, model_state, wanted, modules) for prefix, option in options]
    return sorted(made, key=lambda fit: (not fit.complete, -len(fit.values), not fit.is_plain))


def _unprefixed(names: Mapping[str, str], wanted: Mapping[str, str]) -> list[tuple[str, dict[str, str | None]]]:
    """Take off each prefix under which the model's names are found; and the wrappers', where only some have them."""
    counts: Counter[str] = Counter()
    probes = list(wanted)[:: max(1, len(wanted) // 8)]
    for name in names.values():
        for probe in probes:
            if name.endswith(f".{probe}"):
                counts[name.removesuffix(probe)] += 1
    options: list[tuple[str, dict[str, str | None]]] = []
    for prefix, _ in counts.most_common(12):
        under = sum(name.startswith(prefix) for name in names.values())
        plain = all(part in ("", *NESTS) for part in prefix.split("."))
        if plain or under >= _LEAST_SHARE * len(names):
            taken = {name: new.removeprefix(prefix) if new.startswith(prefix) else None for name, new in names.items()}
            options.append((prefix, taken))
    mixed: list[dict[str, str | None]] = [dict(names)]
    for _ in range(3):
        mixed += [
            {name: (new or "").removeprefix(prefix) for name, new in option.items()}
            for option in mixed
            for prefix in PREFIXES
        ]
        # No two names may become one.
        mixed = [option for option in mixed if len(set(option.values())) == len(names)]
        mixed = sorted(mixed, key=lambda option: -len(wanted.keys() & set(option.values())))[:4]
    return [*options, *(("", option) for option in mixed)]


def _fit(
    candidate: Candidate,
    prefix: str,
    names: Mapping[str, str | None],
    model_state: Mapping[str, Tensor],
    wanted: Mapping[str, str],
    modules: Collection[str],
) -> Fit:
    values: dict[str, Tensor] = {}
    unexpected, misshapen, left_out = [], [], []
    for name, new in names.items():
        value = candidate.tensors[name]
        key = None if new is None else wanted.get(new) or wanted.get(_norm_name(new, wanted))
        if key in values:  # two names that are one to the model
            unexpected.append(name)
        elif key is not None:
            expected = model_state[key]
            if value.shape == expected.shape and (value.is_floating_point() or not expected.is_floating_point()):
                values[key] = value
            else:
                misshapen.append(_difference(key, value, expected))
        elif new is not None and belongs(new, modules):
            unexpected.append(name)
        else:
            left_out.append(name)
    bad = {text.split(" ", 1)[0] for text in misshapen}
    # Weights that are one tensor in the model need one name in the file: safetensors keeps no more of them.
    given = {place_of(model_state[key]) for key in values}
    missing = [
        f"{key} ({candidate.others[key]} in the file)" if key in candidate.others else key
        for key, value in model_state.items()
        if key not in values and key not in bad and not key.endswith("num_batches_tracked")
        if place_of(value) not in given
    ]
    return Fit(candidate, prefix, names, values, missing, unexpected, misshapen, left_out)


def place_of(tensor: Tensor) -> tuple[object, ...]:
    """Give what two names of one tensor share; an empty tensor shares it with no other."""
    place = tensor.data_ptr() or id(tensor)
    return place, tensor.shape, tensor.stride()


def _difference(key: str, value: Tensor, expected: Tensor) -> str:
    if value.shape != expected.shape:
        return f"{key} is {list(value.shape)} in the file and {list(expected.shape)} in the model"
    kinds = (str(tensor.dtype).removeprefix("torch.") for tensor in (value, expected))
    return "{} is {} in the file and {} in the model".format(key, *kinds)


def belongs(name: str, modules: Collection[str]) -> bool:
    """Say whether an entry would be a part of the model if the model had it.

    A layer more in a stack of them, or a bias that the model does without, is: another model was trained. A counter
    is not, and nor is what belongs to another part of the training, such as ``criterion.weight``.
    """
    path = name.split(".")
    if path[-1] in _COUNTERS:
        return False
    if len(path) == 1 or path[0] in modules:
        return True
    return path[0].isdecimal() and any(module.isdecimal() for module in modules)


def _clean(name: str) -> str:
    return _INFIX.sub("", name)


def _norm_name(name: str, wanted: Mapping[str, str]) -> str:
    """Give the older name of what torch's newer weight norm keeps; torch itself knows the way forth, not back."""
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        base = name.removesuffix(f"parametrizations.weight.{new}")
        if base != name and base + old in wanted:
            return base + old
    return name


def choose(options: Iterable[Fit], where: str, file: str) -> tuple[Fit, list[Fit]]:
    """Choose between complete fits: the usual key first, an average or another network only where it is alone.

    Args:
        options: complete fits, at least one.
        where: the start of an error.
        file: named in it.

    Returns:
        The chosen one, and the others that hold something else.

    Raises:
        InfluenceError: several fit, and none is under a usual key.
    """
    different: list[Fit] = []
    for option in options:
        if not any(_same(option, other) for other in different):
            different.append(option)
    plain = [option for option in different if option.is_plain]
    if len(different) > 1 and not plain:
        names = [_spelt(option, different) for option in different]
        raise InfluenceError(
            f"{where}: {file} holds several weights that fit the model: {', '.join(name for _, name in names)}",
            f"name one: -s model.checkpoint.{names[0][0]}={names[0][1]}",
        )
    taken = (plain or different)[0]
    return taken, [option for option in different if option is not taken]


def told(taken: Fit, others: Sequence[Fit]) -> str:
    """Say which weights were taken and what takes the others instead."""
    every = [taken, *others]
    spelt = [_spelt(option, every) for option in others]
    ways = " and ".join(f"{name} is there too, `model.checkpoint.{key}: {name}` takes it" for key, name in spelt)
    return f"weights: {_spelt(taken, every)[1]}; {ways}"


def _spelt(option: Fit, every: Sequence[Fit]) -> tuple[str, str]:
    """Name the key of the config that chooses a fit among others, and its value."""
    key = option.candidate.key
    shared = any(other is not option and other.candidate is option.candidate for other in every)
    if option.prefix and (shared or not key):
        return "strip", option.prefix
    return "key", key or "(at the top)"


def _same(one: Fit, other: Fit) -> bool:
    return one.values.keys() == other.values.keys() and all(
        value.dtype == other.values[key].dtype
        and (value.data_ptr() == other.values[key].data_ptr() or torch.equal(value, other.values[key]))
        for key, value in one.values.items()
    )
