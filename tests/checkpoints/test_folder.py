"""A folder of weights gives the tensors of the state dict that was saved in it; a damaged one is told in one line."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from influence_cli.checkpoints.folder import read_distributed
from influence_cli.checkpoints.load import load_checkpoint, read_content
from influence_cli.config.schema import CheckpointConfig
from influence_cli.errors import InfluenceError

WHERE = "influence.yaml:4"


def make() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.fixture
def state() -> dict[str, Tensor]:
    return {key: value + 1 for key, value in make().state_dict().items()}


def same(path: Path, state: dict[str, Tensor]) -> None:
    model = make()
    load_checkpoint(model, CheckpointConfig(file=path), WHERE)
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def refused(path: Path) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        read_content(path, WHERE)
    assert caught.value.message.startswith(f"{WHERE}: ")
    assert "\n" not in caught.value.message
    return caught.value


def shards(folder: Path, state: dict[str, Tensor], suffix: str, write: Callable[..., object]) -> Path:
    """Write a state in two files and an index."""
    folder.mkdir()
    names = list(state)
    halves = {f"model-{k}-of-2{suffix}": names[k - 1 :: 2] for k in (1, 2)}
    for file, keys in halves.items():
        write({key: state[key] for key in keys}, folder / file)
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    index = folder / f"{stem}{suffix}.index.json"
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_a_folder_of_hugging_face_is_read(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    torch.save(object, tmp_path / "training_args.bin")
    same(tmp_path, state)


@pytest.mark.parametrize(("suffix", "write"), [(".safetensors", save_file), (".bin", torch.save)])
def test_shards_are_read_from_the_folder_and_from_their_index(
    tmp_path: Path, state: dict[str, Tensor], suffix: str, write: Callable[..., object]
) -> None:
    index = shards(tmp_path / "runs", state, suffix, write)
    same(index.parent, state)
    same(index, state)
    (index.parent / f"model-2-of-2{suffix}").unlink()
    assert f"names 2 files, but model-2-of-2{suffix} is not beside it" in refused(index).message


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../x"}}', '{"weight_map": {"a": 3}}']
)
def test_a_file_that_is_no_index_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "is not an index of shards" in refused(tmp_path).message


def test_a_tensor_that_no_shard_has_is_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    index = shards(tmp_path / "runs", state, ".safetensors", save_file)
    save_file({"other": torch.ones(1)}, index.parent / "model-2-of-2.safetensors")
    assert "0.bias is not in model-2-of-2.safetensors" in refused(index).message


def test_a_folder_without_weights_names_what_is_in_it(tmp_path: Path, state: dict[str, Tensor]) -> None:
    (tmp_path / "checkpoint-500").mkdir()
    save_file(state, tmp_path / "checkpoint-500" / "model.safetensors")
    assert refused(tmp_path).hint == "name one of what is in it: checkpoint-500/"
    torch.save(state, tmp_path / "best.pt")
    assert refused(tmp_path).hint == "name one of what is in it: best.pt"
    (tmp_path / "none").mkdir()
    assert "is a folder without model.safetensors" in refused(tmp_path / "none").message


@pytest.fixture
def distributed(tmp_path: Path, state: dict[str, Tensor]) -> Path:
    """Write a folder of torch.distributed.checkpoint, with an optimiser and a number beside the model."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path / "step-3"
    moments = {"0": {"exp_avg": torch.ones(5, 6)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": state, "optimizer": {"state": moments}, "epoch": 3}, checkpoint_id=folder)
    return folder


def test_a_distributed_checkpoint_is_read(distributed: Path, state: dict[str, Tensor]) -> None:
    same(distributed, state)
    content = read_distributed(distributed, WHERE)
    assert list(content) == ["model"]


def test_parts_of_a_tensor_are_put_together(distributed: Path) -> None:
    # What two processes write: rows 0 to 2 and 2 to 5 of one weight.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    facts = pickle.loads((distributed / ".metadata").read_bytes())
    weight = torch.arange(30.0).reshape(5, 6)
    about = facts.state_dict_metadata["model.0.weight"]
    about.chunks[:] = []
    (old,) = (index for index in facts.storage_data if index.fqn == "model.0.weight")
    del facts.storage_data[old]
    for start, stop in ((0, 2), (2, 5)):
        file = distributed / f"__{start}_0.distcp.part"
        torch.save(weight[start:stop].clone(), file)
        offsets = torch.Size([start, 0])
        about.chunks.append(ChunkStorageMetadata(offsets, torch.Size([stop - start, 6])))
        place = _StorageInfo(file.name, 0, file.stat().st_size)
        facts.storage_data[MetadataIndex("model.0.weight", offsets, len(about.chunks) - 1)] = place
    (distributed / ".metadata").write_bytes(pickle.dumps(facts))
    assert torch.equal(read_distributed(distributed, WHERE)["model"]["0.weight"], weight)
    about.chunks.pop()
    (distributed / ".metadata").write_bytes(pickle.dumps(facts))
    assert "parts of model.0.weight are missing" in refused(distributed).message


def test_a_damaged_distributed_checkpoint_is_told(distributed: Path, tmp_path: Path) -> None:
    metadata, (file,) = distributed / ".metadata", list(distributed.glob("*.distcp"))
    content: Any = metadata.read_bytes()
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "step-3" in refused(distributed).message
    file.unlink()
    assert "cannot be read" in refused(distributed).message
    for bad in (b"", content[:100], pickle.dumps({"a": 1}), pickle.dumps(Path(tmp_path))):
        metadata.write_bytes(bad)
        assert "cannot be read" in refused(distributed).message
