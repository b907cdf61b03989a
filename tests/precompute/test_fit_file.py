"""A fit's progress on disk: it comes back whole and for the same run only, or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

from influence_cli.curvature.progress import Progress
from influence_cli.errors import InfluenceError
from influence_cli.precompute import fit_file
from influence_cli.precompute.fit_file import fit_path, load_progress, save_progress
from influence_cli.runtime import disk

FINGERPRINT = {"weights": "abc", "basis": "ekfac ggn"}


def progress() -> Progress:
    """Arrays of every kind that a fit keeps: scalars, an empty one, one that is not contiguous."""
    torch.manual_seed(0)
    arrays = {
        "seed": torch.tensor(3),
        "covariances.n": torch.tensor(256),
        "a.0": torch.randn(1, 3, 3, dtype=torch.float64),
        "qd.0": torch.randn(2, 2, 3).transpose(1, 2),
        "la.0": torch.zeros(1, 0, dtype=torch.float64),
        "t.0": torch.tensor(5.5, dtype=torch.float64),
    }
    return Progress("eigenvalues", 4, 1024, arrays)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = fit_path(tmp_path / "influence.h5")
    save_progress(path, progress(), FINGERPRINT)
    return path


def same(found: Progress | None) -> bool:
    wanted = progress()
    return (
        found is not None
        and (found.stage, found.done, found.examples) == (wanted.stage, wanted.done, wanted.examples)
        and found.arrays.keys() == wanted.arrays.keys()
        and all(
            torch.equal(found.arrays[name], tensor) and found.arrays[name].dtype == tensor.dtype
            for name, tensor in wanted.arrays.items()
        )
    )


def test_it_lies_beside_the_store() -> None:
    assert fit_path(Path("runs/influence.2.h5")) == Path("runs/influence.2.h5.fit")


def test_what_is_saved_comes_back(saved: Path) -> None:
    found = load_progress(saved, FINGERPRINT)
    assert same(found)
    # The arrays are its own: a fit goes on adding to them, and the file is removed or replaced meanwhile.
    before = saved.read_bytes()
    found.arrays["a.0"].add_(1)
    assert saved.read_bytes() == before
    saved.unlink()
    assert float(found.arrays["t.0"]) == 5.5
    assert [path.name for path in saved.parent.iterdir()] == []


def test_it_is_replaced_whole(saved: Path) -> None:
    later = progress()
    later.done, later.arrays = 5, {"v.0": torch.ones(2)}
    save_progress(saved, later, FINGERPRINT)
    found = load_progress(saved, FINGERPRINT)
    assert found is not None
    assert found.done == 5
    assert list(found.arrays) == ["v.0"]
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_there_may_be_none(tmp_path: Path) -> None:
    assert load_progress(tmp_path / "influence.h5.fit", FINGERPRINT) is None
    (tmp_path / "influence.h5.fit").mkdir()
    assert load_progress(tmp_path / "influence.h5.fit", FINGERPRINT) is None


@pytest.mark.parametrize(
    "other", [{}, {"weights": "abc"}, FINGERPRINT | {"weights": "abd"}, FINGERPRINT | {"labels": ""}], ids=str
)
def test_that_of_another_run_is_not_used(saved: Path, other: dict[str, str]) -> None:
    assert load_progress(saved, other) is None
    assert same(load_progress(saved, dict(reversed(FINGERPRINT.items()))))


def test_no_damaged_byte_passes(saved: Path) -> None:
    whole = saved.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 6
        saved.write_bytes(damaged)
        assert load_progress(saved, FINGERPRINT) is None, f"byte {place} of {len(whole)}"


@pytest.mark.parametrize(
    ("was", "now"),
    [(b'"shape":[1,3,3]', b'"shape":[3,3,1]'), (b'"shape":[1,0]', b'"shape":[9,0]'), (b'"F64"', b'"I64"')],
    ids=["shape", "shape of nothing", "type"],
)
def test_the_same_bytes_of_another_shape_or_type_are_not_used(saved: Path, was: bytes, now: bytes) -> None:
    whole = saved.read_bytes()
    assert was in whole
    saved.write_bytes(whole.replace(was, now, 1))
    assert load_progress(saved, FINGERPRINT) is None


def test_a_file_that_is_cut_short_or_longer_is_not_used(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in range(0, len(whole), 7):
        saved.write_bytes(whole[:length])
        assert load_progress(saved, FINGERPRINT) is None, length
    saved.write_bytes(whole + b"\0")
    assert load_progress(saved, FINGERPRINT) is None


@pytest.mark.parametrize("text", [b"", b"not a file of tensors", b"\x02\0\0\0\0\0\0\0{}"])
def test_another_file_is_not_used(saved: Path, text: bytes) -> None:
    saved.write_bytes(text)
    assert load_progress(saved, FINGERPRINT) is None


@pytest.mark.parametrize("stopped_at", ["save_file", "flush"])
def test_an_error_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: str) -> None:
    def fail(*_: object, **__: object) -> None:
        if stopped_at == "save_file":
            saved.with_name(saved.name + ".part").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk if stopped_at == "flush" else fit_file, stopped_at, fail)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**6, 10**6, 0))
    later = progress()
    later.done = 5
    with pytest.raises(
        InfluenceError, match=r"fit cannot be written: No space left on device, [\d.]+ k?B more"
    ) as caught:
        save_progress(saved, later, FINGERPRINT)
    assert "free disk space" in caught.value.hint
    assert same(load_progress(saved, FINGERPRINT))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InfluenceError, match=r"cannot be written: .*No such file"):
        save_progress(tmp_path / "gone" / "influence.h5.fit", progress(), FINGERPRINT)
