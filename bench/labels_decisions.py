"""What decisions are worth to `influence mislabels`: an estimate with an interval, and a list that learns.

    python bench/labels_decisions.py --work FOLDER > bench/results/labels_decisions.md

Seven sets, most of them of bench/label_noise.py, each trained where FOLDER has it not (half an hour on one core). The
true labels answer for the person. First the number of wrong labels: the model's range, and the interval of
``--sample N`` over 200 draws. Then the list: after 1, 2 and 5% of the labels were decided in the order of the list, the
errors in the next 5% of the list that learnt of them beside the list as it was.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from label_noise import CASES, Case, prepare
from mislabels import write_project

from influence_cli import Terminal, find_mislabels, load_config, load_tasks
from influence_cli.mislabels.find import Mislabels
from influence_cli.mislabels.sample import Listed, draw_sample, estimate
from influence_cli.mislabels.signals import SignalChoice
from influence_cli.mislabels.teaching import Taught
from influence_cli.model.task import Task

SETS = {
    "fashion-2": "Fashion-MNIST, 2% uniform",
    "fashion-10": "Fashion-MNIST, 10% uniform",
    "look-alike-10": "Fashion-MNIST, 10% to look-alikes",
    "uniform40-10": "Fashion-MNIST, 40% uniform",
    "mnist-10": "MNIST, 10% uniform",
    "cifar10n-aggregate": "CIFAR-10N aggregate, ResNet-8",
    "cifar10n-worst": "CIFAR-10N worst, ResNet-8",
}
# Cases beside those of bench/label_noise.py: few wrong labels, and easy ones.
MORE = {
    "mnist-10": Case("mnist", 10_000, "uniform", 0.1, "cnn", 10, 1),
    "fashion-2": Case("fashion-mnist", 10_000, "uniform", 0.02, "cnn", 10, 1),
}
DRAWS, SIZES = 200, (50, 100, 200)
SHARES, NEXT = (0.01, 0.02, 0.05), 0.05


def sampled_table(found: dict[str, tuple[Mislabels, np.ndarray, Task]]) -> None:
    """Print how often the interval of a sample holds the truth, how wide it is, and the model's range."""
    print("\n## How many labels are wrong\n")
    print(
        f"{DRAWS} draws of each size; the true labels answer. Width is that of the 95% interval as a share of the "
        "labels; beside it that of as many decisions on labels drawn without strata. A range is right if it holds the "
        "truth or one end is within a factor of 1.5 of it.\n"
    )
    print("| set | wrong | the model's range | right | " + " | ".join(f"{n}: holds | width" for n in SIZES) + " |")
    print("|---|---|---|---|" + "---|---|" * len(SIZES))
    for name, (result, wrong, task) in found.items():
        truth, n, cells = int(wrong.sum()), len(wrong), []
        low, high = min(result.ways.values()), max(result.ways.values())
        right = low / 1.5 <= truth <= high * 1.5
        for size in SIZES:
            spans = intervals(result, wrong, task, size)
            plain = intervals(replace(result, score=np.zeros(n), noise=None), wrong, task, size)
            holds = np.mean((spans[:, 0] <= truth) & (truth <= spans[:, 1]))
            widths = [np.mean(one[:, 1] - one[:, 0]) / n for one in (spans, plain)]
            cells += [f"{holds:.1%}", f"{widths[0]:.1%} ({widths[1]:.1%})"]
        print(
            f"| {SETS[name]} | {truth / n:.1%} | {low / n:.1%} to {high / n:.1%} | {'yes' if right else 'no'} | "
            + " | ".join(cells)
            + " |",
            flush=True,
        )


def intervals(result: Mislabels, wrong: np.ndarray, task: Task, size: int) -> np.ndarray:
    """Draw samples and give the ends of their intervals, float64 [draws, 2]."""
    facts, noise = result.facts, result.noise
    listed = Listed(facts.indices, facts.labels, result.score, None if noise is None else noise.wrong)
    none, ends = np.empty(0, dtype=np.int64), []
    for seed in range(DRAWS):
        sample = draw_sample(listed, size, task.train, task.classes, before=none, seed=seed)
        decided = np.full(len(wrong), np.nan)
        decided[sample.drawn] = wrong[sample.drawn]
        count = estimate(sample, decided).all
        ends.append((count.low, count.high))
    return np.array(ends)


def taught_table(found: dict[str, tuple[Mislabels, np.ndarray, Task]], work: Path) -> None:
    """Print what the next labels of the list hold, with and without learning of those that were decided."""
    print("\n## What the list learns\n")
    print(
        f"Decided in the order of the list; wrong labels among the next {NEXT:.0%}, of the list as it was and of the "
        "list that learnt; the difference with its standard error, by the labels that only one of the two shows "
        "(McNemar). Expected and wrong: of the next 50 images, what the page says and what is.\n"
    )
    print(
        "| set | decided | were wrong | list as it was | list that learnt | difference | expected | wrong | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, (result, wrong, task) in found.items():
        listed = result.facts.indices[result.order]
        for share in SHARES:
            count, following = int(share * len(wrong)), int(NEXT * len(wrong))
            started = time.perf_counter()
            taught = decisions(task, np.load(work / f"{name}-0" / "true.npy"), listed[:count])
            with contextlib.chdir(work / f"{name}-0"):
                learnt = find_mislabels([task], choice=SignalChoice(taught=taught), terminal=Terminal(quiet=True))
            seconds = time.perf_counter() - started
            plain = listed[count : count + following]
            coming = learnt.facts.indices[learnt.order]
            only = [np.setdiff1d(*pair) for pair in ((coming[:following], plain), (plain, coming[:following]))]
            apart = [int(wrong[one].sum()) for one in only]
            print(
                f"| {SETS[name]} | {count} | {int(wrong[listed[:count]].sum())} | {int(wrong[plain].sum())} | "
                f"{int(wrong[coming[:following]].sum())} | {apart[0] - apart[1]:+d} ± {sum(apart) ** 0.5:.0f} | "
                f"{np.nansum(learnt.score[learnt.order[:50]]):.0f} | {int(wrong[coming[:50]].sum())} | {seconds:.0f} |",
                flush=True,
            )


def decisions(task: Task, true: np.ndarray, decided: np.ndarray) -> Taught:
    """Let the true labels decide on some positions."""
    given = task.train.labels
    seen = np.zeros(len(given), dtype=bool)
    seen[decided] = True
    wrong = np.where(seen, (given != true).astype(float), np.nan)
    return Taught(seen, given, np.where(seen, true, given), wrong, np.zeros(len(given), dtype=bool))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the cases are")
    parser.add_argument("sets", nargs="*", default=list(SETS))
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short=7", "HEAD"], cwd=HERE, capture_output=True, text=True)
    print("# Decisions about labels: an estimate to rely on, and a list that learns\n")
    print("- Command: `python bench/labels_decisions.py --work FOLDER`")
    print("- Machine: 2 cores of a shared x86 machine, no GPU")
    print(f"- Recorded at commit: `{commit.stdout.strip()}`")
    found = {}
    for name in arguments.sets:
        case, folder = replace({**CASES, **MORE}[name], folds=False), arguments.work / f"{name}-0"
        prepare(case, 0, folder)
        write_project(folder, case.data, case.net, test=False)
        with contextlib.chdir(folder):
            (task,) = load_tasks(load_config(Path("influence.yaml")))
            result = find_mislabels([task], terminal=Terminal(quiet=True))
        found[name] = result, np.load(folder / "true.npy") != task.train.labels, task
    sampled_table(found)
    taught_table(found, arguments.work.resolve())


if __name__ == "__main__":
    main()
