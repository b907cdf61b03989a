"""The commands of the README run as they stand, in the demo project, of whose images a quarter is kept."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fork_server
import pytest
from conftest import Demo, run_influence
from torchvision.datasets import ImageFolder

README = Path(__file__).parents[1] / "README.md"
# A line that stands there twice runs once.
LINES = list(
    dict.fromkeys(
        line.partition("   #")[0].strip()
        for block in re.findall(r"```sh\n(.*?)```", README.read_text(), flags=re.DOTALL)
        for line in block.splitlines()
        if line.startswith(("influence ", "ls ", "mkdir "))
    )
)
# A quarter of a minute each, of what other tests show in less; no other line needs what they write.
SLOW = (
    "--format cleanlab",
    "-o all.parquet",
    "--truth truth.csv --signal loss",
    "--truth truth.csv --plot",
    "--explain 17",
    "compare loss.csv all.csv",
    "--fail-above 500",
    "perturb --attack",
    "--top 500 --report",
    "--attribution",
    "--damping-sweep",
    "select --keep",
)

# As it is installed; the others are forks of one process.
INSTALLED = next(line for line in LINES if line.endswith("| head -1"))
# Training images of a quarter of the demo.
TRAINING = 1250


@pytest.fixture(scope="module")
def project(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(demo.folder, tmp_path_factory.mktemp("readme") / "demo"))
    for split, every in (("train", 4), ("test", 2)):
        for path in (path for kind in sorted((folder / split).iterdir()) for path in sorted(kind.iterdir())):
            if int(path.stem) % every and not path.match("test/Shirt/050*.png"):
                path.unlink()
    with (folder / "truth.csv").open() as file:
        wrong = {row["path"]: row for row in csv.DictReader(file)}
    kept = ImageFolder(folder / "train").samples
    with (folder / "truth.csv").open("w") as truth, (folder / "decisions.csv").open("w") as decisions:
        truth.write(",".join(next(iter(wrong.values()))) + "\n")
        # What a person would have saved from the page.
        decisions.write("index,path,label,new_label,decision\n")
        for index, (path, _) in enumerate(kept):
            row = wrong.get(str(Path(path).relative_to(folder)))
            if row is not None:
                line = ",".join([str(index), *list(row.values())[1:]])
                truth.write(f"{line}\n")
                decisions.write(f"{line},relabel\n")
    run_influence("gradients", "--overwrite", cwd=folder)
    return folder


def test_there_are_commands() -> None:
    assert len(LINES) >= 10


@pytest.mark.parametrize(
    "line",
    [pytest.param(line, marks=pytest.mark.slow) if any(part in line for part in SLOW) else line for line in LINES],
)
def test_it_runs_as_typed(line: str, project: Path) -> None:
    if "jq" in line and shutil.which("jq") is None:
        pytest.skip("jq is not installed")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    installed = {**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}
    words = ["bash", "-o", "pipefail", "-c", line]
    done = subprocess.run(
        words,
        cwd=project,
        env=installed if line == INSTALLED else fork_server.path(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert "Traceback" not in done.stderr
    rows = done.stdout.splitlines()
    if line.endswith("jq -r .path"):
        assert len(rows) == 50
        assert all(Path(row).is_file() for row in rows)
    if "--format csv | head -1" in line:
        assert rows == [
            "test,test_path,test_label,test_predicted,effect,rank,index,path,label,predicted,loss,influence"
        ]
    if line.startswith("ls "):
        files = len(list((project / "bad").glob("*.png")))
        assert files > 3
        assert len(rows) == 1 + files * 20
        assert all(row.count("\t") == 11 for row in rows)
    if "--matrix" in line:
        import h5py

        with h5py.File(project / "scores.h5") as file:
            assert any(data.shape == (1, TRAINING) for data in file.values())
    if "suspects.csv" in line:
        assert len((project / "suspects.csv").read_text().split()) > 0.08 * TRAINING


def test_the_python_example_prints_what_the_command_does(project: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    rows = run_influence("mislabels", "--top", "50", cwd=project).stdout.splitlines()
    assert re.findall(r"\d+", done.stdout) == [str(json.loads(row)["index"]) for row in rows]


def test_the_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target


def test_every_command_is_named() -> None:
    from influence_cli.cli import app

    for command in app.registered_commands:
        assert f"`influence {command.name}" in README.read_text()
