"""Read a pickle without running what it names: foreign classes and functions become inert stand-ins.

A pickle is a program: it names classes and functions, and calls them. Here no name is ever imported. A name is looked
up in the tables of ``pickle_values.py``, and anything that is not there is a ``Stand`` that remembers what it was
given. Not even a class that is known is on the pickle's stack: only its name is, so nothing can be called, changed or
replaced but by the functions of those tables.
"""

from __future__ import annotations

import pickle
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch

_SCALARS = (str, int, float, bool, bytes, complex, type(None), torch.dtype, torch.device)
# Bytes and entries that a pickle may make of what it holds, beside four times its size.
_ROOM = 2**26
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)


@dataclass(frozen=True)
class Name:
    """The name of a class or function in a pickle; nothing was imported for it.

    Attributes:
        name: with its module, such as ``torch.optim.adam.Adam``.
    """

    name: str


@dataclass(eq=False)
class Stand:
    """What stands for an object that is not known here: its name, and what the pickle gave it.

    Attributes:
        name: of its class, or of the function that makes it.
        args: what that would have been called with.
        state: what would have become its attributes; None if nothing.
        entries: what would have been put in under keys.
        items: what would have been appended.
    """

    name: str
    args: tuple[Any, ...] = field(default=(), repr=False)
    state: Any = field(default=None, repr=False)
    entries: dict[Any, Any] = field(default_factory=dict, repr=False)
    items: list[Any] = field(default_factory=list, repr=False)


# From a name and the arguments to a value; a Stand where the arguments are not those of a plain value.
Makers = Mapping[str, Callable[..., Any]]


class RestrictedUnpickler(pickle._Unpickler):
    """Read one pickle.

    It is the unpickler in Python of the standard library, because that one's steps can be replaced: those that would
    call something (REDUCE, NEWOBJ, INST, OBJ, BUILD, EXT) or reserve memory for a length that a file only claims.

    Args:
        file: open for reading.
        makers: functions that make the values of known classes and functions, by name.
        constants: known values, by name.
        persistent: from an identity to what lies outside the pickle, such as a storage; None if nothing does.
    """

    # What the base class has; its type stubs leave them out.
    stack: list[Any]
    memo: dict[int, Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: IO[bytes],
        makers: Makers,
        constants: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="utf-8", errors="replace")
        self._makers, self._constants, self._persistent = makers, constants, persistent
        start = file.tell()
        self._room = _ROOM + 4 * (file.seek(0, 2) - start)
        file.seek(start)

    def find_class(self, module: str, name: str) -> Any:
        """Give a constant, or the name alone."""
        # Protocol 2, which torch writes, spells the modules of Python 3 as those of Python 2.
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        return self._constants[full] if full in self._constants else Name(full)

    def get_extension(self, code: int) -> None:
        """Refuse: the registry of extensions is the process's, not the file's."""
        raise pickle.UnpicklingError(f"extension code {code}")

    def persistent_load(self, pid: Any) -> Any:
        """Give what lies outside the pickle."""
        if self._persistent is None:
            raise pickle.UnpicklingError("a persistent identity outside a file of torch")
        return self._persistent(pid)

    def make(self, what: Any, args: Any) -> Any:
        """Make the value of a known class or function, or a stand-in."""
        args = args if isinstance(args, tuple) else ()
        if not isinstance(what, Name):
            return Stand(what.name if isinstance(what, Stand) else type(what).__name__, args)
        if what.name == "copyreg._reconstructor" and args and isinstance(args[0], Name):
            return self.make(args[0], args[2:] if args[2:] != (None,) else ())
        maker = self._makers.get(what.name)
        if maker is None:
            return Stand(what.name, args)
        made = maker(*args)
        # One long text can be made into bytes again and again.
        self._room -= _length(made)
        if self._room < 0:
            raise pickle.UnpicklingError("it would take much more memory than it has bytes")
        return made

    # One function per step that is replaced, with the standard library's names. ``stack`` and ``append`` are its own.

    def load_reduce(self) -> None:
        """Replace a function and its arguments by the value."""
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args)

    def load_newobj(self) -> None:
        """Replace a class and its arguments by an object."""
        self.load_reduce()

    def load_newobj_ex(self) -> None:
        """Replace a class, its arguments and keywords by an object."""
        words, args, what = self.stack.pop(), self.stack.pop(), self.stack.pop()
        made = self.make(what, args)
        if isinstance(made, Stand) and isinstance(words, dict):
            made.entries.update(words)
        self.append(made)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self.make(klass, tuple(args)))

    def load_build(self) -> None:
        """Give an object its state."""
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Stand):
            made.state = state
        elif isinstance(made, Namespace | SimpleNamespace):
            if isinstance(state, dict):
                vars(made).update({key: value for key, value in state.items() if isinstance(key, str)})
        elif isinstance(made, OrderedDict):
            # torch keeps the versions of its modules there.
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                made._metadata = state["_metadata"]  # type: ignore[attr-defined]
        elif (builder := self._makers.get(f"{type(made).__module__}.{type(made).__name__}.__setstate__")) is not None:
            built = builder(made, state)
            if built is not made:
                self.stack[-1] = built
                last = max((place for place, value in self.memo.items() if value is made), default=None)
                if last is not None:
                    self.memo[last] = built

    def load_append(self) -> None:
        """Append one value."""
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        """Append several values."""
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        made = self.stack[-1]
        if type(made) is list:
            made.extend(values)
        elif isinstance(made, Stand):
            made.items.extend(values)

    def load_setitem(self) -> None:
        """Put in one value under a key."""
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key, value])

    def load_setitems(self) -> None:
        """Put in several values under keys."""
        self._put(self.pop_mark())

    def _put(self, items: list[Any]) -> None:
        made = self.stack[-1]
        target = made.entries if isinstance(made, Stand) else made if type(made) in _MAPPINGS else None
        if target is not None:
            for key, value in zip(items[::2], items[1::2], strict=True):
                if is_key(key):
                    target[key] = value

    def load_dict(self) -> None:
        """Make a dict of what is above the mark."""
        items = self.pop_mark()
        self.append({})
        self._put(items)

    def load_additems(self) -> None:
        """Add values to a set."""
        items, made = self.pop_mark(), self.stack[-1]
        if type(made) is set:
            made.update(filter(is_key, items))
        elif isinstance(made, Stand):
            made.items.extend(items)

    def load_frozenset(self) -> None:
        """Make a frozen set of what is above the mark."""
        items = self.pop_mark()
        self.append(frozenset(item for item in items if is_key(item)))

    def load_bytearray8(self) -> None:
        """Read bytes: as many as there are, not as many as the file claims."""
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))


_STEPS = ("reduce", "newobj", "newobj_ex", "build", "append", "appends", "setitem", "setitems")
for _step in (*_STEPS, "dict", "additems", "frozenset", "bytearray8"):
    RestrictedUnpickler.dispatch[getattr(pickle, _step.upper())[0]] = getattr(RestrictedUnpickler, f"load_{_step}")


def _length(value: Any) -> int:
    """Count the bytes or entries of a new value; a tensor is a view of memory that was there before."""
    if not isinstance(value, torch.Tensor) and hasattr(value, "nbytes"):
        return int(value.nbytes)
    return len(value) if isinstance(value, bytes | bytearray | list | tuple | dict | set | frozenset) else 0


def is_key(value: Any) -> bool:
    """Say whether a value can be a key.

    A tuple is one only if it is flat: the hash of nested ones, each holding the last twice, takes for ever.
    """
    if isinstance(value, tuple) and type(value) in (tuple, torch.Size):
        return all(isinstance(item, _SCALARS) for item in value)
    return isinstance(value, (*_SCALARS, Name, Stand))


def entries_of(value: object) -> Mapping[Any, Any] | None:
    """Give the keys and values of a mapping, a namespace, or of a stand-in for one; None for anything else."""
    if isinstance(value, Namespace | SimpleNamespace):
        return vars(value)
    if isinstance(value, Stand):
        return value.entries or None
    return value if isinstance(value, Mapping) else None
