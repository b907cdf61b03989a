"""Seconds and memory of EK-FAC on all 50,000 images of CIFAR-10: factors, influence on 2,000 test images, a store.

    python bench/label_noise.py --work FOLDER cifar10 cifar10-wide
    python bench/ekfac_speed.py --work FOLDER [--precision tf32] [--profile] CASE

The calls are those of `influence rank 0:2000 --matrix FILE --on-the-fly`, `influence mislabels --signal self-influence`
and `influence gradients` with the defaults, one process a run of this file.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from label_noise import CASES
from mislabels import write_project

from influence_cli import Terminal, load_config, load_tasks, prepare_all, rank_training
from influence_cli.curvature import ekfac
from influence_cli.data.batches import read_batches
from influence_cli.influence.ensemble import make_closed_forms
from influence_cli.influence.example_facts import training_facts
from influence_cli.influence.self_influence import self_influences
from influence_cli.influence.test_selection import Selected
from influence_cli.model.task import measure_loading
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking.rank import RankOptions
from influence_cli.ranking.sinks import matrix_file

TESTS = 2_000
STAGES = {"_add_covariances": "covariances", "_decompose_layer": "eigenvectors", "_add_eigenvalues": "eigenvalues"}
Result = TypeVar("Result")


class Clock:
    """Prints the seconds of each step, and the GPU's peak memory in it."""

    def __init__(self, profile: bool) -> None:
        self._profile = profile
        print("| step | seconds | peak GPU memory |\n|---|---|---|")

    def step(self, what: str, work: Callable[[], Result]) -> Result:
        """Run and print one step."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) if self._profile else contextlib.nullcontext() as profiler:
            started = time.perf_counter()
            result = work()
            wait()
            seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        print(f"| {what} | {seconds:.1f} | {peak:.1f} GB |", flush=True)
        if profiler is not None:
            by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            print(profiler.key_averages().table(sort_by=by, row_limit=14, max_name_column_width=60), file=sys.stderr)
        return result


def wait() -> None:
    """Let the device come to an end."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@contextlib.contextmanager
def stages() -> Iterator[dict[str, float]]:
    """Add up the seconds of the stages of a fit, reading the images left out."""
    spent, saved = dict.fromkeys(STAGES.values(), 0.0), {name: getattr(ekfac, name) for name in STAGES}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            started = time.perf_counter()
            result = saved[name](*args, **more)
            wait()
            spent[STAGES[name]] += time.perf_counter() - started
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where bench/label_noise.py put the cases")
    parser.add_argument("--precision", default="float32", help="float32, tf32 or bf16")
    parser.add_argument("--tests", type=int, default=TESTS)
    parser.add_argument("--profile", action="store_true", help="print the largest operations of each step to stderr")
    parser.add_argument("case", help="cifar10 (ResNet-9, 2.3 million parameters) or cifar10-wide (6.6 million)")
    words = parser.parse_args()
    folder = words.work / f"{words.case}-0"
    write_project(folder, "cifar10", CASES[words.case].net, test=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    with contextlib.chdir(folder):
        Path("influence.h5").unlink(missing_ok=True)
        given = [f"precision={words.precision}", "curvature.method=ekfac"]
        config, terminal = load_config(Path("influence.yaml"), given), Terminal(quiet=True)
        tasks = load_tasks(config)
        size = sum(p.numel() for p in tasks[0].model.parameters())
        print(f"\n### {words.case}: {size:,} parameters, {words.precision}, {machine}, torch {torch.__version__}\n")
        measure(Clock(words.profile), config, tasks, terminal, words.tests)
        Path("influence.h5").unlink()


def measure(clock: Clock, config: Any, tasks: list[Any], terminal: Terminal, tests: int) -> None:
    """Run every step."""
    split, test = tasks[0].train, tasks[0].test_split()
    selected = [Selected(index, None, int(test.labels[index])) for index in range(tests)]

    measure_loading(tasks[0], terminal)

    def read() -> None:
        for _ in read_batches(split, split.indices, 256, tasks[0].loading):
            pass

    def scores(stores: list[Prepared]) -> None:
        facts = training_facts(stores)
        with matrix_file(Path("scores.h5"), split.indices) as sink:
            for _ in rank_training(stores, selected, facts=facts, terminal=terminal, options=RankOptions(sinks=[sink])):
                pass

    clock.step("read the images once", read)
    with stages() as spent:
        stores = clock.step("fit", lambda: prepare_all(config, tasks, terminal, on_the_fly=True))
    print("".join(f"| of it {stage} | {seconds:.1f} | |\n" for stage, seconds in spent.items()), end="")
    clock.step(f"influence on {tests:,} tests, on the fly", lambda: scores(stores))
    inverses = make_closed_forms(stores, terminal)
    own = clock.step(
        "self-influence of all, on the fly", lambda: self_influences(stores, inverses, split, terminal, skip=False)
    )
    del stores, inverses
    stores = clock.step("a store", lambda: prepare_all(config, tasks, terminal))
    size = Path("influence.h5").stat().st_size
    print(f"| of {stores[0].width:,} coordinates, {size / 1e9:.1f} GB | | |")
    clock.step(f"influence on {tests:,} tests, from the store", lambda: scores(stores))
    inverses = make_closed_forms(stores, terminal)
    kept = clock.step(
        "self-influence of all, from the store", lambda: self_influences(stores, inverses, split, terminal, skip=False)
    )
    print(f"\nself-influence, store and on the fly: correlation {np.corrcoef(own, kept)[0, 1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
