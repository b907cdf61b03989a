"""disk: a file that is written whole is there complete or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from influence_cli.runtime import disk


def test_a_file_appears_flushed_at_the_end_of_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, done = tmp_path / "a", []
    path.write_text("before")
    for name in ("flush", "replace"):
        call = getattr(disk, name)
        monkeypatch.setattr(disk, name, lambda *words, call=call, name=name: (done.append(name), call(*words)))
    with disk.whole(path) as part:
        part.write_text("after")
        assert path.read_text() == "before"
        assert done == []
    assert done == ["flush", "replace"]
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fails", ["block", "flush", "replace"])
def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    path = tmp_path / "a"
    path.write_text("before")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if fails != "block":
        monkeypatch.setattr(disk, fails, refuse)

    def write() -> None:
        with disk.whole(path) as part:
            part.write_text("after")
            if fails == "block":
                refuse()

    with pytest.raises(OSError, match="No space"):
        write()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF])
def test_a_file_system_that_cannot_reserve_gets_a_file_of_that_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    path = tmp_path / "store.h5"
    with path.open("wb", buffering=0) as raw:
        disk.reserve(raw, 5000)
    assert path.stat().st_size == 5000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_without_room_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with (tmp_path / "store.h5").open("wb", buffering=0) as raw, pytest.raises(OSError, match=os.strerror(code)):
        disk.reserve(raw, 5000)
