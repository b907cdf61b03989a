"""requirements.lock: what pyproject.toml asks for and no more, each file by its hash, and no place of one machine."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OWN = PROJECT["project"]["name"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
ASKED = {
    "requirements.lock": [*PROJECT["project"]["dependencies"], *(line for extra in EXTRAS.values() for line in extra)],
    **{f"requirements-{group}.lock": lines for group, lines in PROJECT["dependency-groups"].items()},
}
PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)(?: ; [^\\]+)? \\")


def entries(text: str) -> list[str]:
    """Split a lock into one text a package: its pin, its hashes, and what asks for it."""
    return re.split(r"^(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)[1:]


def complaints(asked: list[str], text: str, own: str = OWN) -> list[str]:
    """Compare direct requirements with a lock; none where they agree."""
    pins: list[tuple[str, Version]] = []  # a name may have a version a platform
    direct = set()
    found = []
    for entry in entries(text):
        match = PINNED.match(entry)
        if match is None:
            found.append(f"not a pinned version: {entry.splitlines()[0]}")
            continue
        name = canonicalize_name(match[1])
        pins.append((name, Version(match[2])))
        if not re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry):
            found.append(f"{name} has no hash")
        if re.search(rf"# +(via )?{re.escape(own)} \(pyproject\.toml", entry):
            direct.add(name)
    requirements = [requirement for requirement in map(Requirement, asked) if requirement.name != own]
    wanted = {canonicalize_name(requirement.name) for requirement in requirements}
    found += [f"{name} is not locked" for name in wanted - direct]
    found += [f"{name} is locked, but not asked for" for name in direct - wanted]
    found += [
        f"{requirement} is locked at {version}"
        for requirement in requirements
        for name, version in pins
        if name == canonicalize_name(requirement.name) and version not in requirement.specifier
    ]
    return found


@pytest.mark.parametrize("name", ASKED)
def test_the_lock_is_that_of_pyproject(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert complaints(ASKED[name], text) == [], "make lock brings it up to date"
    # A lock belongs to no machine: no index, no folder, no option of pip is written into it.
    assert "/" not in text
    assert not re.search(r"^-", text, re.MULTILINE)


def test_make_renews_and_audits_every_lock() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {path.name for path in ROOT.glob("requirements*.lock")} == ASKED.keys()
    for name in ASKED:
        assert f"--output-file {name}\n" in makefile
        assert f"--requirement {name} " in makefile


def test_a_lock_that_is_out_of_date_is_told() -> None:
    sha = f"    --hash=sha256:{'0' * 64}\n    # via {OWN} (pyproject.toml)\n"
    text = f"# made\nrich==15.0.0 \\\n{sha}typer==0.29.2 ; sys_platform == 'linux' \\\n{sha}"
    assert complaints(["rich>=14", "typer"], text) == []
    assert complaints(["rich>=16", "typer"], text) == ["rich>=16 is locked at 15.0.0"]
    assert complaints(["rich"], text) == ["typer is locked, but not asked for"]
    assert complaints(["rich", "typer", "h5py"], text) == ["h5py is not locked"]
    assert complaints(["rich", "typer"], text.replace("--hash=sha256", "# ", 1)) == ["rich has no hash"]
    assert complaints(["rich", "typer"], text.replace("==15.0.0", ">=15")) == [
        "not a pinned version: rich>=15 \\", "rich is not locked",
    ]  # fmt: skip


def test_torch_and_torchvision_are_a_matching_pair() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pins = dict(match.groups()[:2] for match in map(PINNED.match, entries(text)) if match)
    if importlib.metadata.version("torchvision") != pins["torchvision"]:
        pytest.skip("another torchvision than the locked one is installed")
    needed = [Requirement(line) for line in importlib.metadata.requires("torchvision") or ()]
    (torch,) = [requirement for requirement in needed if requirement.name == "torch"]
    assert Version(pins["torch"]) in torch.specifier
