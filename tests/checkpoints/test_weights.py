"""The layouts that tools write reach the model as their plain state dict does; what else is in them is said."""

from __future__ import annotations

import argparse
import copy
import functools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from influence_cli.checkpoints.load import load_checkpoint
from influence_cli.checkpoints.weights import NESTS
from influence_cli.config.schema import CheckpointConfig
from influence_cli.errors import InfluenceError
from influence_cli.runtime.terminal import Terminal

WHERE = "influence.yaml:4"
State = dict[str, Tensor]


def make() -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(conv1=nn.Conv2d(1, 3, 2), bn1=nn.BatchNorm2d(3), flat=nn.Flatten(), fc=nn.Linear(12, 4))
    )


def trained() -> State:
    """Give a state in which no tensor has the value that it starts with."""
    state = make().state_dict()
    return {key: value + 1 if value.dtype == torch.int64 else torch.randn_like(value) for key, value in state.items()}


def load(path: Path, model: nn.Module | None = None, **wanted: Any) -> nn.Module:
    model = make() if model is None else model
    load_checkpoint(model, CheckpointConfig(file=path, **wanted), WHERE, Terminal())
    return model


def same(model: nn.Module, state: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(loaded[key], value), key


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def adam(state: State) -> dict[str, Any]:
    """Give the state of an optimiser that took a step."""
    parameters = [nn.Parameter(value) for value in state.values() if value.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def timm(state: State, average: State) -> dict[str, Any]:
    return {
        "epoch": 12,
        "arch": "resnet18",
        "optimizer": adam(state),
        "version": 2,
        "args": argparse.Namespace(model="resnet18", lr=0.1, device=torch.device("cuda:0"), out=Path("runs")),
        "amp_scaler": {"scale": 65536.0},
        "state_dict": OrderedDict(state),
        "state_dict_ema": OrderedDict(average),
        "metric": np.float64(87.5),
    }


def torchvision(state: State, average: State) -> dict[str, Any]:
    return {
        "model": OrderedDict(state),
        "optimizer": adam(state),
        "lr_scheduler": {"_schedulers": [{"_step_count": 3}], "milestones": [1]},
        "epoch": 89,
        "args": argparse.Namespace(data_path="imagenet", weights=None),
        "model_ema": {**under("module.", average), "n_averaged": torch.tensor(7)},
        "scaler": {},
    }


def lightning(state: State, average: State) -> dict[str, Any]:
    del average
    return {
        "epoch": 9,
        "global_step": 780,
        "pytorch-lightning_version": "2.6.1",
        "state_dict": {
            **under("net.", state),
            "criterion.weight": torch.ones(4),
            "train_acc.tp": torch.tensor([3, 4]),
        },
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.3), "best": Path("x")}},
        "optimizer_states": [adam(state)],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {
            "loss": nn.CrossEntropyLoss(weight=torch.ones(4)),
            "optimizer": functools.partial(torch.optim.Adam, lr=0.1),
            "net": make(),
            "lr": np.float32(0.1),
        },
    }


def averaged(state: State, average: State) -> dict[str, Any]:
    del average
    model = make()
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


def mmengine(state: State, average: State) -> dict[str, Any]:
    del average
    return {
        "meta": {"epoch": 3, "cfg": "model = dict()", "seed": None, "experiment_name": "x"},
        "state_dict": OrderedDict(state),
        "message_hub": {"log_scalars": OrderedDict(loss=nn.MSELoss()), "runtime_info": OrderedDict(iter=np.int64(3))},
        "optimizer": adam(state),
        "param_schedulers": [],
    }


def fastai(state: State, average: State) -> dict[str, Any]:
    del average
    return {"model": state, "opt": {"state": [{"mom": torch.ones(2)}], "hypers": [{"lr": np.float64(1e-3)}]}}


def composer(state: State, average: State) -> dict[str, Any]:
    del average
    return {
        "state": {"model": under("module.", state), "optimizers": {"AdamW": adam(state)}, "timestamp": {"epoch": 3}},
        "rng": [{"python": (3, (1, 2, 3), None), "numpy": ("MT19937", np.arange(4), 3, 0, 0.0)}],
    }


def loop(state: State, average: State) -> dict[str, Any]:
    del average
    history: defaultdict[str, list[float]] = defaultdict(list)
    history["loss"].append(0.5)
    return {"epoch": 3, "model_state": state, "history": history, "best_acc": np.float64(0.9), "confusion": np.eye(3)}


LAYOUTS = [timm, torchvision, lightning, averaged, mmengine, fastai, composer, loop]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_tool_writes_gives_the_tensors_of_its_plain_state_dict(
    tmp_path: Path, layout: Callable[[State, State], dict[str, Any]], zipped: bool
) -> None:
    state = trained()
    torch.save(layout(state, trained()), tmp_path / "last.pt", _use_new_zipfile_serialization=zipped)
    same(load(tmp_path / "last.pt"), state)


@pytest.mark.parametrize("key", [*NESTS, "ema", "state_dict_ema", "model_ema", "teacher", "student", "backbone"])
@pytest.mark.parametrize("wrapper", ["", "_orig_mod.", "module.", "module._orig_mod.", "classifier."])
def test_weights_under_any_key_are_taken_where_they_alone_fit(tmp_path: Path, key: str, wrapper: str) -> None:
    state = trained()
    torch.save({"epoch": 1, key: under(wrapper, state)}, tmp_path / "a.pt")
    same(load(tmp_path / "a.pt"), state)
    torch.save({"run": {key: under(wrapper, state), "step": 3}}, tmp_path / "b.pt")
    same(load(tmp_path / "b.pt"), state)


def test_a_module_that_was_compiled_or_sharded_inside_the_model_loses_its_wrapper(tmp_path: Path) -> None:
    state = trained()
    for wrapper in (
        "_orig_mod.",
        "_fsdp_wrapped_module.",
        "_checkpoint_wrapped_module.",
        "_fsdp_wrapped_module._orig_mod.",
    ):
        wrapped = {key.replace("fc.", f"fc.{wrapper}").replace("bn1.", f"bn1.{wrapper}"): v for key, v in state.items()}
        torch.save(wrapped, tmp_path / "a.pt")
        same(load(tmp_path / "a.pt"), state)
    compiled = torch.compile(make())
    torch.save(state, tmp_path / "a.pt")
    load(tmp_path / "a.pt", compiled)
    same(compiled, under("_orig_mod.", state))


# What is taken where several fit


def test_the_raw_weights_are_taken_and_the_average_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, average = trained(), trained()
    torch.save(timm(state, average), tmp_path / "a.pt")
    same(load(tmp_path / "a.pt"), state)
    assert capsys.readouterr().err == (
        "weights: state_dict; state_dict_ema is there too, `model.checkpoint.key: state_dict_ema` takes it\n"
    )
    same(load(tmp_path / "a.pt", key="state_dict_ema"), average)
    assert capsys.readouterr().err == ""
    torch.save(torchvision(state, average), tmp_path / "b.pt")
    same(load(tmp_path / "b.pt", key="model_ema"), average)
    assert "n_averaged" in capsys.readouterr().err


def test_the_order_in_the_file_decides_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, average = trained(), trained()
    for content in ({"model_ema": average, "model": state}, {"model": state, "model_ema": average}):
        torch.save(content, tmp_path / "a.pt")
        same(load(tmp_path / "a.pt"), state)
        assert "`model.checkpoint.key: model_ema` takes it" in capsys.readouterr().err
    torch.save({"net": average, "state_dict": state}, tmp_path / "a.pt")
    same(load(tmp_path / "a.pt"), state)
    assert "weights: state_dict; net is there too" in capsys.readouterr().err


def test_the_same_weights_twice_are_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = trained()
    torch.save({"model": state, "best": copy.deepcopy(state), "ema": state}, tmp_path / "a.pt")
    same(load(tmp_path / "a.pt"), state)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [("student", "teacher"), ("ema", "swa"), ("generator", "critic")])
def test_two_that_fit_equally_well_are_refused_with_the_key_to_set(tmp_path: Path, names: tuple[str, str]) -> None:
    one, other = trained(), trained()
    torch.save({names[0]: one, names[1]: under("module.", other), "epoch": 2}, tmp_path / "a.pt")
    with pytest.raises(InfluenceError) as caught:
        load(tmp_path / "a.pt")
    assert "holds several weights that fit the model: " in caught.value.message
    assert all(name in caught.value.message for name in names)
    assert caught.value.hint == f"name one: -s model.checkpoint.key={names[0]}"
    same(load(tmp_path / "a.pt", key=names[0]), one)
    same(load(tmp_path / "a.pt", key=names[1]), other)


def test_two_networks_in_one_state_dict_are_told_apart_by_their_prefix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, average = trained(), trained()
    both = {**under("model.", state), **under("ema_model.module.", average), "ema_model.n_averaged": torch.tensor(3)}
    torch.save({"state_dict": both}, tmp_path / "a.ckpt")
    same(load(tmp_path / "a.ckpt"), state)
    said = capsys.readouterr().err
    assert "`model.checkpoint.strip: ema_model.module.` takes it" in said
    assert "conv1" not in said
    same(load(tmp_path / "a.ckpt", strip="ema_model.module."), average)
    torch.save({"state_dict": {**under("model.", state), **under("net.", average)}}, tmp_path / "c.ckpt")
    same(load(tmp_path / "c.ckpt"), state)
    assert capsys.readouterr().err == "weights: model.; net. is there too, `model.checkpoint.strip: net.` takes it\n"
    torch.save({"state_dict": {**under("student.", state), **under("teacher.", average)}}, tmp_path / "b.ckpt")
    with pytest.raises(InfluenceError, match="several weights that fit") as caught:
        load(tmp_path / "b.ckpt")
    assert caught.value.hint == "name one: -s model.checkpoint.strip=student."
    same(load(tmp_path / "b.ckpt", strip="teacher."), average)


# What is in the file and not in the model


def test_what_is_no_part_of_the_model_is_left_out_and_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = trained()
    extra = {"criterion.weight": torch.ones(4), "n_averaged": torch.tensor(3), "conv1.total_ops": torch.zeros(1)}
    torch.save(state | extra | {"train_acc.tp": torch.ones(3)}, tmp_path / "a.pt")
    same(load(tmp_path / "a.pt"), state)
    assert capsys.readouterr().err == (
        "a.pt: 4 entries left out, not in the model: criterion.weight, n_averaged, conv1.total_ops, train_acc.tp\n"
    )
    torch.save(state | {"AuxLogits.fc.weight": torch.ones(3)}, tmp_path / "a.pt")
    same(load(tmp_path / "a.pt"), state)
    assert capsys.readouterr().err == "warning: a.pt: 1 entry left out, not in the model: AuxLogits.fc.weight\n"


@pytest.mark.parametrize("name", ["fc.gain", "conv1.1.weight", "scale"])
def test_what_would_be_part_of_the_model_is_another_model(tmp_path: Path, name: str) -> None:
    state = trained()
    torch.save(state | {name: torch.ones(4)}, tmp_path / "a.pt")
    with pytest.raises(InfluenceError) as caught:
        load(tmp_path / "a.pt")
    assert f"1 unexpected ({name})" in caught.value.message
    assert f"model.checkpoint.ignore: [{name}]" in caught.value.hint
    same(load(tmp_path / "a.pt", ignore=[name]), state)


def test_a_deeper_network_of_the_same_family_is_refused(tmp_path: Path) -> None:
    deep = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    torch.save(deep.state_dict(), tmp_path / "a.pt")
    with pytest.raises(InfluenceError, match=r"2 unexpected \(2.weight, 2.bias\)"):
        load(tmp_path / "a.pt", deep[:2])


def test_one_layer_of_a_large_file_is_not_taken_for_a_model(tmp_path: Path) -> None:
    torch.save(trained(), tmp_path / "a.pt")
    with pytest.raises(InfluenceError, match=r"2 missing \(weight, bias\)"):
        load(tmp_path / "a.pt", nn.Linear(12, 4))


def test_numbers_that_are_no_floats_are_no_weights(tmp_path: Path) -> None:
    state = trained()
    state["fc.weight"] = state["fc.weight"].to(torch.int8)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(InfluenceError, match=r"fc.weight is int8 in the file and float32 in the model"):
        load(tmp_path / "a.pt")


# What the config says


def test_names_are_changed_as_the_config_says(tmp_path: Path) -> None:
    state = trained()
    torch.save({"state_dict": under("lit.net.", state), "other": under("x.", trained())}, tmp_path / "a.pt")
    same(load(tmp_path / "a.pt", strip="lit.net."), state)
    torch.save({key.removeprefix("fc."): value for key, value in state.items() if key[:3] == "fc."}, tmp_path / "b.pt")
    head = load(tmp_path / "b.pt", nn.Sequential(OrderedDict(fc=nn.Linear(12, 4))), add="fc.")
    same(head, {key: value for key, value in state.items() if key.startswith("fc.")})


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        ({"key": "state_dict_emma"}, "there are no weights under 'state_dict_emma'", "did you mean 'state_dict_ema'?"),
        ({"strip": "modul."}, "no name begins with 'modul.'", "module."),
        ({"ignore": ["criterium.*"]}, "nothing has the name 'criterium.*'", "known: "),
    ],
)
def test_a_mistake_in_it_is_told_with_what_there_is(
    tmp_path: Path, wanted: dict[str, Any], message: str, hint: str
) -> None:
    torch.save(timm(under("module.", trained()), trained()), tmp_path / "a.pt")
    with pytest.raises(InfluenceError) as caught:
        load(tmp_path / "a.pt", **wanted)
    assert caught.value.message.startswith(f"{WHERE}: model.checkpoint.{next(iter(wanted))}: ")
    assert message in caught.value.message
    assert hint in caught.value.hint


# Names that torch changes


def weight_normed(kind: Callable[..., nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc=kind(nn.Linear(3, 2)), out=nn.Linear(2, 2)))


@pytest.fixture
def old_norm() -> Iterator[Callable[..., nn.Module]]:
    with pytest.warns(FutureWarning):
        yield torch.nn.utils.weight_norm


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weight_norm_is_read_from_the_older_form_and_from_the_newer(
    tmp_path: Path, old_norm: Callable[..., nn.Module], prefix: str
) -> None:
    old, new = weight_normed(old_norm), weight_normed(parametrizations.weight_norm)
    x = torch.randn(4, 3)
    for source, target in ((old, new), (new, old)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        torch.save({"state_dict": under(prefix, source.state_dict())}, tmp_path / "a.pt")
        loaded = load(tmp_path / "a.pt", target)
        assert torch.allclose(loaded(x), source(x))


class Renamed(nn.Module):
    """A module that takes the names of its first version."""

    def __init__(self) -> None:
        super().__init__()
        self.new = nn.Linear(2, 2)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        for kind in ("weight", "bias"):
            if f"{prefix}old.{kind}" in state_dict:
                state_dict[f"{prefix}new.{kind}"] = state_dict.pop(f"{prefix}old.{kind}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_names_that_a_module_changes_while_it_loads_are_left_to_it(tmp_path: Path) -> None:
    weights = nn.Linear(2, 2).state_dict()
    torch.save(under("old.", weights), tmp_path / "a.pt")
    same(load(tmp_path / "a.pt", Renamed()), under("new.", weights))
    torch.save({**under("old.", weights), "new.extra": torch.ones(3)}, tmp_path / "a.pt")
    with pytest.raises(InfluenceError, match="does not fit the model"):
        load(tmp_path / "a.pt", Renamed())
