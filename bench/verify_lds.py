"""Which estimate predicts retraining? `influence verify --lds` on Fashion-MNIST, beside kronfluence and TRAK.

    python bench/verify_lds.py --work build/verify-lds [--peers ENVS]

10,000 images (10% of their labels flipped), the demo's CNN, M = 100 random halves, each trained on twice (two processes
on one core each: 30 to 50 minutes, made once, resumable), 300 test images of the first 1,000. Then EK-FAC, conjugate
gradients on the GGN and ``identity`` on one checkpoint, EK-FAC at other λ, and what five checkpoints add. ENVS holds
the peers' environments, as bench/compare.py --install makes them; without it they are left out.

All intervals are 95%, by a bootstrap over subsets and test images; a difference is of the same draws.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import verify_lds_project as project

from influence_cli.config.load import load_config
from influence_cli.config.schema import Config
from influence_cli.curvature import damping
from influence_cli.metrics import bootstrap_lds, lds
from influence_cli.model.task import load_tasks
from influence_cli.retrain.lds import Datamodeling, datamodeling_score, left_out
from influence_cli.retrain.random_subsets import LdsPlan
from influence_cli.retrain.retraining import Retraining
from influence_cli.retrain.training import HALVES, half
from influence_cli.runtime.seeds import seed_of
from influence_cli.runtime.terminal import Terminal

MODELS, SUBSETS, REPEATS, TESTS = 5, 100, 2, 300
# Conjugate gradients stop at a residual that a rank correlation does not see.
TOLERANCE = 1e-3
MULTIPLES = (0.01, 0.1, 10.0, 100.0)
# λ of the exact matrix, in multiples of its ``auto``, to see what that is worth.
EXACT = (0.01, 0.1)
PEERS = ("kronfluence", "traker")
CONFIG = """
model: {{factory: {file}:build, checkpoint: [{checkpoints}]}}
training: {{factory: {file}:train}}
loss: cross_entropy
l2: 1e-4
train: {{dataset: {file}:Images, args: {{part: train}}}}
test: {{dataset: {file}:Images, args: {{part: test}}}}
"""


def make_project(work: Path) -> None:
    """Write the config, and train the checkpoints that are missing."""
    work.mkdir(parents=True, exist_ok=True)
    file = os.path.relpath(Path(project.__file__), work)
    for name, count in (("one.yaml", 1), ("five.yaml", MODELS)):
        checkpoints = ", ".join(f"model-{seed}.pt" for seed in range(count))
        (work / name).write_text(CONFIG.format(file=file, checkpoints=checkpoints))
    torch.set_num_threads(1)
    data = project.Images("train")
    for seed in range(MODELS):
        path = work / f"model-{seed}.pt"
        if path.exists():
            continue
        torch.manual_seed(seed)
        recipe = project.RECIPE
        model = project.lds_retrain.minimise(project.build(), recipe, data.x, torch.tensor(data.targets), seed)
        torch.save(model.state_dict(), path)
        print(f"trained {path.name}", file=sys.stderr)


def retrain(work: Path, processes: int) -> None:
    """Run the command, several times at once: they share the retrainings."""
    words = ["--lds", "--subsets", str(SUBSETS), "--repeats", str(REPEATS), "--tests", str(TESTS), "-c", "one.yaml"]
    command = [sys.executable, "-m", "influence_cli", "verify", *words, "--methods", "ekfac,identity"]
    print(" ".join(["influence", *command[3:]]), file=sys.stderr)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, "-o", f"verify-{n}.csv"], cwd=work, env=environment) for n in range(processes)
    ]
    if sum(process.wait() for process in running):
        sys.exit("influence verify failed")


def scores(work: Path, config: str, methods: dict[str, str], multiple: float = 1.0) -> Datamodeling:
    """Score methods by the retrainings that are there, λ of ``auto`` times ``multiple``."""
    terminal = Terminal()
    configs: dict[str, Config] = {}
    prefix = "influence" if config == "one.yaml" else "five"  # the command's own stores serve again
    for name, method in methods.items():
        values = [f"curvature.method={method}", f"gradients.store={work}/{prefix}.{method}.h5"]
        if method == "cg":
            values.append(f"curvature.tolerance={TOLERANCE}")
        configs[name] = load_config(work / config, values)
    own = damping.C, damping.C_EXACT
    damping.C, damping.C_EXACT = (multiple * value for value in own)
    try:
        base = load_config(work / config, [])
        return datamodeling_score(
            configs,
            load_tasks(base),
            retraining=Retraining(base),
            plan=LdsPlan(SUBSETS, REPEATS, TESTS),
            terminal=terminal,
        )
    finally:
        damping.C, damping.C_EXACT = own


def peers(work: Path, envs: Path, tests: np.ndarray) -> dict[str, np.ndarray]:
    """Have the peers score in their own environments: [tests, n] by method."""
    train, test = project.Images("train"), project.Images("test")
    targets = np.array(test.targets)[tests]
    np.savez(
        work / "case.npz", x=train.x.numpy(), y=np.array(train.targets), test_x=test.x.numpy()[tests], test_y=targets
    )
    found: dict[str, np.ndarray] = {}
    for peer in PEERS:
        if not (work / f"{peer}.npz").exists():
            script = Path(__file__).parent / "peers" / "score_lds.py"
            subprocess.run([envs / peer / "bin" / "python", script, peer, work.resolve()], check=True)
        with np.load(work / f"{peer}.npz") as file:
            found |= {name: file[name] for name in file.files}
    return found


def report(predicted: dict[str, np.ndarray], actual: np.ndarray) -> None:
    """Print the tables: the scores, and the differences that are asked about."""
    names, mean = list(predicted), actual.mean(axis=0)
    own = {name: float(lds(values, mean).mean()) for name, values in predicted.items()}
    draws = dict(zip(names, bootstrap_lds(list(predicted.values()), mean).T, strict=True))
    first, second = lds(actual[0], actual[1]).mean(), float(np.std(mean, axis=1).mean())
    print(f"\n{len(mean)} tests, {mean.shape[1]} halves, {len(actual)} trainings of each; one training's losses score")
    print(f"{first:.3f} on the other's; a test's mean loss varies by {second:.3f} nats over the halves.\n")
    print("| estimate | LDS | 95% |\n|---|---|---|")
    for name in names:
        low, high = np.quantile(draws[name], (0.025, 0.975))
        print(f"| {name} | {own[name]:.3f} | {low:.3f} to {high:.3f} |")
    print("\n| difference | LDS | 95% |\n|---|---|---|")
    best = [max((name for name in names if name.startswith("kronfluence") and ("models" in name) == many),
                key=own.__getitem__, default=None) for many in (False, True)]  # fmt: skip
    pairs = [("EK-FAC", best[0]), (f"EK-FAC, {MODELS} models", best[1]), (f"EK-FAC, {MODELS} models", "EK-FAC")]
    pairs += [(f"CG on the GGN{more}", "EK-FAC") for more in ("", *(f", λ × {multiple:g}" for multiple in EXACT))]
    pairs += [("EK-FAC", "identity"), ("EK-FAC", "TRAK")]
    pairs += [(f"EK-FAC, {MODELS} models", f"TRAK, {MODELS} models")]
    pairs += [(f"EK-FAC, λ × {multiple:g}", "EK-FAC") for multiple in MULTIPLES]
    for left, right in pairs:
        if left in own and right is not None and right in own:
            low, high = np.quantile(draws[left] - draws[right], (0.025, 0.975))
            print(f"| {left} − {right} | {own[left] - own[right]:+.3f} | {low:+.3f} to {high:+.3f} |")


def main() -> None:
    """Train what is missing, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers", type=Path, help="folder of the peers' environments")
    parser.add_argument("--processes", type=int, default=2, help="trainings at a time")
    words = parser.parse_args()
    make_project(words.work)
    retrain(words.work, words.processes)
    torch.set_num_threads(os.cpu_count() or 1)

    predicted: dict[str, np.ndarray] = {}

    def add(found: Datamodeling) -> Datamodeling:
        predicted.update(zip(found.methods, found.predicted[:, -1], strict=True))
        return found

    one = add(scores(words.work, "one.yaml", {"EK-FAC": "ekfac", "identity": "identity"}))
    for multiple in MULTIPLES:
        add(scores(words.work, "one.yaml", {f"EK-FAC, λ × {multiple:g}": "ekfac"}, multiple))
    add(scores(words.work, "five.yaml", {f"EK-FAC, {MODELS} models": "ekfac"}))
    if words.peers is not None:
        seed, n = load_config(words.work / "one.yaml", []).seed, len(project.Images("train"))
        out = left_out([half(seed_of(seed, HALVES), subset, n) for subset in range(SUBSETS)], n)
        predicted |= {name: scored @ out.T for name, scored in peers(words.work, words.peers, one.tests).items()}
    started = time.perf_counter()
    add(scores(words.work, "one.yaml", {"CG on the GGN": "cg"}))
    for multiple in EXACT:
        add(scores(words.work, "one.yaml", {f"CG on the GGN, λ × {multiple:g}": "cg"}, multiple))
    print(f"conjugate gradients and their scores took {time.perf_counter() - started:.0f} s", file=sys.stderr)
    np.savez(words.work / "lds.npz", actual=one.actual, tests=one.tests, **predicted)
    report(predicted, one.actual)


if __name__ == "__main__":
    main()
