"""Checkpoints as torch, torchvision's reference script and loops of one's own write them."""

from __future__ import annotations

import argparse
import collections
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from tests.ecosystem.checkpoint import Checkpoint, State
from tests.ecosystem.pictures import batch


def cloned(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copy the state dict, so that it stays while the model changes."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def shifted(model: nn.Module, by: float = 0.02) -> State:
    """Change every weight a little, and give the new state dict."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(1 + by * (1 + number % 3))
    return cloned(model)


def _plain(folder: Path, model: nn.Module) -> State:
    torch.save(model.state_dict(), folder / "model.pt")
    return cloned(model)


def _safetensors(folder: Path, model: nn.Module) -> State:
    save_file(cloned(model), folder / "model.safetensors")
    return cloned(model)


def _old_format(folder: Path, model: nn.Module) -> State:
    torch.save(model.state_dict(), folder / "model.pth", _use_new_zipfile_serialization=False)
    return cloned(model)


def _own_loop(folder: Path, model: nn.Module) -> State:
    """As in many a loop: the best accuracy is a numpy scalar, the history an array."""
    optimizer = torch.optim.AdamW(model.parameters())
    content = {
        "epoch": 3, "model_state": model.state_dict(), "optimizer": optimizer.state_dict(),
        "best_acc": np.float64(0.93), "history": np.arange(3.0), "dtype": np.dtype("float32"), "file": Path("run/1"),
        "names": collections.defaultdict(list, {"a": [1]}),
    }  # fmt: skip
    torch.save(content, folder / "best.pt")
    return cloned(model)


def _teacher(folder: Path, model: nn.Module) -> State:
    """As DINO: student and teacher, both behind ``backbone.`` of a wrapper in DDP."""
    student = {f"module.backbone.{key}": value for key, value in cloned(model).items()}
    teacher = shifted(model)
    content = {"student": student, "teacher": {f"backbone.{key}": value for key, value in teacher.items()}, "epoch": 1}
    torch.save(content, folder / "checkpoint.pth")
    return teacher


def _composer(folder: Path, model: nn.Module) -> State:
    content = {
        "state": {"model": {f"module.{key}": value for key, value in cloned(model).items()}, "run_name": "r"},
        "rng": [],
    }
    torch.save(content, folder / "ep1.pt")
    return cloned(model)


class HistoryBuffer:
    """As mmengine's, pickled beside the weights."""

    def __init__(self) -> None:
        self.values = np.zeros(2)


def _mmengine(folder: Path, model: nn.Module) -> State:
    content = {"meta": {"epoch": 1}, "state_dict": model.state_dict(), "message_hub": {"log": HistoryBuffer()}}
    torch.save(content, folder / "epoch_1.pth")
    return cloned(model)


def _torchvision(folder: Path, model: nn.Module) -> State:
    """As references/classification/train.py at the end of an epoch; the average is that of its utils.py."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    plain = cloned(model)
    shifted(model)
    average.update_parameters(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    args = argparse.Namespace(model="mobilenet_v2", data_path="data", epochs=90, weight_decay=1e-4, device="cpu")
    model.load_state_dict(plain)
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict(),
        "epoch": 89, "args": args, "model_ema": average.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
    }  # fmt: skip
    torch.save(content, folder / "checkpoint.pth")
    return plain


def _torchvision_average(folder: Path, model: nn.Module) -> State:
    _torchvision(folder, model)
    content = torch.load(folder / "checkpoint.pth", weights_only=False)["model_ema"]
    return {key.removeprefix("module."): value for key, value in content.items() if key != "n_averaged"}


def _averaged(folder: Path, model: nn.Module) -> State:
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    shifted(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), folder / "swa.pt")
    return cloned(average.module)


def _compiled(folder: Path, model: nn.Module) -> State:
    torch.save(torch.compile(model).state_dict(), folder / "compiled.pt")
    return cloned(model)


def _distributed(folder: Path, model: nn.Module) -> State:
    """One process, which is all that the names need."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        whole = nn.parallel.DistributedDataParallel(model)
        torch.save({"net": torch.compile(whole).state_dict(), "epoch": 1}, folder / "ddp.pt")
    finally:
        dist.destroy_process_group()
    return cloned(model)


def _distributed_checkpoint(folder: Path, model: nn.Module) -> State:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is one process
        dcp.save({"model": model.state_dict(), "epoch": torch.tensor(1)}, checkpoint_id=folder / "step-10")
    return cloned(model)


def _pickled(folder: Path, model: nn.Module) -> State:
    torch.save(model, folder / "whole.pt")
    return cloned(model)


def _torchscript(folder: Path, model: nn.Module) -> State:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what is around
        torch.jit.trace(model, batch("val")[0]).save(folder / "scripted.pt")
    return cloned(model)


def _rounded(model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in cloned(model).items()}


def _half(folder: Path, model: nn.Module) -> State:
    state = _rounded(model, torch.float16)
    torch.save({"model": state}, folder / "half.pt")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _bfloat16(folder: Path, model: nn.Module) -> State:
    state = _rounded(model, torch.bfloat16)
    save_file(state, folder / "bf16.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _double(folder: Path, model: nn.Module) -> State:
    torch.save(_rounded(model, torch.float64), folder / "double.pt")
    return cloned(model)


AVERAGED = "the averaged weights behind `module.`, and `n_averaged`"
PLAIN = Checkpoint("torch.save", "a state dict", "checkpoint: model.pt", _plain)
SAFETENSORS = Checkpoint("safetensors", "a state dict", "checkpoint: model.safetensors", _safetensors)
OLD_FORMAT = Checkpoint("torch.save before 1.6", "a state dict, no zip archive", "checkpoint: model.pth", _old_format)
OWN_LOOP = Checkpoint(
    "a loop of one's own", "weights under `model_state`; numpy scalars, arrays, paths", "checkpoint: best.pt", _own_loop
)
TEACHER = Checkpoint(
    "DINO and the like", "`student` and `teacher`, both behind `backbone.`",
    "checkpoint: {file: checkpoint.pth, key: teacher, strip: backbone.}", _teacher,
)  # fmt: skip
COMPOSER = Checkpoint("Composer", "weights under `state`, `model`", "checkpoint: ep1.pt", _composer)
MMENGINE = Checkpoint(
    "mmengine", "weights under `state_dict`, objects of its own beside them", "checkpoint: epoch_1.pth", _mmengine
)
TORCHVISION = Checkpoint(
    "torchvision, references/classification", "`model`, `model_ema`, optimizer, `args`: a Namespace",
    "checkpoint: checkpoint.pth", _torchvision,
)  # fmt: skip
TORCHVISION_EMA = Checkpoint(
    "torchvision, references/classification", f"the same; {AVERAGED}",
    "checkpoint: {file: checkpoint.pth, key: model_ema}", _torchvision_average,
)  # fmt: skip
AVERAGE = Checkpoint("torch AveragedModel (SWA, EMA)", AVERAGED, "checkpoint: swa.pt", _averaged)
COMPILED = Checkpoint("torch.compile", "names behind `_orig_mod.`", "checkpoint: compiled.pt", _compiled)
DISTRIBUTED = Checkpoint(
    "DistributedDataParallel, compiled", "names behind `_orig_mod.module.`, under `net`", "checkpoint: ddp.pt",
    _distributed,
)  # fmt: skip
DISTRIBUTED_CHECKPOINT = Checkpoint(
    "torch.distributed.checkpoint (FSDP)", "a folder: `.metadata`, `__0_0.distcp`", "checkpoint: step-10",
    _distributed_checkpoint,
)  # fmt: skip
PICKLED = Checkpoint(
    "torch.save(model)", "the whole pickled module", "checkpoint: whole.safetensors", _pickled, convert="whole.pt"
)
TORCHSCRIPT = Checkpoint(
    "TorchScript", "an archive with code", "checkpoint: scripted.safetensors", _torchscript, convert="scripted.pt"
)
HALF = Checkpoint("torch.save", "half precision (float16)", "checkpoint: half.pt", _half)
BFLOAT16 = Checkpoint("safetensors", "bfloat16", "checkpoint: bf16.safetensors", _bfloat16)
DOUBLE = Checkpoint("torch.save", "float64", "checkpoint: double.pt", _double)
