"""Does a GPU give what the CPU gives? The same checkpoints on both, every curvature method, every signal.

    python bench/devices.py --work FOLDER [NET ...]                       on a machine with a CUDA device
    python bench/devices.py --work FOLDER --sides cpu-float32 [NET ...]   elsewhere before it, FOLDER being copied then

A net is trained on the demo's images; then influence and self-influence (from a store and on the fly) and the signals
of mislabels are computed on each device, on the GPU also with TF32 and bfloat16. The tables have the relative error
‖b − a‖/‖a‖, the mean rank correlation over the test images, and the share of the ten most helpful and ten most harmful
images that are the same. EK-FAC and K-FAC draw labels from the model: a probability that is rounded otherwise may draw
another label.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from devices_project import Images, build

from influence_cli import Terminal, find_mislabels, load_config, load_tasks, prepare_all, rank_training
from influence_cli.influence.example_facts import TestFacts, training_facts
from influence_cli.influence.test_selection import Selected
from influence_cli.mislabels.signals import SignalChoice, wanted_signals
from influence_cli.ranking.rank import RankOptions

FLY = "on the fly"


def curvature(method: str, *more: str) -> list[str]:
    """Give the overrides of a method."""
    return [f"curvature.method={method}", *more]


# By net: its model, training images, epochs, test images, and the runs: a name and what overrides the config.
NETS: dict[str, tuple[str, int, int, int, dict[str, list[str]]]] = {
    "cnn": (
        "cnn",
        500,
        10,
        10,
        {
            "explicit": curvature("explicit", "gradients.layers=['0','9']"),
            "explicit, last layer": curvature("explicit", "gradients.layers=['9']"),
            "ekfac": curvature("ekfac"),
            f"ekfac {FLY}": curvature("ekfac"),
            "kfac": curvature("kfac"),
            "arnoldi": curvature("arnoldi"),
            f"arnoldi {FLY}": curvature("arnoldi"),
            "fisher": curvature("fisher"),
            "identity": curvature("identity"),
            f"identity {FLY}": curvature("identity"),
        },
    ),
    "cnn-small": (
        "cnn",
        128,
        15,
        3,
        {
            "explicit, Hessian": curvature("explicit", "curvature.matrix=hessian", "gradients.layers=['0','9']"),
            "cg": curvature("cg", "curvature.damping=0.03"),
            f"cg, Hessian {FLY}": curvature("cg", "curvature.matrix=hessian", "curvature.damping=3"),
            f"lissa {FLY}": curvature("lissa", "curvature.damping=0.3"),
        },
    ),
    "resnet18": (
        "resnet18",
        128,
        10,
        10,
        {
            "ekfac": curvature("ekfac", "gradients.budget=2GB"),
            f"ekfac {FLY}": curvature("ekfac"),
            f"kfac {FLY}": curvature("kfac"),
            f"identity {FLY}": curvature("identity"),
        },
    ),
    "attention": (
        "attention",
        300,
        20,
        10,
        {
            "ekfac": curvature("ekfac"),
            f"ekfac {FLY}": curvature("ekfac"),
            "kfac": curvature("kfac"),
            "arnoldi": curvature("arnoldi"),
            "identity": curvature("identity"),
        },
    ),
    "recurrent": (
        "recurrent",
        128,
        20,
        3,
        {"ekfac": curvature("ekfac"), "cg": curvature("cg", "curvature.damping=0.1")},
    ),
}
SIDES = ("cpu-float32", "cuda-float32", "cuda-tf32", "cuda-bf16")


def make(folder: Path, name: str) -> None:
    """Write a net's project, trained for a few epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, count, epochs, _, _ = NETS[name]
    project, colour = f"{HERE.resolve()}/devices_project.py", kind == "resnet18"
    if not (folder / "model.pt").exists():
        torch.save(trained(kind, Images(count, True, colour), epochs), folder / "model.pt")
    config = {
        "model": {"factory": f"{project}:build", "args": {"name": kind}, "checkpoint": "model.pt"},
        "l2": 1e-4,
        "train": {"dataset": f"{project}:Images", "args": {"count": count, "train": True, "colour": colour}},
        "test": {"dataset": f"{project}:Images", "args": {"count": 100, "train": False, "colour": colour}},
    }
    (folder / "influence.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def trained(kind: str, data: Images, epochs: int) -> dict[str, torch.Tensor]:
    """Train a net and give its weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, y = data.x.to(device), torch.tensor(data.targets, device=device)
    torch.manual_seed(0)
    model = build(kind).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x), device=device).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    return dict(model.cpu().state_dict())


class Kept:
    """Keeps all of influence[t, i]."""

    def __init__(self, n: int) -> None:
        self.scores, self._n = np.empty((0, n), np.float32), n

    def begin(self, tests: Sequence[TestFacts | None]) -> None:
        """Make room."""
        self._start = len(self.scores)
        self.scores = np.concatenate([self.scores, np.full((len(tests), self._n), np.nan, np.float32)])

    def add(self, where: slice, values: np.ndarray) -> None:
        """Take a piece."""
        self.scores[self._start :, where] = values


def compute(folder: Path, name: str, device: str, precision: str) -> None:
    """Run every method of a net on one device, and save what comes out."""
    out, seconds = folder / f"{device}-{precision}", {}
    out.mkdir(exist_ok=True)
    _, _, _, tests, runs = NETS[name]
    for number, (method, words) in enumerate(runs.items()):
        store, started = out / f"{number}.h5", time.perf_counter()
        store.unlink(missing_ok=True)
        arrays: dict[str, np.ndarray] = {}
        try:
            given = [f"gradients.store={store.name}", f"device={device}", f"precision={precision}", *words]
            with contextlib.chdir(out):
                arrays = run(folder / "influence.yaml", given, method, tests)
        except Exception as error:
            (out / f"{number}.error").write_text(f"{type(error).__name__}: {error}")
        store.unlink(missing_ok=True)
        seconds[method] = time.perf_counter() - started
        np.savez(out / f"{number}.npz", **arrays)
    (out / "seconds.json").write_text(json.dumps(seconds))


def run(config_file: Path, given: list[str], method: str, tests: int) -> dict[str, np.ndarray]:
    """Give influence of the first test images and every signal that the method has."""
    config, terminal = load_config(config_file, given), Terminal(quiet=True)
    tasks = load_tasks(config)
    stores = prepare_all(config, tasks, terminal, on_the_fly=FLY in method)
    split = tasks[0].test_split()
    selected = [Selected(index, None, int(split.labels[index])) for index in range(tests)]
    sink = Kept(len(tasks[0].train))
    for _ in rank_training(
        stores, selected, facts=training_facts(stores), terminal=terminal, options=RankOptions(sinks=[sink])
    ):
        pass
    solves = stores[0].choice.solves
    signals = {}
    if not solves:
        wanted = wanted_signals(
            "combined", extent="all", on="train", checkpoints=1, tests=True, solves=solves, probabilities=False
        )
        signals = find_mislabels(tasks, stores, choice=SignalChoice(wanted=wanted), terminal=terminal).signals
    return {"influence": sink.scores, **{name: values[None] for name, values in signals.items()}}


def compare(folder: Path, name: str, first: str, second: str) -> None:
    """Print how far the results of two runs are from each other."""
    one, two = (json.loads((folder / kind / "seconds.json").read_text()) for kind in (first, second))
    print(f"\n### {name}: {second} beside {first}\n")
    print("| method | influence: error | rank correlation | same top 10 | self-influence: error | rank correlation |")
    print("|---|---|---|---|---|---|")
    others: dict[str, list[tuple[float, float]]] = {}
    for number, method in enumerate(NETS[name][4]):
        errors = [path.read_text() for kind in (first, second) if (path := folder / kind / f"{number}.error").exists()]
        if errors:
            print(f"| {method} | {errors[0][:300]} |")
            continue
        with np.load(folder / first / f"{number}.npz") as a, np.load(folder / second / f"{number}.npz") as b:
            cells = [measure(a["influence"], b["influence"])]
            cells.append(measure(a["self-influence"], b["self-influence"])[:2] if "self-influence" in a else ())
            print(f"| {method} | " + " | ".join(f"{value:.3g}" for cell in cells for value in cell) + " |", flush=True)
            for signal in a.files:
                if signal not in ("influence", "self-influence"):
                    others.setdefault(signal, []).append(measure(a[signal], b[signal])[:2])
    print("\n| signal | largest error of all methods | smallest rank correlation |\n|---|---|---|")
    for signal, found in others.items():
        print(f"| {signal} | {max(e for e, _ in found):.2g} | {min(r for _, r in found):.5f} |")
    print(f"\nSeconds, {first}: {sum(one.values()):.0f}; {second}: {sum(two.values()):.0f}", flush=True)


def measure(a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    """Give relative error, mean Spearman correlation of the rows, and the share of the strongest that are the same."""
    error = float(np.linalg.norm(b.astype(np.float64) - a) / np.linalg.norm(a))
    ranks = [np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1] for x, y in zip(a, b, strict=True)]
    shares = []
    for sign in (1, -1):
        for x, y in zip(a, b, strict=True):
            shares.append(len(np.intersect1d((-sign * x).argsort()[:10], (-sign * y).argsort()[:10])) / 10)
    return error, float(np.mean(ranks)), float(np.mean(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where projects and results go")
    parser.add_argument("--sides", default=",".join(SIDES), help="what to compute; what is there is compared")
    parser.add_argument("nets", nargs="*", help=", ".join(NETS))
    words = parser.parse_args()
    work: Path = words.work.resolve()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"{machine}, torch {torch.__version__}", flush=True)
    for name in words.nets or NETS:
        make(work / name, name)
        for side in words.sides.split(","):
            device, precision = side.split("-")
            if precision == "float32" or name not in ("cnn-small", "recurrent"):
                compute(work / name, name, device, precision)
        base, *others = (side for side in SIDES if (work / name / side / "seconds.json").exists())
        for side in others:
            compare(work / name, name, base, side)


if __name__ == "__main__":
    main()
