"""What is plain comes out of a pickle as it was; what is foreign is never imported, called, or allowed to change us."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import pickle
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from influence_cli.checkpoints.restricted_pickle import Name, Stand, entries_of
from influence_cli.checkpoints.torch_file import read_torch_file, unpickle
from influence_cli.errors import InfluenceError

PLAIN: dict[str, Any] = {
    "namespace": argparse.Namespace(lr=0.1, device=torch.device("cuda:0"), layers=[1, 2]),
    "simple": SimpleNamespace(a=1),
    "ordered": OrderedDict(b=1, a=2),
    "default": defaultdict(list, {"loss": [0.5]}),
    "counter": Counter("abca"),
    "path": Path("runs/best"),
    "pure": PurePosixPath("a"),
    "size": torch.Size([2, 3]),
    "dtype": torch.bfloat16,
    "scalar": np.float64(0.9),
    "flag": np.bool_(True),
    "text": np.str_("word"),
    "numpy dtype": np.dtype("float32"),
    "set": {1, 2},
    "frozen": frozenset({"a"}),
    "bytes": b"\xff\x00a",
    "array of bytes": bytearray(b"abc"),
    "complex": 1 + 2j,
    "large": 2**100,
    "none": [None, True, 1.5, (1, "é")],
}
ARRAYS = {
    "rows": np.arange(6.0).reshape(2, 3),
    "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "other byte order": np.arange(3, dtype=">i4"),
    "words": np.array(["a", "bb"]),
    "empty": np.empty((0, 2)),
}
TENSORS = {
    "strided": torch.arange(10)[2:8:2],
    "parameter": nn.Parameter(torch.ones(2, 3).t()),
    "half": torch.ones(2, dtype=torch.float16),
    "complex": torch.ones(2, dtype=torch.complex64).conj(),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(3),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_what_they_were(tmp_path: Path, zipped: bool, protocol: int) -> None:
    path = tmp_path / "a.pt"
    torch.save(
        {"plain": PLAIN, "arrays": ARRAYS, "tensors": TENSORS},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=zipped,
    )
    content: Any = read_torch_file(path, "here")
    assert content["plain"] == PLAIN
    assert [type(value) for value in content["plain"].values()] == [type(value) for value in PLAIN.values()]
    for name, array in ARRAYS.items():
        assert content["arrays"][name].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
        assert np.array_equal(content["arrays"][name], array)
    for name, tensor in TENSORS.items():
        assert torch.equal(content["tensors"][name], tensor), name
        assert content["tensors"][name].dtype == tensor.dtype


def test_a_foreign_object_is_a_stand_in_that_remembers_what_it_was_given(tmp_path: Path) -> None:
    torch.save({"loss": nn.CrossEntropyLoss(label_smoothing=0.1), "kind": nn.Linear}, tmp_path / "a.pt")
    content: Any = read_torch_file(tmp_path / "a.pt", "here")
    assert isinstance(content["loss"], Stand)
    assert content["loss"].name == "torch.nn.modules.loss.CrossEntropyLoss"
    assert content["loss"].state["label_smoothing"] == 0.1
    assert content["kind"] == Name("torch.nn.modules.linear.Linear")


def test_a_foreign_mapping_can_be_read(tmp_path: Path) -> None:
    class Settings(dict[str, Any]):
        pass

    Settings.__qualname__ = Settings.__name__
    sys.modules["settings_of_a_user"] = module = type(sys)("settings_of_a_user")
    module.Settings = Settings  # type: ignore[attr-defined]
    Settings.__module__ = "settings_of_a_user"
    data = pickle.dumps({"hyper_parameters": Settings(lr=0.1)}, protocol=2)
    del sys.modules["settings_of_a_user"]
    assert entries_of(unpickle(io.BytesIO(data))["hyper_parameters"]) == {"lr": 0.1}


class Calls:
    """Is unpickled by calling something."""

    def __init__(self, what: Any, *args: Any) -> None:
        self.call = (what, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_of_a_crafted_file_happens_and_its_values_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted.py").write_text("open('imported', 'w').close()\ndef run(*args): open('called', 'w').close()\n")
    import planted  # type: ignore[import-not-found]

    (tmp_path / "imported").unlink()
    evil = [
        Calls(os.system, "touch shell"),
        Calls(Path.touch, Path("touched")),
        Calls(exec, "open('executed', 'w')"),
        Calls(getattr, "text", "upper"),
        Calls(planted.run, 1),
        Calls(torch.load, "other.pt"),
        Calls(np.load, "other.npy"),
    ]
    torch.save(
        {"evil": evil, "w": torch.ones(2)}, "a.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
    )
    del sys.modules["planted"]
    content: Any = read_torch_file(Path("a.pt"), "here")
    assert all(isinstance(item, Stand) for item in content["evil"])
    assert torch.equal(content["w"], torch.ones(2))
    assert "planted" not in sys.modules
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"a.pt", "planted.py"}


def built(*steps: bytes) -> Any:
    return unpickle(io.BytesIO(b"\x80\x02" + b"".join(steps) + b"."))


def test_a_class_that_is_known_cannot_be_changed() -> None:
    # BUILD on a class sets its attributes, in the standard reader.
    before = argparse.Namespace.__init__
    state = b"N}X\x08\x00\x00\x00__init__K\x01s\x86b"
    assert built(b"cargparse\nNamespace\n", state) == Name("argparse.Namespace")
    assert argparse.Namespace.__init__ is before


def test_keys_whose_hash_would_take_for_ever_are_no_keys() -> None:
    nested = b")" + b"\x71\x00h\x00\x86" * 60
    assert built(b"}", nested, b"K\x01s") == {}
    assert built(b"}(K\x01K\x02", nested, b"K\x03u") == {1: 2}


@pytest.mark.parametrize(
    "steps",
    [
        b"\x96" + (2**60).to_bytes(8, "little"),  # a bytearray of that length
        b"\x8e" + (2**60).to_bytes(8, "little"),  # bytes
        b"\x8d" + (2**60).to_bytes(8, "little"),  # a text
        b"\x8b" + (2**31 - 1).to_bytes(4, "little"),  # a number
        b"N" + b"r" + (2**32 - 1).to_bytes(4, "little"),  # a place in the memo
        b"\x82\x01",  # an extension
        b"X\x01\x00\x00\x00aQ",  # what is outside the file
    ],
)
def test_a_length_that_is_only_claimed_reserves_nothing(steps: bytes) -> None:
    import tracemalloc

    tracemalloc.start()
    with contextlib.suppress(Exception):  # any is turned into one line by the reader of files
        built(steps)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_what_is_made_of_one_text_again_and_again_is_refused() -> None:
    text = b"X" + (2**22).to_bytes(4, "little") + b"a" * 2**22 + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    encode = b"c_codecs\nencode\nh\x00h\x01\x86R"
    assert built(b"(", text, encode * 4, b"t")[-1] == b"a" * 2**22
    with pytest.raises(pickle.UnpicklingError, match="much more memory"):
        built(b"(", text, encode * 40, b"t")


def test_a_state_dict_that_was_pickled_without_torch_is_read(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": state}))
    content: Any = read_torch_file(tmp_path / "model.pkl", "here")
    assert all(torch.equal(content["model"][name], value) for name, value in state.items())


def test_a_tensor_cannot_reach_beyond_its_storage(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(4.0)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.pt").read_bytes()
    # The size (4,) and the stride (1,), behind the offset 0.
    place = content.index(b"K\x00K\x04\x85")
    for new in (b"K\x01K\x04\x85", b"K\x00K\x05\x85", b"K\xffK\x04\x85"):
        (tmp_path / "a.pt").write_bytes(content[:place] + new + content[place + len(new) :])
        with pytest.raises(InfluenceError, match="larger than its storage"):
            read_torch_file(tmp_path / "a.pt", "here")


def test_what_is_not_used_is_not_read_into_memory(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    torch.save({"state_dict": {"w": torch.ones(3)}, "optimizer": torch.zeros(2**23)}, tmp_path / "a.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content: Any = read_torch_file(tmp_path / "a.pt", "here")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**23 / 1024
    assert content["optimizer"].shape == (2**23,)


def test_writing_into_what_was_read_leaves_the_file(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    content: Any = read_torch_file(tmp_path / "a.pt", "here")
    content["w"].fill_(7)
    assert (tmp_path / "a.pt").read_bytes() == before
