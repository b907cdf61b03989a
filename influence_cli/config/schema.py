"""The typed values of a config, section by section: defaults, types, units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, PrivateAttr, Tag

from influence_cli.config.yaml_reader import Keys

UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}

# The keys that can name a data set, and those that go with each of them.
DATA_KEYS = {
    "dataset": ("args", "image", "label", "split"),
    "csv": ("image", "label", "root", "split"),
    "folder": (),
    "huggingface": ("args", "image", "label", "split"),
}


def _bytes(value: Any) -> Any:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in UNITS:
            raise ValueError("expected a size such as 8GB, 500MB or 2GiB")
        return int(float(match[1]) * UNITS[match[2].upper()])
    return value


def _path(value: Any) -> Any:
    if value == "":
        raise ValueError("expected a path")  # else it would be the current folder
    return Path(value) if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """Take one value or several; null is none."""
    return tuple(value) if isinstance(value, list | tuple) else () if value is None else (value,)


def _checkpoints(value: Any) -> Any:
    if value == []:
        raise ValueError("expected at least one")
    return _listed(value) if value is None or isinstance(value, str | list | dict | CheckpointConfig) else value


def _layers(value: Any) -> Any:
    """Take one pattern or several; the modules of a Sequential have numbers for names."""
    items = value if isinstance(value, list) else [value]
    return tuple(str(item) if type(item) is int else item for item in items)


def _features(value: Any) -> Any:
    """Take one mapping or several; a word is the file of one."""
    return tuple({"file": item} if isinstance(item, str) else item for item in _listed(value))


def _step(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and isinstance(value.get("factory"), str) and set(value) <= {"factory", "args"}:
        args = value.get("args")
        return {"name": value["factory"], "args": {} if args is None else args}
    if isinstance(value, dict) and set(value) == {"processor"}:
        if not isinstance(value["processor"], str) or not value["processor"]:
            raise ValueError("expected the folder of an image processor: {processor: runs/checkpoint-500}")
        return {"name": "processor", "args": {"folder": value["processor"]}}
    if isinstance(value, dict) and len(value) == 1:
        ((name, args),) = value.items()
        return {"name": name, "args": {} if args is None else args}
    if isinstance(value, dict):
        raise ValueError(
            "expected a name, or one name with its arguments: {Normalize: {mean: [0.5], std: [0.25]}}, "
            "{factory: ./file.py:make, args: {…}} or {processor: FOLDER}"
        )
    return value


def _classes(value: Any) -> Any:
    """Take names with outputs, a list of names, or a file."""
    if value is None or isinstance(value, dict | list | Path):
        return value
    if isinstance(value, str) and value:
        return Path(value)
    raise ValueError("expected names with outputs {cat: 0, dog: 1}, a list of names, or a file")


def _steps(value: Any) -> Any:
    """Take a list of steps, or one step."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str | dict):
        return (value,)
    if value is None:
        return None
    raise ValueError("expected a list of steps, a name such as ./file.py:evaluation, or {processor: FOLDER}")


def _is_mapping(value: Any) -> str:
    return "mapping" if isinstance(value, dict) else "number"


def _loss(value: Any) -> Any:
    return {"factory": value} if isinstance(value, str) else value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


# Strict mode does not accept a string as a Path, and YAML has only strings.
_Path = Annotated[Path, BeforeValidator(_path)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# λ₂ of all parameters, or by pattern of their names; the first match counts.
_Penalty = Annotated[
    Annotated[_NotNegative, Tag("number")] | Annotated[dict[str, _NotNegative], Field(min_length=1), Tag("mapping")],
    Discriminator(_is_mapping),
]
_Share = Annotated[float, Field(ge=0, lt=1)]
_Numbers = Annotated[tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], BeforeValidator(_listed)]


class TransformStep(_Section):
    """One step of a transform and its arguments.

    ``name`` is a class of torchvision.transforms.v2, a dotted name or an object of a file, or ``processor`` for the
    image processor in the folder ``args["folder"]``.
    """

    name: str
    args: dict[str, Any] = {}


_Transform = Annotated[tuple[Annotated[TransformStep, BeforeValidator(_step)], ...], BeforeValidator(_steps)]


class CheckpointConfig(_Section):
    """Which weights of a file are the model's, where that has to be said.

    ``key`` is where they lie in the file, such as ``state_dict_ema``. Names keep what they are without the prefix
    ``strip`` and with the prefix ``add``; entries that match the globs of ``ignore`` are left out.
    """

    file: _Path
    key: str | None = None
    strip: str | None = None
    add: str | None = None
    ignore: Annotated[tuple[str, ...], BeforeValidator(_listed)] = ()


_Checkpoint = Annotated[
    Annotated[_Path, Tag("path")] | Annotated[CheckpointConfig, Tag("mapping")],
    Discriminator(lambda value: "mapping" if isinstance(value, dict | CheckpointConfig) else "path"),
]


class ModelConfig(_Section):
    """The model: what makes it, its weights, and what several checkpoints are to each other (influence/ensemble.py).

    ``learning_rates`` and ``steps`` describe one run: η of each checkpoint, and the optimiser's steps since the
    checkpoint before it (of the first: since the start). A single number is that of every checkpoint. Without a
    checkpoint the factory returns the trained model.
    """

    factory: str
    args: dict[str, Any] = {}
    checkpoint: Annotated[tuple[_Checkpoint, ...], BeforeValidator(_checkpoints)] = ()
    output: int | str | None = None
    ensemble: Literal["mean", "tracin", "source"] = "mean"
    learning_rates: _Numbers = ()
    steps: _Numbers = ()
    segments: int | None = Field(default=None, ge=1)

    @property
    def sources(self) -> tuple[CheckpointConfig | None, ...]:
        """Give every checkpoint; None where the config has none and the factory returns the trained model."""
        given = tuple(
            item if isinstance(item, CheckpointConfig) else CheckpointConfig(file=item) for item in self.checkpoint
        )
        return given or (None,)

    @property
    def count(self) -> int:
        """Count the models: one per checkpoint, and one without any."""
        return len(self.sources)

    @property
    def is_one_run(self) -> bool:
        """Say whether the checkpoints are from one run, in order of training; the last one is then explained."""
        return self.ensemble != "mean"

    def times(self) -> list[float]:
        """Give η · steps of each checkpoint: the training time that it represents; only η without steps."""
        count = self.count
        rates, steps = (
            numbers * count if len(numbers) == 1 else numbers
            for numbers in (self.learning_rates or (1.0,), self.steps or (1.0,))
        )
        return [rate * number for rate, number in zip(rates, steps, strict=True)]


class LossConfig(_Section):
    """The loss of one example."""

    factory: str
    args: dict[str, Any] = {}


class RecipeConfig(_Section):
    """A training that `influence train` runs, step by step (replay/recipe.py).

    ``lr`` is the largest η of the schedule; ``warmup`` is in epochs; ``eps_root`` stands under Adam's root, so that it
    has a derivative at 0; ``augment`` are steps on the input as ``train.transform`` gives it. The loss is the mean of
    the config's over a batch; ``weight_decay`` takes the place of ``l2``.
    """

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = Field(gt=0, allow_inf_nan=False)
    momentum: float | None = Field(default=None, ge=0, lt=1)
    nesterov: bool = False
    betas: Annotated[tuple[_Share, _Share], BeforeValidator(_listed)] | None = None
    eps: float = Field(default=1e-8, ge=0, allow_inf_nan=False)
    eps_root: float = Field(default=1e-10, ge=0, allow_inf_nan=False)
    weight_decay: _NotNegative = 0.0
    schedule: Literal["constant", "cosine", "step", "one-cycle"] = "constant"
    warmup: _NotNegative = 0.0
    batch: int = Field(ge=1)
    epochs: int = Field(ge=1)
    clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augment: Annotated[
        tuple[Annotated[TransformStep, BeforeValidator(_step)], ...], BeforeValidator(lambda value: _steps(value) or ())
    ] = ()
    precision: Literal["float32", "float64"] = "float32"
    seed: int = Field(default=0, ge=0, le=2**63 - 1)


class TrainingConfig(_Section):
    """How the checkpoint was trained: a recipe, which `influence train` runs, the record of a loop, or a function.

    ``record`` is the folder that `influence_cli.Recorder` wrote in a training loop. ``factory`` names a function
    ``train(model, data, *, l2, seed, progress)`` that returns the trained model: ``model`` a fresh one (or, to leave
    single examples out, the checkpoint) on its device; ``data`` a sequence of (input, label), the input as the
    transform gives it; ``l2`` the λ₂ of λ₂/2·‖θ‖² in the mean objective; ``seed`` of all that is random in it;
    ``progress`` takes (done, all), as often as it likes. ``args`` are further keywords.
    """

    factory: str = ""
    args: dict[str, Any] = {}
    recipe: RecipeConfig | None = None
    record: _Path | None = None


class DataConfig(_Section):
    """A data set, and what is changed about it.

    One of ``dataset``, ``csv``, ``folder`` and ``huggingface`` names it; ``args`` are those of ``dataset``, or of the
    ``datasets`` library. ``image`` and ``label`` name columns, ``split`` the examples in use, and ``root`` is the
    folder that the paths of a list are in. ``weights``, a column of the list or a file, says how often each training
    example counts.
    """

    dataset: str = ""
    csv: _Path | None = None
    folder: _Path | None = None
    huggingface: str = ""
    image: str | None = None
    label: str | None = None
    root: _Path | None = None
    split: str | None = None
    args: dict[str, Any] = {}
    labels: _Path | None = None
    exclude: _Path | None = None
    weights: str | None = Field(default=None, min_length=1)
    n: int | None = Field(default=None, ge=1)
    classes: Annotated[Any, BeforeValidator(_classes)] = None
    transform: _Transform | None = None

    @property
    def kind(self) -> str:
        """Say which key names the data set."""
        return next((key for key in DATA_KEYS if getattr(self, key)), "dataset")


class GradientsConfig(_Section):
    """The store and what goes into it."""

    store: _Path = Path("influence.h5")
    layers: Annotated[tuple[str, ...], BeforeValidator(_layers)] = Field(default=("*",), min_length=1)
    budget: Annotated[int, BeforeValidator(_bytes)] = Field(default=8_000_000_000, ge=1)
    store_dtype: Literal["float32", "float16", "int8"] = "float32"
    block: int = Field(default=256, ge=1, le=65536)


class CurvatureConfig(_Section):
    """Which curvature, the damping λ, and when a solver stops."""

    method: Literal[
        "auto",
        "explicit",
        "ekfac",
        "kfac",
        "arnoldi",
        "fisher",
        "identity",
        "cg",
        "nystrom",
        "lissa",
        "neumann",
        "replay",
    ] = "auto"
    matrix: Literal["ggn", "hessian", "empirical"] = "ggn"
    damping: Literal["auto", "training"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = "auto"
    tolerance: float | None = Field(default=None, gt=0, lt=1)
    max_iterations: int | None = Field(default=None, ge=1)


class FeaturesConfig(_Section):
    """What another network gives about every example, or a file that has it already (docs/features.md).

    ``factory`` with ``args`` and ``checkpoint`` makes the network, and ``transform`` its input of an image. ``file``
    has a row of features per training example, ``probabilities`` one of class probabilities.
    """

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]{1,40}$")
    factory: str = ""
    args: dict[str, Any] = {}
    checkpoint: _Checkpoint | None = None
    transform: _Transform | None = None
    file: _Path | None = None
    probabilities: _Path | None = None

    @property
    def title(self) -> str:
        """Give the name; without one that of the factory or of the file."""
        file = self.file or self.probabilities
        word = file.stem if file is not None else self.factory.replace(":", ".").rpartition(".")[2]
        return self.name or re.sub(r"[^A-Za-z0-9_.-]", "-", word)


class EvidenceConfig(_Section):
    """What is heard about the labels besides the model."""

    features: Annotated[tuple[FeaturesConfig, ...], BeforeValidator(_features)] = ()


class Config(_Section):
    """A whole run, every path absolute."""

    path: Path
    model: ModelConfig
    loss: Annotated[LossConfig, BeforeValidator(_loss)] = LossConfig(factory="cross_entropy")
    l2: _Penalty = 0.0
    train: DataConfig
    test: DataConfig | None = None
    gradients: GradientsConfig = GradientsConfig()
    curvature: CurvatureConfig = CurvatureConfig()
    training: TrainingConfig | None = None
    evidence: EvidenceConfig = EvidenceConfig()
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    _places: dict[Keys, str] = PrivateAttr(default_factory=dict)

    def where(self, *keys: str | int) -> str:
        """Say where a key was set: ``influence.yaml:12``; otherwise where the nearest section was."""
        return place_of(keys, {(): self.path.name, **self._places})

    @property
    def has_unit(self) -> bool:
        """Say whether influence is in the loss's unit: gradient similarity is not, unless steps give it one."""
        return self.curvature.method != "identity" or (self.model.ensemble == "tracin" and bool(self.model.steps))

    @property
    def folder(self) -> Path:
        """Give the folder of the YAML file."""
        return self.path.parent

    def resolved(self) -> dict[str, Any]:
        """Give the whole config, defaults included, as plain JSON-able values."""
        return self.model_dump(mode="json")


def place_of(keys: Keys, places: Mapping[Keys, str]) -> str:
    """Say where a key stands; otherwise where the nearest section does."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in places:
            return places[keys[:length]]
    return places[()]
