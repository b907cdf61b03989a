"""The planted faults themselves: each fits the present package and suite, and the run tells a fault that lives on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault import DoesNotApplyError, Fault, nodes_of, place_of, planted
from faults import FAULTS

ROOT = Path(__file__).parents[2]


def test_there_are_forty_of_different_names() -> None:
    assert len(FAULTS) >= 40
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_applies_once_and_its_tests_are_there(fault: Fault) -> None:
    path = place_of(fault, ROOT)
    text = path.read_text(encoding="utf-8")
    changed = planted(fault, text)
    assert changed != text
    if path.suffix == ".py":
        compile(changed, str(path), "exec")
    nodes = nodes_of(fault, ROOT)
    assert len(nodes) == len(set(fault.tests)) > 0
    # make test has to kill it.
    for file, name in (node.split("::") for node in nodes):
        code = (ROOT / file).read_text()
        assert not re.search(rf"^@pytest\.mark\.slow\n(?:@.*\n)*def {name}\(", code, flags=re.MULTILINE), name
        assert not re.search(r"^pytestmark = .*slow", code, flags=re.MULTILINE), file


def small(folder: Path) -> Path:
    """Write a checkout of one module and its tests."""
    (folder / "influence_cli").mkdir()
    (folder / "tests").mkdir()
    (folder / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (folder / "influence_cli" / "__init__.py").write_text("")
    (folder / "influence_cli" / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\nZERO = 0\nONE = ZERO\n")
    (folder / "tests" / "test_sums.py").write_text(
        "import pytest\n\nfrom influence_cli.sums import add\n\n\n"
        "def test_two():\n    assert add(1, 1) == 2\n\n\n"
        "def test_nothing():\n    assert add(0, 0) == 0\n\n\n"
        "def test_skipped():\n    pytest.skip('not here')\n\n\n"
        "def test_fails():\n    raise AssertionError\n"
    )
    return folder


SCRIPT = """
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import run
from fault import Fault

code, work = Path(sys.argv[2]), Path(sys.argv[3])
asked = [
    ("minus", "a + b", "a - b", "test_two"),
    ("unseen", "a + b", "a - b", "test_nothing"),
    ("syntax", "a + b", "a +", "test_two"),
    ("twice", "ZERO", "1", "test_two"),
    ("no-test", "a + b", "a - b", "test_that_is_not_there"),
    ("skipped", "a + b", "a - b", "test_skipped"),
    ("fails", "a + b", "a - b", "test_fails"),
]
faults = [Fault(name, "sums.py", old, new, "why", (test,)) for name, old, new, test in asked]
print(run.table(run.judge(faults, code, work, jobs=1, tell=lambda _: None)))
"""
VERDICTS = {
    "minus": "killed",
    "unseen": "SURVIVED",
    "syntax": "BREAKS",
    "twice": "DOES NOT APPLY",
    "no-test": "DOES NOT APPLY",
    "skipped": "SURVIVED",
    "fails": "TESTS FAIL WITHOUT IT",
}


@pytest.mark.slow
def test_the_run_tells_what_lives_on(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    words = [sys.executable, "-c", SCRIPT, Path(__file__).parent, small(tmp_path / "code"), tmp_path / "work"]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert not done.returncode, done.stderr
    for name, word in VERDICTS.items():
        assert re.search(rf"^{name} +{word} +[0-9.]+(  test_sums.py::test_[a-z]+)?$", done.stdout, re.MULTILINE), (
            done.stdout
        )
    assert "7 faults, 1 killed" in done.stdout
    # Each copy is as it was, for the next fault.
    assert "a + b" in (tmp_path / "work" / "0" / "influence_cli" / "sums.py").read_text()


def test_a_fault_that_is_nowhere_is_told(tmp_path: Path) -> None:
    code = small(tmp_path)
    with pytest.raises(DoesNotApplyError, match="nowhere"):
        place_of(Fault("gone", "sums.py", "a * b", "a", "why", ("test_two",)), code)
