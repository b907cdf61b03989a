"""Retrain by the user's training function, which the config names: on half of the examples, or without one.

The randomness of a training depends only on its seed, and the seed on the config's seed, the subset and the repeat: a
retraining is the same in any process at any time.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.config.schema import Config
from influence_cli.config.source_code import object_hash
from influence_cli.config.user_code import bind, import_object
from influence_cli.data.batches import Batch, fits_memory, labelled_inputs, readable_batches
from influence_cli.data.split import Split, raw_item, to_input
from influence_cli.errors import InfluenceError, describe
from influence_cli.influence.measure import MARGIN
from influence_cli.model.fingerprint import DATA_MEANING
from influence_cli.model.guard import add_guard, settle_as, take_guard
from influence_cli.model.heads import add_head, take_head
from influence_cli.model.losses import negative_margin
from influence_cli.model.outputs import logits_of
from influence_cli.model.task import Task, build_model
from influence_cli.runtime.fence import fenced
from influence_cli.runtime.jobs import Arrays, Job
from influence_cli.runtime.seeds import seed_all

FORM = "train(model, data, *, l2, seed, progress)"
# Keywords that verify gives; the config gives the others.
OURS = ("l2", "seed", "progress")
# The purposes of seeds, so that different purposes never share one.
HALVES, ON_HALVES, WITHOUT, CHOSEN, KEPT, FROM_START, DROPPED, REPEATED = 1, 2, 3, 4, 5, 6, 7, 8
BATCH = 256

# The first claim number of each repeat is a multiple of this.
REPEAT = 2**32
MEANING = {
    **DATA_MEANING,
    "training": "the training function (its file or its arguments)",
    "model": "the model (its factory's file or its arguments)",
    "loss": "the loss (its file or its arguments)",
    "torch": "the version of torch",
    "l2": "l2",
    "seed": "the seed",
    "weights": "the checkpoint's weights",
}

Progress = Callable[[int, int], None]
Pairs = Sequence[tuple[Tensor, int]]


@dataclass(frozen=True)
class Training:
    """The user's training function, with its own arguments bound.

    Attributes:
        function: (model, data, *, l2, seed, progress) to the trained model.
        name: as in the config.
        where: ``influence.yaml:12``.
        folder: the current folder while it runs, so that its relative paths work.
        source: hash of its file and its arguments.
    """

    function: Callable[..., Any]
    name: str
    where: str
    folder: Path
    source: str


def load_training(config: Config) -> Training:
    """Import the training function and check its signature, before anything is trained.

    Raises:
        InfluenceError: the config names none, it does not exist, or cannot be called as ``FORM``.
    """
    section = config.training
    if section is not None and config.train.weights is not None:
        raise InfluenceError(
            f"{config.where('train', 'weights')}: a training function gets (input, label) pairs, without train.weights",
            "verify --loo on an output layer under a convex loss retrains with them, by Newton steps",
        )
    if section is None or not section.factory:
        raise InfluenceError(
            f"{config.path.name}: retraining needs a training function, but the config names none",
            f"add training: {{factory: ./model.py:train}}, a function {FORM} that returns the trained model",
        )

    def where(*keys: str) -> str:
        return config.where("training", *(keys or ("factory",)))

    imported = import_object(section.factory, config.folder, where())
    if not callable(imported):
        raise InfluenceError(f"{where()}: {section.factory} is a {type(imported).__name__}, which cannot be called")
    for key in section.args:
        if key in (*OURS, "model", "data"):
            raise InfluenceError(f"{where('args', key)}: {key} cannot be set in the config", f"verify calls {FORM}")
    function = bind(imported, section.args, section.factory, where)
    _check_signature(imported, section.args, f"{where()}: {section.factory}")
    return Training(function, section.factory, where(), config.folder, object_hash(imported, section.args))


def _check_signature(function: Callable[..., Any], args: Mapping[str, Any], name: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # built in: a call reports mistakes itself
    try:
        signature.bind(None, [], l2=0.0, seed=0, progress=None, **args)
    except TypeError as error:
        raise InfluenceError(
            f"{name}{str(signature)[:120]} cannot be called as {FORM}: {error}",
            "it must accept these; put its other arguments under training.args",
        ) from error


def half(seed: int, subset: int, n: int) -> np.ndarray:
    """Draw a random half of n examples: ⌊n/2⌋ rows, rising; the same however many subsets there are."""
    return some_rows(seed, subset, n, n // 2)


def some_rows(seed: int, subset: int, n: int, size: int) -> np.ndarray:
    """Draw ``size`` of n rows at random, rising; the same however many subsets there are."""
    generator = np.random.default_rng([seed, subset])
    return np.sort(generator.choice(n, size, replace=False))


def fresh_model(config: Config, seed: int, device: torch.device) -> nn.Module:
    """Make an untrained model whose start depends on the seed alone."""
    seed_all(seed)
    return build_model(config).to(device)


def train(
    training: Training,
    model: nn.Module,
    data: Pairs,
    *,
    l2: float | dict[str, float],
    seed: int,
    what: str,
    progress: Progress = lambda *_: None,
) -> nn.Module:
    """Call the training function, and check what it returns.

    Args:
        training: the function.
        model: where it starts.
        data: (input, label) pairs.
        l2: λ₂ of the objective: a number, or by pattern of parameter names, as in the config.
        seed: for all randomness in it.
        what: names this training in an error: ``subset 3 (seed 17)``.
        progress: called with (done, all).

    Returns:
        The trained model, in eval mode.

    Raises:
        InfluenceError: it raises, or does not return the trained model that it was given.
    """
    at, shapes = f"{training.where}: {training.name}", _shapes(model)
    # The user's function takes what the user's model returns.
    head, guard = take_head(model), take_guard(model)
    device = next(model.parameters()).device
    seed_all(seed)
    try:
        # stdout is for data, not for the output of a training function.
        with fenced(), contextlib.chdir(training.folder), contextlib.redirect_stdout(sys.stderr), torch.enable_grad():
            trained = training.function(model, data, l2=l2, seed=seed, progress=progress)
    except InfluenceError:
        raise
    except (Exception, SystemExit) as error:
        raise InfluenceError(
            f"{at} failed on {what}: {describe(error)}", "INFLUENCE_DEBUG=1 shows where it failed"
        ) from error
    if not isinstance(trained, nn.Module):
        raise InfluenceError(
            f"{at} returned a {type(trained).__name__} for {what}, not the trained model", "end it with: return model"
        )
    returned = _shapes(trained)
    if returned != shapes:
        name = next(name for name in [*shapes, *returned] if shapes.get(name) != returned.get(name))
        raise InfluenceError(
            f"{at} returned another architecture for {what}: {name} is {_shape(returned, name)}, but "
            f"{_shape(shapes, name)} in the model that it was given",
            "train the given model and return it",
        )
    add_head(trained, head)
    add_guard(trained, guard)
    return trained.to(device).eval()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "not there"


def example_outcomes(task: Task, model: nn.Module, batches: Iterable[Batch], split: Split, what: str) -> Arrays:
    """Measure every example of a split under a model.

    Returns:
        ``losses`` float64 [m], ``margins`` float64 [m], log(p_y/(1 − p_y)) of the label in a softmax of the outputs,
        and ``right`` bool [m], whether it is predicted correctly.

    Raises:
        InfluenceError: a loss is NaN or infinite; it names the training and the example.
    """
    parts: dict[str, list[np.ndarray]] = {"losses": [], "margins": [], "right": []}
    for batch in batches:
        targets = batch.targets.to(task.device)
        with torch.no_grad():
            outputs = logits_of(model(batch.inputs.to(task.device)))
            losses = task.loss(outputs, targets).double().cpu().numpy()
            # A label that the loss ignores may be no class.
            known = targets.clamp(0, outputs.shape[1] - 1)
            margins = torch.where(known == targets, -negative_margin(outputs.double(), known), torch.nan)
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise InfluenceError(
                f"{what} gave a model whose loss on {split.title(int(batch.indices[bad[0]]))} is NaN or infinite",
                "the training function diverges there: use a smaller learning rate, or check what it does",
            )
        parts["losses"].append(losses)
        parts["margins"].append(margins.cpu().numpy())
        parts["right"].append((outputs.argmax(dim=1).cpu() == batch.targets).numpy())
    return {name: np.concatenate(values) for name, values in parts.items()}


def measured(outcomes: Arrays, measure: str) -> np.ndarray:
    """Give what a measure is of the test examples [m], a rise bad: the loss, or the margin with the sign changed."""
    return -outcomes["margins"] if measure == MARGIN else outcomes["losses"]


def needed(measure: str) -> str:
    """Name what a measure reads of a kept retraining: files from before margins were measured have none."""
    return "margins" if measure == MARGIN else "losses"


class _Reading(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """(input, label) pairs, read on every access, for data that does not fit the memory."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        index = int(self._split.indices[row])
        image, _ = raw_item(self._split, index)
        return to_input(self._split, image, self._split.title(index)), int(self._split.labels[index])


class _Rows(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Some rows of a larger data set."""

    def __init__(self, data: Any, rows: np.ndarray) -> None:
        self._data, self._rows = data, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        pair: tuple[Tensor, int] = self._data[int(self._rows[row])]
        return pair


def training_pairs(split: Split) -> Pairs:
    """Give the (input, label) pairs of all examples in use: a list if it fits the memory, otherwise read on access."""
    return list(labelled_inputs(split)) if fits_memory(split) else _Reading(split)  # type: ignore[return-value]


def take_pairs(data: Pairs, rows: np.ndarray) -> Pairs:
    """Give some rows of the pairs."""
    return [data[int(row)] for row in rows] if isinstance(data, list) else _Rows(data, rows)  # type: ignore[return-value]


def held_batches(split: Split) -> Iterable[Batch]:
    """Give the examples of a split in batches, for many passes: in memory if they fit, otherwise read every time."""

    class Again:
        def __iter__(self) -> Any:
            return iter(readable_batches(split, split.indices, BATCH, skip=False))

    return list(Again()) if fits_memory(split) else Again()


@dataclass(frozen=True)
class Again:
    """What every retraining reads: the training function, the training pairs, the test examples."""

    task: Task
    training: Training
    pairs: Pairs
    tests: Iterable[Batch]

    def outcomes(
        self,
        model: nn.Module,
        rows: np.ndarray,
        l2: float | dict[str, float],
        seed: int,
        what: str,
        progress: Callable[[float], None],
    ) -> Arrays:
        """Train on some rows, and give what ``example_outcomes`` measures of all test examples, and the seconds."""
        started = time.perf_counter()
        changes = _changes(self.pairs)
        trained = train(
            self.training,
            model,
            take_pairs(self.pairs, rows),
            l2=l2,
            seed=seed,
            what=what,
            progress=lambda done, total: progress(done / max(total, 1)),
        )
        if _changes(self.pairs) != changes:
            raise InfluenceError(
                f"{self.training.where}: {self.training.name} changes its training images in place, so the next "
                "training would get others",
                "write x = x - mean instead of x -= mean",
            )
        settle_as(trained, self.task.model)
        outcomes = example_outcomes(self.task, trained, self.tests, self.task.test_split(), what)
        return {**outcomes, "seconds": np.array(time.perf_counter() - started)}


def _changes(pairs: Pairs) -> int:
    """Count the changes in place of pairs in memory, by autograd's counters; others are read anew on every access."""
    return sum(x._version for x, _ in pairs) if isinstance(pairs, list) else 0


def check_whole(task: Task) -> None:
    """Refuse a list that is not all of the training set: retraining needs all."""
    if task.n != len(task.train):
        raise InfluenceError(
            f"train.n is {task.n:,}, but {len(task.train):,} training examples are listed: retraining needs all",
            "list all that the checkpoint was trained on, and leave out train.n",
        )


def job_of(name: str, repeat: int, number: int) -> Job:
    """Name the file and number the claim of a retraining: ``number`` of this repeat."""
    return Job(f"{name}_{repeat}", 1 + repeat * REPEAT + number)
