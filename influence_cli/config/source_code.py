"""Which code a config names: the sources of its functions and classes, and of what those import from the project.

A source is hashed as Python reads it: comments, docstrings and layout do not count.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

import influence_cli

# Which Python parsed the sources: another one may print the same tree in another way.
PARSER = "python"
# Files in folders of these names belong to installed packages, wherever the environment lies.
INSTALLED = {"site-packages", "dist-packages"}


@dataclass(frozen=True)
class UserCode:
    """What a config says of the user's own code.

    Attributes:
        names: of functions and classes, ``package.module.Name`` or ``./file.py:name``.
        given: the names and arguments themselves, by the key of the config, such as ``model.args``.
        folder: of the config.
    """

    names: tuple[str, ...] = ()
    given: Mapping[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def parts(self) -> dict[str, str]:
        """Describe the code: a hash per source file, relative to the config's folder, and per key of the config."""
        # Paths were made absolute: a project that moves as a whole stays the same.
        here = json.dumps(f"{self.folder}{os.sep}")[1:-1]
        texts = {key: json.dumps(value, sort_keys=True, default=str) for key, value in self.given.items()}
        given = {key: _hash(text.replace(here, "")) for key, text in texts.items()}
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        return {PARSER: python, **given, **source_hashes(self.names, self.folder)}


def source_hashes(names: Iterable[str], folder: Path) -> dict[str, str]:
    """Hash the sources that the named objects come from, and those that they import from the project.

    The project is the config's folder, the current one, and the one above in which a named package lies. Imports are
    read from the sources, inside functions too. What is loaded by other means is not seen.

    Args:
        names: ``package.module.Name`` or ``./file.py:name``; any other is ignored.
        folder: the config's.

    Returns:
        Hash by path, relative to ``folder``.
    """
    given = list(names)
    roots = _roots(given, folder)
    waiting = [file for name in given for file in _named(name, folder, roots)]
    hashes: dict[Path, str] = {}
    while waiting:
        file = waiting.pop()
        if file in hashes or not _is_of_project(file, roots):
            continue
        hashes[file] = source_hash(file)
        waiting += _imported(file, roots)
    return {os.path.relpath(file, folder.resolve()): hashes[file] for file in sorted(hashes)}


def source_hash(file: Path) -> str:
    """Hash a Python file without its comments, docstrings and layout; its bytes where it cannot be parsed."""
    tree = _tree(file)
    return _hash(file.read_bytes()) if tree is None else _hash(ast.dump(tree))


def is_installed(file: Path) -> bool:
    """Say whether a file belongs to Python, to an installed package or to this one."""
    if not INSTALLED.isdisjoint(file.parts):
        return True
    return any(file.is_relative_to(place) for place in _installed_places())


def _roots(names: Iterable[str], folder: Path) -> list[Path]:
    folder = folder.resolve()
    firsts = {name.partition(".")[0] for name in names}
    above = [
        place
        for first in sorted(firsts)
        if first.isidentifier()
        for place in [next((place for place in folder.parents if (place / first).is_dir()), None)]
        if place is not None
    ]
    return list(dict.fromkeys([folder, Path.cwd(), *above]))


def _is_of_project(file: Path, roots: Iterable[Path]) -> bool:
    return file.suffix == ".py" and not is_installed(file) and any(file.is_relative_to(root) for root in roots)


@lru_cache(maxsize=1)
def _installed_places() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    places = [Path(paths[key]).resolve() for key in ("stdlib", "platstdlib", "purelib", "platlib") if key in paths]
    return (*places, Path(influence_cli.__file__).resolve().parent)


def _named(name: str, folder: Path, roots: list[Path]) -> Iterator[Path]:
    if ":" in name or name.endswith(".py"):
        file = (folder / os.path.expanduser(name.partition(":")[0])).resolve()  # noqa: PTH111 (as it is imported)
        if file.is_file():
            yield file
    else:
        yield from _modules(name, roots)


def _imported(file: Path, roots: list[Path]) -> Iterator[Path]:
    """List the files of the modules that a source imports, those inside its functions too."""
    tree = _tree(file)
    beside = [file.parent, file.parent.parent, *roots]
    for node in [] if tree is None else ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _modules(alias.name, beside)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                if node.level:
                    package = file.parents[min(node.level, len(file.parents)) - 1]
                    yield from (source for source in [package / "__init__.py"] if source.is_file())
                    yield from _files(name, [package])
                else:
                    yield from _modules(name, beside)


def _modules(dotted: str, places: list[Path]) -> Iterator[Path]:
    """List the files of a module and of the packages above it: as they are loaded, else where they lie."""
    module = sys.modules.get(dotted.partition(".")[0])
    loaded = getattr(module, "__file__", None)
    if module is not None and loaded is None and not hasattr(module, "__path__"):
        return  # built in
    if loaded is not None:
        file = Path(loaded).resolve()
        places = [file.parent.parent if file.name == "__init__.py" else file.parent]
        if is_installed(file):
            return
    yield from _files(dotted, places)


def _files(dotted: str, places: Iterable[Path]) -> list[Path]:
    """List the files of a module and of the packages above it, in the first place that has any of them."""
    for place in places:
        at, files = place, []
        for part in dotted.split("."):
            at = at / part
            here = [file for file in (at / "__init__.py", at.with_name(f"{part}.py")) if file.is_file()]
            if not here and not at.is_dir():
                break  # a name in the module before it
            files += here[:1]
        if files:
            return files
    return []


def _tree(file: Path) -> ast.Module | None:
    try:
        status = file.stat()
        return _parsed(file, status.st_mtime_ns, status.st_size)
    except OSError:
        return None


@lru_cache(maxsize=256)
def _parsed(file: Path, _changed: int, _size: int) -> ast.Module | None:
    """Parse a source and drop its docstrings; None where it is not Python."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def _hash(text: str | bytes) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode(errors="surrogatepass") if isinstance(text, str) else text)


def object_hash(target: Any, args: Mapping[str, Any]) -> str:
    """Hash the file of a factory, a function or an object's class, and its arguments, to detect changes."""
    while isinstance(target, functools.partial):
        target = target.func
    source = target if inspect.isroutine(target) or inspect.isclass(target) else type(target)
    state = xxhash.xxh3_128(f"{source.__qualname__} {sorted(args.items())!r}".encode())
    with contextlib.suppress(TypeError, OSError):  # built in, or without a file
        state.update(Path(inspect.getsourcefile(source) or "").read_bytes())
    return state.hexdigest()
