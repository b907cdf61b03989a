"""The config: defaults, the file and line of every mistake, overrides, sizes, paths, and what is written back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from influence_cli.config.load import load_config
from influence_cli.config.schema import CheckpointConfig, Config
from influence_cli.errors import InfluenceError

MINIMAL = """\
model:
  factory: torchvision.models.resnet18
  checkpoint: runs/best.pt
train:
  dataset: torchvision.datasets.ImageFolder
  args: {root: data/train}
"""
# The tests below count these lines.
FULL = """\
model:
  factory: ./model.py:build
  args: {num_classes: 10}
  checkpoint: runs/best.pt
loss: cross_entropy
l2: 0.5
train:
  dataset: torchvision.datasets.ImageFolder
  args: {root: data/train}
  labels: labels.csv
  exclude: null
  n: 500
  transform:
    - ToImage
    - {ToDtype: {dtype: float32, scale: true}}
    - Normalize:
        mean: [0.5]
        std: [0.25]
test:
  dataset: torchvision.datasets.ImageFolder
  args: {root: data/test}
gradients:
  store: out/influence.h5
  layers: [fc, "layer4.*"]
  budget: 2GiB
  store_dtype: float16
  block: 64
curvature:
  method: explicit
  matrix: hessian
  damping: 1e-3
device: cuda:1
seed: 7
"""
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Write ``influence.yaml`` into an empty current folder and read it: ``load(text, "l2=0.1")``."""
    monkeypatch.chdir(tmp_path)

    def read(text: str, *overrides: str) -> Config:
        Path("influence.yaml").write_text(text, encoding="utf-8")
        return load_config(Path("influence.yaml"), overrides)

    return read


def mistake(load: Load, text: str, *overrides: str) -> InfluenceError:
    """Read a config that is wrong, and give the error."""
    with pytest.raises(InfluenceError) as caught:
        load(text, *overrides)
    assert "\n" not in caught.value.message
    return caught.value


def value(config: Config, dotted: str) -> Any:
    """Look up ``gradients.block``."""
    return reduce(getattr, dotted.split("."), config)


DEFAULTS = [
    ("model.args", {}),
    ("loss.factory", "cross_entropy"),
    ("loss.args", {}),
    ("l2", 0.0),
    ("train.labels", None),
    ("train.exclude", None),
    ("train.n", None),
    ("train.transform", None),
    ("test", None),
    ("gradients.layers", ("*",)),
    ("gradients.budget", 8_000_000_000),
    ("gradients.store_dtype", "float32"),
    ("gradients.block", 256),
    ("curvature.method", "auto"),
    ("curvature.matrix", "ggn"),
    ("curvature.damping", "auto"),
    ("training", None),
    ("device", "auto"),
    ("seed", 0),
]


@pytest.mark.parametrize(("key", "expected"), DEFAULTS)
def test_a_key_that_is_left_out_has_its_documented_default(load: Load, key: str, expected: object) -> None:
    assert value(load(MINIMAL), key) == expected


def test_the_store_lies_beside_the_config_by_default(load: Load, tmp_path: Path) -> None:
    assert load(MINIMAL).gradients.store == tmp_path / "influence.h5"
    assert load(MINIMAL + "gradients: {block: 8}\n").gradients.store == tmp_path / "influence.h5"
    assert load(MINIMAL + "gradients: {store: null}\n").gradients.store == tmp_path / "influence.h5"


def test_the_starter_file_reads_and_spells_out_the_defaults(load: Load) -> None:
    (starter,) = [entry for entry in files("influence_cli.commands").iterdir() if entry.name.endswith(".yaml")]
    config, minimal = load(starter.read_text(encoding="utf-8")), load(MINIMAL)
    for part in ("loss", "l2", "gradients", "curvature", "device", "seed"):
        assert value(config, part) == value(minimal, part)
    assert config.test is not None


def test_features_are_one_or_several_their_paths_beside_the_config(load: Load, tmp_path: Path) -> None:
    assert load(MINIMAL + "evidence: {features: null}\n").evidence.features == ()
    (one,) = load(MINIMAL + "evidence: {features: f/dino.npy}\n").evidence.features
    assert (one.title, one.file) == ("dino", tmp_path / "f" / "dino.npy")
    network = "{factory: ./net.py:build, args: {weight_path: ./w, name: a/b}, checkpoint: net.pt, transform: [ToImage]}"
    other = "{name: text, probabilities: ../p.npy}"
    checkpoint = "{name: key, factory: a.b, checkpoint: {file: n.pt, key: ema}, transform: {processor: folder}}"
    first, text, key = load(MINIMAL + f"evidence:\n  features: [{network}, {other}, {checkpoint}]\n").evidence.features
    assert (first.title, first.checkpoint, first.args["name"]) == ("build", tmp_path / "net.pt", "a/b")
    assert first.args["weight_path"] == str(tmp_path / "w")
    assert (text.title, text.probabilities) == ("text", tmp_path.parent / "p.npy")
    assert key.checkpoint is not None
    assert (key.checkpoint.file, key.checkpoint.key) == (tmp_path / "n.pt", "ema")  # type: ignore[union-attr]
    assert key.transform is not None
    assert key.transform[0].args == {"folder": str(tmp_path / "folder")}
    (alone,) = load(MINIMAL + f"evidence:\n  features: {network}\n").evidence.features
    assert alone == first


GIVEN = [
    ("model.factory", "./model.py:build"),
    ("model.args", {"num_classes": 10}),
    ("l2", 0.5),
    ("train.exclude", None),
    ("train.n", 500),
    ("gradients.layers", ("fc", "layer4.*")),
    ("gradients.budget", 2 * 1024**3),
    ("gradients.store_dtype", "float16"),
    ("gradients.block", 64),
    ("curvature.method", "explicit"),
    ("curvature.matrix", "hessian"),
    ("curvature.damping", 0.001),
    ("device", "cuda:1"),
    ("seed", 7),
]


@pytest.mark.parametrize(("key", "expected"), GIVEN)
def test_a_key_that_is_given_is_kept(load: Load, key: str, expected: object) -> None:
    found = value(load(FULL), key)
    assert found == expected
    assert type(found) is type(expected)


def test_a_step_of_a_transform_is_a_name_or_a_name_with_arguments(load: Load) -> None:
    steps = load(FULL).train.transform
    assert steps is not None
    assert [(step.name, step.args) for step in steps] == [
        ("ToImage", {}),
        ("ToDtype", {"dtype": "float32", "scale": True}),
        ("Normalize", {"mean": [0.5], "std": [0.25]}),
    ]
    (bare,) = load(MINIMAL + "  transform: [{ToImage: }]\n").train.transform or ()
    assert (bare.name, bare.args) == ("ToImage", {})


def test_test_takes_the_transform_of_train_unless_it_has_one(load: Load) -> None:
    config = load(FULL)
    assert config.test is not None
    assert config.test.transform == config.train.transform
    own = load(FULL.replace("{root: data/test}", "{root: data/test}\n  transform: [PILToTensor]")).test
    assert own is not None
    assert [step.name for step in own.transform or ()] == ["PILToTensor"]
    none = load(FULL.replace("{root: data/test}", "{root: data/test}\n  transform: []")).test
    assert none is not None
    assert none.transform == ()


def test_a_loss_is_a_name_or_a_factory_with_arguments(load: Load) -> None:
    config = load(MINIMAL + "loss: {factory: ./losses.py:mine, args: {alpha: 2}}\n")
    assert (config.loss.factory, config.loss.args) == ("./losses.py:mine", {"alpha": 2})
    assert load(MINIMAL + "loss: ./losses.py:mine\n").loss.factory == "./losses.py:mine"


def test_one_pattern_or_checkpoint_is_a_list_of_one(load: Load, tmp_path: Path) -> None:
    config = load(MINIMAL + 'gradients: {layers: "fc*"}\n')
    assert config.gradients.layers == ("fc*",)
    assert config.model.checkpoint == (tmp_path / "runs/best.pt",)
    several = load(MINIMAL.replace("runs/best.pt", "[a.pt, b.pt]")).model.checkpoint
    assert several == (tmp_path / "a.pt", tmp_path / "b.pt")


def test_a_checkpoint_may_say_which_weights_of_a_file_it_means(load: Load, tmp_path: Path) -> None:
    text = MINIMAL.replace("runs/best.pt", "{file: runs/last.pt, key: state_dict_ema, ignore: criterion.*}")
    (source,) = load(text).model.sources
    assert source == CheckpointConfig(file=tmp_path / "runs/last.pt", key="state_dict_ema", ignore=("criterion.*",))
    several = load(MINIMAL.replace("runs/best.pt", "[a.pt, {file: b.pt, strip: net.}]")).model
    assert several.count == 2
    assert [source.file.name for source in several.sources if source] == ["a.pt", "b.pt"]
    assert several.checkpoint[0] == tmp_path / "a.pt"
    json.dumps(load(text).resolved())


def test_an_override_adds_a_key_to_the_file_of_a_checkpoint(load: Load, tmp_path: Path) -> None:
    (source,) = load(MINIMAL, "model.checkpoint.key=teacher").model.sources
    assert source == CheckpointConfig(file=tmp_path / "runs/best.pt", key="teacher")
    config = load(MINIMAL.replace("runs/best.pt", "[a.pt, b.pt]"), "model.checkpoint.1.strip=student.")
    assert config.model.sources[1] == CheckpointConfig(file=tmp_path / "b.pt", strip="student.")
    (source,) = load(MINIMAL, "model.checkpoint={file: x.pt, key: ema}").model.sources
    assert source == CheckpointConfig(file=tmp_path / "x.pt", key="ema")


def test_a_config_without_a_checkpoint_has_one_model(load: Load) -> None:
    for text in (MINIMAL.replace("  checkpoint: runs/best.pt\n", ""), MINIMAL.replace("runs/best.pt", "null")):
        model = load(text).model
        assert (model.checkpoint, model.sources, model.count, model.times()) == ((), (None,), 1, [1.0])


def test_a_config_cannot_be_changed(load: Load) -> None:
    config = load(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.l2 = 1.0  # type: ignore[misc]


MISTAKES = [
    ("  factory: ./model.py:build\n", "", 1, "model.factory is missing"),
    ("factory: ./model.py:build", "factory: 3", 2, "model.factory is 3: expected a word"),
    ("factory: ./model.py:build", "factory:", 2, "model.factory is empty: expected a word"),
    ("args: {num_classes: 10}", "args: 10", 3, "model.args is 10: expected keys with values"),
    ("args: {num_classes: 10}", "args: [10]", 3, "model.args is [10]: expected keys with values"),
    ("checkpoint: runs/best.pt", "checkpoint: []", 4, "expected at least one"),
    ("checkpoint: runs/best.pt", "checkpoint: 5", 4, "model.checkpoint is 5: expected a list"),
    ("checkpoint: runs/best.pt", "checkpoint:\n    - a.pt\n    - 7", 6, "model.checkpoint.1 is 7: expected a path"),
    ("checkpoint: runs/best.pt", "checkpoint: {file: a.pt, kye: b}", 4, "unknown key 'kye' in 'model.checkpoint'"),
    ("checkpoint: runs/best.pt", "checkpoint: {key: ema}", 4, "model.checkpoint.file is missing"),
    ("checkpoint: runs/best.pt", "checkpoint: [{file: a.pt, key: 3}]", 4, "key is 3: expected a word"),
    ("loss: cross_entropy", "loss: {args: {}}", 5, "loss.factory is missing"),
    ("loss: cross_entropy", "loss: 3", 5, "loss is 3: expected"),
    ("l2: 0.5", "l2: lots", 6, "l2 is 'lots': expected a number"),
    ("l2: 0.5", "l2: -0.5", 6, "l2 is -0.5: expected a number ≥ 0"),
    ("l2: 0.5", "l2: true", 6, "l2 is True: expected a number"),
    ("l2: 0.5", "l2: '0.5'", 6, "l2 is '0.5': expected a number"),
    ("l2: 0.5", "l2: .inf", 6, ".inf is not a finite number"),
    ("l2: 0.5", "l2: [0.5", 7, "not valid YAML"),
    ("l2: 0.5", "seed: 7", 33, "duplicate key 'seed' (first on line 6)"),
    ("  dataset: torchvision.datasets.ImageFolder\n  args: {root: data/train}\n", "", 7, "train.dataset is missing"),
    ("labels: labels.csv", "labels: 5", 10, "train.labels is 5: expected a path"),
    ("labels: labels.csv", "labels: labels.csv\n  labels: x.csv", 11, "duplicate key 'labels' (first on line 10)"),
    ("exclude: null", "exclude: [1, 2]", 11, "train.exclude is"),
    ("n: 500", "n: 0", 12, "train.n is 0: expected a number ≥ 1"),
    ("n: 500", "n: 5.5", 12, "train.n is 5.5: expected a whole number"),
    ("n: 500", "n: many", 12, "train.n is 'many': expected a whole number"),
    ("    - ToImage\n", "    - 5\n", 14, "train.transform.0 is 5: expected"),
    ("    - ToImage\n", "    - {A: {}, B: {}}\n", 14, "expected a name, or one name with its arguments"),
    ("{ToDtype: {dtype: float32, scale: true}}", "{ToDtype: float32}", 15, "train.transform.1 is 'float32': expected"),
    ("test:\n", "test: 5\ntset:\n", 20, "unknown key 'tset'"),
    ("{root: data/test}", "{root: data/test}\n  n: 5", 22, "test.n has no meaning"),
    ("store: out/influence.h5", "store: 5", 23, "gradients.store is 5: expected a path"),
    ('layers: [fc, "layer4.*"]', "layers: []", 24, "expected at least one"),
    ('layers: [fc, "layer4.*"]', "layers: [fc, 3.5]", 24, "gradients.layers.1 is 3.5: expected a word"),
    ("budget: 2GiB", "budget: 2XB", 25, "gradients.budget is '2XB': expected a size such as 8GB, 500MB or 2GiB"),
    ("budget: 2GiB", "budget: 0", 25, "gradients.budget is 0: expected a number ≥ 1"),
    ("budget: 2GiB", "budget: 2.5", 25, "gradients.budget is 2.5: expected a whole number"),
    ("budget: 2GiB", "budget: true", 25, "gradients.budget is True: expected a whole number"),
    ("store_dtype: float16", "store_dtype: int4", 26, "gradients.store_dtype is 'int4': expected 'float32'"),
    ("block: 64", "block: 0", 27, "gradients.block is 0: expected a number ≥ 1"),
    ("block: 64", "block: 65537", 27, "gradients.block is 65537: expected a number ≤ 65536"),
    ("block: 64", "block: 64.0", 27, "gradients.block is 64.0: expected a whole number"),
    ("method: explicit", "method: exact", 29, "curvature.method is 'exact': expected 'auto'"),
    ("matrix: hessian", "matrix: fisher", 30, "curvature.matrix is 'fisher': expected 'ggn', 'hessian' or 'empirical'"),
    ("damping: 1e-3", "damping: -1", 31, "curvature.damping is -1: expected auto, training or a number ≥ 0"),
    ("damping: 1e-3", "damping: lots", 31, "curvature.damping is 'lots': expected auto, training or a number ≥ 0"),
    ("damping: 1e-3", "damping:", 31, "curvature.damping is None: expected auto, training or a number ≥ 0"),
    ("device: cuda:1", "device: gpu", 32, "device is 'gpu': expected auto, cpu, cuda, cuda:N or mps"),
    ("device: cuda:1", "device: 'cuda:'", 32, "device is 'cuda:': expected auto, cpu, cuda, cuda:N or mps"),
    ("seed: 7", "seed: -1", 33, "seed is -1: expected a number ≥ 0"),
    ("seed: 7", "seed: &s 7", 33, "anchors and aliases are not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "message"), MISTAKES)
def test_a_mistake_is_told_with_its_line(load: Load, old: str, new: str, line: int, message: str) -> None:
    assert old in FULL
    error = mistake(load, FULL.replace(old, new, 1))
    assert error.message.startswith(f"influence.yaml:{line}: ")
    assert message in error.message


@pytest.mark.parametrize("section", ["model", "train", "test", "gradients", "curvature"])
def test_a_section_without_keys_is_told_with_its_line(load: Load, section: str) -> None:
    lines = FULL.splitlines()
    start = lines.index(f"{section}:")
    end = next(i for i in range(start + 1, len(lines)) if not lines[i].startswith(" "))
    text = "\n".join([*lines[:start], f"{section}: [5]", *lines[end:]])
    error = mistake(load, text)
    assert error.message == f"influence.yaml:{start + 1}: {section} is [5]: expected a section with keys"


MODEL_ONLY = "model:\n  factory: a.b\n  checkpoint: m.pt\n"
TRAIN_ONLY = "l2: 0.1\ntrain:\n  dataset: a.b\n"


@pytest.mark.parametrize(("text", "missing"), [(MODEL_ONLY, "train"), (TRAIN_ONLY, "model")])
def test_a_section_that_is_missing_is_named(load: Load, text: str, missing: str) -> None:
    error = mistake(load, text)
    assert error.message == f"influence.yaml: {missing} is missing"
    assert "influence init" in error.hint


UNKNOWN = [
    (
        "l2: 0.5",
        "l3: 0.5",
        6,
        "'l3'",
        "did you mean 'l2'? known: curvature, device, evidence, gradients, l2, loss, model",
    ),
    (
        "  damping:",
        "  dampng:",
        31,
        "'dampng' in 'curvature'",
        "did you mean 'damping'? known: damping, matrix, max_iterations, method, tolerance",
    ),
    ("  checkpoint:", "  chekpoint:", 4, "'chekpoint' in 'model'", "did you mean 'checkpoint'?"),
    ("  exclude:", "  exlude:", 11, "'exlude' in 'train'", "did you mean 'exclude'?"),
    ("  block:", "  blocks:", 27, "'blocks' in 'gradients'", "did you mean 'block'?"),
    ("loss: cross_entropy", "loss: {factory: a.b, arg: {}}", 5, "'arg' in 'loss'", "did you mean 'args'?"),
    ("seed: 7", "path: x", 33, "'path'", "known: curvature, device, evidence, gradients"),
    ("seed: 7", "zzz: x", 33, "'zzz'", "known: curvature, device, evidence, gradients"),
]


@pytest.mark.parametrize(("old", "new", "line", "key", "hint"), UNKNOWN)
def test_an_unknown_key_gets_its_line_and_the_nearest_known_one(
    load: Load, old: str, new: str, line: int, key: str, hint: str
) -> None:
    assert old in FULL
    error = mistake(load, FULL.replace(old, new, 1))
    assert error.message == f"influence.yaml:{line}: unknown key {key}"
    assert hint in error.hint
    assert "path" not in error.hint


def test_of_several_mistakes_the_first_line_is_told(load: Load) -> None:
    text = FULL.replace("seed: 7", "seed: x").replace("n: 500", "n: x").replace("block: 64", "block: x")
    assert mistake(load, text).message.startswith("influence.yaml:12: train.n ")


def test_a_misspelt_key_is_told_before_the_missing_one_it_causes(load: Load) -> None:
    assert "unknown key 'dataet' in 'train'" in mistake(load, MINIMAL.replace("dataset:", "dataet:")).message


SIZES = [
    ("8GB", 8_000_000_000),
    ("500MB", 500_000_000),
    ("2GiB", 2_147_483_648),
    ("1TB", 1_000_000_000_000),
    ("3TiB", 3_298_534_883_328),
    ("64kB", 64_000),
    ("64KiB", 65_536),
    ("1.5gb", 1_500_000_000),
    ("10 MB", 10_000_000),
    ("77B", 77),
    ("4096", 4096),
    ("'4096'", 4096),
]


@pytest.mark.parametrize(("text", "expected"), SIZES)
def test_a_size_is_read_in_bytes(load: Load, text: str, expected: int) -> None:
    assert load(MINIMAL + f"gradients: {{budget: {text}}}\n").gradients.budget == expected
    assert load(MINIMAL, f"gradients.budget={text}").gradients.budget == expected


@pytest.mark.parametrize("text", ["GB", "-1GB", "1,5GB", "8GBs", "''", "0.2B", "1e3MB", "9" * 400 + "GB"])
def test_what_is_not_a_size_is_refused_with_its_line(load: Load, text: str) -> None:
    error = mistake(load, MINIMAL + f"gradients:\n  budget: {text}\n")
    assert error.message.startswith("influence.yaml:8: gradients.budget is ")
    assert "expected a" in error.message


@pytest.mark.parametrize(("text", "expected"), [("1e-3", 0.001), ("5E-4", 0.0005), ("0", 0.0), ("2", 2.0), (".5", 0.5)])
def test_numbers_are_numbers_whatever_their_notation(load: Load, text: str, expected: float) -> None:
    for config in (
        load(MINIMAL + f"l2: {text}\ncurvature: {{damping: {text}}}\n"),
        load(MINIMAL, f"l2={text}", f"curvature.damping={text}"),
    ):
        assert config.l2 == expected
        assert isinstance(config.l2, float)
        assert config.curvature.damping == expected


# Paths


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder for a config that is not the current one; the current one is beside it, named ``here``."""
    (tmp_path / "here").mkdir()
    for folder in ("project/data/train", "data/test", "project/data/test", "here/data", "here/d"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "project"


def read_from(folder: Path, text: str, *overrides: str) -> Config:
    (folder / "influence.yaml").write_text(text)
    return load_config(Path("..") / folder.name / "influence.yaml", overrides)


def test_paths_of_the_file_are_relative_to_its_folder(elsewhere: Path) -> None:
    config = read_from(elsewhere, FULL.replace("data/test", "../data/test"))
    assert config.folder.resolve() == elsewhere
    assert [path.resolve() for path in config.model.checkpoint] == [elsewhere / "runs/best.pt"]
    assert config.train.labels == elsewhere / "labels.csv"
    assert config.gradients.store == elsewhere / "out/influence.h5"
    assert config.train.args == {"root": str(elsewhere / "data/train")}
    assert config.test is not None
    assert config.test.args == {"root": str(elsewhere.parent / "data/test")}
    assert config.path.is_absolute()


def test_paths_of_a_section_are_anchored_where_another_section_is_missing(elsewhere: Path) -> None:
    config = read_from(elsewhere, MINIMAL + "  exclude: out.npy\ngradients: {store: mine.h5}\n")
    assert config.train.exclude == elsewhere / "out.npy"
    assert config.gradients.store == elsewhere / "mine.h5"


def test_paths_of_overrides_are_relative_to_the_current_folder(elsewhere: Path) -> None:
    here = elsewhere.parent / "here"
    config = read_from(
        elsewhere,
        FULL,
        "train.args.root=data",
        "train.labels=l.npy",
        "train.exclude=../e.npy",
        "gradients.store=mine.h5",
        "model.checkpoint=m.pt",
    )
    assert config.train.args == {"root": str(here / "data")}
    assert (config.train.labels, config.train.exclude) == (here / "l.npy", here.parent / "e.npy")
    assert config.gradients.store == here / "mine.h5"
    assert config.model.checkpoint == (here / "m.pt",)
    assert config.test is not None
    assert config.test.args == {"root": str(elsewhere / "data/test")}


def test_a_path_inside_a_list_of_an_override_is_relative_to_the_current_folder(elsewhere: Path) -> None:
    here = elsewhere.parent / "here"
    config = read_from(elsewhere, FULL, "model.checkpoint=[a.pt, b.pt]")
    assert config.model.checkpoint == (here / "a.pt", here / "b.pt")
    config = read_from(elsewhere, MINIMAL.replace("runs/best.pt", "[a.pt, b.pt]"), "model.checkpoint.1=c.pt")
    assert config.model.checkpoint == (elsewhere / "a.pt", here / "c.pt")


MAPPINGS = [
    ("train.args={root: d}", "train.args", {"root": "d"}),
    ("train={dataset: a.b, args: {root: d}}", "train.args", {"root": "d"}),
    ("train={dataset: a.b, labels: l.npy}", "train.labels", "l.npy"),
    ("model={factory: a.b, checkpoint: [m.pt]}", "model.checkpoint", ["m.pt"]),
    ("gradients={store: s.h5}", "gradients.store", "s.h5"),
]


@pytest.mark.parametrize(("text", "key", "expected"), MAPPINGS)
def test_a_path_inside_a_mapping_of_an_override_is_relative_to_the_current_folder(
    elsewhere: Path, text: str, key: str, expected: Any
) -> None:
    def absolute(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: absolute(inner) for name, inner in part.items()}
        return [absolute(inner) for inner in part] if isinstance(part, list) else str(elsewhere.parent / "here" / part)

    parts = read_from(elsewhere, MINIMAL, text).resolved()
    for name in key.split("."):
        parts = parts[name]
    assert parts == absolute(expected)


def test_replacing_the_gradients_section_keeps_the_store_beside_the_config(elsewhere: Path) -> None:
    store = read_from(elsewhere, MINIMAL, "gradients={block: 8}").gradients.store
    assert store.is_absolute()
    assert store.resolve() == elsewhere / "influence.h5"


@pytest.mark.parametrize("name", ["root", "data_dir", "img_folder", "path", "annotation_file", "filename", "ROOT"])
def test_an_argument_named_like_a_path_is_one(load: Load, tmp_path: Path, name: str) -> None:
    (tmp_path / "data/train").mkdir(parents=True)
    assert load(MINIMAL.replace("root:", f"{name}:")).train.args == {name: str(tmp_path / "data/train")}


HUB = ["google/vit-base", "s3://bucket/x", "https://a.b/c-{0..9}.tar", "not/there/yet", "imagenet"]


@pytest.mark.parametrize("name", HUB)
def test_a_name_that_is_no_path_arrives_as_it_is_written(load: Load, tmp_path: Path, name: str) -> None:
    text = MINIMAL.replace("root: data/train", f"root: '{name}', files: ['{name}', ./x, '*.png', '/y']")
    written = {"root": name, "files": [name, str(tmp_path / "x"), str(tmp_path / "*.png"), "/y"]}
    assert load(text).train.args == written
    assert load(MINIMAL, f"train.args={{root: '{name}'}}").train.args == {"root": name}
    args = load(MINIMAL, f"model.args.pretrained_model_name_or_path={name}").model.args
    assert args == {"pretrained_model_name_or_path": name}


def test_an_override_that_names_something_beside_the_config_is_still_from_the_current_folder(elsewhere: Path) -> None:
    config = read_from(elsewhere, MINIMAL, "train.args.root=data/train")  # not in the current folder
    assert config.train.args == {"root": str(elsewhere.parent / "here/data/train")}


def section(text: str) -> str:
    """Give a config with another training section."""
    return MINIMAL.replace("dataset: torchvision.datasets.ImageFolder\n  args: {root: data/train}", text)


def test_a_set_of_the_hub_is_a_name_unless_there_is_such_a_folder(elsewhere: Path) -> None:
    for name, expected in (
        ("owner/name", "owner/name"),
        ("data/train", str(elsewhere / "data/train")),
        ("./new", str(elsewhere / "new")),
    ):
        assert read_from(elsewhere, section(f"huggingface: {name}")).train.huggingface == expected


def test_a_table_and_its_root_and_a_folder_are_paths(elsewhere: Path) -> None:
    text = section("csv: l.csv\n  root: photos\n  label: breed\n  split: train")
    config = read_from(elsewhere, text + "test: {folder: t}\n")
    assert (config.train.csv, config.train.root) == (elsewhere / "l.csv", elsewhere / "photos")
    assert (config.train.label, config.train.split, config.train.kind) == ("breed", "train", "csv")
    assert config.test is not None
    assert (config.test.folder, config.test.kind) == (elsewhere / "t", "folder")


DATA = [
    ("csv: a.csv\n  folder: b", 6, "train has both csv and folder", "keep the one that is meant"),
    ("csv: a.csv\n  args: {x: 1}", 6, "train.args has no meaning with train.csv", "csv goes with image, label, root"),
    ("folder: a\n  label: x", 6, "train.label has no meaning with train.folder", "folder takes none of args, image"),
    ("dataset: a.b\n  root: x", 6, "train.root has no meaning with train.dataset", "dataset goes with args, image"),
    ("n: 4", 4, "train.dataset is missing", "or name the data by folder:"),
    ("csb: a.csv", 5, "unknown key 'csb' in 'train'", "did you mean 'csv'?"),
]


@pytest.mark.parametrize(("keys", "line", "message", "hint"), DATA)
def test_a_section_names_its_data_once_and_with_keys_of_its_kind(
    load: Load, keys: str, line: int, message: str, hint: str
) -> None:
    error = mistake(load, section(keys))
    assert error.message == f"influence.yaml:{line}: {message}"
    assert error.hint.startswith(hint)


@pytest.mark.parametrize("name", ["split", "profile", "pathological", "rooted", "classes"])
def test_an_argument_named_otherwise_is_left_alone(load: Load, name: str) -> None:
    assert load(MINIMAL.replace("root:", f"{name}:")).train.args == {name: "data/train"}


def test_lists_of_paths_and_absolute_paths_are_understood(load: Load, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    text = MINIMAL.replace("{root: data/train}", "{roots: [a, /b/c], root: 3, dir: null}")
    assert load(text).train.args == {"roots": [str(tmp_path / "a"), "/b/c"], "root": 3, "dir": None}


def test_a_tilde_is_the_home_folder(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config = load(MINIMAL.replace("runs/best.pt", "~/best.pt"), "train.args.root=~/data")
    assert config.model.checkpoint == (tmp_path / "home/best.pt",)
    assert config.train.args == {"root": str(tmp_path / "home/data")}


def test_the_home_of_somebody_who_does_not_exist_is_a_file_name(load: Load, tmp_path: Path) -> None:
    # As in a shell.
    found = load(MINIMAL.replace("runs/best.pt", "~no-such-user/best.pt")).model.checkpoint
    assert found == (tmp_path / "~no-such-user/best.pt",)


# Overrides


OVERRIDES = [
    ("l2=0.25", "l2", 0.25),
    ("curvature.damping=1e-3", "curvature.damping", 0.001),
    ("curvature.method=cg", "curvature.method", "cg"),
    ("device=cuda:0", "device", "cuda:0"),
    ("gradients.budget=1GB", "gradients.budget", 1_000_000_000),
    ("gradients.layers=fc", "gradients.layers", ("fc",)),
    ("gradients.layers=[fc, layer4]", "gradients.layers", ("fc", "layer4")),
    ("gradients.layers=[a, b, c]", "gradients.layers", ("a", "b", "c")),
    ("train.n=null", "train.n", None),
    ("train.n=", "train.n", None),
    ("model.args={num_classes: 3}", "model.args", {"num_classes": 3}),
    ("model.args.depth=4", "model.args", {"num_classes": 10, "depth": 4}),
    ("model.args.filter=a=b", "model.args", {"num_classes": 10, "filter": "a=b"}),
    ("model.args.word=no", "model.args", {"num_classes": 10, "word": "no"}),
    ("model.args.word='1'", "model.args", {"num_classes": 10, "word": "1"}),
    ("model.args.flag=true", "model.args", {"num_classes": 10, "flag": True}),
    ("model.args.deep.er=1", "model.args", {"num_classes": 10, "deep": {"er": 1}}),
]


@pytest.mark.parametrize(("text", "key", "expected"), OVERRIDES)
def test_an_override_replaces_a_value(load: Load, text: str, key: str, expected: object) -> None:
    assert value(load(FULL, text), key) == expected


def test_an_override_reaches_into_lists_and_the_last_one_wins(load: Load) -> None:
    config = load(
        FULL, "train.transform.2.Normalize.mean.0=0.75", "gradients.layers.1=head", "l2=1", "l2=2", "train.labels=null"
    )
    assert config.train.transform is not None
    assert config.train.transform[2].args == {"mean": [0.75], "std": [0.25]}
    assert config.gradients.layers == ("fc", "head")
    assert config.l2 == 2.0
    assert config.train.labels is None


def test_an_override_makes_the_section_it_needs(load: Load) -> None:
    config = load(MINIMAL, "curvature.matrix=hessian", "test.dataset=a.b", "test.args.root=x")
    assert config.curvature.matrix == "hessian"
    assert config.test is not None
    assert config.test.dataset == "a.b"


WRONG_OVERRIDES = [
    ("l2", "--set l2: expected KEY=VALUE"),
    ("=3", "--set =3: expected KEY=VALUE"),
    (".l2=3", "--set .l2=3: expected KEY=VALUE"),
    ("l2.=3", "--set l2.=3: expected KEY=VALUE"),
    ("l2=lots", "--set l2=lots: l2 is 'lots': expected a number"),
    ("l2=", "--set l2=: l2 is empty: expected a number"),
    ("l2=1e999", "1e999 is not a finite number"),
    ("l2.x=3", "--set l2.x=3: l2 holds a value, not keys"),
    ("l3=3", "--set l3=3: unknown key 'l3'"),
    ("path=x", "--set path=x: unknown key 'path'"),
    ("curvature.dampng=3", "--set curvature.dampng=3: unknown key 'dampng' in 'curvature'"),
    ("device=gpu", "--set device=gpu: device is 'gpu'"),
    ("gradients.layers.2=x", "--set gradients.layers.2=x: gradients.layers is a list of 2"),
    ("gradients.layers.x=x", "--set gradients.layers.x=x: gradients.layers is a list of 2"),
    ("gradients.layers.-1=x", "--set gradients.layers.-1=x: gradients.layers is a list of 2"),
    ("gradients.layers.²=x", "--set gradients.layers.²=x: gradients.layers is a list of 2"),
    ("train.transform.0.Resize.size=3", "train.transform.0 holds a value, not keys"),
    ("l2=[1", "not valid YAML"),
    ("l2='1", "not valid YAML"),
    ("l2=&a 1", "anchors and aliases are not supported"),
    ("l2=!!float 1", "is not supported"),
    ("model.args={a: 1, a: 2}", "duplicate key 'a'"),
    ("test.n=5", "--set test.n=5: test.n has no meaning"),
]


@pytest.mark.parametrize(("text", "message"), WRONG_OVERRIDES)
def test_a_mistake_in_an_override_names_the_override(load: Load, text: str, message: str) -> None:
    error = mistake(load, FULL, text)
    assert error.message.startswith(f"--set {text}:")
    assert message in error.message


def test_an_unknown_override_gets_the_nearest_known_key(load: Load) -> None:
    assert "did you mean 'damping'?" in mistake(load, FULL, "curvature.dampng=3").hint


# Where, and what is written back


WHERE = [
    ((), "influence.yaml"),
    (("model",), "influence.yaml:1"),
    (("model", "checkpoint"), "influence.yaml:4"),
    (("model", "checkpoint", 0), "influence.yaml:4"),
    (("model", "args", "num_classes"), "influence.yaml:3"),
    (("model", "args", "missing"), "influence.yaml:3"),
    (("train", "transform", 1), "influence.yaml:15"),
    (("train", "transform", 2), "influence.yaml:16"),
    (("test", "labels"), "influence.yaml:19"),
    (("gradients", "layers", 1), "influence.yaml:24"),
    (("curvature", "damping"), "influence.yaml:31"),
    (("seed",), "influence.yaml:33"),
    (("nothing",), "influence.yaml"),
]


@pytest.mark.parametrize(("keys", "expected"), WHERE)
def test_where_names_the_line_of_a_key_or_of_the_nearest_section(
    load: Load, keys: tuple[str | int, ...], expected: str
) -> None:
    assert load(FULL).where(*keys) == expected


def test_where_names_the_override_that_set_a_key(load: Load) -> None:
    config = load(FULL, "train.args={root: x, extra: 1}", "l2=3", "curvature.method=cg")
    assert config.where("l2") == "--set l2=3"
    assert config.where("train", "args", "root") == "--set train.args={root: x, extra: 1}"
    assert config.where("curvature", "method") == "--set curvature.method=cg"
    assert config.where("curvature", "matrix") == "influence.yaml:30"
    assert config.where("train", "labels") == "influence.yaml:10"


def test_where_names_a_file_in_another_folder_as_seen_from_here(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_from(elsewhere, FULL).where("l2") == f"{Path('..', 'project', 'influence.yaml')}:6"
    monkeypatch.chdir(elsewhere.parent)
    assert load_config(elsewhere / "influence.yaml").where("l2") == f"{Path('project', 'influence.yaml')}:6"


def test_the_resolved_config_is_plain_json_with_every_default(load: Load, tmp_path: Path) -> None:
    for config in (load(MINIMAL), load(FULL, "curvature.damping=auto")):
        resolved = config.resolved()
        assert json.loads(json.dumps(resolved)) == resolved
        assert resolved["curvature"]["damping"] == "auto"
        assert resolved["loss"] == {"factory": "cross_entropy", "args": {}}
        assert resolved["path"] == str(tmp_path / "influence.yaml")
    assert resolved["model"]["checkpoint"] == [str(tmp_path / "runs/best.pt")]
    assert resolved["train"]["transform"][0] == {"name": "ToImage", "args": {}}
    assert resolved["test"]["transform"] == resolved["train"]["transform"]
    assert resolved["gradients"]["budget"] == 2_147_483_648


# Files that are no config


def test_a_file_that_is_not_there_names_the_ways_to_one(load: Load) -> None:
    with pytest.raises(InfluenceError, match=r"there is no config nothing\.yaml") as caught:
        load_config(Path("nothing.yaml"))
    assert "influence init" in caught.value.hint


CONTENT = [
    (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a text file in UTF-8"),
    (b"l2: 0\n" + b"# " + b"x" * 1_000_001, "1,000,009 bytes or more; a config is a few kB"),
    (b"", "the file is empty"),
    (b"# nothing but a comment\n", "the file is empty"),
    (b"- a\n- b\n", "influence.yaml:1: expected a mapping of keys"),
    (b"hello", "influence.yaml:1: expected a mapping of keys"),
    (b"l2: 1\n\x00", "not valid YAML"),
]


@pytest.mark.parametrize(("content", "message"), CONTENT)
def test_a_file_that_is_no_config_is_told_so(load: Load, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "influence.yaml").write_bytes(content)
    with pytest.raises(InfluenceError) as caught:
        load_config(Path("influence.yaml"))
    assert message in caught.value.message
    assert caught.value.message.startswith("influence.yaml:")


def test_a_folder_is_no_config(load: Load, tmp_path: Path) -> None:
    with pytest.raises(InfluenceError, match="cannot be read: IsADirectoryError"):
        load_config(tmp_path)


def test_a_byte_order_mark_and_windows_line_ends_are_read(load: Load, tmp_path: Path) -> None:
    (tmp_path / "influence.yaml").write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
    config = load_config(Path("influence.yaml"))
    assert config.where("seed") == "influence.yaml:33"
    assert config.model.factory == "./model.py:build"


def test_reading_a_config_leaves_torch_out(tmp_path: Path) -> None:
    (tmp_path / "influence.yaml").write_text(FULL)
    code = (
        "import sys; from pathlib import Path; from influence_cli.config.load import load_config; "
        "print(load_config(Path('influence.yaml')).seed, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["7", "False", "False"]


def test_the_training_function_is_a_section_of_its_own(load: Load) -> None:
    found = load(MINIMAL + "training: {factory: './model.py:train', args: {epochs: 3}}\n").training
    assert found is not None
    assert (found.factory, found.args) == ("./model.py:train", {"epochs": 3})
    assert load(MINIMAL, "training.factory=a.b").training is not None
    wrong = mistake(load, MINIMAL + "training:\n  factory: a.b\n  arg: {}\n")
    assert "unknown key 'arg' in 'training'" in wrong.message
    assert "did you mean 'args'" in wrong.hint
    assert "training.factory is missing" in mistake(load, MINIMAL + "training: {args: {}}\n").message


def test_an_argument_is_a_path_by_its_name_and_not_because_a_folder_is_called_so(load: Load, tmp_path: Path) -> None:
    """A folder ``train`` beside the config leaves ``split: train`` a word, and what is not there stays a name."""
    (tmp_path / "train").mkdir()
    config = load(
        "model: {factory: m.build, checkpoint: m.pt}\n"
        "train: {dataset: m.make, args: {split: train, root: train, names: [train], cache_dir: nowhere}}\n"
    )
    expected = {"split": "train", "root": str(tmp_path / "train"), "names": ["train"], "cache_dir": "nowhere"}
    assert config.train.args == expected
