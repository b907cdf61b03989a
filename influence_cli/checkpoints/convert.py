"""Make a checkpoint of a file that holds a program: a whole pickled module, a TorchScript or an exported archive.

Such a file is read by running what is in it, so it is read in a process of its own, and only where the user says that
the file is trusted. That process runs ``main``; what comes out is a file of safetensors: numbers and no code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_cli.errors import InfluenceError, describe
from influence_cli.runtime import disk

_ORDER = ("model", "module", "net", "network", "state_dict", "ema", "model_ema")


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        tensors: number of tensors.
        size: of the file, in bytes.
        source: what they are from, such as ``ema, a ultralytics.nn.tasks.ClassificationModel``.
        others: keys of other modules in the file, which were not written.
    """

    tensors: int
    size: int
    source: str
    others: tuple[str, ...]


def convert(file: Path, output: Path) -> Converted:
    """Write the weights of a file to safetensors, by running what the file holds in a process of its own.

    Args:
        file: a trusted file: it can do whatever the user can.
        output: appears when it is complete.

    Raises:
        InfluenceError: the file needs a module that is not there, holds no module, or its process ended early.
    """
    package = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), package)))}
    with tempfile.TemporaryDirectory() as folder, disk.whole(output) as part:
        report = Path(folder) / "report.json"
        words = [sys.executable, "-m", "influence_cli.checkpoints.convert", str(file), str(part), str(report)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, errors="replace", check=False)
        if not report.is_file():
            last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it said nothing")
            raise InfluenceError(f"{file}: the process that ran it ended with code {done.returncode}: {last}")
        facts = json.loads(report.read_text(encoding="utf-8"))
        if "error" in facts:
            raise InfluenceError(facts["error"], facts["hint"])
        size = part.stat().st_size
    return Converted(facts["tensors"], size, facts["source"], tuple(facts["others"]))


def main(file: Path, output: Path, report: Path) -> None:
    """Run the file, write its weights, and say in ``report`` how that ended."""
    # The user's own classes are where the command was typed.
    sys.path.insert(0, str(Path.cwd()))
    warnings.simplefilter("ignore")
    try:
        facts = _write(file, output)
    except InfluenceError as error:
        facts = {"error": error.message, "hint": error.hint}
    report.write_text(json.dumps(facts), encoding="utf-8")


def _write(file: Path, output: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    try:
        state, source, others = _weights_of(_run(file), file)
        # A copy each: safetensors refuses tensors that share memory.
        tensors = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        save_file(tensors, output, metadata={"format": "pt"})
    except InfluenceError:
        raise
    except ModuleNotFoundError as error:
        raise InfluenceError(
            f"{file} needs the module {error.name}, which is not installed",
            "install it beside influence, or run the command in the folder that the module is in",
        ) from error
    except AttributeError as error:
        name = re.search(r"get attribute '(\w+)'", str(error))
        raise InfluenceError(
            f"{file} needs the class {name[1]} of the program that made it" if name else f"{file}: {describe(error)}",
            "in the program that made the file: torch.save(model.state_dict(), FILE)",
        ) from error
    except (Exception, SystemExit) as error:
        raise InfluenceError(f"{file} cannot be converted: {describe(error)}") from error
    return {"tensors": len(tensors), "source": source, "others": others}


def _run(file: Path) -> Any:
    import torch

    names: set[str] = set()
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            names = {Path(name).name for name in archive.namelist()}
    if "constants.pkl" in names:
        return torch.jit.load(file, map_location="cpu")  # type: ignore[no-untyped-call]
    if names & {"archive_format", "serialized_exported_program.json"}:
        return torch.export.load(file)
    return torch.load(file, map_location="cpu", weights_only=False)


def _weights_of(content: Any, file: Path) -> tuple[Mapping[str, Any], str, list[str]]:
    """Give the state dict of the module in a file, what it is, and the keys of other modules."""
    import torch

    if isinstance(content, torch.export.ExportedProgram):
        return content.state_dict, "an exported program", []
    if not isinstance(content, Mapping | torch.nn.Module) and isinstance(
        getattr(content, "model", None), torch.nn.Module
    ):
        content = {"model": content.model}  # a trainer, such as fastai's Learner
    values = content if isinstance(content, Mapping) else {"": content}
    modules = {str(key): value for key, value in values.items() if isinstance(value, torch.nn.Module)}
    if not modules:
        raise InfluenceError(
            f"{file} holds no whole module, so there is nothing to convert",
            f"model.checkpoint: {file} reads it as it is",
        )
    key = min(modules, key=lambda key: _ORDER.index(key) if key in _ORDER else len(_ORDER))
    kind = type(modules[key])
    source = f"{f'{key}, ' if key else ''}{kind.__module__}.{kind.__qualname__}"
    return modules[key].state_dict(), source, [other for other in modules if other != key]


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
