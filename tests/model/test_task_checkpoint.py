"""From the shell: what a tool wrote gives the rows of its plain state dict, and says on stderr what was taken."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conftest import Command

RANK = ("rank", "0", "--top", "2", "--format", "jsonl")


@pytest.fixture
def state(tiny: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(tiny / "model.pt")
    return loaded


def test_the_rows_are_those_of_the_plain_state_dict(influence: Command, tiny: Path, state: dict[str, Tensor]) -> None:
    plain = influence(*RANK, cwd=tiny)
    raw = {key: 0.8 * value for key, value in state.items()}
    content = {
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.9),
        "state_dict": {f"module.{key}": value for key, value in state.items()} | {"criterion.weight": torch.ones(10)},
        "state_dict_ema": raw,
    }
    torch.save(content, tiny / "last.pth.tar")
    done = influence(*RANK, "-s", "model.checkpoint=last.pth.tar", cwd=tiny)
    assert done.out == plain.out
    assert done.err.count("`model.checkpoint.key: state_dict_ema` takes it") == 1
    assert done.err.count("last.pth.tar: 1 entry left out, not in the model: criterion.weight") == 1
    # The store is of the weights, not of the file: nothing was computed again.
    assert "mismatch" not in done.err
    torch.save(raw, tiny / "raw.pt")
    words = ("-s", "gradients.store=raw.h5")
    alone = influence(*RANK, "-s", "model.checkpoint=raw.pt", *words, cwd=tiny)
    named = influence(
        *RANK, "-s", "model.checkpoint=last.pth.tar", "-s", "model.checkpoint.key=state_dict_ema", *words, cwd=tiny
    )
    assert named.out == alone.out != plain.out
    assert "is there too" not in named.err


def test_two_networks_that_fit_are_refused_and_the_next_command_takes_one(
    influence: Command, tiny: Path, state: dict[str, Tensor]
) -> None:
    torch.save({"student": {key: 0.8 * value for key, value in state.items()}, "teacher": state}, tiny / "model.pt")
    done = influence("check", cwd=tiny, code=2)
    assert "error: influence.yaml:" in done.err
    assert "holds several weights that fit the model: student, teacher" in done.err
    assert "-s model.checkpoint.key=student" in done.err
    influence("check", "-s", "model.checkpoint.key=teacher", cwd=tiny)


def test_a_folder_and_its_shards_are_checkpoints(influence: Command, tiny: Path, state: dict[str, Tensor]) -> None:
    def measured(*words: str) -> list[str]:
        lines = influence("check", *words, cwd=tiny).out.splitlines()
        return [line for line in lines if "accuracy" in line or "loss" in line]

    plain = measured()
    assert plain
    folder = tiny / "runs" / "shards"
    folder.mkdir(parents=True)
    names = {key: f"model-{k}-of-2.safetensors" for k, key in enumerate(state, 1)}
    for key, name in names.items():
        save_file({key: state[key]}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    for path in ("runs/shards", "runs/shards/model.safetensors.index.json"):
        assert measured("-s", f"model.checkpoint={path}") == plain
    done = influence("check", "-s", "model.checkpoint=runs", cwd=tiny, code=2)
    assert "is a folder without model.safetensors" in done.err


def test_a_factory_that_returns_the_trained_model_needs_no_checkpoint(influence: Command, tiny: Path) -> None:
    plain = influence(*RANK, cwd=tiny)
    left_out = ("-s", "model.checkpoint=null")
    refused = influence(*RANK, *left_out, cwd=tiny, code=2)
    assert "model.checkpoint is left out, but model.factory makes other weights at every call" in refused.err
    (tiny / "pretrained.py").write_text(
        "import torch\nfrom model import build\n\n\ndef trained():\n    model = build()\n"
        "    model.load_state_dict(torch.load('model.pt'))\n    return model\n"
    )
    done = influence(*RANK, *left_out, "-s", "model.factory=./pretrained.py:trained", cwd=tiny)
    assert done.out == plain.out
    looked = influence("check", *left_out, "-s", "model.factory=./pretrained.py:trained", cwd=tiny)
    assert "training accuracy" in looked.out
