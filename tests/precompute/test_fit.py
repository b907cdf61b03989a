"""Curvatures with one basis per layer through the command line: fitted once, resumed, reused, within the budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from influence_cli.store.store import Store
from tests.conftest import Command, edit, make_project

DEEP = """
import torch
from torch import nn


def build():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12 * 6 * 6, 20), nn.ReLU(),
        nn.Linear(20, 10),
    )
"""


@pytest.fixture(scope="module")
def deep(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a small convolutional network of 10,000 parameters, trained a little; do not change it."""
    import importlib.util

    import torch
    from torch import nn
    from torchvision.datasets import ImageFolder

    folder = make_project(tmp_path_factory.mktemp("deep"), train=192, test=48)
    (folder / "model.py").write_text(DEEP)
    edit(folder, "l2: 0.01", "l2: 0.001")
    spec = importlib.util.spec_from_file_location("deep_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.build().train()
    data = ImageFolder(folder / "train")
    x = torch.stack([torch.tensor(np.array(image.convert("L"))).float()[None] / 255 for image, _ in data])
    y = torch.tensor(data.targets)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, weight_decay=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.eval().state_dict(), folder / "model.pt")
    return folder


@pytest.fixture
def project(deep: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(deep, tmp_path / "project"))


def matrix(influence: Command, cwd: Path, *words: object) -> np.ndarray:
    influence("rank", *words, "--matrix", "m.h5", "-q", cwd=cwd)
    with h5py.File(cwd / "m.h5") as file:
        return np.asarray(file["influence"])


def test_auto_is_ekfac_past_explicit(influence: Command, project: Path) -> None:
    done = influence("gradients", "-v", cwd=project)
    assert "curvature auto: EK-FAC over 9,842 parameters in 5 layers" in done.err
    with Store.open(project / "influence.h5") as store:
        assert store.facts["method"] == "ekfac"
        assert [block["kind"] for block in store.facts["blocks"]] == ["kronecker"] * 4 + ["dense"]
        assert store.layout.k == len(store.array("kept"))
        assert store.layout.k % 64 == 0
    assert not (project / "influence.h5.fit").exists()


@pytest.mark.slow
def test_rank_and_mislabels_say_what_was_kept(influence: Command, project: Path) -> None:
    done = influence("rank", 3, "-o", "r.csv", "-v", cwd=project)
    assert "of each layer)" in done.err
    assert "The store keeps " in done.err
    assert "coordinates kept" in done.err
    facts = json.loads((project / "r.csv.run.json").read_text())["stores"][0]
    assert set(facts["damping"]) == {"0", "4", "7", "9", "1"}
    assert 0 < facts["kept_share"] <= 1
    assert facts["effective_dimension"] > 1
    rows = [
        json.loads(line)
        for line in influence("mislabels", "--signal", "self-influence", "--top", 3, cwd=project).out.splitlines()
    ]
    assert rows[0]["self_influence"] >= rows[1]["self_influence"] >= rows[2]["self_influence"] > 0


@pytest.mark.slow
def test_the_whole_basis_on_the_fly_equals_a_store_of_it(influence: Command, project: Path) -> None:
    """A budget for every coordinate is no option, so λ is made tiny: d_eff is then nearly all of them."""
    words = ("-s", "curvature.damping=0.05")
    direct = matrix(influence, project, "0:5", "--on-the-fly", *words)
    with Store.open(project / "influence.h5") as store:
        assert store.facts["rows"] is False
        assert store.layout.k == 0
    from influence_cli.config.load import load_config
    from influence_cli.curvature.coordinates import Blocks
    from influence_cli.data.batches import read_batches
    from influence_cli.model.task import load_tasks
    from influence_cli.precompute.decide import decide
    from influence_cli.precompute.fingerprint import fingerprint
    from influence_cli.precompute.fitted import open_basis, stored_curvature
    from influence_cli.runtime.terminal import Terminal

    config = load_config(project / "influence.yaml")
    task = load_tasks(config)[0]
    choice, _ = decide(config, task, Terminal(quiet=True))
    fitted = stored_curvature(project / "influence.h5", fingerprint(task, choice, "float32"), choice)
    assert fitted is not None
    basis, spectrum = open_basis(fitted, choice, None, task.device)
    assert isinstance(basis, Blocks)
    from influence_cli.curvature.coordinates import coordinates

    batch = next(read_batches(task.train, task.train.indices, 192))
    rows = coordinates(choice.network, basis, batch.inputs, batch.targets)[0].double()
    tests = next(read_batches(task.test_split(), task.test_split().indices[:5], 5))
    own = coordinates(choice.network, basis, tests.inputs, tests.targets)[0].double()
    expected = (own / (spectrum.values + 0.05 + 0.001)) @ rows.T / task.n
    assert np.linalg.norm(direct - expected.numpy()) / np.linalg.norm(expected.numpy()) < 1e-5
    lines = influence(
        "mislabels", "--signal", "self-influence", "--on-the-fly", "--all", *words, cwd=project
    ).out.splitlines()
    found = {row["index"]: row["self_influence"] for row in map(json.loads, lines)}
    values = ((rows.square() / (spectrum.values + 0.051)).sum(dim=1) / task.n).tolist()
    assert [found[i] for i in range(192)] == pytest.approx(values, rel=1e-4)


@pytest.mark.slow
def test_on_the_fly_rows_are_those_of_any_other_run(influence: Command, project: Path) -> None:
    lines = influence("rank", 3, 7, "--on-the-fly", "--top", 4, cwd=project).out.splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["effect"] for row in rows] == (["helpful"] * 4 + ["harmful"] * 4) * 2
    assert all(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert all(row["loss"] > 0 for row in rows)
    stored = [json.loads(line) for line in influence("rank", 3, "--top", 4, cwd=project).out.splitlines()]
    by_index = {row["index"]: row for row in stored}
    common = [row for row in rows if row["index"] in by_index]
    assert common
    for row in common:
        assert row["predicted"] == by_index[row["index"]]["predicted"]
        assert row["loss"] == pytest.approx(by_index[row["index"]]["loss"], rel=1e-4)


@pytest.mark.parametrize("method", ["identity", "explicit", "cg"])
@pytest.mark.quick("identity*")
@pytest.mark.slow
def test_on_the_fly_equals_the_store_for_other_methods(
    influence: Command, trained: Path, tmp_path: Path, method: str
) -> None:
    import shutil

    project = Path(shutil.copytree(trained, tmp_path / "project"))
    words = ("3", "17", "-s", f"curvature.method={method}")
    direct = matrix(influence, project, *words, "--on-the-fly", "-s", f"gradients.store={project}/direct.h5")
    stored = matrix(influence, project, *words)
    assert np.linalg.norm(direct - stored) / np.linalg.norm(stored) < 1e-4
    if method == "cg":
        return
    direct_lines = influence(
        "mislabels", "--signal", "self-influence", "--on-the-fly", "--all", *words[2:], cwd=project
    ).out.splitlines()
    stored_lines = influence(
        "mislabels", "--signal", "self-influence", "--all", *words[2:], cwd=project
    ).out.splitlines()
    both = [{r["index"]: r["self_influence"] for r in map(json.loads, lines)} for lines in (direct_lines, stored_lines)]
    assert [both[0][i] for i in range(320)] == pytest.approx([both[1][i] for i in range(320)], rel=1e-3)


@pytest.mark.slow
def test_several_checkpoints_on_the_fly_are_averaged(influence: Command, project: Path) -> None:
    import torch

    state = torch.load(project / "model.pt", weights_only=True)
    torch.save({name: value * 0.9 for name, value in state.items()}, project / "two.pt")
    one = matrix(influence, project, 3, "--on-the-fly")
    two = matrix(influence, project, 3, "--on-the-fly", "-s", "model.checkpoint=two.pt", "-s", "gradients.store=two.h5")
    words = ("-s", "model.checkpoint=[model.pt, two.pt]", "-s", "gradients.store=both.h5")
    assert np.allclose(matrix(influence, project, 3, "--on-the-fly", *words), (one + two) / 2, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_factors_are_used_again_when_only_labels_change(influence: Command, project: Path) -> None:
    influence("gradients", cwd=project)
    with Store.open(project / "influence.h5") as store:
        before = {name: np.array(store.array(name)) for name in store.names("factor.")}
    labels = np.zeros(192, dtype=np.int64)
    np.save(project / "labels.npy", labels)
    words = ("-s", "train.labels=labels.npy")
    refused = influence("gradients", *words, cwd=project, code=2)
    assert "the training labels" in refused.err
    done = influence("gradients", "--overwrite", "-v", *words, cwd=project)
    assert "reusing the curvature in" in done.err
    with Store.open(project / "influence.h5") as store:
        assert before
        assert all(np.array_equal(store.array(name), values) for name, values in before.items())
    # The empirical Fisher is of the labels, and is fitted again.
    words = (*words, "-s", "curvature.matrix=empirical")
    assert "reusing the curvature in" not in influence("gradients", "--overwrite", "-v", *words, cwd=project).err


@pytest.mark.slow
def test_a_curvature_from_an_on_the_fly_run_serves_the_store(influence: Command, project: Path) -> None:
    influence("rank", 3, "--on-the-fly", "-q", cwd=project)
    assert "reusing the curvature in" in influence("gradients", "-v", cwd=project).err


@pytest.mark.slow  # in small, and at every moment: tests/system/test_crash_points.py, tests/system/test_kills.py
def test_a_fit_that_is_killed_goes_on_and_ends_the_same(project: Path, tmp_path: Path, influence: Command) -> None:
    """SIGKILL in the middle of the fit, several times; the store is that of one pass, byte for byte."""
    import shutil

    whole = Path(shutil.copytree(project, tmp_path / "whole"))
    script = (
        "import influence_cli.precompute.fit_file as f, torch, sys, time\n"
        "torch.set_num_threads(1)\n"
        "f.SAVE_EVERY = 0\n"
        "save = f.save_progress\n"
        "def slow(*a):\n"
        "    save(*a); print('saved', flush=True); time.sleep(0.05)\n"
        "f.save_progress = slow\n"
        "from influence_cli.cli import app\n"
        "app(['gradients', '-s', 'gradients.block=32'])\n"
    )

    def start(cwd: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", script], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    kills = 0
    for stop_after in (2, 3, 5):
        with start(project) as process:
            assert process.stdout is not None
            for _ in range(stop_after):
                process.stdout.readline()
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        assert not (project / "influence.h5").exists()
        assert (project / "influence.h5.fit").exists()
    assert kills == 3
    for folder, resumed in ((project, True), (whole, False)):
        with start(folder) as process:
            _, err = process.communicate()
        assert process.returncode == 0, err
        assert ("resuming with the factors" in err) is resumed
    with Store.open(project / "influence.h5") as a, Store.open(whole / "influence.h5") as b:
        for name in a.names("factor."):
            assert np.array_equal(a.array(name), b.array(name)), name
        assert np.array_equal(
            np.concatenate([rows for _, rows in a.scan()]), np.concatenate([rows for _, rows in b.scan()])
        )


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        (("-s", "gradients.budget=200kB"), "one coordinate per layer (5 layers)", "gradients.budget="),
        (("-s", "curvature.matrix=hessian"), "curvature ekfac cannot use the Hessian", "curvature.matrix: ggn"),
        (("-s", "curvature.method=explicit", "-s", "curvature.matrix=empirical"), "empirical is for ekfac", "ggn"),
        (
            ("-s", "gradients.layers=['1']", "-s", "curvature.method=ekfac"),
            "needs a linear or convolutional",
            "identity",
        ),
        (("-s", "gradients.layers=['con*']"), "no layer matches 'con*'", "known:"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    influence: Command, project: Path, words: tuple[str, ...], message: str, hint: str
) -> None:
    done = influence("gradients", *words, cwd=project, code=2)
    assert message in done.err
    assert hint in done.err
    assert not list(project.glob("influence.h5*"))


def test_the_budget_error_names_the_least_budget(influence: Command, project: Path) -> None:
    done = influence("gradients", "-s", "gradients.budget=200kB", cwd=project, code=2)
    least = done.err.split("-s gradients.budget=")[1].split("B")[0] + "B"
    influence("gradients", "-s", f"gradients.budget={least}", cwd=project)


def test_a_zero_damping_of_a_singular_spectrum_is_refused(influence: Command, project: Path) -> None:
    done = influence("rank", 3, "-s", "curvature.damping=0", "-s", "l2=0", cwd=project, code=2)
    assert "singular" in done.err
    assert "leave it at auto" in done.err


def test_factors_that_do_not_fit_the_memory_are_refused(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_cli.precompute.fit.available_bytes", lambda _device: 100_000)
    done = influence("gradients", cwd=project, code=2)
    assert "of memory for its factors" in done.err
    assert "track fewer layers" in done.err


def test_another_convex_loss_has_a_root_of_its_curvature(influence: Command, project: Path) -> None:
    (project / "losses.py").write_text(
        "import torch\n\n\ndef squares(outputs, targets):\n"
        "    return ((outputs - torch.nn.functional.one_hot(targets, 10)) ** 2).sum(1)\n\n\n"
        "def bent(outputs, targets):\n"
        "    return torch.sin(3 * outputs).sum(1) + (outputs[:, 0] - targets) ** 2\n"
    )
    done = influence("gradients", "-s", "loss={factory: ./losses.py:squares}", cwd=project)
    assert "empirical" not in done.err
    done = influence("gradients", "-s", "loss={factory: ./losses.py:bent}", "--overwrite", cwd=project)
    assert "is not convex in the outputs: curvature ekfac uses the empirical Fisher" in " ".join(done.err.split())


@pytest.mark.slow
def test_int8_and_float16_rows_keep_the_scores(influence: Command, project: Path) -> None:
    exact = matrix(influence, project, "0:4")
    for dtype, tolerance in (("float16", 1e-2), ("int8", 0.1)):
        words = ("-s", f"gradients.store_dtype={dtype}", "-s", f"gradients.store={project}/{dtype}.h5")
        rounded = matrix(influence, project, "0:4", *words)
        assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < tolerance, dtype
        assert (project / f"{dtype}.h5").stat().st_size < (project / "influence.h5").stat().st_size


@pytest.mark.slow
def test_check_prints_the_plan_of_each_layer(influence: Command, project: Path) -> None:
    found = {row["item"]: row for row in map(json.loads, influence("check", cwd=project).out.splitlines())}
    assert found["layer 0"]["value"] == "8 ⊗ 10"
    assert "784 positions" in found["layer 0"]["unit"]
    assert "exact block" in found["layer 1"]["unit"]
    assert found["layer 9"]["unit"].startswith("linear, 1 positions, a and δ rotated first")
    influence("gradients", "-q", cwd=project)
    found = {row["item"]: row for row in map(json.loads, influence("check", cwd=project).out.splitlines())}
    kept = [
        int(row["unit"].split("; ")[1].split()[0].replace(",", ""))
        for name, row in found.items()
        if name.startswith("layer ")
    ]
    with Store.open(project / "influence.h5") as store:
        assert sum(kept) == store.layout.k
        assert min(kept) >= 1


@pytest.mark.slow
def test_bf16_is_close_and_has_a_store_of_its_own(influence: Command, project: Path) -> None:
    exact = matrix(influence, project, 3)[0]
    refused = influence("rank", 3, "--precision", "bf16", cwd=project, code=2)
    assert "the precision of the layer pass (float32 in the store, bf16 now)" in refused.err
    rough = matrix(influence, project, 3, "--precision", "bf16", "-s", f"gradients.store={project}/bf16.h5")[0]
    assert not np.array_equal(exact, rough)
    assert np.corrcoef(exact, rough)[0, 1] > 0.95
    wrong = influence("rank", 3, "--precision", "fp8", cwd=project, code=2)
    assert "precision is 'fp8'" in wrong.err
