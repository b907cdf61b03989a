"""What does each checkpoint of a run buy, and how should they be put together? `influence verify --lds`, several times.

    python bench/ensembles.py --work build/ensembles [--epochs 3]

2,000 images of Fashion-MNIST (10% of their labels flipped), the demo's CNN by SGD with momentum, six checkpoints of one
run and five other runs of the same recipe; 40 random halves, trained on once each; 100 test images. Then the linear
datamodeling score of EK-FAC averaged over the checkpoints of the run and over independent models, of TracIn and of
SOURCE, by one checkpoint to six. Of 12 epochs (the default) little is left to learn; 3 end far from a minimum, where
the last checkpoint alone should know least. Nothing is stored but the curvature (--on-the-fly), so that all coordinates
count. Eight minutes on a core of its own. Intervals are 95%, by a bootstrap over halves and test images, of the same
draws everywhere.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import lds_retrain

from influence_cli.config.load import load_config
from influence_cli.model.task import load_tasks
from influence_cli.retrain.lds import Datamodeling, datamodeling_score
from influence_cli.retrain.random_subsets import LdsPlan
from influence_cli.retrain.retraining import Retraining
from influence_cli.runtime.terminal import Terminal

N, TESTS, SUBSETS, RUNS, CHECKPOINTS = 2_000, 100, 40, 6, 6
BATCH, PEAK, MOMENTUM, L2 = 64, 0.03, 0.9, 1e-3
CONFIG = """
model:
  factory: {file}:build
  checkpoint: [{checkpoints}]
  ensemble: {ensemble}
  learning_rates: [{rates}]
  steps: {steps}
training: {{factory: {file}:train, args: {{epochs: {epochs}}}}}
l2: {l2}
train: {{dataset: {file}:Images, args: {{part: train}}}}
test: {{dataset: {file}:Images, args: {{part: test}}}}
"""


class Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The training images, some of their labels flipped, or the first 1,000 test images."""

    def __init__(self, part: str) -> None:
        if part == "train":
            choice = lds_retrain.choose(lds_retrain.DATA, seed=0)
            some = np.random.default_rng(0).choice(len(choice.given), N, replace=False)
            self.x = lds_retrain.read_inputs(lds_retrain.DATA, "train", choice.train_indices[some])
            self.targets = choice.given[some].tolist()
        else:
            self.x = lds_retrain.read_inputs(lds_retrain.DATA, "t10k", slice(0, 1_000))
            self.targets = lds_retrain.read(lds_retrain.DATA, "t10k", "labels")[:1_000].tolist()
        self.classes = [str(number) for number in range(lds_retrain.CLASSES)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


def build() -> nn.Module:
    """Make the demo's CNN."""
    return lds_retrain.RECIPES["cnn"].build()


def rate_at(step: int, steps: int) -> float:
    """Give the rate of a step: it falls to 0 along a cosine."""
    return PEAK * (1 + np.cos(np.pi * step / steps)) / 2


def train(
    model: nn.Module,
    data: Sequence[tuple[Tensor, int]],
    *,
    l2: float,
    seed: int,
    epochs: int,
    progress: Callable[[int, int], None] = lambda *_: None,
    keep: Callable[[int], None] = lambda _: None,
) -> nn.Module:
    """Train by SGD with momentum; ``keep`` is told the steps that have been taken."""
    x, y = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    model = model.train().to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=PEAK, momentum=MOMENTUM, weight_decay=l2)
    steps, step = epochs * -(-len(y) // BATCH), 0
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for batch in torch.randperm(len(y), generator=order).split(BATCH):
            optimizer.param_groups[0]["lr"] = rate_at(step, steps)
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            keep(step)
        progress(epoch + 1, epochs)
    return model.eval().to(memory_format=torch.contiguous_format)


def make_project(work: Path, epochs: int) -> None:
    """Train the run and the other runs, and write the configs."""
    work.mkdir(parents=True, exist_ok=True)
    data = list(Images("train"))  # type: ignore[call-overload]
    steps = epochs * -(-N // BATCH)
    every = steps // CHECKPOINTS

    def save(model: nn.Module, name: str) -> None:
        torch.save({key: value.contiguous() for key, value in model.state_dict().items()}, work / name)

    for run in range(RUNS):
        if (work / f"run-{run}.pt").exists():
            continue
        torch.manual_seed(run)
        model = build()

        def keep(step: int, model: nn.Module = model, run: int = run) -> None:
            if run == 0 and step % every == 0:
                save(model, f"step-{step:03d}.pt")

        save(train(model, data, l2=L2, seed=run, epochs=epochs, keep=keep), f"run-{run}.pt")
        print(f"trained run {run}", file=sys.stderr)
    kept = [f"step-{every * (1 + number):03d}.pt" for number in range(CHECKPOINTS)]
    rates = [
        np.mean([rate_at(step, steps) for step in range(every * number, every * (number + 1))]) / (1 - MOMENTUM)
        for number in range(CHECKPOINTS)
    ]
    lists = {
        # The last checkpoint first: one is then the same model everywhere.
        "mean": ("mean", kept[::-1]),
        "models": ("mean", [f"run-{run}.pt" for run in range(RUNS)]),
        "tracin": ("tracin", kept),
        "source": ("source", kept),
    }
    for name, (ensemble, files) in lists.items():
        text = CONFIG.format(
            file=os.path.relpath(__file__, work),
            checkpoints=", ".join(files),
            ensemble=ensemble,
            rates=", ".join(f"{rate:.6g}" for rate in rates),
            steps=every,
            epochs=epochs,
            l2=L2,
        )
        (work / f"{name}.yaml").write_text(text)


def main() -> None:
    """Train what is missing, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=12)
    words = parser.parse_args()
    work: Path = words.work / f"{words.epochs}-epochs"
    torch.set_num_threads(1)
    started = time.process_time()
    make_project(work, words.epochs)
    cases = {
        "EK-FAC, mean of the run": ("mean", "epochs"),
        "EK-FAC, mean of independent models": ("models", "models"),
        "TracIn": ("tracin", "identity"),
        "SOURCE": ("source", "source"),
        "SOURCE, 3 segments": ("source", "source"),
    }
    found: dict[str, Datamodeling] = {}
    for name, (config_name, store) in cases.items():
        values = [f"gradients.store={work / store}.h5"]
        values += ["curvature.method=ekfac"] if config_name != "tracin" else []
        values += ["model.segments=3"] if "segments" in name else []
        config = load_config(work / f"{config_name}.yaml", values)
        # The retrainings lie beside the store of this config; all the others take them from there.
        base = load_config(work / "mean.yaml", [f"gradients.store={work / 'influence'}.h5"])
        found[name] = datamodeling_score(
            {name: config}, load_tasks(config), retraining=Retraining(base), plan=LdsPlan(SUBSETS, 1, TESTS),
            on_the_fly=True, terminal=Terminal(),
        )  # fmt: skip
        print(f"{name}: {time.process_time() - started:.0f} CPU seconds so far", file=sys.stderr)
    report(found)
    print(f"\n{time.process_time() - started:.0f} CPU seconds")


def interval(value: float, draws: np.ndarray, sign: str = "") -> str:
    """Write a number and its interval."""
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{value:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def report(found: dict[str, Datamodeling]) -> None:
    """Print the scores by number of checkpoints, what each one adds, and the differences that are asked about."""
    names = list(found)
    print("\n| checkpoints | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for at in range(CHECKPOINTS):
        cells = [f"{found[name].mean(0, at)[0]:.3f}" for name in names]
        print(f"| {at + 1} | " + " | ".join(cells) + " |")
    print("\n| six less one | LDS, 95% |\n|---|---|")
    for name in names:
        own = found[name]
        value = float((own.scores[0, -1] - own.scores[0, 0]).mean())
        print(f"| {name} | {interval(value, own.draws[:, 0, -1] - own.draws[:, 0, 0], '+')} |")
    print("\n| with all checkpoints | LDS, 95% |\n|---|---|")
    for name in names:
        print(f"| {name} | {interval(found[name].mean(0)[0], found[name].draws[:, 0, -1])} |")
    value = found["SOURCE"].mean(0)[0] - found[names[0]].mean(0, 0)[0]
    draws = found["SOURCE"].draws[:, 0, -1] - found[names[0]].draws[:, 0, 0]
    print(f"| SOURCE − EK-FAC of the last checkpoint | {interval(value, draws, '+')} |")
    for left, right in (("SOURCE", names[0]), ("SOURCE", "TracIn"), ("SOURCE", names[1]), ("SOURCE", names[4])):
        a, b = found[left], found[right]
        value = a.mean(0)[0] - b.mean(0)[0]
        print(f"| {left} − {right} | {interval(value, a.draws[:, 0, -1] - b.draws[:, 0, -1], '+')} |")


if __name__ == "__main__":
    main()
