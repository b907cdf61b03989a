"""init: the starter holds every documented key, says what it is, and never replaces a config that is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from influence_cli.commands.init import KEPT, _write_new
from influence_cli.config.load import load_config
from influence_cli.config.schema import Config, DataConfig
from influence_cli.errors import InfluenceError
from tests.conftest import Command
from tests.support import brightness

# Every key that the design documents, by section; "" for the top.
KEYS = {
    "": {
        "model",
        "loss",
        "l2",
        "train",
        "test",
        "gradients",
        "curvature",
        "training",
        "evidence",
        "device",
        "precision",
    }
    | {"seed"},
    "model": {"factory", "args", "checkpoint", "output", "ensemble", "learning_rates", "steps", "segments"},
    "train": {"dataset", "args", "labels", "exclude", "weights", "classes", "n", "transform"},
    "test": {"dataset", "args"},
    "gradients": {"store", "layers", "budget", "store_dtype", "block"},
    "curvature": {"method", "matrix", "damping", "tolerance", "max_iterations"},
    "evidence": {"features"},
}


@pytest.fixture
def starter(influence: Command, tmp_path: Path) -> Path:
    influence("init", cwd=tmp_path)
    return tmp_path / "influence.yaml"


def sections(values: dict[str, Any]) -> dict[str, set[str]]:
    """Give the keys at the top and of each section of ours; what goes to a user's factory is theirs."""
    return {"": set(values)} | {name: set(part) for name, part in values.items() if isinstance(part, dict)}


def test_every_documented_key_is_there(starter: Path) -> None:
    assert sections(yaml.safe_load(starter.read_text())) == KEYS


def test_no_key_of_the_config_is_missing(starter: Path) -> None:
    """What the config takes, the starter shows: a new key that is not added to it is found here."""
    found = sections(yaml.safe_load(starter.read_text()))
    assert found[""] == set(Config.model_fields) - {"path"}
    for name in ("model", "gradients", "curvature", "evidence"):
        assert found[name] == set(Config.model_fields[name].annotation.model_fields), name
    # Other ways to name the data, of which a section has one, stand in docs/data.md.
    assert found["train"] == set(DataConfig.model_fields) - {
        "csv",
        "folder",
        "huggingface",
        "image",
        "label",
        "root",
        "split",
    }


def test_it_is_a_config_whose_paths_start_at_its_folder(starter: Path) -> None:
    config = load_config(starter)
    assert config.model.factory == "torchvision.models.resnet18"
    assert config.model.checkpoint == (starter.parent / "runs" / "best.pt",)
    assert config.train.args == {"root": "data/train"}, "the factory runs in the folder of the YAML file"
    assert config.gradients.store == starter.parent / "influence.h5"
    assert [step.name for step in config.train.transform or ()] == ["Resize", "ToImage", "ToDtype", "Normalize"]
    assert config.test is not None
    assert config.test.transform == config.train.transform


def test_what_it_does_not_need_to_say_it_says_as_it_is(starter: Path) -> None:
    """A value that is a default is the default: to delete the line changes nothing."""
    config = load_config(starter)
    required = "model: {factory: m.f, checkpoint: runs/best.pt}\ntrain: {dataset: d.D}\n"
    starter.write_text(required)
    plain = load_config(starter)
    for name in ("loss", "l2", "gradients", "curvature", "device", "seed"):
        assert getattr(config, name) == getattr(plain, name), name
    for name in ("ensemble", "learning_rates", "steps", "segments"):
        assert getattr(config.model, name) == getattr(plain.model, name), name
    for name in ("labels", "exclude", "n"):
        assert getattr(config.train, name) == getattr(plain.train, name), name


def test_every_key_has_a_comment_and_the_first_line_runs_it(starter: Path) -> None:
    first, *lines = starter.read_text().splitlines()
    assert first.startswith("# influence check")
    assert "a config is code" in first
    for line in lines:
        heading = line.endswith(":") or line.split("#")[0].strip() in ("seed: 0",)
        # A step of the transform is explained by its heading.
        if not heading and not line.lstrip().startswith("- ") and "torchvision.datasets.ImageFolder" not in line:
            assert "#" in line, line
        assert len(line) <= 120


def test_a_choice_that_a_comment_offers_is_one_that_the_config_takes(starter: Path) -> None:
    # The comment goes on in the next line.
    lines = starter.read_text().split("method: auto")[1].splitlines()[:2]
    methods = " ".join(line.strip(" #") for line in lines).replace(" or a solver:", "")
    names = [name.strip() for name in methods.split(",")]
    assert len(names) > 3
    for name in names:
        assert load_config(starter, [f"curvature.method={name}"]).curvature.method == name


def test_nothing_is_data_and_the_next_step_is_named(influence: Command, tmp_path: Path) -> None:
    done = influence("init", cwd=tmp_path)
    assert done.out == ""
    assert done.err.startswith("wrote influence.yaml; next: ")
    assert "influence check" in done.err


def test_the_next_step_names_what_is_still_missing_by_its_line(influence: Command, starter: Path) -> None:
    done = influence("check", cwd=starter.parent, code=2)
    line = next(n for n, text in enumerate(starter.read_text().splitlines(), start=1) if "dataset:" in text)
    assert f"error: influence.yaml:{line}: " in done.err
    assert str(starter.parent / "data" / "train") in done.err


@pytest.mark.parametrize("folder", ["project", "a/b/c", "."])
def test_the_folder_is_made_where_it_is_missing(influence: Command, tmp_path: Path, folder: str) -> None:
    done = influence("init", folder, cwd=tmp_path)
    assert (tmp_path / folder / "influence.yaml").is_file()
    assert f"wrote {Path(folder) / 'influence.yaml'}" in done.err


def test_a_config_that_is_there_is_not_replaced(influence: Command, tmp_path: Path) -> None:
    (tmp_path / "influence.yaml").write_text("mine: true\n")
    done = influence("init", cwd=tmp_path, code=2)
    assert "error: influence.yaml exists already" in done.err
    assert "influence init DIR" in done.err
    assert (tmp_path / "influence.yaml").read_text() == "mine: true\n"


@pytest.mark.parametrize("target", ["elsewhere.yaml", "nowhere.yaml"])
def test_a_link_in_its_place_is_not_followed(influence: Command, tmp_path: Path, target: str) -> None:
    (tmp_path / "elsewhere.yaml").write_text("mine: true\n")
    (tmp_path / "influence.yaml").symlink_to(target)
    influence("init", cwd=tmp_path, code=2)
    assert (tmp_path / "elsewhere.yaml").read_text() == "mine: true\n"
    assert not (tmp_path / "nowhere.yaml").exists()


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_place_of_the_folder_is_called_that(influence: Command, tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("mine\n")
    done = influence("init", folder, cwd=tmp_path, code=2)
    assert "error: " in done.err
    assert "exists already" not in done.err
    assert "not a" in done.err.lower()
    assert (tmp_path / "file").read_text() == "mine\n"


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """A folder with model.pt, net.py and data/, without a config."""
    return brightness.project(tmp_path)


def test_from_a_checkpoint_and_data_to_a_ranked_list_in_two_commands(influence: Command, material: Path) -> None:
    done = influence("init", "model.pt", "data", "--model", "net:Net", cwd=material)
    measured = {row["item"]: row["value"] for row in map(json.loads, done.out.splitlines())}
    assert measured["training accuracy"] == 1
    assert measured["test examples"] == 6
    assert "wrote influence.yaml; its comments say what each line was guessed from" in done.err
    text = (material / "influence.yaml").read_text()
    assert "  factory: net.Net                           # --model\n" in text
    assert "# Written by influence init model.pt data --model net:Net. " in text
    ranked = influence("rank", "3", cwd=material)
    assert len(ranked.out.splitlines()) > 0
    listed = influence("mislabels", "--top", "3", cwd=material)
    assert len(listed.out.splitlines()) == 3


def test_data_may_be_named_apart(influence: Command, material: Path) -> None:
    influence("init", "model.pt", "data/train", "data/val", "--model", "./net.py:Net", cwd=material)
    assert load_config(material / "influence.yaml").test is not None
    assert "root: data/val" in (material / "influence.yaml").read_text()


def test_a_config_that_is_there_stops_it_before_anything_is_read(influence: Command, material: Path) -> None:
    (material / "influence.yaml").write_text("mine: true\n")
    done = influence("init", "gone.pt", "data", cwd=material, code=2)
    assert "error: influence.yaml exists already" in done.err
    assert (material / "influence.yaml").read_text() == "mine: true\n"


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (("gone.pt", "data"), "there is no checkpoint gone.pt", "CHECKPOINT is a file or a folder"),
        (("model.pt", "gone"), "there is no gone", "DATA is a folder or a file"),
        (("model.pt", "data", "gone"), "there is no gone", "TEST is a folder or a file"),
        (("model.pt", "data"), "model.pt: the model is not recognised: 2 tensors (fc.weight, fc.bias)", "--model"),
        (("model.pt", "net.py"), "net.py: a .py file, no form of data that is known", "known: a folder of"),
        (("model.pt", "data", "--model", "net:Nett"), "--model: net has no 'Nett'", "did you mean 'Net'?"),
        (("model.pt",), "model.pt is a file, not a folder", "influence init model.pt DATA [TEST]"),
        (("a", "b", "c", "d"), "not 4 paths", "influence init CHECKPOINT DATA [TEST]"),
        (("--model", "net:Net"), "--model goes with a checkpoint and its data", "influence init CHECKPOINT DATA"),
    ],
)
def test_what_does_not_go_is_said_in_a_line_and_nothing_is_written(
    influence: Command, material: Path, words: tuple[str, ...], said: str, hint: str
) -> None:
    before = sorted(material.rglob("*"))
    done = influence("init", *words, cwd=material, code=2)
    assert done.out == ""
    error, *rest = [line for line in done.err.splitlines() if not line.startswith(("model:", "data:"))]
    assert said in error
    assert len(rest) == 1
    assert hint in rest[0]
    assert [path for path in sorted(material.rglob("*")) if "__pycache__" not in path.parts] == before


def test_a_name_that_would_break_a_line_stays_in_its_comment(influence: Command, material: Path) -> None:
    name = "model\nseed: 7.pt"
    (material / "model.pt").rename(material / name)
    influence("init", name, "data", "--model", "net:Net", cwd=material)
    config = load_config(material / "influence.yaml")
    assert config.seed == 0
    assert config.model.checkpoint == (material / name,)


def test_what_appears_before_it_is_written_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "influence.yaml"
    _write_new(path, "a: 1\n", KEPT)
    with pytest.raises(InfluenceError, match="exists already"):
        _write_new(path, "b: 1\n", KEPT)
    assert path.read_text() == "a: 1\n"
