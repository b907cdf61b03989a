"""What `cg` does without a tolerance, by the command line: three products, λ of each layer, `damping: training`."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from influence_cli.curvature import operator
from influence_cli.influence import layer_curvature
from tests.conftest import Command

CG = ("-s", "curvature.method=cg")
WIDE = """
from torch import nn


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 3))
"""


@pytest.fixture
def wide(tiny: Path) -> Path:
    """A project with a network of 6,531 parameters, its checkpoint with the optimiser that trained it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(24, 1, 8, 8)), torch.arange(24) % 3).backward()
        optimizer.step()
    (tiny / "model.py").write_text(WIDE)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tiny / "model.pt")
    return tiny


def store_record(project: Path) -> dict[str, object]:
    return dict(json.loads((project / "out.csv.run.json").read_text())["stores"][0])


def influences(project: Path) -> np.ndarray:
    with (project / "out.csv").open() as file:
        rows = sorted((int(row["test"]), int(row["index"]), float(row["influence"])) for row in csv.DictReader(file))
    return np.array([value for *_, value in rows])


def test_it_says_what_was_done_on_stderr_and_in_the_run_file(influence: Command, wide: Path) -> None:
    done = influence("rank", 0, *CG, "-o", "out.csv", "--strict", cwd=wide)
    assert re.search(r"cg: 3 products with the GGN of 24 training examples, relative residual [\d.e-]+", done.err)
    assert "auto: 10 × mean eigenvalue of each layer" in done.err
    found = store_record(wide)
    assert isinstance(found["damping"], dict)
    assert set(found["damping"]) == {"1", "3"}
    (solve,) = found["solves"]  # type: ignore[misc]
    assert (solve["iterations"], solve["products"], solve["examples"], solve["preconditioner"]) == (3, 3, 24, "ekfac")
    assert solve["tolerance"] is solve["converged"] is None
    assert 0 < solve["residual"] < 10


def test_scores_do_not_depend_on_what_is_asked_along_nor_on_what_is_kept(
    influence: Command, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence("rank", 0, "--all", *CG, "-o", "out.csv", cwd=wide)
    alone = influences(wide)
    influence("rank", 0, 1, 2, "--all", *CG, "-o", "out.csv", cwd=wide)
    assert influences(wide)[: len(alone)] == pytest.approx(alone, rel=1e-3, abs=1e-5 * np.abs(alone).max())
    monkeypatch.setattr(operator, "KEPT_SHARE", 0.0)
    done = influence("rank", 0, "--all", *CG, "-o", "out.csv", cwd=wide)
    assert "3 products, " in done.err
    assert "the Jacobian of 24 examples does not fit into the memory" in done.err
    assert influences(wide) == pytest.approx(alone, rel=1e-3, abs=1e-5 * np.abs(alone).max())


def test_a_tolerance_solves_and_many_products_go_there(
    influence: Command, wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = influence("rank", 0, "--all", *CG, "-s", "curvature.tolerance=1e-6", "-o", "out.csv", cwd=wide)
    solved, found = influences(wide), store_record(wide)
    assert "did not converge" not in done.err
    assert found["solves"][0]["converged"] is True  # type: ignore[index]
    monkeypatch.setattr("influence_cli.influence.iterative.PRODUCTS", 40)
    influence("rank", 0, "--all", *CG, "-o", "out.csv", cwd=wide)
    # Both have the same λ, though it is not the same solver, preconditioner or product.
    assert store_record(wide)["damping"] == found["damping"]
    assert influences(wide) == pytest.approx(solved, rel=1e-2, abs=1e-3 * np.abs(solved).max())


def test_a_sample_of_the_images_is_said(influence: Command, wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_curvature, "SAMPLE", 10)
    assert "GGN of 10 training examples" in influence("rank", 0, *CG, cwd=wide).err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("curvature.matrix=hessian",), "not the Hessian"),
        (("gradients.layers=[3]",), "the objective is convex"),
        (("gradients.layers=[1]",), "up to 6,000 parameters"),
    ],
)
def test_where_ekfac_is_not_to_be_had_it_solves_and_says_why(
    influence: Command, wide: Path, words: tuple[str, ...], why: str
) -> None:
    if "6,000" in why:
        (wide / "model.py").write_text(WIDE.replace("96", "48"))
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 3))
        torch.save(model.state_dict(), wide / "model.pt")
    settings = [part for word in words for part in ("-s", word)]
    done = influence("rank", 0, "-v", *CG, *settings, cwd=wide)
    assert re.search(rf"cg solves to a residual of 1e-05: .*{why}", done.err)


def test_training_gives_each_layer_its_own_under_adam(influence: Command, wide: Path) -> None:
    words = ("-s", "curvature.damping=training", "-s", "model.learning_rates=0.001", "-s", "model.steps=20")
    done = influence("rank", 0, *CG, *words, "-o", "out.csv", cwd=wide)
    assert "training: 3/(η·K), Adam's η·K" in done.err
    assert re.search(r"; auto: [\d.e-]+ to [\d.e-]+ by layer", done.err)
    state = torch.load(wide / "model.pt", weights_only=True)["optimizer"]["state"]
    found = store_record(wide)["damping"]
    for name, numbers in (("1", (0, 1)), ("3", (2, 3))):
        v = torch.cat([(state[number]["exp_avg_sq"] / (1 - 0.999**20)).flatten() for number in numbers])
        assert found[name] == pytest.approx(3 * float((v.sqrt() + 1e-8).mean()) / 0.02, rel=1e-4)  # type: ignore[index]
    for method in ("ekfac", "explicit", "cg"):
        words_of = ("-s", f"curvature.method={method}", "-s", "gradients.layers=[3]")
        assert "training: 3/(η·K)" in influence("rank", 0, *words_of, *words, "--on-the-fly", cwd=wide).err


def test_training_without_rate_or_steps_is_refused_in_one_line(influence: Command, wide: Path) -> None:
    for words, absent in (((), "learning_rates"), (("-s", "model.learning_rates=0.1"), "steps")):
        failed = influence("rank", 0, *CG, "-s", "curvature.damping=training", *words, cwd=wide, code=2)
        assert f"curvature.damping training is 3/(η·K), but model.{absent} is not given" in failed.err
    words = ("-s", "model.learning_rates=0.001", "-s", "model.steps=20", "-s", "curvature.damping=training")
    saved = torch.load(wide / "model.pt", weights_only=True)
    del saved["optimizer"]["state"][2]
    torch.save(saved, wide / "model.pt")
    failed = influence("rank", 0, *CG, *words, cwd=wide, code=2)
    assert "is not that of the model's parameters" in failed.err
    assert not (wide / "influence.h5").exists()
