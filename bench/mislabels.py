"""How well, and how fast, the signals of `influence mislabels` find wrong labels that are known.

    make bench-mislabels                                  (half an hour, after two hours of training)
    python bench/mislabels.py --work FOLDER [CASE ...]    the tables of bench/results/mislabels.md, for FOLDER's cases

For each case of bench/label_noise.py it runs the command with --signals --truth on its folder, and reads the file of
the run. --time all measures the steps on 60,000 images instead, --rescore prints from the files that are there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from label_noise import CASES, read, usual
from public_data import need

SHOWN = (
    ("combined", "default"),
    ("pred-probs", "five trainings"),
    ("loss", "loss"),
    ("readout", "readout"),
    ("neighbours", "neighbours"),
    ("logistic", "logistic"),
    ("margin", "margin"),
    ("self-influence", "self-influence"),
    ("gradient-norm", "gradient norm"),
    ("test-influence", "test influence"),
)
# Of the natural errors, how many of the first are looked at.
CUTS = (50, 100, 275)
FORWARD = ("combined", "loss", "readout", "neighbours", "logistic", "margin")


def write_project(folder: Path, data: str, net: str, test: bool) -> None:
    """Write the influence.yaml of a case."""
    project = f"{HERE.resolve()}/label_noise_project.py"
    config: dict[str, Any] = {
        "model": {
            "factory": f"{project}:build",
            "args": {"net": net},
            "checkpoint": "model.pt",
        },
        "train": {"dataset": f"{project}:Images", "args": {"file": "data.npz"}},
        "gradients": {"store": "influence.h5"},
    }
    if test:
        images, labels = read(data, "test")
        np.savez(folder / "test.npz", x=images, y=labels)
        config["test"] = {"dataset": f"{project}:Images", "args": {"file": "test.npz"}}
    (folder / "influence.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def run(folder: Path, name: str, *words: str) -> dict[str, Any]:
    """Run the command in a folder and give the file of the run."""
    command = [sys.executable, "-W", "ignore", "-m", "influence_cli", "mislabels", "-q", "-o", f"{name}.csv", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr[-2000:]}")
    return dict(json.loads((folder / f"{name}.csv.run.json").read_text()))


def measure(name: str, seed: int, work: Path, *, again: bool) -> dict[str, Any] | None:
    """Run one case, or take the run that is there; None where the case was not trained."""
    folder, case = work / f"{name}-{seed}", CASES[name]
    if not (folder / "case.json").exists() or (case.folds and not (folder / "folds.npy").exists()):
        return None
    write_project(folder, case.data, case.net, test=case.data == "fashion-mnist")
    trained = json.loads((folder / "case.json").read_text())
    if again or not (folder / "default.csv.run.json").exists():
        trained["default"] = run(folder, "default")
        words = ["--pred-probs", "folds.npy"] if case.folds else []
        if case.noise == "none":
            trained["all"] = trained["default"]
        else:
            np.save(folder / "truth.npy", np.load(folder / "true.npy"))
            trained["all"] = run(folder, "all", "--signals", "--truth", "truth.npy", *words)
    for kind in ("default", "all"):
        path = folder / f"{kind}.csv.run.json"
        if path.exists():
            trained[kind] = json.loads(path.read_text())
    return trained


def quality_table(work: Path, names: list[str], *, again: bool) -> None:
    """Print AP, AUROC and right suggestions of every signal, means over the seeds with their standard error."""
    for name in names:
        case = CASES[name]
        found = [one for seed in range(case.seeds) if (one := measure(name, seed, work, again=again)) is not None]
        if not found:
            continue
        noise = "as it is" if case.noise == "none" else f"{case.noise} {case.rate:.0%}".replace(" 0%", "")
        rates = [one["default"]["noise"]["rate"] for one in found]
        print(
            f"\n### {name}: {case.data}, {case.count:,} images, {noise}, {case.net}, {case.epochs} epochs\n", flush=True
        )
        seconds = np.mean([one["default"]["seconds"] for one in found])
        training = np.mean([one["train_seconds"] for one in found])
        line = f"{len(found)} seeds; training {training:.0f} s, default command {seconds:.0f} s"
        if case.folds:
            line += f", five trainings {np.mean([one['fold_seconds'] for one in found]):.0f} s"
        line += f"; estimated noise {np.mean(rates):.1%}"
        if case.noise != "none":
            wrong = [
                np.mean(np.load(work / f"{name}-{seed}" / "true.npy") != given(work, name, seed))
                for seed in range(len(found))
            ]
            memorised = np.mean([one["all"]["memorised_share"] for one in found])
            line += f" (true {np.mean(wrong):.1%}), errors memorised {memorised:.0%}"
        print(line + "\n")
        if case.noise == "none":
            continue
        print("| signal | AP | AUROC | found at 10% | suggested right |\n|---|---|---|---|---|")
        for signal, title in SHOWN:
            rows = [q for one in found for q in one["all"]["truth"] if q["signal"] == signal]
            if rows:
                cells = [spread([q["average_precision"] for q in rows]), spread([q["auroc"] for q in rows])]
                cells.append(f"{np.mean([q['found'][2] for q in rows]):.3f}")
                right = [q["suggested"] for q in rows if q["suggested"] is not None]
                cells.append(f"{np.mean(right):.3f}" if right else "–")
                print(f"| {title} | " + " | ".join(cells) + " |")


def given(work: Path, name: str, seed: int) -> np.ndarray:
    """Read the labels of a case as given."""
    with np.load(work / f"{name}-{seed}" / "data.npz") as data:
        return np.asarray(data["y"])


def spread(values: list[float]) -> str:
    """Write a mean, and its 95% interval where there are several values."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    # Student's t at 97.5% for one to nine degrees of freedom.
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[min(len(values) - 2, 8)]
    return f"{np.mean(values):.3f} ± {t * np.std(values, ddof=1) / len(values) ** 0.5:.3f}"


def natural_errors(work: Path) -> None:
    """Print how many validated label errors are among the first, and the precision of those that were reviewed."""
    print("\n### Natural errors, --on test\n")
    print(
        "| set, model | signal | " + " | ".join(f"first {cut}" for cut in CUTS) + " |\n|---|---|" + "---|" * len(CUTS)
    )
    folders = [work / f"mnist-test-{seed}" for seed in range(CASES["mnist-test"].seeds)]
    folders = [folder for folder in folders if (folder / "case.json").exists()]
    for folder in folders:
        write_project(folder, "mnist", "cnn", test=True)
    foreign = work / "cifar10-resnet20"
    write_foreign(foreign)
    for data, model, own in (
        ("mnist", f"CNN, 3 epochs, mean of {len(folders)}", folders),
        ("cifar10", "ResNet-20 from elsewhere", [foreign]),
    ):
        review = json.loads((need("label_errors") / f"{data}_test.json").read_text())
        errors = np.array([item["index"] for item in review["items"] if item["is_error"]])
        looked = np.array([item["index"] for item in review["items"]])
        orders = [test_orders(folder) for folder in own]
        for signal, title in SHOWN:
            if signal not in FORWARD:
                continue
            cells = []
            for cut in CUTS:
                hits = [np.isin(errors, found[signal][:cut]).sum() for found in orders]
                seen = [np.isin(looked, found[signal][:cut]).sum() for found in orders]
                cells.append(f"{np.mean(hits):.1f} of {len(errors)} ({np.sum(hits) / max(1, np.sum(seen)):.2f})")
            print(f"| {data}, {model} | {title} | " + " | ".join(cells) + " |", flush=True)


def test_orders(folder: Path) -> dict[str, np.ndarray]:
    """Order a test set by every signal that needs no gradient."""
    from influence_cli import Terminal, find_mislabels, load_config, load_tasks
    from influence_cli.mislabels.signals import SignalChoice

    with contextlib.chdir(folder):
        config = load_config(Path("influence.yaml"))
        found = find_mislabels(
            load_tasks(config), on="test", choice=SignalChoice(wanted=FORWARD), terminal=Terminal(quiet=True)
        )
    indices = found.facts.indices
    return {name: indices[np.lexsort((indices, -values))] for name, values in found.signals.items()}


def write_foreign(folder: Path) -> None:
    """Write the project of the ResNet-20 that came with its own weights: configs/cifar10_resnet20.yaml's."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        images, labels = read("cifar10", part)
        np.savez(folder / f"{part}.npz", x=images, y=labels)
    models, project = (
        HERE.parent.resolve() / "configs" / "models.py",
        f"{HERE.resolve()}/label_noise_project.py:ImageNetImages",
    )
    config = {
        "model": {"factory": f"{models}:resnet20", "checkpoint": str(need("weights") / "resnet20-12fca82f.th")},
        "train": {"dataset": project, "args": {"file": "train.npz"}},
        "test": {"dataset": project, "args": {"file": "test.npz"}},
    }
    (folder / "influence.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def steps(folder: Path, everything: bool) -> None:
    """Print the seconds of every step on one case, in forward passes and in forward and backward passes."""
    from influence_cli.config.load import load_config
    from influence_cli.data.batches import read_batches
    from influence_cli.evidence.activations import activations
    from influence_cli.evidence.neighbours import nearest, vote
    from influence_cli.evidence.readout import leave_one_out
    from influence_cli.mislabels.find import find_mislabels
    from influence_cli.mislabels.signals import SignalChoice, wanted_signals
    from influence_cli.model.task import load_tasks, measure_loading
    from influence_cli.precompute.prepare import prepare_all
    from influence_cli.runtime.terminal import Terminal
    from influence_cli.solvers.eigen import eigenpairs

    with contextlib.chdir(folder):
        config = load_config(Path("influence.yaml"))
        (task,) = load_tasks(config)
        split, quiet = task.train, Terminal(quiet=True)
        seconds: dict[str, float] = {}

        def timed(what: str, work: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            result = work()
            seconds[what] = time.perf_counter() - started
            return result

        measure_loading(task, quiet)

        def batches() -> Any:
            return read_batches(split, split.indices, 256, task.loading)

        def forward() -> None:
            with torch.no_grad():
                for batch in batches():
                    task.model(batch.inputs)

        def both() -> None:
            for batch in batches():
                task.model.zero_grad()
                task.loss(task.model(batch.inputs), batch.targets).mean().backward()

        forward()
        timed("one forward pass", forward)
        timed("one forward and backward pass (U)", both)
        task.model.zero_grad(set_to_none=True)
        found = timed("activations", lambda: activations(task.model, batches(), task.device))
        targets = torch.from_numpy(found.targets)
        readout = timed("readout", lambda: leave_one_out(found.hidden, targets, len(task.classes)))
        width = found.hidden.shape[1]
        square = torch.cov(torch.randn(width, 2 * width, dtype=torch.float64))[None]
        timed(f"of it the eigendecomposition ({width} wide)", lambda: eigenpairs(square))
        rows, near = timed("neighbours", lambda: nearest(readout.components))
        timed("vote", lambda: vote(rows, near, targets, len(task.classes)))
        timed("default, whole", lambda: find_mislabels([task], [], terminal=quiet))
        if everything:
            Path("influence.h5").unlink(missing_ok=True)
            wanted = wanted_signals(
                "combined",
                extent="all",
                on="train",
                checkpoints=1,
                tests=task.test is not None,
                solves=False,
                probabilities=False,
            )
            started = time.perf_counter()
            stores = prepare_all(config, [task], quiet)
            seconds["all signals: curvature and store"] = time.perf_counter() - started
            find_mislabels([task], stores, choice=SignalChoice(wanted=wanted), terminal=quiet)
            seconds["all signals, whole"] = time.perf_counter() - started
    print(f"\n### Seconds on {folder.name}, {len(split):,} images, {torch.get_num_threads()} threads\n")
    print("| step | seconds | forward passes | U |\n|---|---|---|---|")
    forward_s, both_s = seconds["one forward pass"], seconds["one forward and backward pass (U)"]
    for what, taken in seconds.items():
        print(f"| {what} | {taken:.1f} | {taken / forward_s:.2f} | {taken / both_s:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where bench/label_noise.py put the cases")
    parser.add_argument("--time", choices=("default", "all"), help="measure the steps on fashion-60k instead")
    parser.add_argument("--rescore", action="store_true", help="run again what was run before")
    parser.add_argument("cases", nargs="*", help="NAME; natural for the test sets")
    arguments = parser.parse_args()
    if arguments.time:
        write_project(arguments.work / "fashion-60k-0", "fashion-mnist", "wide", test=True)
        steps(arguments.work / "fashion-60k-0", arguments.time == "all")
        return
    names = arguments.cases or [*(name for name in usual() if name != "mnist-test"), "natural"]
    quality_table(arguments.work, [name for name in names if name in CASES], again=arguments.rescore)
    if "natural" in names:
        natural_errors(arguments.work)


if __name__ == "__main__":
    main()
