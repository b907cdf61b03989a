"""`influence verify`: does influence predict here what training again does?

Leave-one-out: train again without an example, and compare the change of a test loss with its influence. Linear
datamodeling score: train from scratch on random halves, and rank their losses by the summed influence of what each
leaves out. The smallest change puts a deep network on another path, so there the first is mostly noise and the second
is the measure (Bae et al. 2022, "If influence functions are the answer"; Park et al. 2023, "TRAK").
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from influence_cli.config import Config
from influence_cli.curvature.explicit import MAX_PARAMETERS
from influence_cli.data import readable_batches
from influence_cli.errors import InfluenceError
from influence_cli.facts import TestFacts, TrainingFacts
from influence_cli.fingerprint import weights_hash
from influence_cli.kept_influence import KeptInfluence
from influence_cli.metrics import bootstrap_lds, intercept, lds, pearson, slope
from influence_cli.newton import losses_under, make_problem, minimise, outputs_of, start_of, without_each
from influence_cli.precompute import Prepared, decide, prepare_all
from influence_cli.rank import rank_training, training_facts
from influence_cli.retrain import (
    MEANING,
    fresh_model,
    half,
    job_of,
    load_training,
    made_of,
    make_again,
    retrained_folder,
    seed_of,
)
from influence_cli.retrain_files import Arrays, Job, do_all, open_folder, turn
from influence_cli.selection import Selected
from influence_cli.task import Task
from influence_cli.terminal import Terminal
from influence_cli.testset import selected_batches

BATCH = 256
# What the seeds are for, so that no two kinds of them are alike.
HALVES, ON_HALVES, WITHOUT, CHOSEN = 1, 2, 3, 4


@dataclass(frozen=True)
class LeftOut:
    """What leaving training examples out does to the loss of one test example.

    Attributes:
        test: the test example.
        rows: int64 [k], rows of the training examples among those in use; the most influential first.
        influential: how many of them were chosen for their influence; the rest at random.
        estimated: influence [k].
        actual: the rise of the loss by retraining [k].
    """

    test: TestFacts
    rows: np.ndarray
    influential: int
    estimated: np.ndarray
    actual: np.ndarray

    def fit(self, part: slice = slice(None)) -> tuple[float, float, float]:
        """Give the correlation r, and the slope and intercept of actual on estimated."""
        x, y = self.estimated[part], self.actual[part]
        return pearson(x, y), slope(x, y), intercept(x, y)


@dataclass(frozen=True)
class Datamodeling:
    """Linear datamodeling scores of several methods.

    Attributes:
        methods: their names.
        tests: int64 [m], positions of the test examples.
        predicted: [methods, m, subsets], the summed influence of what each subset leaves out.
        actual: [repeats, m, subsets], the loss after training on each.
        scores: [methods, m], Spearman's correlation over the subsets, of the loss averaged over repeats.
        draws: [1,000, methods], mean scores of bootstrap samples of subsets and tests.
    """

    methods: tuple[str, ...]
    tests: np.ndarray
    predicted: np.ndarray
    actual: np.ndarray
    scores: np.ndarray
    draws: np.ndarray

    def mean(self, method: int) -> tuple[float, float, float]:
        """Give a method's score and its 95% interval."""
        return _interval(float(self.scores[method].mean()), self.draws[:, method])

    def difference(self, method: int) -> tuple[float, float, float]:
        """Give a method's score less the first method's, and the 95% interval of that, from the same draws."""
        own = float((self.scores[method] - self.scores[0]).mean())
        return _interval(own, self.draws[:, method] - self.draws[:, 0])

    def agreement(self) -> float | None:
        """Give the score that one half of the repeats has on the other: how repeatable the losses are themselves."""
        if len(self.actual) < 2:
            return None
        return float(lds(self.actual[::2].mean(axis=0), self.actual[1::2].mean(axis=0)).mean())


def _interval(value: float, draws: np.ndarray) -> tuple[float, float, float]:
    low, high = np.quantile(draws, (0.025, 0.975))
    return value, float(low), float(high)


def leave_one_out(
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    *,
    config: Config,
    count: int,
    repeats: int = 1,
    facts: TrainingFacts | None = None,
    terminal: Terminal,
    run: dict[str, Any] | None = None,
) -> list[LeftOut]:
    """Compare influence with retraining without each of some training examples.

    Half of them are the most influential on the test example, half are drawn from the rest. An output layer under a
    convex loss is retrained by Newton steps in float64, from its minimum. Anything else by the training function, from
    the checkpoint, with l2·n/(n − 1), so that its objective is the one of n examples without one; the change counts
    from a training of the same seed that leaves nothing out.

    Args:
        stores: what was prepared, for one checkpoint.
        selected: which test examples.
        config: of the run.
        count: K, training examples a test example.
        repeats: trainings of each by the training function, averaged.
        facts: of the training examples; read where they are not given.
        terminal: progress and what was found.
        run: takes the facts of the run.

    Raises:
        InfluenceError: K is larger than the training set, several checkpoints, or a training that fails.
    """
    run = {} if run is None else run
    task = _one_task([prepared.task for prepared in stores])
    prepared, n = stores[0], len(task.train)
    if not 1 <= count < n:
        raise InfluenceError(f"--loo {count}: there are {n:,} training examples", f"give a number from 1 to {n - 1}")
    convex = is_convex(prepared)
    if not convex:
        load_training(config)  # a mistake in it is told before any work
        if any(item.file is not None for item in selected):
            raise InfluenceError(
                "an image file as TEST goes only with an output layer under a convex loss",
                "give positions of the test set",
            )
    facts = training_facts(stores) if facts is None else facts
    held, tests = KeptInfluence(len(selected), n), []
    for group in rank_training(
        stores, selected, config=config, facts=facts, count=1, terminal=terminal, run=run, sinks=[held]
    ):
        tests += group.tests
    choices = [_choose(values, count, seed_of(config.seed, CHOSEN, t)) for t, values in enumerate(held.values)]
    rows = np.unique(np.concatenate(choices))
    if convex:
        changes = _newton_changes(prepared, selected, tests, rows, terminal, run)
    else:
        changes = _trained_changes(config, task, tests, rows, repeats, terminal)
    influential = (count + 1) // 2
    return [
        LeftOut(test, own, influential, values[own].astype(np.float64), change[np.searchsorted(rows, own)])
        for test, own, values, change in zip(tests, choices, held.values, changes.T, strict=True)
    ]


def is_convex(prepared: Prepared) -> bool:
    """Say whether the tracked parameters are an output layer under a convex loss, small enough for Newton steps."""
    choice, task = prepared.choice, prepared.task
    # The hinge is convex, but has no curvature for a Newton step.
    smooth = task.convex_loss and task.loss_name != "hinge"
    return choice.output is not None and smooth and choice.network.size <= MAX_PARAMETERS


def _one_task(tasks: Sequence[Task]) -> Task:
    if len(tasks) > 1:
        raise InfluenceError(
            f"--loo retrains one checkpoint, the config lists {len(tasks)}",
            f"-s model.checkpoint={tasks[0].checkpoint}",
        )
    _whole(tasks[0])
    return tasks[0]


def _whole(task: Task) -> None:
    if task.n != len(task.train):
        raise InfluenceError(
            f"train.n is {task.n:,}, but {len(task.train):,} training examples are listed: training again needs all",
            "list all that the checkpoint was trained on, and leave out train.n",
        )


def _choose(influence: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose rows: half the most influential, strongest first, half at random from the others."""
    read = np.flatnonzero(np.isfinite(influence))
    most = read[np.argsort(-np.abs(influence[read]), kind="stable")][: (count + 1) // 2]
    rest = np.setdiff1d(read, most)
    random = np.random.default_rng(seed).choice(rest, min(len(rest), count - len(most)), replace=False)
    return np.concatenate([most, np.sort(random)])


def _newton_changes(
    prepared: Prepared,
    selected: Sequence[Selected],
    tests: Sequence[TestFacts],
    rows: np.ndarray,
    terminal: Terminal,
    run: dict[str, Any],
) -> np.ndarray:
    """Give the rise of each test loss without each row, by Newton steps: [rows, tests]."""
    task, network, layer = prepared.task, prepared.choice.network, prepared.choice.output
    if layer is None:
        raise ValueError("an output layer is needed")
    with terminal.status("training the output layer to its minimum (Newton)"):
        problem = make_problem(
            network, layer, readable_batches(task.train, task.train.indices, BATCH, skip=False), task.l2
        )
        w, before, after = minimise(problem, start_of(network, layer, problem.examples.a))
    terminal.say(f"gradient norm {before:.1e} at the checkpoint, {after:.1e} after Newton steps in float64")
    run["newton"] = {"gradient_norm_before": before, "gradient_norm_after": after}
    batches = (batch for batch, _ in selected_batches(task, selected, BATCH, terminal, skip=False))
    held_out = outputs_of(network, layer, batches)
    held_out.targets.copy_(torch.tensor([test.target for test in tests]))
    with terminal.progress(len(rows), "retraining without one example") as advance:
        ws = without_each(problem, w, torch.from_numpy(rows).to(w.device), advance)
    change = losses_under(problem, ws, held_out) - losses_under(problem, w[None], held_out)
    return change.cpu().numpy()


def _trained_changes(
    config: Config, task: Task, tests: Sequence[TestFacts], rows: np.ndarray, repeats: int, terminal: Terminal
) -> np.ndarray:
    """Give the rise of each test loss without each row, by the training function: [rows, tests]."""
    again = make_again(config, task)
    folder = retrained_folder(config) / "without"
    open_folder(folder, made_of(config, task) | {"weights": weights_hash(task.model)}, MEANING)
    n = len(task.train)
    # Row n stands for a training that leaves nothing out.
    keys = [(repeat, row) for repeat in range(repeats) for row in (n, *rows.tolist())]
    jobs = {
        job_of(f"without_{row:07d}" if row < n else "without_none", repeat, row): (repeat, row) for repeat, row in keys
    }

    def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
        repeat, row = jobs[job]
        kept = np.delete(np.arange(n), row) if row < n else np.arange(n)
        seed = seed_of(config.seed, WITHOUT, repeat)
        left_out = f"without {task.train.title(int(task.train.indices[row]))}" if row < n else "with all examples"
        what = f"the training {left_out} (seed {seed})"
        model = copy.deepcopy(task.model).train()
        return again.losses(model, kept, task.l2 * n / len(kept), seed, what, progress)

    found = do_all(folder, list(jobs), run_one, terminal, "retraining without one example")
    order = np.searchsorted(task.test_split().indices, np.array([test.index for test in tests], dtype=np.int64))
    losses = np.array([arrays["losses"][order] for arrays in found]).reshape(repeats, 1 + len(rows), len(tests))
    change: np.ndarray = (losses[:, 1:] - losses[:, :1]).mean(axis=0)
    return change


def datamodeling_score(
    methods: Mapping[str, Config],
    tasks: Sequence[Task],
    *,
    config: Config,
    subsets: int = 100,
    repeats: int = 2,
    tests: int = 300,
    on_the_fly: bool = False,
    terminal: Terminal,
    run: dict[str, Any] | None = None,
) -> Datamodeling:
    """Score methods by how well they rank what training on random halves gives.

    Park et al. 2023, section 2: for test example t, Spearman's correlation over subsets S between Σ_{i∉S}
    influence[t, i] and the mean loss of t over trainings on S. The score of a method is the mean over test examples.

    Args:
        methods: a config each, by name; they differ in what estimates influence, not in model or data.
        tasks: the checkpoints.
        config: of the run: its training function, its seed, and the retrainings beside its store.
        subsets: M, random halves of the training examples.
        repeats: R, trainings on each, from scratch.
        tests: N, test examples, drawn once.
        on_the_fly: store no gradients.
        terminal: progress.
        run: takes the facts of the run, a method each.

    Raises:
        InfluenceError: no training function, one that fails, a store that cannot be made, too few examples.
    """
    run = {} if run is None else run
    task = tasks[0]
    _whole(task)
    split, n = task.test_split(), len(task.train)
    if tests > len(split):
        terminal.say(f"all {len(split):,} test examples are taken: there are no {tests:,}")
    again = make_again(config, task)
    for own in methods.values():  # what cannot be estimated is told before anything is trained
        decide(own, task, Terminal(quiet=True))
    folder = retrained_folder(config) / "halves"
    open_folder(folder, made_of(config, task), MEANING)
    # Of several processes one makes the stores, and the others begin to train.
    stores: dict[str, list[Prepared]] = {}
    with turn(folder, wait=False) as mine:
        if mine:
            stores = _prepare(methods, tasks, on_the_fly, terminal)
    halves = [half(seed_of(config.seed, HALVES), subset, n) for subset in range(subsets)]
    keys = [(repeat, subset) for repeat in range(repeats) for subset in range(subsets)]
    jobs = {job_of(f"half_{subset:05d}", repeat, subset): (repeat, subset) for repeat, subset in keys}

    def run_one(job: Job, progress: Callable[[float], None]) -> Arrays:
        repeat, subset = jobs[job]
        seed = seed_of(config.seed, ON_HALVES, subset, repeat)
        what = f"subset {subset}, repeat {repeat} (seed {seed}, {n // 2:,} examples)"
        return again.losses(fresh_model(config, seed, task.device), halves[subset], task.l2, seed, what, progress)

    terminal.say(f"{subsets:,} random halves of {n:,} training examples; trainings on each: {repeats}")
    found = do_all(folder, list(jobs), run_one, terminal, "retraining on halves")
    run["training_seconds"] = float(sum(arrays["seconds"] for arrays in found))
    generator = np.random.default_rng(seed_of(config.seed, CHOSEN))
    chosen = np.sort(generator.choice(len(split), min(tests, len(split)), replace=False))
    actual = np.array([arrays["losses"][chosen] for arrays in found])
    actual = actual.reshape(repeats, subsets, len(chosen)).swapaxes(1, 2)
    removed = np.ones((subsets, n))
    for subset, rows in enumerate(halves):
        removed[subset, rows] = 0
    positions = split.indices[chosen]
    selected = [Selected(int(index), None, int(split.labels[index])) for index in positions]
    if not stores:
        with turn(folder, wait=True):
            stores = _prepare(methods, tasks, on_the_fly, terminal)
    predicted = np.array(
        [
            _predictions(own, stores[name], selected, removed, terminal, run.setdefault("methods", {}), name)
            for name, own in methods.items()
        ]
    )
    mean = actual.mean(axis=0)
    return Datamodeling(
        tuple(methods),
        positions,
        predicted,
        actual,
        np.array([lds(values, mean) for values in predicted]),
        bootstrap_lds(list(predicted), mean),
    )


def _prepare(
    methods: Mapping[str, Config], tasks: Sequence[Task], on_the_fly: bool, terminal: Terminal
) -> dict[str, list[Prepared]]:
    return {name: prepare_all(own, tasks, terminal, on_the_fly=on_the_fly) for name, own in methods.items()}


def _predictions(
    config: Config,
    stores: Sequence[Prepared],
    selected: Sequence[Selected],
    removed: np.ndarray,
    terminal: Terminal,
    run: dict[str, Any],
    name: str,
) -> np.ndarray:
    """Sum each method's influence over what each subset leaves out, as it streams by: [tests, subsets]."""
    terminal.say(f"{name}: influence on {len(selected):,} test examples")
    sums, facts = _Removed(removed), training_facts(stores)
    own: dict[str, Any] = run.setdefault(name, {})
    for _ in rank_training(
        stores, selected, config=config, facts=facts, count=1, terminal=terminal, run=own, sinks=[sums]
    ):
        pass
    return np.concatenate(sums.parts)


class _Removed:
    """Takes the numbers of ``rank_training`` and keeps their sums over what each subset leaves out.

    Attributes:
        parts: [tests, subsets] of each group of test examples.
    """

    def __init__(self, removed: np.ndarray) -> None:
        self._removed = removed
        self.parts: list[np.ndarray] = []

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Take the next test examples."""
        self.parts.append(np.zeros((len(tests), len(self._removed))))

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take their influence [m, b] on a range of training examples."""
        self.parts[-1] += values @ self._removed[:, where].T
