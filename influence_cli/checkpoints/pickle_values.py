"""The classes and functions that the restricted reader knows: what a checkpoint holds that is plain data.

Each maker takes what a pickle hands over and checks it: those of torch and numpy that it stands for trust their
arguments. What is not plain data (an array of objects, a quantised tensor) becomes a stand-in.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.checkpoints.restricted_pickle import Name, Stand, is_key

_PLAIN_DTYPE = re.compile(r"[?biufcSU]\d{0,4}")
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}


@dataclass(frozen=True, eq=False)
class Storage:
    """The numbers of a file that tensors are views of.

    Attributes:
        bytes: the memory, often a part of the file that is mapped and read when it is used.
        dtype: of the numbers; None where each tensor says it.
    """

    bytes: torch.UntypedStorage
    dtype: torch.dtype | None

    @property
    def nbytes(self) -> int:
        """Give the size of the memory."""
        return int(self.bytes.nbytes())


def storage_dtype(kind: object) -> torch.dtype | None:
    """Give the dtype of a storage's class; None for one without a dtype.

    Raises:
        ValueError: it is not known.
    """
    name = kind.name.rpartition(".")[2] if isinstance(kind, Name) else ""
    if name == "UntypedStorage":
        return None
    if name not in _STORAGES:
        raise ValueError(f"a storage of the class {name or type(kind).__name__}")
    return _STORAGES[name]


def tensor(storage: Storage, dtype: torch.dtype, offset: int, size: Any, stride: Any) -> Tensor:
    """Make a view of a storage.

    Args:
        storage: the memory.
        dtype: of the tensor.
        offset: of its first number, in numbers.
        size: of each dimension.
        stride: of each dimension, in numbers.

    Raises:
        ValueError: it reaches beyond the storage, which torch would enlarge for it.
    """
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers) or len(size) != len(stride):
        raise ValueError("a tensor of an impossible shape")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if 0 not in size and (last + 1) * dtype.itemsize > storage.bytes.nbytes():
        raise ValueError("a tensor that is larger than its storage")
    if 0 in size:
        return torch.empty(size, dtype=dtype) if math.prod(filter(None, size)) < 2**62 else torch.empty(0, dtype=dtype)
    return torch.empty(0, dtype=dtype).set_(storage.bytes, offset, size, stride)


def _tensor_v2(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> Any:
    if not isinstance(storage, Storage) or storage.dtype is None:
        return Stand("torch._utils._rebuild_tensor_v2")
    return _turned(tensor(storage, storage.dtype, offset, size, stride), metadata)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, metadata: Any = None
) -> Any:
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        return Stand("torch._utils._rebuild_tensor_v3")
    return _turned(tensor(storage, dtype, offset, size, stride), metadata)


def _turned(made: Tensor, metadata: Any) -> Tensor:
    """Apply the two marks that torch keeps beside a view: its conjugate, its negative."""
    if isinstance(metadata, dict):
        made = made.conj() if metadata.get("conj") else made
        made = torch._neg_view(made) if metadata.get("neg") else made
    return made


def _parameter(data: Any, grad: Any = None, *_more: Any) -> Any:
    if not isinstance(data, Tensor):
        return data
    return nn.Parameter(data, requires_grad=grad is not False and (data.is_floating_point() or data.is_complex()))


def _of_subclass(function: Any, _kind: Any, args: Any, _state: Any) -> Any:
    """Make the plain tensor of a subclass that holds its numbers in a storage."""
    maker = MAKERS.get(function.name) if isinstance(function, Name) else None
    made = maker(*args) if maker in (_tensor_v2, _tensor_v3, _parameter) and isinstance(args, tuple) else None
    return made if isinstance(made, Tensor) else Stand("torch._tensor._rebuild_from_type_v2")


def _of_array(data: Any, dtype: Any, _device: Any, grad: Any) -> Any:
    if not isinstance(data, np.ndarray) or not isinstance(dtype, torch.dtype):
        return Stand("torch._utils._rebuild_device_tensor_from_numpy")
    del grad
    return torch.from_numpy(data).to(dtype) if data.flags.writeable else Stand("numpy.ndarray")


def _size(values: Any = ()) -> Any:
    return torch.Size(values)


def _device(*values: Any) -> Any:
    try:
        return torch.device(*values)
    except (RuntimeError, TypeError):  # of a machine that this torch does not know
        return Stand("torch.device", values)


def _dtype(code: Any, *_more: Any) -> Any:
    return np.dtype(code) if isinstance(code, str) and _PLAIN_DTYPE.fullmatch(code) else Stand("numpy.dtype", (code,))


def _dtype_state(made: np.dtype[Any], state: Any) -> Any:
    if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
        return made.newbyteorder(state[1])
    return made


def _scalar(dtype: Any, data: Any = b"") -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes) or len(data) != dtype.itemsize:
        return Stand("numpy.scalar")
    if dtype.itemsize == 0:
        return dtype.type()
    return np.frombuffer(data, dtype=dtype)[0]


def _array(*_args: Any) -> Any:
    return np.empty(0, dtype=np.int8)


def _array_state(made: np.ndarray, state: Any) -> Any:
    _version, shape, dtype, fortran, data = state
    array = _buffer_array(data, dtype, shape, "F" if fortran else "C")
    if isinstance(array, np.ndarray):
        state = (1, array.shape, array.dtype, bool(fortran), bytes(data))
        made.__setstate__(state)
        return made
    return array


def _buffer_array(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    data = data.encode("latin1") if isinstance(data, str) else data
    plain = isinstance(dtype, np.dtype) and isinstance(data, bytes | bytearray) and dtype.itemsize > 0
    shaped = isinstance(shape, tuple) and all(type(length) is int and length >= 0 for length in shape)
    if not plain or not shaped or math.prod(shape) * dtype.itemsize != len(data):
        return Stand("numpy.ndarray")
    return np.frombuffer(bytes(data), dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _encode(text: Any, coding: Any = "utf-8") -> Any:
    """Give the bytes that protocol 2 writes as text."""
    return text.encode("latin1") if isinstance(text, str) and coding == "latin1" else Stand("_codecs.encode")


def _pairs(values: Any = ()) -> list[tuple[Any, Any]]:
    pairs = values.items() if isinstance(values, dict) else values
    return [
        (pair[0], pair[1]) for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2 and is_key(pair[0])
    ]


def _default_dict(factory: Any = None, values: Any = ()) -> Any:
    known = {"builtins.list": list, "builtins.dict": dict, "builtins.int": int, "builtins.float": float}
    name = factory.name if isinstance(factory, Name) else ""
    return defaultdict(known.get(name), _pairs(values))


def _listed(values: Any = (), *_more: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple | set | frozenset) else []


def _path(kind: Callable[..., PurePath]) -> Callable[..., Any]:
    def make(*parts: Any) -> Any:
        return kind(*(part for part in parts if isinstance(part, str)))

    return make


_PATHS: dict[str, Callable[..., PurePath]] = {
    "PosixPath": Path,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
}
_PATHS["PureWindowsPath"] = PureWindowsPath

MAKERS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor_v2,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_numpy": _of_array,
    "torch._tensor._rebuild_from_type_v2": _of_subclass,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "numpy.dtype": _dtype,
    "argparse.Namespace": lambda *_: Namespace(),
    "types.SimpleNamespace": lambda *_: SimpleNamespace(),
    "collections.OrderedDict": lambda values=(): OrderedDict(_pairs(values)),
    "collections.defaultdict": _default_dict,
    "collections.Counter": lambda values=(): Counter(dict(_pairs(values))),
    "collections.deque": _listed,
    "builtins.list": _listed,
    "builtins.dict": lambda values=(): dict(_pairs(values)),
    "builtins.tuple": lambda values=(): tuple(_listed(values)),
    "builtins.set": lambda values=(): set(filter(is_key, _listed(values))),
    "builtins.frozenset": lambda values=(): frozenset(filter(is_key, _listed(values))),
    "builtins.complex": lambda real=0.0, imag=0.0: complex(float(real), float(imag)),
    "builtins.bytearray": lambda values=b"", *_: bytearray(values) if isinstance(values, bytes) else bytearray(),
    "builtins.bytes": lambda values=b"", *_: values if isinstance(values, bytes) else b"",
    "_codecs.encode": _encode,
    **{f"pathlib.{name}": _path(kind) for name, kind in _PATHS.items()},
    **{f"pathlib._local.{name}": _path(kind) for name, kind in _PATHS.items()},
    # numpy moved these in version 2.
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _buffer_array for core in ("core", "_core")},
    "numpy.ndarray.__setstate__": _array_state,
    **{
        f"numpy.dtypes.{kind}.__setstate__": _dtype_state
        for kind in {type(np.dtype(c)).__name__ for c in "?bBhHiIlLqQefdgFDGSU"}
    },
}
CONSTANTS: Mapping[str, Any] = {
    f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.layout)
}
