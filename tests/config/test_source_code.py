"""Which sources a config names, and what counts as a change of one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from influence_cli.config.source_code import UserCode, is_installed, source_hash, source_hashes

FILES = {
    "losses.py": "from scales import one\n\n\ndef mine(o, t):\n    from late import two\n    return one(two(o))\n",
    "scales.py": "def one(x):\n    return x\n",
    "late.py": "from pack.inner import deep\n\n\ndef two(x):\n    return x\n",
    "pack/__init__.py": "from .other import beside\n",
    "pack/inner.py": "from . import other\n\n\ndef deep():\n    pass\n",
    "pack/other.py": "def beside():\n    pass\n",
    "unused.py": "nothing = 0\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path.parent)
    for name in ("losses", "scales", "late", "pack"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["./losses.py:mine", "losses.mine"])
def test_sources_are_followed_through_imports_even_inside_functions(folder: Path, name: str) -> None:
    assert list(source_hashes([name, "torch.nn.Linear", "Resize"], folder)) == sorted(set(FILES) - {"unused.py"})


def test_a_package_above_the_config_belongs_to_the_project(folder: Path) -> None:
    (folder / "configs").mkdir()
    expected = ["../pack/__init__.py", "../pack/inner.py", "../pack/other.py"]
    assert list(source_hashes(["pack.inner.deep"], folder / "configs")) == expected


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("# Why.\ndef one( x ):\n\n    return (x)  # it\n", True),
        ('"""About."""\ndef one(x):\n    """Give it."""\n    return x\n', True),
        ("def one(x):\n    return +x\n", False),
        ("def one(x, y=0):\n    return x\n", False),
        ("def one(x:\n", False),
    ],
    ids=["layout", "docstrings", "operator", "argument", "not Python"],
)
def test_what_changes_a_source(folder: Path, text: str, same: bool) -> None:
    before = source_hash(folder / "scales.py")
    (folder / "scales.py").write_text(text)
    assert (source_hash(folder / "scales.py") == before) == same


def test_installed_code_is_not_the_users() -> None:
    import torch

    import influence_cli

    assert is_installed(Path(torch.__file__).resolve())
    assert is_installed(Path(influence_cli.__file__).resolve())
    assert is_installed(Path("/home/me/project/.venv/lib/python3.11/site-packages/x.py"))
    assert not is_installed(Path("/home/me/project/x.py"))


def test_arguments_count_and_a_moved_project_does_not(folder: Path) -> None:
    def parts(at: Path, seed: int = 0) -> dict[str, str]:
        return UserCode((), {"train.args": {"root": str(at / "train"), "seed": seed}}, at).parts()

    assert parts(folder) == parts(folder / "elsewhere")
    assert parts(folder)["train.args"] != parts(folder, seed=1)["train.args"]
