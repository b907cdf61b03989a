"""Solvers through the command line: what they say before and after, their limits, and what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from influence_cli.curvature.choice import SOLVERS
from influence_cli.influence import iterative
from influence_cli.influence.iterative import TOLERANCES, expected_products
from influence_cli.solvers.cg import conjugate_gradients
from tests.conftest import Command


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e3, 1e4])
def test_conjugate_gradients_need_no_more_products_than_said(condition: float) -> None:
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 400, dtype=torch.float64)
    taken = conjugate_gradients(
        lambda v: v * values, torch.ones(1, 400, dtype=torch.float64), tolerance=TOLERANCES["cg"]
    )
    # The bound is of the error in the energy norm; the residual may lag by the root of the condition number.
    assert taken[1].iterations <= 1.5 * expected_products("cg", 1.0, 1.0 / condition, TOLERANCES["cg"]) + 1


def test_the_series_needs_what_its_slowest_direction_needs() -> None:
    shift = 0.01
    count = expected_products("lissa", 1.0, shift, TOLERANCES["lissa"])
    assert (1 - shift) ** count == pytest.approx(TOLERANCES["lissa"], rel=0.1)


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.quick("cg")
@pytest.mark.slow
def test_it_is_said_and_a_long_one_is_warned_of(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    words = ("rank", 0, "-s", f"curvature.method={method}", "-s", "curvature.damping=0.1")
    done = influence(*words, cwd=project)
    assert re.search(rf"{method} for 1 right-hand sides: at most about [\d,]+ products", done.err)
    assert "may take" not in done.err
    monkeypatch.setattr(iterative, "LONG", 0.0)
    assert f"warning: {method} may take" in influence(*words, cwd=project).err


# --- what a run says and writes


def use_network(project: Path) -> None:
    """Put a smooth network that was not trained in the project's place: its Hessian is indefinite."""
    (project / "model.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 10))\n"
    )
    scope: dict[str, object] = {}
    exec((project / "model.py").read_text(), scope)
    torch.manual_seed(0)
    model = scope["build"]()  # type: ignore[operator]
    torch.save({name: 2 * value for name, value in model.state_dict().items()}, project / "model.pt")


def solve_of(project: Path) -> dict[str, object]:
    run = json.loads((project / "out.csv.run.json").read_text())
    return dict(run["stores"][0], **run["stores"][0]["solves"][0])


@pytest.mark.quick("cg", "nystrom")
@pytest.mark.parametrize("method", SOLVERS)
def test_a_solve_is_described_on_stderr_and_in_the_run_file(influence: Command, project: Path, method: str) -> None:
    words = ("rank", 0, "-s", f"curvature.method={method}", "-s", "curvature.damping=0.125", "-o", "out.csv")
    done = influence(*words, cwd=project)
    found = solve_of(project)
    assert found["method"] == method
    assert found["damping"] == 0.125
    assert found["converged"] is True
    assert isinstance(found["iterations"], int)
    assert 0 <= float(str(found["residual"])) <= float(str(found["tolerance"]))
    line = rf"{method}: {found['iterations']:,} iterations, relative residual [\d.e-]+, λ = 0\.125"
    assert re.search(line, done.err), done.err
    assert "did not converge" not in done.err


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.quick("cg")
def test_not_to_converge_is_a_warning_and_strictly_an_error(influence: Command, project: Path, method: str) -> None:
    words = ("rank", 0, "-s", f"curvature.method={method}", "-s", "curvature.tolerance=1e-12", "-o", "out.csv")
    words += ("-s", "curvature.max_iterations=2", "-s", "l2=0.0001", "-s", "curvature.damping=0")
    done = influence(*words, cwd=project)
    assert f"warning: {method} did not converge: relative residual" in done.err
    assert "raise curvature.max_iterations (2)" in done.err or "rounding allows no better" in done.err
    assert solve_of(project)["converged"] is False
    (project / "out.csv").unlink()
    failed = influence(*words, "--strict", cwd=project, code=2)
    assert f"error: {method} did not converge" in failed.err
    assert not (project / "out.csv").exists()


@pytest.mark.slow
def test_strict_holds_for_mislabels_and_for_the_other_way_round(influence: Command, project: Path) -> None:
    words = ("-s", "curvature.method=cg", "-s", "curvature.max_iterations=1", "-s", "curvature.tolerance=1e-12")
    influence("mislabels", "--signal", "test-influence", *words, cwd=project)
    for command in (("mislabels", "--signal", "test-influence"), ("rank", "--train", 3)):
        assert "did not converge" in influence(*command, *words, "--strict", cwd=project, code=2).err


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.quick("cg")
def test_a_negative_eigenvalue_is_measured_and_outweighed(influence: Command, project: Path, method: str) -> None:
    use_network(project)
    words = ("rank", 0, "-s", f"curvature.method={method}", "-s", "curvature.matrix=hessian", "-s", "l2=0")
    done = influence(*words, "-o", "out.csv", cwd=project)
    found = solve_of(project)
    smallest = found["smallest_eigenvalue"]
    assert isinstance(smallest, float)
    assert smallest < -1e-3
    assert found["damping"] == pytest.approx(-2 * smallest)
    assert f"smallest eigenvalue is {smallest:.3g}" in done.err
    assert "curvature.matrix: ggn" in done.err
    assert found["converged"] is True
    # A λ that does not outweigh it: refused before anything is solved, and no numbers are written.
    (project / "out.csv").unlink()
    failed = influence(*words, "-s", f"curvature.damping={-0.9 * smallest}", "-o", "out.csv", cwd=project, code=2)
    assert "indefinite: l2 + λ" in failed.err
    assert f"set curvature.damping above {-smallest:.3g}" in failed.err
    assert "curvature.matrix: ggn" in failed.err
    assert not (project / "out.csv").exists()


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.quick("cg")
def test_no_damping_of_a_singular_matrix_is_refused(influence: Command, project: Path, method: str) -> None:
    for matrix in ("ggn", "hessian"):
        words = ("-s", f"curvature.method={method}", "-s", f"curvature.matrix={matrix}", "-s", "curvature.damping=0")
        failed = influence("rank", 0, *words, "-s", "l2=0", cwd=project, code=2)
        assert "singular or indefinite" in failed.err


def test_the_preconditioner_does_not_change_the_answer(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_network(project)
    words = ("rank", 0, "--all", "-s", "curvature.method=cg", "-s", "l2=0", "-o", "out.csv")
    influence(*words, cwd=project)
    better, rows = solve_of(project), influences(project)
    assert better["preconditioner"] == "ggn-rows"
    monkeypatch.setattr("influence_cli.curvature.choice.Choice.is_preconditioned", False)
    influence(*words, cwd=project)
    plain, others = solve_of(project), influences(project)
    assert plain["preconditioner"] == ""
    assert plain["damping"] == better["damping"]
    assert int(str(better["iterations"])) < int(str(plain["iterations"]))
    assert rows == pytest.approx(others, rel=1e-2, abs=1e-4 * max(map(abs, others.values())))


def influences(project: Path) -> dict[str, float]:
    import csv

    with (project / "out.csv").open() as file:
        return {row["index"]: float(row["influence"]) for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("curvature.max_iterations=0", "curvature.max_iterations is 0: expected a number ≥ 1"),
        ("curvature.tolerance=0", "curvature.tolerance is 0: expected a number above 0"),
        ("curvature.tolerance=1", "curvature.tolerance is 1: expected a number below 1"),
        ("curvature.damping=-0.1", "curvature.damping is -0.1: expected auto, training or a number ≥ 0"),
        ("curvature.damping=.inf", ".inf is not a finite number"),
        ("curvature.method=nystrm", "did you mean 'nystrom'?"),
        ("curvature.tolerence=1e-3", "did you mean 'tolerance'?"),
    ],
)
def test_settings_that_make_no_sense(influence: Command, project: Path, setting: str, message: str) -> None:
    assert message in influence("rank", 0, "-s", setting, cwd=project, code=2).err
