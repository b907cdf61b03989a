"""Import and call what the config names: factories, datasets, losses. Nothing else here runs user code by name.

A config is code: whatever it names is imported and called with the rights of the user.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from influence_cli.config import moved
from influence_cli.config.quick_torchvision import import_torchvision
from influence_cli.errors import InfluenceError, describe, did_you_mean
from influence_cli.runtime.fence import fenced

# What keeps a script from running while it is imported.
GUARD = "move what it runs under if __name__ == '__main__':"


def import_object(name: str, folder: Path, where: str) -> Any:
    """Import a dotted name, or an object of a Python file.

    Args:
        name: ``package.module.Object`` or ``./file.py:object``; a file is relative to ``folder``.
        folder: the config's folder; importable names are looked up there, and in the current folder, last.
        where: ``influence.yaml:12``, the start of any error.

    Returns:
        The object.

    Raises:
        InfluenceError: no such file, module or object, or the import itself fails.
    """
    # Last: nothing there takes the place of an installed module.
    sys.path += [place for place in _places(name, folder) if place not in sys.path]
    # Our options are not those of the user's script, which may read sys.argv.
    with _alone([name.partition(":")[0]], f"{where}: {name.partition(':')[0]}"):
        return _imported(name, folder, where)


def _imported(name: str, folder: Path, where: str) -> Any:
    if ":" in name or name.endswith(".py"):
        return _from_file(name, folder, where)
    if (new := moved.new_name(name)) is not None:
        _say_moved(name, new, where)
        name = new
    parts = name.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise InfluenceError(
            f"{where}: {name!r} is not a dotted name",
            "write package.module.Name (torchvision.models.resnet18) or ./model.py:build",
        )
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            if parts[0] == "torchvision":
                import_torchvision()
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # A module that exists but fails to import another one is a different mistake.
            if error.name is not None and not (module_name + ".").startswith(error.name + "."):
                raise InfluenceError(f"{where}: importing {module_name} failed: {error}") from error
            continue
        except (Exception, SystemExit) as error:
            raise _failed(f"{where}: importing {module_name}", error) from error
        for depth, part in enumerate(parts[cut:], start=cut):
            target = _member(target, part, ".".join(parts[:depth]), where)
        return target
    raise InfluenceError(
        f"{where}: no module named {parts[0]!r}",
        f"install it next to influence, or name your own file: ./{parts[0]}.py:{parts[-1]}",
    )


def _places(name: str, folder: Path) -> list[str]:
    """List where the user's modules lie: beside the config, in the current folder, as for ``python -m``, or above it.

    A config in ``configs/`` names ``src.net.build`` of the folder above.
    """
    first = name.partition(".")[0]
    above = [place for place in folder.parents if first.isidentifier() and (place / first).is_dir()][:1]
    return [str(place) for place in (folder, Path.cwd(), *above)]


@cache
def _say_moved(old: str, new: str, where: str) -> None:
    """Warn once per process of a name that only works for one more release."""
    moved.tell(f"{where}: {old} is now called {new}; the old name works until the next release")


def _from_file(name: str, folder: Path, where: str) -> Any:
    file_name, _, attribute = name.partition(":")
    path = (folder / os.path.expanduser(file_name)).resolve()  # noqa: PTH111 (leaves unknown homes as they are)
    if not attribute:
        raise InfluenceError(f"{where}: {name!r} names a file but nothing in it", f"write {file_name}:NAME")
    if not path.is_file():
        raise InfluenceError(f"{where}: there is no file {path}", "a path is relative to the folder of the YAML file")
    return _member(_load_file(path, where), attribute, file_name, where)


def _member(holder: Any, name: str, holder_name: str, where: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError as error:
        raise InfluenceError(f"{where}: {holder_name} has no {name!r}", did_you_mean(name, _public(holder))) from error
    except Exception as error:  # a package that loads its parts lazily
        raise InfluenceError(f"{where}: {name!r} of {holder_name} failed: {describe(error)}") from error


def _load_file(path: Path, where: str) -> ModuleType:
    module_name = f"influence_user_{path.stem}_{abs(hash(str(path))):x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise InfluenceError(f"{where}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, so that what it defines can be pickled to loader workers.
    sys.modules[module_name] = module
    beside, above = str(path.parent), str(path.parent.parent)
    sys.path.insert(0, beside)
    if above not in sys.path:  # last, for a file of a package that imports from its package by name
        sys.path.append(above)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise _failed(f"{where}: running {path}", error) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(beside)
        if beside not in sys.path:  # last, for what its functions import when they run
            sys.path.append(beside)
    return module


def _failed(what: str, error: BaseException) -> InfluenceError:
    if isinstance(error, SystemExit):
        return InfluenceError(f"{what} ended the program ({describe(error)})", f"if it is a script: {GUARD}")
    return InfluenceError(f"{what} failed: {describe(error)}")


@contextlib.contextmanager
def _alone(argv: list[str], what: str) -> Iterator[None]:
    """Import code of the user: what it changes for the process is undone, and a training that it starts is told."""
    optimizers = sys.modules.get("torch.optim.optimizer")
    with contextlib.ExitStack() as stack:
        if optimizers is not None:
            hook = optimizers.register_optimizer_step_pre_hook(lambda *_: _say_trains(what))
            stack.callback(hook.remove)
        stack.enter_context(fenced(argv))
        # Two edits within a second, of the same length, have one time of change and size: a cached module would be old.
        stack.callback(setattr, sys, "dont_write_bytecode", sys.dont_write_bytecode)
        sys.dont_write_bytecode = True
        yield


@cache
def _say_trains(what: str) -> None:
    """Warn once per process, at the first step: the training may take hours."""
    moved.tell(f"{what} trains a model while it is imported; if it is a training script: {GUARD}")


def call(
    callee: Callable[..., Any], args: Mapping[str, Any], folder: Path, name: str, where: Callable[..., str]
) -> Any:
    """Call a factory with the config's arguments, checked against its signature first.

    Args:
        callee: what ``import_object`` returned.
        args: keyword arguments from the config.
        folder: the config's folder, current while the factory runs, so that its relative paths work.
        name: how the config calls it.
        where: ``where()`` and ``where("args", key)`` give the line of the section and of an argument.

    Raises:
        InfluenceError: an argument that the callee does not take, one that is missing, or an exception inside it.
    """
    if not callable(callee):
        raise InfluenceError(f"{where()}: {name} is a {type(callee).__name__}, which cannot be called")
    try:
        signature: inspect.Signature | None = inspect.signature(callee)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        _refuse_unknown(signature, args, name, where)
        _refuse_missing(signature, args, name, where)
    try:
        with fenced(), contextlib.chdir(folder):
            return callee(**args)
    except InfluenceError as error:
        raise InfluenceError(f"{where()}: {error.message}", error.hint) from error
    except (Exception, SystemExit) as error:
        hint = "INFLUENCE_DEBUG=1 shows where it failed"
        missing = error.filename if isinstance(error, FileNotFoundError) else None
        if isinstance(missing, str | Path) and not Path(missing).is_absolute() and "://" not in str(missing):
            hint = f"there is no {folder / missing}"
        raise InfluenceError(f"{where()}: {name} failed: {describe(error)}", hint) from error


def accepts(callee: Callable[..., Any], argument: str) -> bool:
    """Say whether a callable takes an argument of this name."""
    try:
        return argument in inspect.signature(callee).parameters
    except (TypeError, ValueError):
        return False


def bind(
    function: Callable[..., Any], args: Mapping[str, Any], name: str, where: Callable[..., str]
) -> Callable[..., Any]:
    """Fix some arguments of a function that is called later, their names checked now.

    Raises:
        InfluenceError: an argument that the function does not take.
    """
    with contextlib.suppress(TypeError, ValueError):  # no signature to check against
        _refuse_unknown(inspect.signature(function), args, name, where)
    return partial(function, **args)


def _refuse_unknown(
    signature: inspect.Signature, args: Mapping[str, Any], name: str, where: Callable[..., str]
) -> None:
    parameters = signature.parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    known = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in args:
        if key not in known:
            raise InfluenceError(f"{where('args', key)}: {name} takes no argument {key!r}", did_you_mean(key, known))


def _refuse_missing(
    signature: inspect.Signature, args: Mapping[str, Any], name: str, where: Callable[..., str]
) -> None:
    for parameter in signature.parameters.values():
        needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if needed and parameter.name not in args:
            raise InfluenceError(
                f"{where()}: {name} needs the argument {parameter.name!r}", f"add it: args: {{{parameter.name}: …}}"
            )


def _public(holder: Any) -> list[str]:
    return [word for word in dir(holder) if not word.startswith("_")]
