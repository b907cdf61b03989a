"""Checkpoints in every usual wrapping reach the model bit for bit; misfits are named, and code is not run."""

from __future__ import annotations

import argparse
import contextlib
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from influence_cli.checkpoints.load import load_checkpoint, read_content, trained_model
from influence_cli.checkpoints.weights import NESTS
from influence_cli.config.schema import CheckpointConfig
from influence_cli.errors import InfluenceError
from influence_cli.runtime.terminal import Terminal
from tests.conftest import shared

WHERE = "influence.yaml:4"


def make() -> nn.Sequential:
    """Build a network with parameters and buffers, other ones each time."""
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def trained() -> dict[str, Tensor]:
    """Give a state in which no tensor has the value that it starts with."""
    state = make().state_dict()
    return {key: value + 1 if value.dtype == torch.int64 else torch.randn_like(value) for key, value in state.items()}


def load(path: Path, model: nn.Module | None = None) -> nn.Module:
    """Read a file and put it into a fresh network."""
    model = make() if model is None else model
    load_checkpoint(model, CheckpointConfig(file=path), WHERE)
    return model


def same(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Check that the network holds exactly these tensors."""
    found = model.state_dict()
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[key], value), key


def refused(path: Path, model: nn.Module | None = None) -> InfluenceError:
    with pytest.raises(InfluenceError) as caught:
        load(path, model)
    assert caught.value.message.startswith(f"{WHERE}: ")
    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    return caught.value


# Formats and wrappings


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".th", ".bin", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_state_dict_is_read_whatever_its_suffix(tmp_path: Path, suffix: str, zipped: bool) -> None:
    state, path = trained(), tmp_path / f"model{suffix}"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    same(load(path), state)


def test_safetensors_are_read(tmp_path: Path) -> None:
    state, path = trained(), tmp_path / "model.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    same(load(path), state)
    save_file({f"model.{key}": value for key, value in state.items()}, path)
    same(load(path), state)


@pytest.mark.parametrize("nest", ["state_dict", "model_state_dict", "model", "net", "module", "weights"])
def test_a_nested_state_dict_is_found(tmp_path: Path, nest: str) -> None:
    state, path = trained(), tmp_path / "model.pt"
    torch.save({"epoch": 3, "best": 0.9, nest: OrderedDict(state), "optimizer": {"state": {}, "lr": 0.1}}, path)
    same(load(path), state)
    assert nest in NESTS


def test_a_state_dict_nested_twice_is_found(tmp_path: Path) -> None:
    state, path = trained(), tmp_path / "model.pt"
    torch.save({"state_dict": {"model": state, "step": 2}, "optimizer": torch.zeros(2)}, path)
    same(load(path), state)


def test_a_lightning_checkpoint_is_read(tmp_path: Path) -> None:
    state, path = trained(), tmp_path / "last.ckpt"
    content = {
        "epoch": 9,
        "global_step": 100,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in state.items()},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(content, path)
    same(load(path), state)


def test_the_model_is_taken_where_its_average_lies_beside_it(tmp_path: Path) -> None:
    state, average, path = trained(), trained(), tmp_path / "model.pt"
    torch.save({"ema": average, "model": state}, path)
    same(load(path), state)


PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.module._orig_mod.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    state, path = trained(), tmp_path / "model.pt"
    torch.save({"state_dict": {prefix + key: value for key, value in state.items()}}, path)
    same(load(path), state)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: torch.compile(nn.DataParallel(net))])
def test_what_torchs_own_wrappers_save_is_read(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    state, path, model = trained(), tmp_path / "model.pt", make()
    model.load_state_dict(state)
    torch.save(wrap(model).state_dict(), path)
    same(load(path), state)


@pytest.mark.parametrize("own", ["model", "module", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_prefix_that_is_the_models_own_name_is_kept(tmp_path: Path, own: str, prefix: str) -> None:
    path = tmp_path / "model.pt"
    state = {f"{own}.{key}": value for key, value in trained().items()} | {"head.weight": torch.randn(2, 4)}

    def whole() -> nn.Module:
        model = nn.Module()
        model.add_module(own, make())
        model.add_module("head", nn.Linear(4, 2, bias=False))
        return model

    torch.save({prefix + key: value for key, value in state.items()}, path)
    same(load(path, whole()), state)


def test_a_prefix_on_some_keys_only_is_taken_off_unless_two_names_become_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, path = trained(), tmp_path / "model.pt"
    torch.save({("module." if key == "3.bias" else "") + key: value for key, value in state.items()}, path)
    same(load(path), state)
    # Where both names are in the file, taking one off would lose the other.
    torch.save(state | {"module.3.bias": torch.zeros(4)}, path)
    load_checkpoint(model := make(), CheckpointConfig(file=path), WHERE, Terminal())
    same(model, state)
    assert "1 entry left out, not in the model: module.3.bias" in capsys.readouterr().err


def test_weights_of_another_precision_are_converted_to_the_models(tmp_path: Path) -> None:
    state, path = trained(), tmp_path / "model.pt"
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        stored = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
        torch.save(stored, path)
        same(load(path), {key: stored[key].to(state[key].dtype) for key in state})


def test_the_count_of_batches_of_batch_norm_may_be_missing(tmp_path: Path) -> None:
    state, path = trained(), tmp_path / "model.pt"
    del state["1.num_batches_tracked"]
    torch.save(state, path)
    found = load(path).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert found["1.num_batches_tracked"] == 0


# What does not fit


def test_every_missing_unexpected_and_misshapen_key_is_named(tmp_path: Path) -> None:
    state, path = trained(), tmp_path / "model.pt"
    del state["0.bias"]
    state["3.wieght"] = state.pop("3.weight")
    state["1.running_mean"] = torch.zeros(5)
    torch.save(state, path)
    error = refused(path)
    assert error.message == (
        f"{WHERE}: {path} does not fit the model: 2 missing (0.bias, 3.weight); 1 unexpected (3.wieght); "
        "1 misshapen (1.running_mean is [5] in the file and [3] in the model)"
    )
    assert "model.factory" in error.hint
    assert "number of classes" not in error.hint


def test_of_many_keys_the_first_four_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({f"layer{i}.weight": torch.zeros(2) for i in range(9)}, path)
    message = refused(path).message
    assert "8 missing (0.weight, 0.bias, 1.weight, 1.bias, …)" in message
    assert "9 unexpected (layer0.weight, layer1.weight, layer2.weight, layer3.weight, …)" in message


def test_a_last_layer_of_another_size_points_at_the_number_of_classes(tmp_path: Path) -> None:
    state, path = trained(), tmp_path / "model.pt"
    torch.save(state | {"3.weight": torch.zeros(7, 12), "3.bias": torch.zeros(7)}, path)
    error = refused(path)
    assert "2 misshapen (3.weight is [7, 12] in the file and [4, 12] in the model, 3.bias is [7]" in error.message
    assert "another number of classes" in error.hint


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, bad: float) -> None:
    state, path = trained(), tmp_path / "model.pt"
    state["1.running_var"][1] = bad
    torch.save(state, path)
    assert "holds NaN or infinity in 1.running_var" in refused(path).message


def test_a_model_that_is_refused_a_checkpoint_keeps_its_weights(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.pt"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(trained() | {"3.bias": torch.zeros(9)}, path)
    refused(path, model)
    same(model, before)


def test_a_model_whose_shapes_are_not_known_yet_takes_them_from_the_file_or_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, path)
    model = nn.LazyLinear(2)
    with contextlib.suppress(InfluenceError):
        load(path, model)
        assert torch.equal(model.weight, state["weight"])


CONTENTS: list[tuple[Any, str]] = [
    ({"epoch": 3, "lr": 0.1}, "holds a mapping with the keys 'epoch', 'lr', not a state dict"),
    ({"state_dict": {"epoch": 3}}, "holds a mapping with the keys 'epoch', not a state dict"),
    ([torch.zeros(2)], "holds a list, not a state dict"),
    (torch.zeros(2), "holds a Tensor, not a state dict"),
    ({0: torch.zeros(2)}, "holds a mapping with the keys 0, not a state dict"),
    ({"a": torch.zeros(2), 0: torch.zeros(2)}, "holds a mapping with the keys 'a', 0, not a state dict"),
    ("hello", "holds a str, not a state dict"),
    (None, "holds a NoneType, not a state dict"),
]


@pytest.mark.parametrize(("content", "message"), CONTENTS)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    error = refused(path)
    assert message in error.message
    assert "torch.save(model.state_dict(), FILE)" in error.hint


def test_a_file_that_is_not_there_or_a_folder_is_told(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "missing.pt").message
    (tmp_path / "folder.pt").mkdir()
    assert "is a folder without model.safetensors" in refused(tmp_path / "folder.pt").message


def small(path: Path) -> bytes:
    """Write a small checkpoint in the format that the name says, and give its bytes."""
    state = nn.Linear(3, 2).state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=path.stem == "zip")
    return path.read_bytes()


FORMATS = ["zip.pt", "legacy.pt", "model.safetensors"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = small(path)
    for length in range(0, len(content), 1 if len(content) < 1000 else 5):
        path.write_bytes(content[:length])
        refused(path, nn.Linear(3, 2))


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_with_a_damaged_byte_is_read_or_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = small(path)
    random = np.random.default_rng(0)
    for place, byte in zip(random.integers(len(content), size=300), random.integers(256, size=300), strict=True):
        path.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
        # Whatever else the reader raises is a failure of this test.
        with contextlib.suppress(InfluenceError):
            read_content(path, WHERE)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_half_the_length_is_told_to_be_damaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = small(path)
    path.write_bytes(content[: len(content) // 2])
    message = refused(path).message
    assert "cannot be read" in message or "is not a readable checkpoint" in message


@pytest.mark.parametrize("content", [b"hello", b"\x89PNG\r\n\x1a\n" + bytes(100), b"model:\n  a: 1\n", bytes(64)])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_another_kind_is_told(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    message = refused(path).message
    assert "cannot be read" in message or "is not a readable checkpoint" in message


# Code


class Evil:
    """Touches a file as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    path, marker = tmp_path / "model.pt", tmp_path / "owned"
    content = pickle.dumps({"state_dict": Evil(marker)}, protocol=protocol)
    path.write_bytes(content)
    refused(path)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists(), "the test itself is harmless"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_beside_its_tensors_is_read_and_the_code_is_not_run(
    tmp_path: Path, zipped: bool
) -> None:
    state, path, marker = trained(), tmp_path / "model.pt", tmp_path / "owned"
    content = {"state_dict": state, "extra": Evil(marker), "args": argparse.Namespace(lr=0.1), "best": np.float64(0.9)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    same(load(path), state)
    assert not marker.exists()


def test_a_pickle_named_safetensors_is_not_run(tmp_path: Path) -> None:
    path, marker = tmp_path / "model.safetensors", tmp_path / "owned"
    torch.save({"a": Evil(marker)}, path)
    refused(path)
    assert not marker.exists()


class Learner:
    """An object with a model, as fastai's."""

    def __init__(self) -> None:
        self.epoch, self.model = 1, make()


@pytest.mark.parametrize("content", [make, lambda: {"epoch": 3, "ema": make(), "model": None}, Learner])
def test_a_whole_model_is_named_with_the_command_that_converts_it(
    tmp_path: Path, content: Callable[[], object]
) -> None:
    path = tmp_path / "model.pt"
    torch.save(content(), path)
    error = refused(path)
    assert "is a whole pickled module (torch.nn.modules.container.Sequential" in error.message
    assert "code, of which nothing was run" in error.message
    assert "influence convert " in error.hint
    assert error.hint.endswith("model.safetensors --trust")


def test_an_archive_of_torchscript_or_another_tool_is_called_that(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    error = refused(tmp_path / "script.pt")
    assert "is a TorchScript archive: code, of which nothing was run" in error.message
    assert "script.safetensors --trust" in error.hint
    for name, what in (("a.onnx", "ONNX"), ("a.keras", "Keras"), ("a.h5", "HDF5")):
        (tmp_path / name).write_bytes(b"any")
        assert what in refused(tmp_path / name).message


# A real checkpoint from elsewhere


class Block(nn.Module):
    """A basic block of He et al. 2016, section 4.2, with parameter-free shortcuts (option A)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.stride, self.more = stride, outside - inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        short = x[:, :, :: self.stride, :: self.stride]
        return (out + nn.functional.pad(short, (0, 0, 0, 0, self.more // 2, self.more // 2))).relu()


class ResNet20(nn.Module):
    """ResNet-20 for images of 32×32 (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def foreign() -> Path:
    """Name the checkpoint of a ResNet-20 that other people trained on CIFAR-10."""
    return shared("weights") / "resnet20-12fca82f.th"


def test_the_real_foreign_checkpoint_loads_whole(foreign: Path) -> None:
    content = torch.load(foreign, map_location="cpu", weights_only=True)["state_dict"]
    model = load(foreign, ResNet20())
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722
    found = model.state_dict()
    # 19 convolutions, 19 × 4 of batch norm (none counts its batches), and the last layer.
    assert len(content) == 19 + 19 * 4 + 2
    for key, value in content.items():
        assert torch.equal(found[key.removeprefix("module.")], value)


def test_the_real_foreign_checkpoint_classifies_as_it_is_known_to(foreign: Path) -> None:
    model = load(foreign, ResNet20()).eval()
    folder = shared("cifar10")
    count = 400
    mosaic = np.asarray(Image.open(folder / "test_batch.webp"))[: count // 100 * 32]
    images = mosaic.reshape(-1, 32, 100, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3)
    labels = torch.tensor(np.load(folder / "test_labels.npy")[:count].astype(np.int64))
    inputs = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    inputs = (inputs - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(1) == labels).double().mean())
    # 91.73 % of all 10,000; three standard errors of 400 are 4 points.
    assert accuracy == pytest.approx(0.9173, abs=0.042)


def test_the_real_foreign_checkpoint_in_another_model_names_what_differs(foreign: Path) -> None:
    model = ResNet20()
    model.linear = nn.Linear(64, 100)
    model.head = nn.Linear(2, 2)
    message = refused(foreign, model).message
    assert "2 missing (head.weight, head.bias)" in message
    assert "2 misshapen (linear.weight is [10, 64] in the file and [100, 64] in the model" in message


# Models of another precision, and factories that return the trained model


def test_a_model_of_another_precision_is_computed_in_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, path = trained(), tmp_path / "model.pt"
    torch.save(state, path)
    for kind in (torch.float64, torch.bfloat16):
        model = trained_model(lambda kind=kind: make().to(kind), CheckpointConfig(file=path), WHERE, Terminal())
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert all(torch.equal(value, state[key].to(kind).to(value.dtype)) for key, value in model.state_dict().items())
        name = str(kind).removeprefix("torch.")
        assert f"The model has {name} parameters; everything is computed in float32." in capsys.readouterr().err


def test_without_a_checkpoint_the_factory_must_give_the_same_weights_every_time() -> None:
    state = trained()

    def pretrained() -> nn.Module:
        model = make()
        model.load_state_dict(state)
        return model

    same(trained_model(pretrained, None, WHERE), state)
    with pytest.raises(InfluenceError) as caught:
        trained_model(lambda: nn.Sequential(pretrained(), nn.Linear(4, 2)), None, WHERE)
    assert caught.value.message == (
        f"{WHERE}: model.checkpoint is left out, but model.factory makes other weights at every call: 1.weight, 1.bias"
    )
    assert "model.checkpoint: runs/best.pt" in caught.value.hint
