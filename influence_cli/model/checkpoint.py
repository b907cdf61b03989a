"""Read a checkpoint file and put it into a model: formats, nesting, prefixes, and names that do not fit.

Only tensors are ever unpickled (``weights_only=True``): a checkpoint that carries code is refused, not run.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from influence_cli.errors import InfluenceError, describe, human_bytes

NESTS = ("state_dict", "model_state_dict", "model", "net", "module", "ema", "weights")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")


def read_checkpoint(path: Path, where: str) -> dict[str, Tensor]:
    """Read the state dict of a ``.pt``, ``.pth``, ``.ckpt``, ``.th`` or ``.safetensors`` file, on the CPU.

    Raises:
        InfluenceError: no such file, damaged, carrying code, or without a state dict.
    """
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise InfluenceError(
            f"{where}: the checkpoint {path} {problem}", "a path is relative to the YAML file's folder"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InfluenceError(f"{where}: {path} cannot be read: {describe(error)}") from error
    _refuse_packed(path, where)
    try:
        with warnings.catch_warnings():
            # Reading it shows whether the restricted reader supports the pickle's protocol.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, where, error) from error
    except Exception as error:  # a damaged file of the old format can fail anywhere in torch's reader
        raise InfluenceError(
            f"{where}: {path} is not a readable checkpoint: {describe(error)}",
            "save one with torch.save(model.state_dict(), FILE)",
        ) from error
    return _find_state_dict(content, path, where)


def _refuse_packed(path: Path, where: str) -> None:
    """Refuse an archive whose parts are larger than itself: torch never compresses, but decompresses other archives."""
    try:
        with zipfile.ZipFile(path) as archive:
            whole = sum(part.file_size for part in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # another format, or torch reports what is wrong
    size = path.stat().st_size
    if whole > size:
        raise InfluenceError(
            f"{where}: {path} is compressed, {human_bytes(whole)} in a file of {human_bytes(size)}; nothing was read",
            "save one with torch.save(model.state_dict(), FILE)",
        )


def _refused(path: Path, where: str, error: Exception) -> InfluenceError:
    """Distinguish a checkpoint that contains code (naming it) from a damaged file."""
    text = str(error)
    marker = "GLOBAL "
    if marker in text:
        blocked = text.split(marker, 1)[1].split()[0].strip("`'\",.")
        return InfluenceError(
            f"{where}: {path} contains more than tensors ({blocked}); none of it was run",
            "save only the weights: torch.save(model.state_dict(), FILE)",
        )
    return InfluenceError(
        f"{where}: {path} is not a readable checkpoint: {describe(error)[:160]}",
        "save one with torch.save(model.state_dict(), FILE)",
    )


def _find_state_dict(content: object, path: Path, where: str) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        nested = [key for key in NESTS if isinstance(content.get(key), Mapping)]
        if nested and len(tensors) < len(content):
            content = content[nested[0]]
            continue
        if tensors and all(isinstance(key, str) for key in tensors):
            return tensors
        break
    description = (
        f"a mapping with the keys {', '.join(map(repr, list(content)[:6]))}"
        if isinstance(content, Mapping)
        else f"a {type(content).__name__}"
    )
    raise InfluenceError(
        f"{where}: {path} holds {description}, not a state dict",
        f"it may be at the top or under {', '.join(NESTS)}; save with torch.save(model.state_dict(), FILE)",
    )


def load_weights(model: nn.Module, state: Mapping[str, Tensor], path: Path, where: str) -> None:
    """Copy a state dict into a model; every key must fit.

    Prefixes left by wrappers (``module.``, ``_orig_mod.``, ``model.``) are removed as long as that makes more
    keys fit. BatchNorm's ``num_batches_tracked`` may be missing: nothing in eval mode reads it.

    Raises:
        InfluenceError: naming every missing, unexpected and misshapen key (the first few of many).
    """
    model_state = model.state_dict()
    lazy = [
        key
        for key, value in model_state.items()
        if isinstance(value, nn.UninitializedParameter | nn.UninitializedBuffer)
    ]
    if lazy:
        raise InfluenceError(
            f"{where}: the model does not know the shape of {', '.join(lazy[:4])} before it has run once",
            "run it on one input inside the factory, or give the sizes (Linear instead of LazyLinear)",
        )
    state = _strip_prefixes(dict(state), set(model_state))
    missing = [key for key in model_state if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in model_state]
    misshapen = [
        f"{key} is {list(state[key].shape)} in the file and {list(model_state[key].shape)} in the model"
        for key in model_state
        if key in state and state[key].shape != model_state[key].shape
    ]
    problems = [
        f"{len(keys)} {kind} ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if keys
    ]
    if problems:
        hint = "is model.factory (and its args) the model that was trained?"
        if misshapen and not missing and not unexpected:
            hint += " a last layer of another size usually means another number of classes"
        raise InfluenceError(f"{where}: {path} does not fit the model: {'; '.join(problems)}", hint)
    broken = [key for key, value in state.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise InfluenceError(
            f"{where}: {path} holds NaN or infinity in {', '.join(broken[:4])}", "use an earlier checkpoint"
        )
    whole = OrderedDict(state)
    # Some modules read the version that torch keeps with the weights; the keys fit, so the model's own is right.
    whole._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(whole, strict=False)


def _strip_prefixes(state: dict[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
    """Remove up to three wrapper prefixes, those that make most keys fit; none if that is as good."""
    candidates = [state]
    newest = [state]
    for _ in range(3):
        newest = [
            {key.removeprefix(prefix): value for key, value in candidate.items()}
            for candidate in newest
            for prefix in PREFIXES
            if any(key.startswith(prefix) for key in candidate)
        ]
        candidates += [candidate for candidate in newest if len(candidate) == len(state)]
    return max(candidates, key=lambda candidate: len(wanted & candidate.keys()))
