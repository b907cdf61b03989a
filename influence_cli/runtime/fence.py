"""What code of the user changes for the whole process is undone when that code returns: the arithmetic here needs it.

A training script sets torch's default dtype, switches gradients off, turns warnings into errors, reads ``sys.argv`` or
goes to another folder. Random states are left alone: a transform that draws from them has to be seen to be random.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

# What Ctrl-C and a scheduler send: a handler of the user would end a command without what it keeps for the next one.
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Modes = tuple[Any, ...]


@contextmanager
def fenced(argv: list[str] | None = None) -> Iterator[None]:
    """Undo what the block changes for the process, also if it fails.

    Args:
        argv: ``sys.argv`` in the block; by default as it is.
    """
    modes, numpy_errors, place, words = torch_modes(), np.geterr(), _folder(), sys.argv
    filters, handlers = list(warnings.filters), _handlers()
    if argv is not None:
        sys.argv = argv
    try:
        yield
    finally:
        set_torch_modes(modes)
        np.seterr(**numpy_errors)
        sys.argv = words
        if place is not None and _folder() != place:
            with suppress(OSError):
                os.chdir(place)
        _drop_errors(filters)
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def torch_modes() -> _Modes:
    """Give every mode of torch that changes how this process computes; nothing where torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ()
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        _default_device(torch),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.is_anomaly_enabled(),
    )


def set_torch_modes(modes: _Modes) -> None:
    """Set the modes that ``torch_modes`` gave, those that differ."""
    torch = sys.modules.get("torch")
    if torch is None or not modes or modes == torch_modes():
        return
    dtype, grad, device, threads, deterministic, warn_only, products, tf32, anomaly = modes
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if _default_device(torch) != device:
        torch.set_default_device(device)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    if torch.get_float32_matmul_precision() != products:
        torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = tf32
    torch.autograd.set_detect_anomaly(anomaly)


def item_modes() -> _Modes:
    """Give what is kept around the reading of one example, which takes microseconds: dtype and gradients."""
    torch = sys.modules["torch"]
    return torch.get_default_dtype(), torch.is_grad_enabled()


def set_item_modes(modes: _Modes) -> None:
    """Set what ``item_modes`` gave."""
    if modes != item_modes():
        torch = sys.modules["torch"]
        torch.set_default_dtype(modes[0])
        torch.set_grad_enabled(modes[1])


def _default_device(torch: Any) -> object:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _folder() -> str | None:
    try:
        return os.getcwd()  # noqa: PTH109 (a string is compared with a string)
    except OSError:  # removed: there is nothing to go back to
        return None


def _handlers() -> dict[signal.Signals, Any]:
    if threading.current_thread() is not threading.main_thread():
        return {}  # nothing but the main thread may set them
    known = {number: signal.getsignal(number) for number in SIGNALS}
    return {number: handler for number, handler in known.items() if handler is not None}


def _drop_errors(before: list[Any]) -> None:
    """Drop new filters that turn warnings into errors; others, such as those of an imported library, stay."""
    if warnings.filters != before:
        kept = [one for one in warnings.filters if one[0] != "error" or one in before]
        if len(kept) < len(warnings.filters):
            warnings.filters[:] = kept  # type: ignore[index]
