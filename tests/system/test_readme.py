"""The commands of README and docs run as they stand, in the demo project with a quarter of its images.

Blocks marked ``sh`` are such commands; a block that needs something else has no language. Beside that: README and docs
are linked, and every page says what it answers.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Demo, run_influence
from tests.support import fork_server
from tests.support.copies import copied
from tests.support.fork_hooks import DEMO

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
# Every page that others link to and that links to others.
LINKED = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *PAGES,
    *sorted((ROOT / "bench/results").glob("*.md")),
]
# A line that stands there twice runs once.
LINES = list(
    dict.fromkeys(
        line.partition("   #")[0].strip()
        for page in (README, *PAGES)
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL)
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

# The README's; `make test-slow` runs those of docs as well.
SHOWN = README.read_text()
# As it is installed; the others are forks of one process.
INSTALLED = next(line for line in LINES if line.endswith("| head -1"))


@pytest.fixture(scope="module")
def project(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with copied(demo.folder, tmp_path_factory.mktemp("readme") / "demo") as folder:
        # Names as they are in the whole demo, for a line that takes some by their names.
        for number, path in enumerate(sorted((folder / "test" / "Shirt").iterdir())[:5]):
            path.rename(path.with_name(f"0500{number}.png"))
        with (folder / "truth.csv").open() as truth, (folder / "decisions.csv").open("w") as decisions:
            # What a person would have saved from the page.
            decisions.write("index,path,label,new_label,decision\n")
            for row in csv.reader(truth.readlines()[1:]):
                decisions.write(",".join(row) + ",relabel\n")
        yield folder


def test_there_are_commands() -> None:
    assert len(LINES) >= 10


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.slow)
        if (line not in SHOWN and line != INSTALLED) or any(part in line for part in SLOW)
        else line
        for line in LINES
    ],
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
            assert any(data.shape == (1, DEMO[0]) for data in file.values())
    if "suspects.csv" in line:
        assert len((project / "suspects.csv").read_text().split()) > 0.08 * DEMO[0]


def test_the_python_example_prints_what_the_command_does(project: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "formats.md").read_text(), flags=re.DOTALL)
    (code,) = (block for block in blocks if "from influence_cli import" in block)
    done = fork_server.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True)
    rows = run_influence("mislabels", "--top", "50", cwd=project).stdout.splitlines()
    assert re.findall(r"\d+", done.stdout) == [str(json.loads(row)["index"]) for row in rows]
    assert done.stderr == ""


def headings(page: Path) -> set[str]:
    """Give the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), target


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("folder", [DOCS, ROOT / "bench/results"], ids=lambda folder: folder.name)
def test_the_index_links_every_page(folder: Path) -> None:
    pages = {page.name for page in folder.glob("*.md")} - {"README.md"}
    assert pages
    assert pages <= set(re.findall(r"\]\(([^)\s]+)\)", (folder / "README.md").read_text()))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "README.md"], ids=lambda page: page.relative_to(ROOT).name
)
def test_a_page_opens_with_the_question_that_it_answers(page: Path) -> None:
    title, paragraph = (part.strip() for part in page.read_text().split("\n\n")[:2])
    assert title.startswith("# ")
    assert "\n" not in title
    assert paragraph.endswith("?")


def test_a_page_of_results_names_its_command_machine_and_commit() -> None:
    pages = [page for page in (ROOT / "bench/results").glob("*.md") if page.name != "README.md"]
    for page in pages:
        text = page.read_text()
        commands = re.findall(r"^- Command: .*?(?=^- )", text, flags=re.MULTILINE | re.DOTALL)
        assert len(commands) == 1, page.name
        for target in re.findall(r"`make ([\w-]+)`", commands[0]):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
        for script in re.findall(r"bench/[\w/]+\.py", commands[0]):
            assert (ROOT / script).is_file(), script
        assert re.search(r"^- Machine: \w", text, flags=re.MULTILINE), page.name
        assert re.search(r"^- Recorded at commits?: `[0-9a-f]{7}`", text, flags=re.MULTILINE), page.name


def test_no_command_needs_a_folder_outside_the_checkout() -> None:
    for page in LINKED:
        assert not re.search(r"\.\./shared|shared/data", page.read_text()), page


def test_the_configs_of_the_docs_are_read(tmp_path: Path) -> None:
    from influence_cli import load_config

    file = tmp_path / "influence.yaml"
    whole = [
        block
        for page in (README, DOCS / "config.md")
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL)
        if block.startswith("model:")
    ]
    assert len(whole) == 2
    for block in whole:
        file.write_text(block)
        config = load_config(file)
        assert config.l2 == 1e-4
        assert config.test is not None
        assert config.test.transform == config.train.transform


def test_every_command_is_named() -> None:
    from influence_cli.cli import app

    text = README.read_text()
    for command in app.registered_commands:
        assert re.search(rf"`influence {command.name}[ `]", text), command.name
