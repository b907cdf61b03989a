"""`influence verify` as a user runs it: against real retraining, killed and resumed, shared, and with bad input."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from influence_cli.metrics import bootstrap_lds, pearson, slope, spearman
from influence_cli.retrain.lds import Datamodeling
from influence_cli.retrain.training import HALVES, half
from influence_cli.runtime.seeds import seed_of
from tests.conftest import Command, Ended, edit, save_minimum
from tests.support import fork_server

# Softmax regression by LBFGS from a random start: close to its minimum, not at it, so that the seed shows.
TRAIN = """

def train(model, data, *, l2, seed, progress=None, steps=12, pause=0.0):
    import time

    import torch

    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + l2 / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    for step in range(steps):
        optimizer.step(closure)
        time.sleep(pause / steps)
        progress(step + 1, steps)
    print("a training function may print")
    return model
"""
LDS = ("verify", "--lds", "--subsets", "8", "--repeats", "2", "--tests", "40")
HARMLESS = ("-s", "curvature.damping=0.0")


def with_training(project: Path, source: str = TRAIN, section: str = "training: {factory: ./model.py:train}") -> Path:
    """Give a project a training function; its module must have another path than that of any other test."""
    with (project / "model.py").open("a") as file:
        file.write(source)
    with (project / "influence.yaml").open("a") as file:
        file.write(section + "\n")
    return project


def rows_of(done: Ended) -> list[dict[str, object]]:
    return [json.loads(line) for line in done.out.splitlines()]


def column(rows: list[dict[str, object]], name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=np.float64)


# Without training


def test_the_self_check_says_what_influence_stands_on(influence: Command, project: Path) -> None:
    done = influence("verify", cwd=project)
    assert "the first misclassified one" in done.err
    assert "next: influence verify --loo" in done.err
    rows = {str(row["item"]): row for row in rows_of(done)}
    assert list(next(iter(rows.values()))) == ["item", "value", "unit", "meaning"]
    assert float(str(rows["gradient norm at the checkpoint"]["value"])) < 1e-6
    assert "a minimum" in str(rows["gradient norm at the checkpoint"]["meaning"])
    assert 0 < float(str(rows["residual of s_test"]["value"])) < 1e-4
    assert "solved" in str(rows["residual of s_test"]["meaning"])
    assert 0.999 < float(str(rows["energy of the score kept"]["value"])) <= 1


def test_a_checkpoint_that_is_no_minimum_is_called_that(influence: Command, project: Path) -> None:
    save_minimum(project, l2=1.0)
    rows = rows_of(influence("verify", 3, cwd=project))
    assert "not a minimum" in str(rows[0]["meaning"])


@pytest.mark.parametrize("method", ["ekfac", "explicit", "cg", "identity"])
@pytest.mark.quick("ekfac")
def test_residual_and_energy_are_those_of_a_dense_computation(influence: Command, project: Path, method: str) -> None:
    """The GGN of all 500 parameters by autograd, and s_test taken from the command's own scores."""
    edit(project, "gradients: {block: 64}", "gradients: {block: 64, budget: 400kB}")
    words = ("-s", f"curvature.method={method}", "-s", "curvature.damping=0.05")
    words += ("-s", "gradients.budget=8GB") if method in ("cg", "identity") else ()
    rows = {str(row["item"]): row for row in rows_of(influence("verify", 3, *words, cwd=project))}
    residual = rows["residual of s_test"]["value"]
    if method == "identity":
        assert residual is None
        return
    from influence_cli import Terminal, load_config, load_tasks, prepare_all
    from influence_cli.curvature.coordinates import Blocks, coordinates, parameter_vectors
    from influence_cli.curvature.explicit import curvature_matrix
    from influence_cli.data.batches import Batch, read_batches
    from influence_cli.influence.inverse import make_inverse
    from influence_cli.passes.gradients import example_gradients
    from influence_cli.precompute.prepare import stored_basis

    config = load_config(project / "influence.yaml", [word for word in words if word != "-s"])
    terminal = Terminal(quiet=True)
    (prepared,) = prepare_all(config, load_tasks(config), terminal)
    network, task = prepared.choice.network, prepared.task
    test = next(read_batches(task.test_split(), np.array([3]), 1))
    v = example_gradients(network, test.inputs, test.targets)[0].double()
    c = prepared.coordinates(test.inputs, test.targets)[0]
    inverse = make_inverse(prepared, 0.05, terminal)
    s = parameter_vectors(network, prepared.basis, inverse.apply(c)).double()
    batches: list[Batch] = list(read_batches(task.train, task.train.indices, 64))
    h = curvature_matrix(network, batches, "ggn") + 0.06 * torch.eye(500, dtype=torch.float64)
    # curvature_matrix has an output layer's own path; here it is the general one: every parameter in its place.
    expected = float((s @ h - v).norm() / v.norm())
    assert float(str(residual)) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    share = float(str(rows["energy of the score kept"]["value"]))
    if method == "cg":
        assert share == 1
        assert expected < 1e-4
        return
    kept = float((inverse.apply(c) * c).sum())
    if method == "ekfac":
        basis, spectrum = stored_basis(prepared.path, prepared.choice, task, whole=True)
        assert isinstance(basis, Blocks)
        assert spectrum is not None
        every = coordinates(network, basis, test.inputs, test.targets)[0].double()
        whole = float((every.square() / (spectrum.values + 0.06)).sum())
        assert prepared.width < basis.width
    else:
        outside = float(v.square().sum() - c.double().square().sum())
        whole = kept + outside / 0.06
    assert share == pytest.approx(kept / whole, rel=1e-4)
    assert share < 0.9999


# Leaving one out


def left_out_by_lbfgs(project: Path, test: int, indices: list[int]) -> np.ndarray:
    """Retrain the softmax regression in float64 without each example: the rise of the test example's loss."""
    from torchvision.datasets import ImageFolder

    def read(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        data = ImageFolder(project / part)
        x = torch.stack([torch.tensor(np.array(image.convert("L"))).float() / 255 for image, _ in data])
        return nn.functional.avg_pool2d(x[:, None], 4).flatten(1).double(), torch.tensor(data.targets)

    (x, y), (x_test, y_test) = read("train"), read("test")
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    state = torch.load(project / "model.pt")
    start = torch.cat([state["2.weight"], state["2.bias"][:, None]], dim=1).double()

    def loss_without(index: int | None) -> float:
        w = start.clone().requires_grad_()
        kept = torch.ones(len(x), dtype=torch.float64)
        if index is not None:
            kept[index] = 0
        optimizer = torch.optim.LBFGS(
            [w], max_iter=150, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(x @ w.T, y, reduction="none")
            value = (kept * losses).sum() / len(x) + 0.01 / 2 * w.square().sum()
            value.backward()
            return value

        optimizer.step(closure)  # type: ignore[arg-type]
        point = torch.cat([x_test[test], torch.ones(1)])
        with torch.no_grad():
            return float(nn.functional.cross_entropy((w @ point)[None], y_test[test : test + 1]))

    before = loss_without(None)
    return np.array([loss_without(index) for index in indices]) - before


@pytest.mark.slow
def test_leaving_one_out_is_what_retraining_gives(influence: Command, project: Path) -> None:
    done = influence("verify", "--loo", 9, "--plot", "loo.svg", "-o", "loo.csv", cwd=project)
    rows: list[dict[str, object]] = list(csv.DictReader((project / "loo.csv").read_text().splitlines()))  # type: ignore[arg-type]
    assert [row["chosen"] for row in rows] == ["influential"] * 5 + ["random"] * 4
    test, indices = int(str(rows[0]["test"])), [int(str(row["index"])) for row in rows]
    actual, estimated = column(rows, "actual"), column(rows, "estimated")
    truth = left_out_by_lbfgs(project, test, indices)
    assert pearson(actual, truth) > 0.999999
    assert np.allclose(actual, truth, rtol=1e-3)
    # Of 320 images each carries much more than its first-order effect: in proportion, not in size.
    assert pearson(estimated, actual) > 0.995
    assert "influence is proportional here" in done.err
    facts = json.loads((project / "loo.csv.run.json").read_text())
    fit = facts["fits"][0]["all"]
    assert fit["r"] == pytest.approx(pearson(estimated, actual))
    assert fit["slope"] == pytest.approx(slope(estimated, actual))
    assert facts["newton"]["gradient_norm_after"] < 1e-12
    ranked = rows_of(influence("rank", test, "--all", cwd=project))
    influences = {row["index"]: row["influence"] for row in ranked}
    assert [influences[index] for index in indices] == pytest.approx(estimated)
    strongest = sorted(influences, key=lambda index: -abs(float(str(influences[index]))))[:5]
    assert indices[:5] == strongest
    assert "r = 0.99" in (project / "loo.svg").read_text()


@pytest.mark.slow
def test_several_tests_and_files_are_left_out_for(influence: Command, project: Path) -> None:
    file = next((project / "test" / "Bag").glob("*.png"))
    rows = rows_of(influence("verify", 3, file, "--loo", 4, cwd=project))
    assert len(rows) == 8
    assert [row["test"] for row in rows] == [3] * 4 + [None] * 4
    assert all(row["test_path"] == str(file) for row in rows[4:])
    # One example, asked for in another company, has the same effect.
    alone = rows_of(influence("verify", 3, "--loo", 4, cwd=project))
    assert np.allclose(column(alone, "actual"), column(rows[:4], "actual"), rtol=1e-6)


def test_a_network_is_retrained_by_its_training_function(influence: Command, project: Path) -> None:
    """Softmax regression behind a layer is not convex in all its weights; few weights, so that it converges."""
    (project / "model.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 10))\n"
    )
    # Of every training λ₂ times its examples: without one of them the objective is that of all, less one loss.
    noted = "    import time\n\n    with open('noted.txt', 'a') as file:\n        print(l2 * len(data), file=file)\n"
    source = TRAIN.replace("    import time\n", noted, 1)
    with_training(project, source, section="training: {factory: ./model.py:train, args: {steps: 30}}")
    from influence_cli import load_config
    from influence_cli.data.batches import labelled_inputs
    from influence_cli.data.datasets import load_split
    from influence_cli.retrain.training import fresh_model, load_training, train

    config = load_config(project / "influence.yaml")
    pairs = list(labelled_inputs(load_split(config, "train", config.train)))
    model = fresh_model(config, 0, torch.device("cpu"))
    for _ in range(8):
        model = train(load_training(config), model, pairs, l2=0.01, seed=0, what="it")
    torch.save(model.state_dict(), project / "model.pt")
    done = influence("verify", 3, "--loo", 4, "--repeats", 1, cwd=project)
    rows = rows_of(done)
    assert len(list((project / "influence.retrained" / "without").glob("*.npz"))) == 5
    noted = [float(line) for line in (project / "noted.txt").read_text().splitlines()]
    assert noted == pytest.approx([0.01 * 320] * (8 + 5))
    assert pearson(column(rows, "estimated"), column(rows, "actual")) > 0.9
    again = influence("verify", 3, "--loo", 4, cwd=project)
    assert "5 of 5 retrainings are already in" in again.err
    assert rows_of(again) == rows
    refused = influence("verify", next((project / "test" / "Bag").glob("*.png")), "--loo", 4, cwd=project, code=2)
    assert "an image file as TEST" in refused.err


# It computes in the type of its weights: what is trained in float64 is compared in float64.
CNN = """
import torch
from torch import nn


class Network(nn.Sequential):
    def forward(self, x):
        return super().forward(x.to(self[1].weight.dtype))


def build():
    return Network(nn.AvgPool2d(7), nn.Conv2d(1, 3, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 10))


def train(model, data, *, l2, seed, progress=None):
    model = model.double()
    x, y = torch.stack([x for x, _ in data]), torch.tensor([y for _, y in data])
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=1000, history_size=30, tolerance_grad=1e-8, tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + l2 / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    return model
"""


@pytest.mark.slow
def test_a_small_cnn_at_its_minimum_is_left_out_as_its_hessian_says(influence: Command, project: Path) -> None:
    """Koh & Liang 2017, figure 2 (right), in small: what is not convex has a minimum too, and training follows it."""
    (project / "model.py").write_text(CNN)
    with_training(project, source="", section="training: {factory: ./model.py:train}")
    from influence_cli import load_config
    from influence_cli.data.batches import labelled_inputs
    from influence_cli.data.datasets import load_split
    from influence_cli.retrain.training import fresh_model, load_training, train

    config = load_config(project / "influence.yaml")
    pairs = list(labelled_inputs(load_split(config, "train", config.train)))
    model = train(load_training(config), fresh_model(config, 0, torch.device("cpu")), pairs, l2=0.05, seed=0, what="it")
    torch.save(model.float().state_dict(), project / "model.pt")
    exact = ("-s", "curvature.method=explicit", "-s", "curvature.matrix=hessian", "-s", "curvature.damping=0.0")
    rows = rows_of(influence("verify", "--loo", 12, *exact, "-s", "l2=0.05", cwd=project))
    assert pearson(column(rows, "estimated"), column(rows, "actual")) > 0.99
    # What does not matter is told from what does: the training adds no noise of its own.
    assert pearson(column(rows[6:], "estimated"), column(rows[6:], "actual")) > 0.99


@pytest.mark.parametrize(("slope_", "reason"), [(1.3, "λ shrinks the estimate"), (0.86, "stops before its minimum")])
def test_the_verdict_gives_a_reason_that_fits_the_slope(
    influence: Command, project: Path, slope_: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_cli.retrain.leave_one_out.LeftOut.fit", lambda *_: (0.995, slope_, 0.0))
    assert reason in influence("verify", 3, "--loo", 4, cwd=project).err


# The linear datamodeling score


@pytest.fixture(scope="module")
def scored(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, object]], str]:
    """A project with all of its retrainings done in one go, its rows and what was said; do not change it."""
    folder = Path(shutil.copytree(trained, tmp_path_factory.mktemp("scored") / "project"))
    with_training(folder)
    out, err = io.StringIO(), io.StringIO()
    words = [*LDS, *HARMLESS, "--methods", "explicit,identity"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
        from influence_cli.cli import app

        with pytest.raises(SystemExit) as ended:
            app(words)
    assert not ended.value.code, err.getvalue()
    return folder, [json.loads(line) for line in out.getvalue().splitlines()], err.getvalue()


def started(folder: Path, *words: str) -> fork_server.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    return fork_server.Popen(
        [sys.executable, "-m", "influence_cli", *LDS, *HARMLESS, *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def losses_in(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted((folder / "influence.retrained" / "halves").glob("*.npz")):
        with np.load(path) as file:
            found[path.name] = file["losses"].tobytes()
    return found


def test_a_score_has_its_interval_and_its_difference(scored: tuple[Path, list[dict[str, object]], str]) -> None:
    folder, rows, err = scored
    assert [row["method"] for row in rows] == ["explicit", "identity"]
    first, second = rows
    for row in rows:
        assert float(str(row["low"])) <= float(str(row["lds"])) <= float(str(row["high"]))
        assert (row["subsets"], row["repeats"], row["tests"]) == (8, 2, 40)
    assert float(str(first["lds"])) > 0.6
    assert first["difference"] is None
    assert float(str(second["difference"])) == pytest.approx(float(str(second["lds"])) - float(str(first["lds"])))
    assert float(str(second["difference_high"])) < 0
    assert "identity is worse than explicit" in err
    assert "one half of the repeats scores 0." in err
    assert "one retraining took" in err
    assert (folder / "influence.explicit.h5").exists()
    assert (folder / "influence.identity.h5").exists()
    assert len(losses_in(folder)) == 16


def test_the_score_is_what_rank_and_the_files_give(
    scored: tuple[Path, list[dict[str, object]], str], influence: Command, tmp_path: Path
) -> None:
    """Influence from ``rank --matrix``, summed over what each half leaves out, beside the losses of its own files."""
    import h5py

    folder, rows, _ = scored
    words = ("-s", "curvature.method=explicit", "-s", "gradients.store=influence.explicit.h5")
    influence("rank", "0:80", "--matrix", tmp_path / "m.h5", *words, *HARMLESS, "-q", cwd=folder)
    with h5py.File(tmp_path / "m.h5") as file:
        scores = file["influence"][:].astype(np.float64)
    chosen = np.sort(np.random.default_rng(seed_of(0, 4)).choice(80, 40, replace=False))
    predicted, actual = [], []
    for subset in range(8):
        inside = half(seed_of(0, HALVES), subset, 320)
        assert len(inside) == len(set(inside.tolist())) == 160
        predicted.append(np.delete(scores, inside, axis=1).sum(axis=1)[chosen])
        losses = []
        for repeat in range(2):
            with np.load(folder / "influence.retrained" / "halves" / f"half_{subset:05d}_{repeat}.npz") as archive:
                losses.append(archive["losses"][chosen])
        actual.append(np.mean(losses, axis=0))
    pairs = zip(np.transpose(predicted), np.transpose(actual), strict=True)
    assert rows[0]["lds"] == pytest.approx(np.mean([spearman(p, a) for p, a in pairs]), abs=1e-6)
    low, high = np.quantile(bootstrap_lds([np.transpose(predicted)], np.transpose(actual)), (0.025, 0.975))
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((low, high), abs=1e-3)


@pytest.mark.slow
def test_of_two_processes_one_is_killed_and_the_numbers_are_the_same(
    scored: tuple[Path, list[dict[str, object]], str], trained: Path, influence: Command, tmp_path: Path
) -> None:
    """Both start with the same command; one is killed in the middle of its work, the other ends with everything."""
    whole, rows, _ = scored
    folder = Path(shutil.copytree(trained, tmp_path / "project"))
    with_training(folder, section="training: {factory: ./model.py:train, args: {pause: 0.2}}")
    kept = folder / "influence.retrained" / "halves"
    killed, other = [started(folder, "--methods", "explicit,identity") for _ in range(2)]
    deadline = time.monotonic() + 200
    while len(list(kept.glob("*.npz"))) < 3 and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    before = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.npz")}
    assert 3 <= len(before) < 16
    out, err = other.communicate(timeout=300)
    assert other.returncode == 0, err
    assert [json.loads(line) for line in out.splitlines()] == rows
    assert losses_in(folder) == losses_in(whole)
    assert all((kept / name).stat().st_mtime_ns == then for name, then in before.items())
    again = influence(*LDS, *HARMLESS, "--methods", "explicit,identity", cwd=folder)
    assert "16 of 16 retrainings are already in" in again.err
    assert rows_of(again) == rows


@pytest.mark.slow
def test_more_subsets_use_what_is_there_and_another_seed_does_not(
    scored: tuple[Path, list[dict[str, object]], str], influence: Command, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(scored[0], tmp_path / "project"))
    shutil.copystat(scored[0] / "model.py", folder / "model.py")
    before = losses_in(folder)
    done = influence("verify", "--lds", "--subsets", 9, "--repeats", 1, "--tests", 500, *HARMLESS, cwd=folder)
    assert "using all 80 test examples" in done.err
    assert "8 of 9 retrainings are already in influence.retrained/halves" in done.err
    assert rows_of(done)[0]["method"] == "auto"
    after = losses_in(folder)
    assert len(after) == 17
    assert before.items() <= after.items()
    other = influence(*LDS, "-s", "seed=1", cwd=folder, code=2)
    assert "holds retrainings of another run (17); what differs: the seed" in other.err
    with (folder / "model.py").open("a") as file:
        file.write("# another\n")
    changed = influence(*LDS, *HARMLESS, cwd=folder, code=2)
    assert "what differs: the training function (its file or its arguments); the model" in changed.err


def test_the_interval_of_a_difference_is_paired() -> None:
    generator = np.random.default_rng(0)
    actual = generator.normal(size=(1, 30, 25))
    first = actual[0] + generator.normal(size=(30, 25))
    second = first + 0.3 * generator.normal(size=(30, 25))
    from influence_cli.metrics import lds

    predicted = np.array([first, second])
    found = Datamodeling(
        ("a", "b"),
        np.arange(30),
        predicted[:, None],
        actual,
        np.array([[lds(values, actual[0])] for values in predicted]),
        bootstrap_lds([first, second], actual[0], draws=200)[:, :, None],
        0.0,
        {},
    )
    value, low, high = found.difference(1)
    assert low <= value <= high
    _, alone_low, alone_high = found.mean(1)
    assert high - low < 0.5 * (alone_high - alone_low)
    assert found.difference(0) == (0, 0, 0)
    assert found.agreement() is None


# Bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loo", "4", "--lds"), "--loo and --lds are two commands"),
        (("3", "--lds"), "--lds draws random test examples"),
        (("--plot", "a.svg"), "--plot needs --loo, --top or --same-run: it draws estimated"),
        (("--methods", "ekfac"), "--methods needs --lds"),
        (("--lds", "--methods", "ekfac,ekfca"), "curvature.method is 'ekfca': expected"),
        (("--lds", "--methods", "ekfac,ekfac"), "ekfac is listed twice"),
        (("--loo", "320"), "there are 320 training examples"),
        (("--loo", "0"), "invalid value for '--loo'"),
        (("--lds", "--subsets", "2"), "invalid value for '--subsets'"),
        (("--lds",), "influence.yaml: retraining needs a training function, but the config names none"),
        (("--lds", "-s", "training.factory=./model.py:fit"), "model.py has no 'fit'"),
        (("--lds", "-s", "training.factory=./none.py:fit"), "there is no file"),
        (("--lds", "-s", "training.factory=./model.py:nn"), "is a module, which cannot be called"),
        (("--lds", "-s", "training.factory=./model.py:build"), "cannot be called as train(model, data, *"),
        (("--loo", "4", "-s", "model.checkpoint=[model.pt, model.pt]"), "--loo retrains one checkpoint"),
        (("--loo", "4", "-s", "train.n=400"), "train.n is 400, but 320 training examples are listed"),
    ],
)
def test_a_wrong_word_is_refused_before_any_work(
    influence: Command, stored: Path, words: tuple[str, ...], message: str
) -> None:
    done = influence("verify", *words, cwd=stored, code=2)
    assert message in done.err
    assert done.out == ""
    assert not (stored / "influence.retrained").exists()


FAULTS = {
    "raises": ("raise ValueError('no such thing')", "failed on {what}: ValueError: no such thing"),
    "ends": ("raise SystemExit(3)", "failed on {what}: SystemExit: 3"),
    "nothing": ("return None", "returned a NoneType for {what}, not the trained model"),
    "another": (
        "return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))",
        "returned another architecture for {what}: 2.weight is not there",
    ),
    "wider": (
        "return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 11))",
        "returned another architecture for {what}: 2.weight is [11, 49], but [10, 49] in the model that it was given",
    ),
    "nan": (
        "model[2].bias.data[0] = float('nan')\n    return model",
        "{what} gave a model whose loss on test example 0 (",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.quick("nan*")
def test_a_training_that_goes_wrong_is_named_and_what_was_finished_is_kept(
    influence: Command, project: Path, fault: str
) -> None:
    body, message = FAULTS[fault]
    with_training(
        project,
        f"\n\ndef train(model, data, *, l2, seed, progress):\n    if seed != {seed_of(0, 2, 2, 0)}:\n"
        f"        return model\n    {body}\n",
    )
    done = influence("verify", "--lds", "--subsets", 4, "--repeats", 1, "--tests", 5, cwd=project, code=2)
    what = f"subset 2, repeat 0 (seed {seed_of(0, 2, 2, 0)}, 160 examples)"
    assert message.format(what=what) in done.err
    assert "finished retrainings are kept in influence.retrained/halves (2)" in done.err
    assert sorted(losses_in(project)) == ["half_00000_0.npz", "half_00001_0.npz"]


def test_arguments_of_the_training_function_are_checked(influence: Command, project: Path) -> None:
    with_training(project)
    for argument, message in (
        ("epoch=3", "takes no argument 'epoch'"),
        ("seed=3", "seed cannot be set in the config"),
    ):
        done = influence(*LDS, "-s", f"training.args.{argument}", cwd=project, code=2)
        assert f"--set training.args.{argument}: " in done.err
        assert message in done.err


def test_the_hinge_has_no_newton_step_and_needs_the_training_function(influence: Command, project: Path) -> None:
    words = ("-s", "loss=hinge", "-s", "curvature.method=identity")
    done = influence("verify", 3, "--loo", 4, *words, cwd=project, code=2)
    assert "retraining needs a training function" in done.err
