"""The numbers of a `Debugger` are those of the commands on the same model and data; mistakes are told in a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from influence_cli import Debugger, InfluenceError
from tests.conftest import Command

TO_INPUT = v2.Compose([v2.Grayscale(1), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


def model_of(folder: Path) -> nn.Module:
    model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    state = torch.load(folder / "model.pt", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model


def debugger_of(folder: Path, **words: object) -> Debugger:
    train, test = (ImageFolder(str(folder / name), TO_INPUT) for name in ("train", "test"))
    return Debugger(model_of(folder), train, test, l2=0.01, quiet=True, **words)  # type: ignore[arg-type]


def test_the_suspects_are_those_of_the_command(tiny: Path, influence: Command) -> None:
    told = influence("mislabels", "--all", "--format", "jsonl", "--signals", "-q", cwd=tiny).out
    expected = [json.loads(line) for line in told.splitlines()]
    rows = debugger_of(tiny).mislabels().rows
    for column in ("rank", "index", "label", "suggested", "confidence", "score", "loss", "signal_combined"):
        assert [row[column] for row in rows] == [row[column] for row in expected], column
    assert [Path(str(row["path"])).name for row in rows] == [Path(row["path"]).name for row in expected]


@pytest.mark.parametrize("words", [("0",), ("0", "2", "--aggregate")])
def test_the_ranking_is_that_of_the_command(tiny: Path, influence: Command, words: tuple[str, ...]) -> None:
    told = influence("rank", *words, "--format", "jsonl", "-q", cwd=tiny).out
    expected = [json.loads(line) for line in told.splitlines()]
    tests = [int(word) for word in words if word.isdecimal()]
    ranking = debugger_of(tiny).rank(*tests, aggregate="--aggregate" in words)
    assert [row["index"] for row in ranking.rows] == [row["index"] for row in expected]
    assert [row["influence"] for row in ranking.rows] == [row["influence"] for row in expected]
    assert ranking.influence.shape == (1, 24)
    for row in ranking.rows:
        assert ranking.influence[0, ranking.indices.tolist().index(row["index"])] == np.float32(row["influence"])


def test_settings_reach_the_config(tiny: Path, influence: Command) -> None:
    words = ("-s", "curvature.method=identity", "-s", "curvature.damping=0.3")
    told = influence("rank", "1", *words, "--format", "jsonl", "-q", cwd=tiny).out
    expected = [json.loads(line)["influence"] for line in told.splitlines()]
    ranking = debugger_of(tiny, method="identity", damping=0.3, settings={"gradients.block": 8}).rank(1)
    assert [row["influence"] for row in ranking.rows] == expected


def test_a_transform_inside_of_the_data_set_gives_the_same_numbers(tiny: Path) -> None:
    class Own(Dataset[tuple[torch.Tensor, int]]):
        def __init__(self, folder: Path) -> None:
            self.inner = ImageFolder(str(folder), TO_INPUT)

        def __len__(self) -> int:
            return len(self.inner)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = self.inner[index]
            return image, label

    debugger = Debugger(model_of(tiny), DataLoader(Own(tiny / "train"), batch_size=4, shuffle=True), quiet=True)
    assert debugger.classes == ("0", "1", "2")
    mine, folders = debugger.mislabels(), debugger_of(tiny).mislabels()
    assert [row["score"] for row in mine.rows] == [row["score"] for row in folders.rows]


def test_a_part_of_a_data_set_is_numbered_by_itself(tiny: Path) -> None:
    part = Subset(ImageFolder(str(tiny / "train"), TO_INPUT), list(range(23, -1, -1)))
    rows = Debugger(model_of(tiny), part, l2=0.01, quiet=True).mislabels().rows
    whole = {row["path"]: row["index"] for row in debugger_of(tiny).mislabels().rows}
    assert {row["path"]: 23 - int(str(row["index"])) for row in rows} == whole


def test_classes_name_the_outputs(tiny: Path) -> None:
    inputs, labels = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    debugger = Debugger(model_of(tiny), TensorDataset(inputs, labels), classes=["ant", "bee", "cow"], quiet=True)
    assert {row["label"] for row in debugger.mislabels().rows} == {"ant", "bee", "cow"}


def test_losses_of_torch_and_of_ones_own_agree(tiny: Path) -> None:
    def own(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(outputs, targets, reduction="none")

    smooth = nn.CrossEntropyLoss(label_smoothing=0.1)
    losses = {
        str(loss): [row["influence"] for row in debugger_of(tiny, loss=loss).rank(0).rows]
        for loss in ("cross_entropy", nn.CrossEntropyLoss(), nn.CrossEntropyLoss, functional.cross_entropy)
    }
    assert len({str(values) for values in losses.values()}) == 1
    plain = losses["cross_entropy"]
    assert [row["influence"] for row in debugger_of(tiny, loss=own).rank(0).rows] == pytest.approx(plain, rel=1e-3)
    assert [row["influence"] for row in debugger_of(tiny, loss=smooth).rank(0).rows] != pytest.approx(plain, rel=1e-2)


def test_the_notebook_keeps_its_model_its_random_numbers_and_its_switches(tiny: Path) -> None:
    model = model_of(tiny).train()
    torch.manual_seed(5)
    state, fast = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled()
    data = ImageFolder(str(tiny / "train"), TO_INPUT)
    debugger = Debugger(model, data, data, quiet=True)
    before = [row["influence"] for row in debugger.rank(0).rows]
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert data.transform is TO_INPUT
    with torch.no_grad():
        model[2].weight += 1.0
    assert [row["influence"] for row in debugger.rank(0).rows] == before


def test_a_store_is_kept_where_it_is_named_and_temporary_otherwise(tiny: Path) -> None:
    kept = debugger_of(tiny, store=tiny / "mine.h5")
    kept.rank(0)
    assert (tiny / "mine.h5").exists()
    loose = debugger_of(tiny)
    loose.rank(0)
    folder = loose._session.config.gradients.store.parent
    assert folder.is_dir()
    del loose
    import gc

    gc.collect()
    assert not folder.exists()


def test_after_a_ranking_the_suspects_have_their_self_influence(tiny: Path) -> None:
    debugger = debugger_of(tiny, store=tiny / "mine.h5")
    first = debugger.mislabels()
    assert all(row["self_influence"] is None for row in first.rows)
    debugger.rank(0)
    second = debugger.mislabels()
    assert all(row["self_influence"] > 0 for row in second.rows)  # type: ignore[operator]
    assert [row["index"] for row in second.rows] == [row["index"] for row in first.rows]
    by_gradients = debugger.mislabels(signal="self-influence")
    assert [row["self_influence"] for row in by_gradients.rows] == sorted(
        (row["self_influence"] for row in second.rows),
        reverse=True,  # type: ignore[type-var]
    )


def test_a_store_of_another_model_is_refused_by_rank_and_left_by_mislabels(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    debugger_of(tiny, store=tiny / "mine.h5").rank(0)
    train = ImageFolder(str(tiny / "train"), TO_INPUT)
    model = model_of(tiny)
    with torch.no_grad():
        model[2].weight *= 1.5  # type: ignore[operator,union-attr]
    other = Debugger(model, train, train, store=tiny / "mine.h5", quiet=True)
    assert len(other.mislabels()) == 24
    assert "no self_influence: " in capsys.readouterr().err
    with pytest.raises(InfluenceError, match="belongs to another run"):
        other.rank(0)


class Streamed(IterableDataset[int]):
    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(())


def labelled(*labels: object) -> list[tuple[torch.Tensor, object]]:
    return [(torch.rand(1, 8, 8), label) for label in labels]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"train": Streamed()}, "train: a Streamed is not a data set with a length and items by index"),
        ({"train": 5}, "train: a int is not a data set"),
        ({"train": []}, "train: the train data set is empty"),
        ({"train": labelled(0, 1, "cat")}, "train: training example 2 has the label 'cat', not a class number"),
        ({"train": labelled(0, 1.5)}, "train: training example 1 has the label 1.5, not a class number"),
        ({"train": labelled(0, 7)}, "has the label 7"),
        ({"model": nn.Conv2d(1, 3, 3)}, "model"),
        ({"model": "resnet18"}, "the model: a str is not a torch module"),
        ({"loss": 3}, "loss: a int is neither a name nor a function"),
        ({"loss": "crossentropy"}, "loss: unknown loss 'crossentropy'"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "loss: CrossEntropyLoss has reduction='sum'"),
        ({"loss": lambda outputs, targets: outputs.mean()}, "one loss per example"),
        ({"damping": -1.0}, "Debugger: curvature.damping=-1.0"),
        ({"settings": {"curvature.dampng": 1}}, "unknown key 'dampng'"),
        ({"settings": {"gradients.layers": object()}}, "Debugger: gradients.layers is a object"),
        ({"device": "gpu"}, "device"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_a_mistake_is_told_in_one_line(tiny: Path, words: dict[str, object], told: str) -> None:
    given = {"model": model_of(tiny), "train": labelled(0, 1, 2, 0, 1, 2)} | words
    with pytest.raises(InfluenceError) as error:
        Debugger(**given, quiet=True)  # type: ignore[arg-type]
    text = f"{error.value.message} {error.value.hint}"
    assert told in text
    assert "\n" not in text
    assert "influence_cli.notebook" not in text


def test_what_cannot_be_asked_is_told(tiny: Path) -> None:
    debugger = Debugger(model_of(tiny), labelled(0, 1, 2, 0, 1, 2), quiet=True)
    for call, told in (
        (lambda: debugger.rank(0), "rank: there are no test examples"),
        (lambda: debugger.rank(), "rank: say which test images"),
        (lambda: debugger.rank(0, top=0), "top=0"),
        (lambda: debugger.mislabels(on="dev"), "on='dev'"),
        (lambda: debugger.mislabels(signal="odd"), "signal odd: there is no such signal"),
    ):
        with pytest.raises(InfluenceError, match=told):
            call()
    with pytest.raises(InfluenceError, match="99"):
        debugger_of(tiny).rank(99)


def test_a_notebook_shows_an_error_without_a_traceback() -> None:
    assert InfluenceError("it is wrong", "do this")._render_traceback_() == ["error: it is wrong", "  do this"]


def test_importing_the_package_leaves_torch_out() -> None:
    code = "import sys, influence_cli; assert 'Debugger' in influence_cli.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
