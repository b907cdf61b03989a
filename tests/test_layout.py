"""The layout of the project: sizes of files and packages, and tests beside what they test."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "influence_cli"
PACKAGES = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
# These hold what belongs to no single module: runs of whole commands, and comparisons with the numbers of others.
SHARED = {"system", "agreement", "support", "faults", "record", "ecosystem"}
LONGEST = 400
AT_TOP = 8


def modules(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]


def test_no_file_is_too_long() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > LONGEST
    }
    assert not long


def test_few_modules_stand_at_the_top() -> None:
    assert 0 < len(modules(PACKAGE)) <= AT_TOP


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda path: path.name)
def test_a_package_has_5_to_16_files(folder: Path) -> None:
    # The demo is a project of its own, of three files.
    assert (3 if folder.name == "demo" else 5) <= len(modules(folder)) <= 16


@pytest.mark.parametrize("folder", PACKAGES, ids=lambda path: path.name)
def test_a_package_begins_with_what_it_is_for(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1


def test_a_test_file_names_the_module_that_it_tests() -> None:
    unknown = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.relative_to(ROOT / "tests").parent
        if folder.parts and folder.parts[0] in SHARED:
            continue
        names = [module.stem for module in modules(PACKAGE / folder)] + (["layout"] if folder == Path() else [])
        about = path.stem.removeprefix("test_")
        # test_sinks_matrix.py is about one side of sinks.py.
        if not any(about == name or about.startswith(f"{name}_") for name in names):
            unknown.append(str(path.relative_to(ROOT)))
    assert not unknown


def test_the_architecture_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    assert [folder.name for folder in PACKAGES if f"`{folder.name}`" not in text] == []
