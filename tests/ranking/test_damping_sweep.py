"""The ranking at other λ: equal to the command run again with that λ, poles marked, and said in one sentence."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from torch import nn

from influence_cli.curvature.damping import Damping
from influence_cli.ranking.damping_sweep import MULTIPLES, AtDamping, verdict
from tests.conftest import Command, edit

LAM = 0.02


def influence_of(
    command: Command, project: Path, words: list[object], column: str = "influence"
) -> dict[tuple[str, str], float]:
    rows = csv.DictReader(command(*words, "--all", "--format", "csv", cwd=project).out.splitlines())
    return {(row.get("test", ""), row["index"]): float(row[column]) for row in rows}


def swept(command: Command, project: Path, *words: object, code: int = 0) -> dict[str, Any]:
    output = project / "swept.csv"
    command(*words, "--damping-sweep", "-o", output, cwd=project, code=code)
    found: dict[str, Any] = json.loads((project / "swept.csv.run.json").read_text())["damping_sweep"]
    return found


@pytest.mark.parametrize("method", ["explicit", "ekfac", "fisher"])
@pytest.mark.quick("explicit*")
@pytest.mark.slow
def test_rank_at_every_damping_is_the_command_with_that_damping(project: Path, influence: Command, method: str) -> None:
    setting = ["-s", f"curvature.method={method}"]
    found = swept(influence, project, "rank", 3, 5, "--top", 7, "-s", f"curvature.damping={LAM}", *setting)
    plain = influence_of(
        influence, project, ["rank", 3, 5, "-s", "curvature.method=identity", "-s", "gradients.store=i.h5"]
    )
    scores = {
        multiple: influence_of(
            influence, project, ["rank", 3, 5, "-s", f"curvature.damping={LAM * multiple}", *setting]
        )
        for multiple in MULTIPLES
    }
    rows = found["rows"]
    assert [row["multiple"] for row in rows] == list(MULTIPLES)
    for row in rows:
        own, chosen = scores[row["multiple"]], scores[1.0]
        overlaps, correlations, identities = [], [], []
        for test in ("3", "5"):
            keys = [key for key in chosen if key[0] == test]
            x, y, z = (np.array([values[key] for key in keys]) for values in (chosen, own, plain))
            sets = []
            for values in (x, y):
                order = np.argsort(values)
                sets.append({("harmful", i) for i in order[:7]} | {("helpful", i) for i in order[-7:]})
            overlaps.append(len(sets[0] & sets[1]) / 14)
            correlations.append(spearmanr(x, y).statistic)
            identities.append(pearsonr(y, z).statistic)
        assert row["overlap"] == pytest.approx(np.mean(overlaps), abs=1e-9)
        assert row["correlation"] == pytest.approx(np.mean(correlations), abs=2e-3)
        # A store of EK-FAC keeps a part of the coordinates, and similarity is in these.
        assert row["identity"] == pytest.approx(np.mean(identities), abs=0.02 if method == "ekfac" else 1e-3)
        assert float(row["damping"]) == pytest.approx(LAM * row["multiple"])
    assert rows[2]["overlap"] == 1
    dimensions = [row["effective_dimension"] for row in rows]
    assert dimensions == sorted(dimensions, reverse=True)


@pytest.mark.slow
def test_self_influence_at_every_damping_is_the_command_with_that_damping(project: Path, influence: Command) -> None:
    words: list[object] = ["mislabels", "--signal", "self-influence"]
    found = swept(influence, project, "mislabels", "--top", 10, "-s", f"curvature.damping={LAM}")
    chosen = influence_of(influence, project, [*words, "-s", f"curvature.damping={LAM}"], "self_influence")
    assert found["ranking"] == "self-influence"
    for row in found["rows"]:
        lam = LAM * row["multiple"]
        own = influence_of(influence, project, [*words, "-s", f"curvature.damping={lam}"], "self_influence")
        x, y = (np.array([values[key] for key in chosen]) for values in (chosen, own))
        assert row["overlap"] == len(set(np.argsort(-x)[:10]) & set(np.argsort(-y)[:10])) / 10
        assert row["correlation"] == pytest.approx(spearmanr(x, y).statistic, abs=1e-4)


def test_a_damping_at_or_below_a_pole_is_marked_and_has_no_numbers(project: Path, influence: Command) -> None:
    # A net away from any minimum: its Hessian has negative eigenvalues, and auto takes 2·|min Λ|.
    (project / "model.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10))\n"
    )
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10))
    torch.save(net.state_dict(), project / "model.pt")
    edit(project, "l2: 0.01", "l2: 0.0")
    found = swept(influence, project, "rank", 3, "-s", "curvature={method: explicit, matrix: hessian}")
    rows = found["rows"]
    assert [row["obstacle"] is None for row in rows] == [False, False, True, True, True]
    assert all(row["overlap"] is None and row["correlation"] is None for row in rows[:2])
    assert "−min Λ" in rows[0]["obstacle"]
    assert found["verdict"] == (
        "fragile here: a tenth of λ is at or below a pole of the curvature, so it gives no ranking"
    )


def test_where_damping_is_zero_the_steps_are_those_of_l2(stored: Path, influence: Command, tmp_path: Path) -> None:
    done = influence("rank", 3, "--damping-sweep", "--format", "csv", cwd=stored)
    lines = done.err.splitlines()
    start = lines.index("the ranking at other λ (influence, the test example):")
    assert [line.split()[:2] for line in lines[start + 2 : start + 7]] == [
        ["0.01", "0.0001"],
        ["0.1", "0.001"],
        ["1", "0.01"],
        ["10", "0.1"],
        ["100", "1"],
    ]
    assert lines[start + 7].split()[0] in ("stable", "fragile")


@pytest.mark.slow
def test_the_page_has_the_table_and_the_chart(stored: Path, influence: Command, tmp_path: Path) -> None:
    for words in (("rank", 3), ("rank", "0:5", "--aggregate"), ("mislabels",)):
        report = tmp_path / "page.html"
        influence(*words, "--damping-sweep", "--report", report, "--format", "csv", cwd=stored)
        text = report.read_text(encoding="utf-8")
        assert "The ranking at other λ" in text
        # The answer is the title of the table.
        assert re.search(r"<h2>The ranking is (stable|fragile) here: ", text)
        assert ">0.01</text>" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("rank", 3, "--damping-sweep", "-s", "curvature.method=identity", "-s", "gradients.store=i.h5"),
            "identity has no λ",
        ),
        (("mislabels", "--damping-sweep", "-s", "curvature.method=cg", "-s", "gradients.store=c.h5"), "no spectrum"),
        (("rank", 3, "--damping-sweep", "--on-the-fly"), "--damping-sweep cannot be combined with"),
        (("rank", "--train", 3, "--damping-sweep"), "--damping-sweep cannot be combined with"),
        (("mislabels", "--damping-sweep", "--on", "test"), "cannot be combined with --on test"),
    ],
)
def test_where_it_cannot_be_had_it_is_refused(
    project: Path, influence: Command, words: tuple[object, ...], message: str
) -> None:
    before = sorted(project.iterdir())
    assert message in influence(*words, cwd=project, code=2).err
    assert sorted(project.iterdir()) == before  # no store has been made for it


def test_the_sentence_says_stable_or_fragile() -> None:
    def rows(low: float | None, high: float) -> list[AtDamping]:
        shares = {0.01: 0.0, 0.1: low, 1.0: 1.0, 10.0: high, 100.0: 0.0}
        return [AtDamping(multiple, "", None, None, share) for multiple, share in shares.items()]

    assert verdict(rows(0.9, 0.5), 10).startswith("stable here: at least 50% of the first")
    assert verdict(rows(0.9, 0.4), 10).startswith("fragile here: ")
    pole = [AtDamping(row.multiple, "", "a pole" if row.multiple == 0.1 else None, None, 1.0) for row in rows(1.0, 1.0)]
    assert "pole" in verdict(pole, 10)


def test_times_scales_what_is_there() -> None:
    assert Damping((0.1, 0.2), "given").times(10, 0.5).values == (1.0, 2.0)
    assert Damping((0.0, 0.0), "auto").times(0.1, 0.5).values == (0.05, 0.05)
