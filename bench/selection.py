"""Which images can go? Dropping 5, 10 and 20% by replay, by mislabels, by loss and at random, trained again.

    python bench/selection.py --work FOLDER [--images 2000] [--seeds 3] [--epochs 20] [--data fashion-mnist|cifar10]

For each seed: as many images as --images with 10% wrong labels, a network trained on them by a recipe that answers
smoothly to its data (SGD, momentum .9, batch 250, GELU and average pooling), and its run replayed for the mean loss of
2,000 test images. What is left is trained on from another seed and another start, and measured on 8,000 other test
images. Then the same for the network of the demo as it is (ReLU, max-pooling, Adam, batch 64, its own function; for
cifar10 ResNet-8), where the order is that of the proxy. CIFAR-10 has its own labels, and random ones beside them.

Everything is kept in --work: the same command resumes. The table goes to bench/results/replay_selection.md with --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE / "peers"))
from label_noise import read
from selection_project import Images

from influence_cli import Retraining, find_mislabels, load_config, load_tasks
from influence_cli.config.schema import Config
from influence_cli.data.split import take
from influence_cli.influence.example_facts import passed_facts
from influence_cli.influence.self_influence import harm_to_tests
from influence_cli.model.task import Task
from influence_cli.precompute.prepared import Prepared
from influence_cli.replay.prepare import prepare_run
from influence_cli.replay.proxy import proxy_config, proxy_task
from influence_cli.replay.trained import train_recorded
from influence_cli.replay.verdict import measure_verdict
from influence_cli.retrain.recipe_training import recipe_training
from influence_cli.retrain.subsets import order_by
from influence_cli.retrain.training import Training, load_training, train, training_pairs
from influence_cli.runtime.terminal import Terminal

NOISE = 0.1
SAME = "same share of every class"
CHOSEN = 2_000
# By 97.5% of Student's t: for 2, 3, … seeds.
STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
CONFIG = """
model: {{factory: "./selection_project.py:{factory}"}}
training: {{{training}}}
l2: {l2}
seed: {seed}
device: auto
train: {{dataset: "./selection_project.py:Images", args: {{file: {folder}/train.npz}}}}
test: {{dataset: "./selection_project.py:Images", args: {{file: {folder}/chosen.npz}}}}
gradients: {{store: {folder}/{net}.h5}}
"""


@dataclass(frozen=True)
class Case:
    """One seed of the benchmark.

    Attributes:
        data: ``fashion-mnist`` or ``cifar10``.
        images: training images.
        epochs: of the smooth recipe.
        seed: of images, wrong labels, run, and the trainings on what is left.
        folder: where all of it is kept.
        shares: that are dropped.
        verdict: measure whether the run of this seed, or the proxy's, answers smoothly to its data.
    """

    data: str
    images: int
    epochs: int
    seed: int
    folder: Path
    shares: tuple[float, ...]
    verdict: bool

    def write(self) -> None:
        """Draw the images: training with wrong labels, test images to choose by, and others to measure on."""
        if (self.folder / "measured.npz").exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(self.seed)
        x, true = read(self.data, "train")
        rows = generator.permutation(len(x))[: self.images]
        given = true[rows].copy()
        wrong = generator.choice(self.images, round(NOISE * self.images), replace=False)
        given[wrong] = (given[wrong] + generator.integers(1, 10, len(wrong))) % 10
        np.savez(self.folder / "train.npz", x=x[rows], y=given)
        np.save(self.folder / "wrong.npy", wrong)
        x, y = read(self.data, "test")
        rows = generator.permutation(len(x))
        np.savez(self.folder / "chosen.npz", x=x[rows[:CHOSEN]], y=y[rows[:CHOSEN]])
        np.savez(self.folder / "measured.npz", x=x[rows[CHOSEN:]], y=y[rows[CHOSEN:]])

    def config(self, net: str) -> Config:
        """Write and load the config of the ``smooth`` network, of the demo's (``build``), or of ``resnet8``."""
        recipe = (
            f"recipe: {{optimizer: sgd, lr: 0.05, momentum: 0.9, weight_decay: 1e-3, schedule: cosine, batch: 250, "
            f"epochs: {self.epochs}, seed: {self.seed}}}"
        )
        training = recipe if net == "smooth" else 'factory: "./selection_project.py:train"'
        path = HERE / f".selection-{self.folder.name}-{net}.yaml"
        text = CONFIG.format(
            factory="smooth_colour" if net == "smooth" and self.data == "cifar10" else net,
            net=net,
            training=training,
            l2=0 if net == "smooth" else 1e-3,
            seed=self.seed,
            folder=self.folder.resolve(),
        )
        path.write_text(text)
        try:
            return load_config(path, [])
        finally:
            path.unlink()


def orders(prepared: Prepared, task: Task, name: str, seed: int) -> dict[str, np.ndarray]:
    """Order the training images by each way, first those that go: by replay over all classes, and per class."""
    usefulness = -harm_to_tests([prepared], [], Terminal(quiet=True), skip=False)
    losses, labels = passed_facts(task).losses.astype(np.float64), task.train.labels[task.train.indices]
    suspicious = find_mislabels([task]).order
    return {
        name: usefulness.argsort(kind="stable"),
        f"{name}, {SAME}": order_by("influence", usefulness, losses, labels, seed),
        "mislabels": suspicious,
        "loss": (-losses).argsort(kind="stable"),
        "random": np.random.default_rng(seed + 1_000).permutation(len(labels)),
    }


def outcome(config: Config, task: Task, training: Training, rows: np.ndarray, case: Case) -> list[float]:
    """Train on some rows from another seed and start, and give held-out loss, accuracy and the seconds."""
    started, seed = time.perf_counter(), 10_000 + case.seed
    pairs = training_pairs(take(task.train, task.train.indices[np.sort(rows)]))
    model = train(training, Retraining(config).fresh_model(seed, task.device), pairs, l2=task.objective.trainer_l2(),
                  seed=seed, what="what is left")  # fmt: skip
    seconds, measured = time.perf_counter() - started, Images(str(case.folder / "measured.npz"))
    with torch.no_grad():
        outputs = torch.cat([model(x.to(task.device)).cpu() for x in measured.x.split(500)])
    targets = torch.tensor(measured.targets)
    loss = nn.functional.cross_entropy(outputs, targets).item()
    return [loss, (outputs.argmax(dim=1) == targets).double().mean().item(), seconds]


def run(case: Case, net: str, kept: dict[str, list[float]], save: Callable[[], None]) -> None:
    """Measure all arms of a network that are missing."""
    case.write()
    config, terminal = case.config(net), Terminal()
    wanted = [f"{net}|all", *(f"{net}|{way}|{share}" for share in case.shares for way in ways(net))]
    if all(f"{case.seed}|{name}" in kept for name in wanted):
        return
    (task,) = load_tasks(config, trained=False)
    started = time.perf_counter()
    if net == "smooth":
        training, replaying, replayed_task = recipe_training(config, task), config, task
    else:
        training = load_training(config)
        model = train(training, task.model, training_pairs(task.train), l2=task.objective.trainer_l2(), seed=case.seed,
                      what="the run")  # fmt: skip
        task.model.load_state_dict(model.state_dict())
        started = time.perf_counter()
        replaying = proxy_config(config, task)
        replayed_task = proxy_task(replaying, task)
    replayed = train_recorded(replaying, replayed_task, terminal, "the run that is replayed")
    seconds = time.perf_counter() - started
    if case.verdict:
        verdict = measure_verdict(replayed, terminal)
        kept[f"{case.seed}|{net}|verdict"] = [verdict.agreement, verdict.slope]
        save()
    prepared = prepare_run(replaying, replayed, None, started)
    started = time.perf_counter()
    ordered = orders(prepared, task, ways(net)[0], case.seed)
    kept.setdefault(f"{case.seed}|{net}|seconds", [seconds, time.perf_counter() - started])
    wrong = set(np.load(case.folder / "wrong.npy").tolist())
    for name in wanted:
        key = f"{case.seed}|{name}"
        if key in kept:
            continue
        _, *rest = name.split("|")
        order = np.arange(case.images) if rest == ["all"] else ordered[rest[0]]
        count = 0 if rest == ["all"] else round(float(rest[1]) * case.images)
        caught = len(wrong & set(order[:count].tolist()))
        kept[key] = [*outcome(config, task, training, order[count:], case), caught]
        save()
        print(key, [round(number, 4) for number in kept[key]], flush=True)


def ways(net: str) -> list[str]:
    """Name the ways to choose, first that which is measured."""
    name = "replay" if net == "smooth" else "the proxy's replay"
    return [name, f"{name}, {SAME}", "mislabels", "loss", "random"]


def interval(values: list[float]) -> str:
    """Give the mean of paired differences with its 95% interval by Student's t."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return f"{mean:+.3f}"
    half = STUDENT[len(values)] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def table(net: str, seeds: int, shares: Sequence[float], kept: dict[str, list[float]]) -> list[str]:
    """Give a table: per way and share the held-out loss and accuracy, and both against all images, seed by seed."""
    done = [seed for seed in range(seeds) if f"{seed}|{net}|all" in kept]
    columns = ("dropped", "by", "seeds", "wrong labels", "held-out loss", "against all", "accuracy", "against all")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    base = [kept[f"{seed}|{net}|all"] for seed in done]
    means = np.mean(base, axis=0)
    lines.append(f"| 0% | all images | {len(done)} | | {means[0]:.3f} | | {means[1]:.1%} | |")
    for share in shares:
        for way in ways(net):
            some = [(kept.get(f"{seed}|{net}|{way}|{share}"), kept[f"{seed}|{net}|all"]) for seed in done]
            pairs = [(one, other) for one, other in some if one is not None]
            if not pairs:
                continue
            mean = np.mean([one for one, _ in pairs], axis=0)
            loss = interval([one[0] - other[0] for one, other in pairs])
            right = interval([100 * (one[1] - other[1]) for one, other in pairs])
            lines.append(
                f"| {share:.0%} | {way} | {len(pairs)} | {mean[3]:.0f} | {mean[0]:.3f} | {loss} | {mean[1]:.1%} "
                f"| {right} |"
            )
    every, shared = ways(net)[:2]
    differences = [
        kept[f"{seed}|{net}|{shared}|{share}"][0] - kept[f"{seed}|{net}|{every}|{share}"][0]
        for seed in done
        for share in shares
        if f"{seed}|{net}|{shared}|{share}" in kept
    ]
    mean, fewer = float(np.mean(differences)), sum(each < 0 for each in differences)
    lines += ["", f"The same share of every class has a lower held-out loss than all classes together in {fewer} of "
              f"{len(differences)} trainings, {mean:+.3f} on average."]  # fmt: skip
    if f"0|{net}|verdict" in kept:
        lines.append(f"The verdict on the replayed run: r {kept[f'0|{net}|verdict'][0]:.2f}.")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", default="fashion-mnist", choices=("fashion-mnist", "cifar10"))
    parser.add_argument("--images", type=int, default=2_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--net", default="smooth", choices=("smooth", "own"), help="own: the demo's, or ResNet-8")
    parser.add_argument("--shares", default="0.05,0.1,0.2", help="that are dropped")
    parser.add_argument("--verdict", action="store_true", help="measure whether the first seed's run is smooth")
    parser.add_argument("--table", action="store_true", help="train nothing: give the table of what is kept")
    parser.add_argument("--out", type=Path, help="where the tables go")
    given = parser.parse_args()
    file = given.work / f"{given.data}-{given.images}-{given.epochs}-{given.net}.json"
    kept: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    given.work.mkdir(parents=True, exist_ok=True)
    net = "smooth" if given.net == "smooth" else "build" if given.data == "fashion-mnist" else "resnet8"
    shares = tuple(float(share) for share in given.shares.split(","))

    def save() -> None:
        file.write_text(json.dumps(kept, indent=0) + "\n")

    for seed in range(0 if given.table else given.seeds):
        folder = given.work / f"{given.data}-{given.images}-{given.epochs}-{seed}"
        verdict = given.verdict and seed == 0
        run(Case(given.data, given.images, given.epochs, seed, folder, shares, verdict), net, kept, save)
    text = "\n".join(table(net, given.seeds, shares, kept))
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
