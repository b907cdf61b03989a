"""`influence rank`: how much would the loss of each test example rise if a training example were removed?

Test examples go through in groups, so that what is held is bounded by the group, never by all pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.config import Config
from influence_cli.data import Batch, Split, file_input, read_batches, refuse_unreadable
from influence_cli.errors import InfluenceError
from influence_cli.fill import workers
from influence_cli.inverse import Inverse, make_inverse
from influence_cli.label_files import class_number
from influence_cli.layers import evaluate, example_gradients, micro_batch
from influence_cli.metrics import pearson
from influence_cli.precompute import Prepared
from influence_cli.probe import check_finite
from influence_cli.scores import influence, require_finite
from influence_cli.selection import Selected
from influence_cli.store import READ, Store
from influence_cli.task import Task, logits_of
from influence_cli.terminal import Terminal

# Numbers held at one time for a group of test examples: 2²⁷, 512 MB in float32.
GROUP_NUMBERS = 2**27
# Test examples whose correlation with plain gradient similarity is measured.
COMPARED = 8


@dataclass(frozen=True)
class TestFacts:
    """What is known of a test example after its gradient pass.

    Attributes:
        index: position in the test set, or None for a file.
        path: its file, or None.
        label: the class taken for its label, or None for a file without one.
        predicted: the model's class (several checkpoints: by mean probability).
        target: the class whose loss is explained.
        loss: that loss (several checkpoints: the mean).
    """

    index: int | None
    path: str | None
    label: int | None
    predicted: int
    target: int
    loss: float


@dataclass(frozen=True)
class TrainingFacts:
    """What the stores say about the training examples, averaged over checkpoints.

    Attributes:
        indices: int64 [n], positions in the data set.
        labels: int64 [n].
        probabilities: float32 [n, C], softmax of the outputs.
        losses: float32 [n].
        read: bool [n]; False where an example could not be read.
    """

    indices: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    losses: np.ndarray
    read: np.ndarray

    @cached_property
    def predicted(self) -> np.ndarray:
        """Give the model's class of each example."""
        return np.asarray(self.probabilities.argmax(axis=1))


@dataclass(frozen=True)
class Group:
    """Influence on some test examples.

    Attributes:
        tests: m test examples (empty for an aggregate).
        influence: float32 [m, n], [1, n] for an aggregate; NaN for training examples that could not be read.
    """

    tests: list[TestFacts]
    influence: np.ndarray


def training_facts(stores: Sequence[Prepared]) -> TrainingFacts:
    """Read labels, losses and outputs of all training examples from the stores."""
    probabilities: np.ndarray | None = None
    losses: np.ndarray | None = None
    for prepared in stores:
        with Store.open(prepared.path) as store:
            outputs, own = store.column("outputs"), store.column("losses")
            indices, labels, read = store.column("indices"), store.column("labels"), store.column("state") == READ
        soft = softmax(outputs)
        probabilities = soft if probabilities is None else probabilities + soft
        losses = own if losses is None else losses + own
    if probabilities is None or losses is None:
        raise ValueError("at least one store is needed")
    return TrainingFacts(indices, labels, probabilities / len(stores), losses / len(stores), read)


def softmax(outputs: np.ndarray) -> np.ndarray:
    """Turn outputs [n, C] into probabilities."""
    return torch.from_numpy(outputs).softmax(dim=1).numpy()


def rank_training(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    *,
    config: Config,
    target: str = "label",
    aggregate: bool = False,
    terminal: Terminal,
    skip_unreadable: bool = False,
    run: dict[str, Any] | None = None,
) -> Iterator[Group]:
    """Compute influence[t, i] of all training examples on the selected test examples.

    Args:
        stores: a prepared store a checkpoint; scores are averaged over them.
        selected: which test examples.
        config: for ``curvature.damping``.
        target: whose loss is explained: ``label``, ``predicted``, or a class name.
        aggregate: explain the mean loss of all selected examples.
        terminal: progress, λ, residuals, warnings.
        skip_unreadable: go on without test examples that cannot be read.
        run: takes the facts of the run (λ, effective dimension, residuals, correlation with ``identity``).

    Yields:
        Groups of test examples, in order; one group for an aggregate.
    """
    run = {} if run is None else run
    inverses = make_inverses(stores, config, terminal)
    n, k = len(stores[0].task.train), max(prepared.choice.network.size for prepared in stores)
    size = max(1, GROUP_NUMBERS // (n + 3 * k))
    groups = (selected[start : start + size] for start in range(0, len(selected), size))
    sums: list[Tensor] = []
    facts: list[TestFacts] = []
    for group in groups:
        tests, gradients = _test_gradients(stores, group, target, terminal, skip_unreadable)
        facts += tests
        if aggregate:
            parts = [gradient.sum(dim=0, keepdim=True) for gradient in gradients]
            sums = parts if not sums else [a + b for a, b in zip(sums, parts, strict=True)]
        elif tests:
            yield Group(tests, _scores(stores, inverses, gradients, terminal, run))
    if not facts:
        raise InfluenceError("none of the selected test examples could be read")
    if aggregate:
        means = [part / len(facts) for part in sums]
        yield Group(facts, _scores(stores, inverses, means, terminal, run))
    describe_run(stores, inverses, run, terminal)


def rank_tests(
    stores: Sequence[Prepared],
    index: int,
    *,
    config: Config,
    target: str = "label",
    terminal: Terminal,
    skip_unreadable: bool = False,
    run: dict[str, Any] | None = None,
) -> Group:
    """Turn the question round: which test examples does training example ``index`` help and hurt?

    H is symmetric, so influence[t, i] = (1/n) g_tᵀ (H + (l2 + λ)I)⁻¹ gᵢ needs one inverse, that of gᵢ.

    Returns:
        A group with all test examples and influence [m, 1].
    """
    run = {} if run is None else run
    split = stores[0].task.train
    row_of(split, index)
    inverses = make_inverses(stores, config, terminal)
    batch = next(read_batches(split, np.array([index]), 1))
    refuse_unreadable(batch)
    solved = []
    for prepared, inverse in zip(stores, inverses, strict=True):
        gradient = example_gradients(prepared.choice.network, batch.inputs, batch.targets)[0]
        solved.append(inverse.apply(prepared.coordinates(gradient)))
    tests: list[TestFacts] = []
    values: list[np.ndarray] = []
    test = stores[0].task.test_split()
    everything = [Selected(int(i), None, int(test.labels[i])) for i in test.indices]
    size = max(1, GROUP_NUMBERS // (4 * max(prepared.choice.network.size for prepared in stores)))
    for start in range(0, len(everything), size):
        group, gradients = _test_gradients(stores, everything[start : start + size], target, terminal, skip_unreadable)
        columns = [
            influence(s, gradient, prepared.task.n)[0]
            for prepared, s, gradient in zip(stores, solved, gradients, strict=True)
        ]
        tests += group
        values.append((sum(columns[1:], columns[0]) / len(stores)).cpu().numpy())
    describe_run(stores, inverses, run, terminal)
    result = np.concatenate(values)[:, None]
    require_finite(result, "influence")
    return Group(tests, result)


def check_target(target: str, classes: Sequence[str]) -> None:
    """Refuse a target that is neither ``label`` nor ``predicted`` nor a class."""
    if target not in ("label", "predicted"):
        class_number(target, classes, "--target")


def row_of(split: Split, index: int) -> int:
    """Give the row of a training example among those in use.

    Raises:
        InfluenceError: there is none at this position, or it is excluded.
    """
    row = int(np.searchsorted(split.indices, index))
    if index < 0 or row >= len(split) or split.indices[row] != index:
        raise InfluenceError(
            f"--train {index}: there is no such training example in use", f"positions are 0 to {len(split.source) - 1}"
        )
    return row


def make_inverses(stores: Sequence[Prepared], config: Config, terminal: Terminal) -> list[Inverse]:
    """Choose λ and make the inverse curvature of every checkpoint."""
    return [make_inverse(prepared, config.curvature.damping, terminal) for prepared in stores]


def misclassified(tasks: Sequence[Task], terminal: Terminal) -> np.ndarray:
    """Find the test examples that the model (the mean of several) gets wrong: positions, rising."""
    split = tasks[0].test_split()
    wrong: list[np.ndarray] = []
    with terminal.progress(len(split), "predicting the test set") as advance:
        for batch in read_batches(split, split.indices, 256, workers(tasks[0])):
            if len(batch):
                predicted = _probabilities(tasks, batch.inputs).argmax(dim=1)
                wrong.append(batch.indices[(predicted != batch.targets).numpy()])
            advance(len(batch))
    found = np.concatenate(wrong) if wrong else np.empty(0, dtype=np.int64)
    terminal.say(f"{len(found):,} of {len(split):,} test examples are misclassified")
    return found


def _probabilities(tasks: Sequence[Task], inputs: Tensor) -> Tensor:
    total: Tensor | None = None
    for task in tasks:
        with torch.no_grad():
            soft = logits_of(task.model(inputs.to(task.device))).softmax(dim=1).cpu()
        total = soft if total is None else total + soft
    if total is None:
        raise ValueError("at least one task is needed")
    return total


def _test_gradients(
    stores: Sequence[Prepared], selected: Sequence[Selected], target: str, terminal: Terminal, skip: bool
) -> tuple[list[TestFacts], list[Tensor]]:
    """Compute the coordinates of the test gradients under every checkpoint: [m, k] each."""
    tasks = [prepared.task for prepared in stores]
    facts: list[TestFacts] = []
    rows: list[list[Tensor]] = [[] for _ in stores]
    size = min(256, min(micro_batch(prepared.choice.network, 256) for prepared in stores))
    with terminal.progress(len(selected), "test gradients") as advance:
        for batch, chosen in _batches(tasks[0], selected, size, terminal, skip):
            predicted = _probabilities(tasks, batch.inputs).argmax(dim=1)
            targets = _targets(target, tasks[0].classes, chosen, predicted)
            losses = torch.zeros(len(batch))
            for prepared, own in zip(stores, rows, strict=True):
                gradients, part, _ = example_gradients(prepared.choice.network, batch.inputs, targets)
                check_finite(tasks[0].test or tasks[0].train, batch, part, gradients)
                own.append(prepared.coordinates(gradients))
                losses += part.float().cpu() / len(stores)
            split = tasks[0].test
            for j, item in enumerate(chosen):
                path = str(item.file) if item.file is not None else split.path(item.index or 0) if split else None
                facts.append(
                    TestFacts(item.index, path, item.label, int(predicted[j]), int(targets[j]), float(losses[j]))
                )
            advance(len(batch))
    return facts, [torch.cat(own) if own else torch.empty(0) for own in rows]


def _batches(
    task: Task, selected: Sequence[Selected], size: int, terminal: Terminal, skip: bool
) -> Iterator[tuple[Batch, list[Selected]]]:
    """Read the selected test examples in order: runs of positions together, files one by one."""
    run: list[Selected] = []
    for item in [*selected, None]:
        if item is not None and item.file is None and len(run) < size:
            run.append(item)
            continue
        if run:
            yield from _positions(task.test_split(), run, terminal, skip)
            run = []
        if item is not None and item.file is None:
            run = [item]
        elif item is not None and item.file is not None:
            split = task.test or task.train
            try:
                tensor, _ = file_input(split, item.file)
            except InfluenceError as error:
                if not skip:
                    raise InfluenceError(error.message, error.hint or "--skip-unreadable goes on without it") from error
                terminal.warn(f"skipped: {error.message}")
                continue
            label = item.label if item.label is not None else -1
            yield Batch(tensor[None], torch.tensor([label]), np.array([-1])), [item]


def _positions(
    split: Split, run: list[Selected], terminal: Terminal, skip: bool
) -> Iterator[tuple[Batch, list[Selected]]]:
    indices = np.array([item.index for item in run], dtype=np.int64)
    batch = next(read_batches(split, indices, len(indices)))
    if not skip:
        refuse_unreadable(batch)
    for _, reason in batch.unreadable:
        terminal.warn(f"skipped: {reason}")
    gone = {index for index, _ in batch.unreadable}
    chosen = [item for item in run if item.index not in gone]
    if chosen:
        labels = torch.tensor([-1 if item.label is None else item.label for item in chosen])
        yield replace(batch, targets=labels), chosen


def _targets(target: str, classes: Sequence[str], chosen: Sequence[Selected], predicted: Tensor) -> Tensor:
    """Choose the class whose loss is explained: the label (a file without one: the predicted class), or as asked."""
    if target == "predicted":
        return predicted
    if target != "label":
        return torch.full_like(predicted, class_number(target, classes, "--target"))
    labels = [int(predicted[j]) if item.label is None else item.label for j, item in enumerate(chosen)]
    return torch.tensor(labels)


def _scores(
    stores: Sequence[Prepared],
    inverses: Sequence[Inverse],
    gradients: Sequence[Tensor],
    terminal: Terminal,
    run: dict[str, Any],
) -> np.ndarray:
    """Scan every store once: influence [m, n], the mean over checkpoints."""
    total = np.zeros((len(gradients[0]), len(stores[0].task.train)), dtype=np.float32)
    for prepared, inverse, own in zip(stores, inverses, gradients, strict=True):
        s_test = inverse.apply(own)
        # Plain gradient similarity rides along in the same scan, for the first few.
        plain = own[:COMPARED] if inverse.damping is not None and "identity_correlation" not in run else None
        similarity = np.zeros((0 if plain is None else len(plain), total.shape[1]), dtype=np.float32)
        with (
            terminal.progress(total.shape[1], f"scanning {prepared.path.name}") as advance,
            Store.open(prepared.path) as store,
        ):
            read = store.column("state") == READ
            for where, block in store.scan():
                rows = torch.from_numpy(block).to(own)
                total[:, where] += influence(s_test, rows, prepared.task.n).cpu().numpy() / len(stores)
                if plain is not None:
                    similarity[:, where] = (plain @ rows.T).cpu().numpy()
                advance(len(block))
        if plain is not None:
            pairs = zip(total[:, read], similarity[:, read], strict=False)
            run["identity_correlation"] = float(np.nanmean([pearson(a, b) for a, b in pairs]))
    require_finite(total, "influence")
    total[:, ~read] = np.nan
    return total


def describe_run(
    stores: Sequence[Prepared], inverses: Sequence[Inverse], run: dict[str, Any], terminal: Terminal
) -> None:
    """Gather what belongs to the run, and say where curvature plays no part."""
    run["stores"] = [
        {
            "store": str(prepared.path),
            "checkpoint": str(prepared.task.checkpoint),
            "method": prepared.choice.method,
            "matrix": prepared.choice.matrix,
            "parameters": prepared.choice.network.size,
            "parameters_left_out": len(prepared.choice.network.left_out),
            "l2": prepared.task.l2,
            "n": prepared.task.n,
            "damping": inverse.damping.value if inverse.damping else None,
            "damping_reason": inverse.damping.reason if inverse.damping else None,
            "effective_dimension": inverse.effective_dimension,
            "kept_share": inverse.kept,
            "gradient_norm": prepared.gradient_norm,
            "solves": [vars(info) for info in inverse.solves],
        }
        for prepared, inverse in zip(stores, inverses, strict=True)
    ]
    correlation = run.get("identity_correlation")
    if correlation is not None and np.isfinite(correlation):
        terminal.say(f"correlation with plain gradient similarity: {correlation:.3f}")
        if correlation > 0.98:
            terminal.warn(
                f"curvature plays hardly any part here (correlation {correlation:.3f} with identity): "
                "λ is large beside the spectrum; a smaller curvature.damping would use it"
            )
    elif correlation is not None:
        run["identity_correlation"] = None


def mean_outputs(stores: Sequence[Prepared], batch: Batch) -> tuple[Tensor, Tensor]:
    """Run every checkpoint forward on a batch.

    Returns:
        Mean losses [b] and mean probabilities [b, C], on the CPU.
    """
    losses, soft = [], []
    for prepared in stores:
        loss, outputs = evaluate(prepared.choice.network, batch.inputs, batch.targets)
        losses.append(loss.float().cpu())
        soft.append(outputs.softmax(dim=1).float().cpu())
    return torch.stack(losses).mean(dim=0), torch.stack(soft).mean(dim=0)
