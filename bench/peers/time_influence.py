"""Time influence itself on one case, step by step as the peers are timed: the library calls that its commands make."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Case, Log, start

from influence_cli import Terminal, load_config, load_tasks
from influence_cli.curvature import ekfac
from influence_cli.curvature.blocks import keep
from influence_cli.curvature.coordinates import Blocks, coordinates
from influence_cli.influence.example_facts import training_facts
from influence_cli.influence.test_selection import Selected
from influence_cli.mislabels.find import find_mislabels
from influence_cli.passes.gradients import example_gradients
from influence_cli.precompute.budget import store_layout
from influence_cli.precompute.fitted import Fitted
from influence_cli.precompute.prepare import Upkeep, prepare_all
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankOptions, rank_training
from influence_cli.store.store import Store

CONVENTIONS = """EK-FAC with labels drawn from the model, all parameters, biases in the layers' blocks, norms as exact
blocks; lambda 0.1 x mean eigenvalue of each layer; scores divided by n, > 0 where removing the example hurts."""
METHOD = "ekfac"
DATA = """
import numpy as np
import torch


class Case(torch.utils.data.Dataset):
    def __init__(self, file, train):
        arrays = np.load(file)
        if train:
            self.x, y = torch.from_numpy(arrays["x"]), arrays["y"]
        else:
            self.x = torch.from_numpy(np.concatenate([arrays["x"], arrays["x2"]]))
            y = np.concatenate([arrays["y"], arrays["y2"]])
        self.targets = y.tolist()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], self.targets[index]


def build(name):
    import sys
    sys.path.insert(0, {here!r})
    from common import build_model
    return build_model(name)
"""
CONFIG = """
model: {{factory: ./data.py:build, args: {{name: {model}}}, checkpoint: model.pt}}
train: {{dataset: ./data.py:Case, args: {{file: {case}/train.npz, train: true}}}}
test: {{dataset: ./data.py:Case, args: {{file: {case}/test.npz, train: false}}}}
gradients: {{store: {store}}}
curvature: {{method: ekfac, matrix: {matrix}, damping: {damping}}}
"""


def write_project(folder: Path, case: Case, source: Path) -> None:
    """Write a config over the case's files."""
    settings = case.settings
    shutil.copy(source / "model.pt", folder / "model.pt")
    (folder / "data.py").write_text(DATA.replace("{here!r}", repr(str(Path(__file__).parent))))
    (folder / "influence.yaml").write_text(
        CONFIG.format(
            model=settings.model,
            case=source.resolve(),
            store=folder / "store" / "influence.h5",
            matrix="empirical" if settings.empirical else "ggn",
            damping="auto" if settings.damping is None else settings.damping,
        )
    )
    (folder / "store").mkdir()


@contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Add up the seconds of the stages of a fit."""
    spent: dict[str, float] = {}
    saved = {name: getattr(ekfac, name) for name in ("_add_covariances", "_decompose_layer", "_add_eigenvalues")}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            result = saved[name](*args, **more)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started
            return result

        return call

    try:
        for name in saved:
            setattr(ekfac, name, timed(name))
        yield spent
    finally:
        for name, function in saved.items():
            setattr(ekfac, name, function)


def main() -> None:
    """Run every step on one case."""
    case, log = start("influence", "influence-cli", CONVENTIONS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log.options = replace(log.options, case=log.options.case.resolve(), out=log.options.out.resolve())
        write_project(folder, case, log.options.case)
        os.chdir(folder)  # where its user would stand
        log.folder = folder / "store"
        config, quiet = load_config(folder / "influence.yaml"), Terminal(quiet=True)
        tasks = load_tasks(config)
        log.record["tracked_parameters"] = log.record["parameters"]
        with stages() as spent:
            direct = log.run(METHOD, "fit", lambda: prepare_all(config, tasks, quiet, on_the_fly=True))
        if direct is None:
            return
        for part, step in (
            ("_add_covariances", "of which covariances"),
            ("_decompose_layer", "of which eigendecompositions"),
            ("_add_eigenvalues", "of which eigenvalues"),
        ):
            log.add(METHOD, step, seconds=round(spent.get(part, 0.0), 4))
        found = log.run(METHOD, "self", lambda: find_mislabels(direct, terminal=quiet))
        if found is not None and found.self_influence is not None:
            log.keep(ekfac_self=found.self_influence)
        count = 100 if case.settings.model == "cnn" else 10  # a pass over the images for every few of them
        log.run(METHOD, f"tests_{count} on the fly", lambda: score(direct, range(count), quiet, None))
        if len(case.x) <= 10_000 and case.settings.model == "cnn":
            exact = np.zeros((10, len(case.x)), dtype=np.float32)
            score(direct, range(10), quiet, exact)
            overlap(log, config, quiet, exact)
        stored = log.run(METHOD, "gradients into the store", lambda: prepare_all(config, tasks, quiet))
        if stored is None:
            return
        passes(log, case, stored[0])
        log.run(METHOD, "self from the store", lambda: find_mislabels(stored, terminal=quiet))
        sets = [(f"tests_{count}", range(count)) for count in case.settings.tests]
        for step, positions in [*sets, ("second_100", range(100, 200))]:
            scores = np.zeros((len(positions), len(case.x)), dtype=np.float32) if len(positions) == 10 else None
            log.run(METHOD, step, lambda p=positions, s=scores: score(stored, p, quiet, s))
            if scores is not None:
                log.keep(ekfac_scores=scores)
        if case.settings.model == "cnn":
            fewer_coordinates(log, config, tasks, stored[0], quiet)


def fewer_coordinates(log: Log, config: Any, tasks: list[Any], whole: Prepared, terminal: Terminal) -> None:
    """Time 100 tests over a store whose budget leaves 4,096 coordinates, as good for this network (results/lds.md)."""
    task = whole.task
    rows = [store_layout(config, task, k).bytes() for k in (0, 1)]
    budget = rows[0] + stored_factors(whole).bytes() + 4_096 * (rows[1] - rows[0])
    small = config.model_copy(update={"gradients": config.gradients.model_copy(update={"budget": budget})})
    stored = log.run(
        METHOD, "4,096 coordinates: store", lambda: prepare_all(small, tasks, terminal, upkeep=Upkeep(overwrite=True))
    )
    if stored is not None:
        log.run(
            METHOD,
            "4,096 coordinates: second_100",
            lambda: score(stored, range(100, 200), terminal, None),
            coordinates=stored[0].width,
        )


def stored_factors(prepared: Prepared) -> Fitted:
    """Read the factors of all layers from a store."""
    with Store.open(prepared.path) as store:
        arrays = {n: a for n in store.names("factor.") if (a := store.array(n)) is not None}
        return Fitted(arrays, store.facts)


def overlap(log: Log, config: Any, terminal: Terminal, exact: np.ndarray) -> None:
    """Time bfloat16, and print how much of the top 10 of float32 it finds."""
    rough = config.model_copy(update={"precision": "bf16"})
    folder = log.folder / "bf16"  # type: ignore[operator]
    folder.mkdir()
    gradients = rough.gradients.model_copy(update={"store": folder / "influence.h5"})
    rough = rough.model_copy(update={"gradients": gradients})
    tasks = load_tasks(rough)
    found = log.run("bf16", "fit", lambda: prepare_all(rough, tasks, terminal, on_the_fly=True))
    if found is None:
        return
    scores = np.zeros_like(exact)
    log.run("bf16", "tests_10 on the fly", lambda: score(found, range(10), terminal, scores))
    tops = [np.argsort(-side, axis=1)[:, :10] for side in (exact, scores)]
    shared = float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*tops, strict=True)]))
    log.add("bf16", "share of float32's top 10", overlap=round(shared, 3))


class Kept:
    """Take all of influence[t, i] into an array."""

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def begin(self, tests: Any) -> None:
        """Expect the tests of one group."""

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take a piece."""
        self.scores[:, where] = values


def score(stores: list[Prepared], positions: range, terminal: Terminal, scores: np.ndarray | None) -> int:
    """Rank the training images for some test images, as `influence rank` does with --top 10."""
    labels = stores[0].task.test_split().labels
    selected = [Selected(i, None, int(labels[i])) for i in positions]
    sink = None if scores is None else Kept(scores)
    facts = training_facts(stores)
    return len(
        list(
            rank_training(
                stores,
                selected,
                facts=facts,
                terminal=terminal,
                options=RankOptions(sinks=[] if sink is None else [sink]),
            )
        )
    )


def passes(log: Log, case: Case, prepared: Prepared) -> None:
    """Time the gradient pass alone, in memory, without the disk: kept coordinates, all of them, raw gradients."""
    network = prepared.choice.network
    batch = min(256, prepared.batch)

    def over(work: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        for x, y in zip(case.x.split(batch), case.y.split(batch), strict=True):
            work(x, y)
            log.done += len(x)

    log.run(
        METHOD,
        "gradient pass, kept coordinates",
        lambda: over(lambda x, y: coordinates(network, prepared.basis, x, y)),
        coordinates=prepared.width,
    )
    if isinstance(prepared.basis, Blocks) and log.record["parameters"] < 1_000_000:
        whole = Blocks(tuple(keep(stored_factors(prepared).blocks(), None, prepared.task.device)))
        log.run(METHOD, "gradient pass, all coordinates", lambda: over(lambda x, y: coordinates(network, whole, x, y)))
        log.run(METHOD, "gradient pass, raw gradients", lambda: over(lambda x, y: example_gradients(network, x, y)))


if __name__ == "__main__":
    main()
