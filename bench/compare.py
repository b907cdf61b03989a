"""Side by side with the peers: the same checkpoint, data and machine, one run, and ratios.

    make bench                    (two hours and 28 GB the first time, for the peers' environments)
    python bench/compare.py --envs FOLDER --work FOLDER [--cases cnn-10k,resnet18-2k] [--only kronfluence] [--install]

Cases: cnn-10k and cnn-60k, Fashion-MNIST with the demo's CNN (55,338 parameters) and 10% of the labels flipped;
resnet18-2k, torchvision's ResNet-18 on 2,000 CIFAR-10 images of 32 × 32. Each peer runs in a virtual environment of its
own (bench/peers/run.py); influence runs first and last, so that a drift of the machine shows. Seconds are in-process;
1 U is one plain forward and backward over the training images, measured by each process itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE / "peers"))
from common import build_model, read_fashion_mnist, read_mosaic
from public_data import need

from influence_cli.metrics import average_precision

CASES = {"cnn-10k": ("cnn", 10_000), "cnn-60k": ("cnn", 60_000), "resnet18-2k": ("resnet18", 2_000)}
COLUMNS = ("U", "fit", "self", "tests_1", "tests_10", "tests_100", "second_100")


def make_case(folder: Path, name: str) -> None:
    """Write a case: images, labels with flips, a model trained a little, 100 + 100 test images."""
    if (folder / "case.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    kind, count = CASES[name]
    generator = np.random.default_rng(0)
    (x, y), (test_x, test_y) = fashion() if kind == "cnn" else cifar()
    chosen = generator.permutation(len(x))[:count]
    x, y = x[chosen], y[chosen].copy()
    flipped = np.sort(generator.choice(count, count // 10, replace=False))
    y[flipped] = (y[flipped] + generator.integers(1, 10, len(flipped))) % 10
    picked = generator.permutation(len(test_x))[:200]
    np.savez(folder / "train.npz", x=x, y=y, flipped=flipped)
    first, second = picked[:100], picked[100:]
    np.savez(folder / "test.npz", x=test_x[first], y=test_y[first], x2=test_x[second], y2=test_y[second])
    torch.manual_seed(0)
    model = train(build_model(kind), torch.from_numpy(x), torch.from_numpy(y), epochs=10 if count == 10_000 else 3)
    torch.save(model.state_dict(), folder / "model.pt")
    case = {"name": name, "model": kind, "train": count, "tests": [1, 10, 100], "threads": torch.get_num_threads()}
    (folder / "case.json").write_text(json.dumps(case) + "\n")


def fashion() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Read Fashion-MNIST, normalised."""
    sides = []
    for part in ("train", "t10k"):
        images, labels = read_fashion_mnist(need("fashion-mnist") / "FashionMNIST" / "raw", part)
        sides.append(
            (((images / np.float32(255) - 0.286) / 0.353)[:, None].astype(np.float32), labels.astype(np.int64))
        )
    return sides[0], sides[1]


def cifar() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Read the first batch of CIFAR-10 and its test images from the mosaics, normalised."""
    folder, sides = need("cifar10"), []
    for part, labels in (("data_batch_1", "train_labels"), ("test_batch", "test_labels")):
        tiles = read_mosaic(folder / f"{part}.webp")
        x = ((tiles / np.float32(255) - 0.47) / 0.25).transpose(0, 3, 1, 2)
        y = np.load(folder / f"{labels}.npy")[: len(x)].astype(np.int64)
        sides.append((np.ascontiguousarray(x, dtype=np.float32)[: len(y)], y))
    return sides[0], sides[1]


def train(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    epochs: int,
    vary: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    after_epoch: Callable[[int], None] = lambda _: None,
) -> nn.Module:
    """Minimise cross-entropy by Adam with a falling rate, seeded; ``vary`` changes the images of a batch.

    It runs where model, images and labels are. ``after_epoch`` is told how many epochs are done.
    """
    steps = epochs * -(-len(x) // 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=x.is_cuda)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    if x.is_cuda:
        model.to(memory_format=torch.channels_last)
    for epoch in range(epochs):
        for part in torch.randperm(len(x)).to(x.device).split(128):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(vary(x[part])), y[part]).backward()
            optimizer.step()
            schedule.step()
        after_epoch(epoch + 1)
    return model.eval()


def ours(case: Path, out: Path) -> dict[str, Any]:
    """Run influence on a case."""
    log = out.with_suffix(".log")
    command = [sys.executable, "-W", "ignore", str(HERE / "peers" / "time_influence.py"), str(case), str(out)]
    started = time.perf_counter()
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "--scores", str(out.with_suffix(".npz"))], stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(log.read_text()[-2000:])
    return dict(json.loads(out.read_text())) | {"command_seconds": time.perf_counter() - started}


def table(case: Path, records: list[tuple[str, dict[str, Any]]]) -> None:
    """Print the seconds of every tool, also in U; its whole process has all methods, the imports and U itself in it."""
    flipped = np.load(case / "train.npz")["flipped"]
    truth = np.zeros(CASES[case.name][1], dtype=bool)
    truth[flipped] = True
    print(f"\n## {case.name}\n")
    print("| tool, method | " + " | ".join(COLUMNS) + " | AP of self | peak | disk | whole process |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    for label, record in records:
        unit = next((s["seconds"] for s in record["steps"] if s["step"] == "U"), None)
        methods = dict.fromkeys(s["method"] for s in record["steps"] if s["method"] != "torch")
        if record.get("error"):
            print(f"| {label} | {record['error']} |" + " |" * (len(COLUMNS) + 3))
        for method in methods:
            steps = {s["step"]: s for s in record["steps"] if s["method"] == method}
            cells = [cell(steps.get(column), unit) if column != "U" else f"{unit:.2f} s" for column in COLUMNS]
            disk = max((s.get("disk_bytes", 0) for s in steps.values()), default=0)
            precision = self_precision(record, method, truth)
            peak = record.get("peak_bytes", 0) / 1e9
            row = [f"{label}, {method}", *cells, precision, f"{peak:.1f} GB", f"{disk / 1e6:,.0f} MB"]
            print(f"| {' | '.join(row)} | {record['command_seconds']:.0f} s |")


def cell(step: dict[str, Any] | None, unit: float | None) -> str:
    """Write a step: seconds and U, a limit, or why there is none."""
    if step is None:
        return ""
    seconds = step.get("seconds")
    if isinstance(seconds, int | float) and unit:
        return f"{seconds:.2f} s = {seconds / unit:.2f} U"
    if isinstance(seconds, str):
        more = f", extrapolated {step['extrapolated']:.0f} s" if "extrapolated" in step else ""
        return seconds + more
    return str(step.get("unsupported") or step.get("error") or "")[:80]


def self_precision(record: dict[str, Any], method: str, truth: np.ndarray) -> str:
    """Give the average precision of the saved self-influence on the flipped labels."""
    path = record.get("scores_file")
    if path is None or not Path(path).exists():
        return ""
    with np.load(path) as arrays:
        name = f"{method}_self"
        return f"{average_precision(arrays[name], truth):.3f}" if name in arrays else ""


def main() -> None:
    """Make the cases, run everything, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="folder of the peers' virtual environments")
    parser.add_argument("--work", type=Path, required=True, help="folder for cases and records")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--only", default="kronfluence,captum,pydvl,traker,dattri", help="peers to run; none: no peer")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--keep", action="store_true", help="take over the peers' records that are there")
    words = parser.parse_args()
    peers = [] if words.only == "none" else words.only.split(",")
    for name in words.cases.split(","):
        case, out = (words.work / name).resolve(), (words.work / f"{name}-records").resolve()
        make_case(case, name)
        out.mkdir(exist_ok=True)
        records = [("influence", ours(case, out / "influence.json") | {"scores_file": str(out / "influence.npz")})]
        missing = [peer for peer in peers if not (words.keep and (out / f"{peer}.json").exists())]
        if missing:
            command = [sys.executable, str(HERE / "peers" / "run.py"), "--envs", str(words.envs), "--case", str(case)]
            command += ["--out", str(out), "--only", ",".join(missing), "--scores", *["--install"] * words.install]
            subprocess.run(command, check=True, stdout=sys.stderr)
        if peers:
            for peer in peers:
                record = json.loads((out / f"{peer}.json").read_text())
                records.append(
                    (f"{peer} {record.get('version', '')}", record | {"scores_file": str(out / f"{peer}.npz")})
                )
            again = ours(case, out / "influence_again.json") | {"scores_file": str(out / "influence_again.npz")}
            records.append(("influence, again", again))
        table(case, records)
        steps = [s for s in records[0][1]["steps"] if s["method"] != "torch"]
        unit = next(s["seconds"] for s in records[0][1]["steps"] if s["step"] == "U")
        print("\n| step of influence | seconds | U |\n|---|---|---|")
        for step in steps:
            if isinstance(step.get("seconds"), int | float):
                print(f"| {step['method']}: {step['step']} | {step['seconds']:.2f} | {step['seconds'] / unit:.2f} |")
            elif "overlap" in step:
                print(f"| {step['method']}: {step['step']} | {step['overlap']:.0%} | |")


if __name__ == "__main__":
    main()
