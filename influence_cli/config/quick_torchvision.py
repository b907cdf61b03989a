"""Import torchvision without torch's compiler, which it loads for two decorators: a third of the start of a command.

torchvision.ops asks ``torch._dynamo.utils`` for one function that is called only while a model is compiled, and
torchvision.tv_tensors marks functions with ``torch.compiler.disable``. The compiler (torch._dynamo, and sympy with it)
is loaded when it is first used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

COMPILER = ("torch._dynamo", "torch._dynamo.utils")


class _StandIn(ModuleType):
    """A module that is loaded at the first question that it has no answer to."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        _remove()
        return getattr(importlib.import_module(self.__name__), name)


def import_torchvision() -> None:
    """Import torchvision and its transforms; do nothing if torchvision or the compiler is loaded already.

    Raises:
        ImportError: torchvision is not installed or fails to load.
    """
    if "torchvision" in sys.modules or COMPILER[0] in sys.modules:
        return
    importlib.import_module("torch")  # before anything takes the place of a part of it
    compiler, utils = (_StandIn(name) for name in COMPILER)
    compiler.disable = _disable  # type: ignore[attr-defined]
    utils.is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules.update({COMPILER[0]: compiler, COMPILER[1]: utils})
    try:
        importlib.import_module("torchvision.transforms.v2")
    finally:
        _remove()


def _remove() -> None:
    for name in COMPILER:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


def _disable(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """Stand for ``torch.compiler.disable``: nothing here compiles, so there is nothing to keep a function out of."""
    return (lambda given: given) if function is None else function


def _is_compile_supported(device: str) -> bool:
    supported: bool = importlib.import_module(COMPILER[1]).is_compile_supported(device)
    return supported
