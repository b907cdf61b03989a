"""Measure how the package is laid out: a table for one tree, or for two side by side.

    .venv/bin/python bench/house.py [--tree .] [--before TREE]

Counted from the source, imports inside functions included, each pair once:

- rooms: a package, or a module that stands alone at the top; arrows between rooms; floors: the longest way down, a
  circle taken as one; circles between rooms and between files
- functions with more than 8 parameters, commands aside; positional booleans; README lines

Measured in a run: rooms and files that a config enters during `influence rank 3` on the small project of the tests,
which are those with a function that had the config, or a section of it, among its arguments or variables.
"""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "influence_cli"
MOST_PARAMETERS = 8
# Runs in a process of its own, with the tree to measure first on the path.
TRACE = """
import json, sys, threading
from influence_cli.__main__ import main
rooms = set()
def seen(frame, event, _argument):
    if event != "return":
        return
    name = frame.f_globals.get("__name__", "")
    if not name.startswith("influence_cli.") or name in rooms:
        return
    if any(type(value).__name__.endswith("Config") and type(value).__module__.startswith("influence_cli.")
           for value in frame.f_locals.values()):
        rooms.add(name)
sys.argv = ["influence", "rank", "3", "--format", "jsonl"]
sys.setprofile(seen)
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
finally:
    sys.setprofile(None)
    open(OUT, "w").write(json.dumps(sorted(rooms)))
"""


def modules(tree: Path) -> dict[str, ast.Module]:
    """Parse every module of the package, by dotted name."""
    found = {}
    for path in sorted((tree / PACKAGE).rglob("*.py")):
        parts = path.relative_to(tree).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imports(name: str, module: ast.Module, known: Iterable[str]) -> set[str]:
    """Name the modules of the package that a module imports, wherever in it."""
    known, wanted = set(known), set()
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                wanted.add(inside if inside in known else node.module)
    return {other for other in wanted if other in known and other not in (name, PACKAGE)}


def room(name: str) -> str:
    """Give the package that a module is in, or the module itself where it stands alone."""
    return name.split(".")[1] if "." in name else name


def components(arrows: Mapping[str, set[str]]) -> list[set[str]]:
    """Find the sets of nodes that reach each other (Tarjan 1972), the lowest floor first."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            cut = stack.index(node)
            found.append(set(stack[cut:]))
            del stack[cut:]

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def floors(arrows: Mapping[str, set[str]]) -> int:
    """Count the floors of the longest way down; a circle is one floor."""
    parts = components(arrows)
    of = {node: number for number, part in enumerate(parts) for node in part}
    height = [0] * len(parts)
    for number, part in enumerate(parts):
        below = {of[other] for node in part for other in arrows[node]} - {number}
        height[number] = 1 + max((height[other] for other in below), default=0)
    return max(height)


def circles(arrows: Mapping[str, set[str]]) -> str:
    """Count the circles, and the nodes in them."""
    found = [part for part in components(arrows) if len(part) > 1]
    return f"{len(found)} ({sum(map(len, found))})" if found else "0"


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    """List the parameters of a function, its own object aside."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument for argument in every if argument.arg not in ("self", "cls")]


def entered(tree: Path) -> list[str]:
    """Run a ranking and list the modules in which the config was at hand."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name) / "project", Path(name) / "rooms.json"
        sys.path.insert(0, str(ROOT))
        from tests.support.small_project import make

        make(folder)
        subprocess.run(
            [sys.executable, "-c", f"OUT = {str(out)!r}\n{TRACE}"],
            cwd=folder,
            env={"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
            capture_output=True,
            check=True,
        )
        return list(json.loads(out.read_text()))


def measure(tree: Path) -> dict[str, str]:
    """Give the figures of a tree, by what they are called."""
    every = modules(tree)
    # The package's own page of names is no room.
    files = {name: imports(name, module, every) for name, module in every.items() if name != PACKAGE}
    rooms: dict[str, set[str]] = {room(name): set() for name in files}
    for name, others in files.items():
        rooms[room(name)] |= {room(other) for other in others} - {room(name)}
    functions = [
        (name, node)
        for name, module in every.items()
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef) and not name.startswith(f"{PACKAGE}.commands")
    ]
    top = [path for path in (tree / PACKAGE).glob("*.py") if path.name != "__init__.py"]
    lengths = [len(path.read_text().splitlines()) for path in (tree / PACKAGE).rglob("*.py")]
    config = entered(tree)
    return {
        "modules at the top": str(len(top)),
        "packages": str(len(list((tree / PACKAGE).glob("*/__init__.py")))),
        "rooms": str(len(rooms)),
        "arrows between rooms": str(sum(map(len, rooms.values()))),
        "floors between rooms": str(floors(rooms)),
        "circles between rooms (rooms in them)": circles(rooms),
        "circles between files (files in them)": circles(files),
        "longest file, lines": str(max(lengths)),
        "rooms that a config enters for `rank`": str(len({room(name) for name in config})),
        "files that a config enters for `rank`": str(len(config)),
        "functions with more than 8 parameters": str(
            sum(len(parameters(node)) > MOST_PARAMETERS for _, node in functions)
        ),
        "positional parameters that are booleans": str(
            sum(
                isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool"
                for _, node in functions
                for argument in node.args.args
            )
        ),
        "README lines": str(len((tree / "README.md").read_text().splitlines())),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--before", type=Path, help="another checkout, shown beside it")
    given = parser.parse_args()
    trees = [tree.resolve() for tree in (given.before, given.tree) if tree is not None]
    columns = [measure(tree) for tree in trees]
    print("| |" + " before | after |" if len(trees) == 2 else "| | |")
    print("|---|" + "---:|" * len(trees))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main()
