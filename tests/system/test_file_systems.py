"""A file system that cannot do something is worked on; one that fails is named for what it says."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from influence_cli.runtime import disk
from tests.conftest import Command
from tests.support import relabel_project
from tests.support.small_project import refusal

# What a call says on a file system that does not have it: nothing is wrong, and the command works.
CANNOT = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
COURTESIES = [
    *((os, "posix_fallocate", code) for code in (*CANNOT, errno.EBADF, errno.EIO, errno.ESTALE)),
    *((fcntl, "flock", code) for code in (*CANNOT, errno.ENOLCK, errno.EBADF, errno.EIO, errno.ESTALE)),
    *((fcntl, "lockf", code) for code in (*CANNOT, errno.ENOLCK, errno.EIO)),
    *((os, "fdatasync", code) for code in CANNOT),
    *((os, "fsync", code) for code in (*CANNOT, errno.EBADF, errno.EIO)),  # of folders
    *((mmap, "mmap", code) for code in (*CANNOT, errno.ENODEV)),
    *((os, "utime", code) for code in (*CANNOT, errno.EPERM)),
    *((os, "link", code) for code in (*CANNOT, errno.EPERM, errno.EMLINK)),
]
# What says that a disk is full, read-only, or gone.
FAILURES = [
    *((os, "posix_fallocate", code) for code in (errno.ENOSPC, errno.EDQUOT)),
    *((os, "fdatasync", code) for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS)),
    *((Path, "replace", code) for code in (errno.EIO, errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ESTALE)),
    *((disk, "write_at", code) for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT)),
]


def name_of(value: object) -> str:
    return errno.errorcode[value] if isinstance(value, int) else getattr(value, "__name__", str(value))


def inject(monkeypatch: pytest.MonkeyPatch, holder: object, name: str, code: int) -> None:
    call: Callable[..., object] = getattr(holder, name)

    def fail(*_: object, **__: object) -> object:
        raise OSError(code, os.strerror(code))

    if holder is mmap:  # a class, which others ask about
        monkeypatch.setattr(disk, "mmap", Mapless(call, fail))
    else:
        monkeypatch.setattr(holder, name, fail)


class Mapless:
    """The module mmap on a file system that maps no file."""

    def __init__(self, kind: object, fail: Callable[..., object]) -> None:
        self.mmap, self.fail = fail, kind

    def __getattr__(self, name: str) -> object:
        return getattr(mmap, name)


@pytest.mark.quick("*posix_fallocate-EBADF", "*flock-EIO", "*fdatasync-EINVAL", "*mmap-ENODEV")
@pytest.mark.parametrize(("holder", "name", "code"), COURTESIES, ids=lambda value: name_of(value))
def test_a_file_system_that_cannot_do_something_is_worked_on(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, holder: object, name: str, code: int
) -> None:
    words = ("rank", 0, "--all", "-o", "rows.csv")
    usual = Path(shutil.copytree(tiny, tiny.parent / "usual"))
    influence(*words, cwd=usual)
    inject(monkeypatch, holder, name, code)
    done = influence(*words, "-v", cwd=tiny)
    rows = [(folder / "rows.csv").read_text().replace(str(folder), "") for folder in (usual, tiny)]
    assert rows[0] == rows[1]
    assert (name == "flock") == ("is used without a lock" in done.err)
    influence("gradients", "--fsck", cwd=tiny)
    monkeypatch.undo()
    influence("gradients", "--fsck", cwd=tiny)


@pytest.mark.quick("*posix_fallocate-ENOSPC", "*fdatasync-EIO", "*replace-EROFS")
@pytest.mark.parametrize(("holder", "name", "code"), FAILURES, ids=lambda value: name_of(value))
def test_a_disk_that_fails_is_named_for_what_it_says(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, holder: object, name: str, code: int
) -> None:
    with monkeypatch.context() as patch:
        inject(patch, holder, name, code)
        told = refusal(influence, tiny, "gradients")
    assert "influence.h5" in told
    assert os.strerror(code) in told
    assert "--overwrite" not in told
    influence("gradients", cwd=tiny)
    influence("gradients", "--fsck", cwd=tiny)


@pytest.mark.quick("*fdatasync-EIO")
@pytest.mark.parametrize(
    ("holder", "name", "code"),
    [one for one in FAILURES if one[1] in ("fdatasync", "replace")],
    ids=lambda value: name_of(value),
)
def test_a_result_that_cannot_be_written_is_named_and_leaves_nothing(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, holder: object, name: str, code: int
) -> None:
    influence("gradients", cwd=tiny)
    with monkeypatch.context() as patch:
        inject(patch, holder, name, code)
        told = refusal(influence, tiny, "rank", 0, "-o", "rows.csv")
    assert f"rows.csv cannot be written: {os.strerror(code)}" in told
    assert not list(tiny.glob("rows.csv*"))
    influence("gradients", "--fsck", cwd=tiny)


@pytest.mark.quick("*flock-EIO")
@pytest.mark.parametrize(
    ("holder", "name", "code"),
    [one for one in COURTESIES if one[1] in ("flock", "fdatasync", "fsync", "link", "utime")],
    ids=lambda value: name_of(value),
)
def test_files_move_and_come_back_on_such_a_file_system(
    influence: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, holder: object, name: str, code: int
) -> None:
    images = relabel_project.make(tmp_path / "images")
    before = relabel_project.tree(images)
    relabel_project.decide(images, (0, "relabel", "plain"), (9, "drop"))
    inject(monkeypatch, holder, name, code)
    influence("relabel", "decisions.csv", "--apply-moves", cwd=images)
    assert (moved := relabel_project.tree(images)) != before
    influence("relabel", "--undo", cwd=images)
    assert relabel_project.tree(images) != moved


@pytest.mark.quick("EIO")
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTCONN], ids=lambda value: name_of(value))
def test_a_store_that_cannot_be_read_is_not_called_damaged(
    influence: Command, tiny: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    from influence_cli.store import header

    influence("gradients", cwd=tiny)
    before = (tiny / "influence.h5").read_bytes()

    def fail(*_: object) -> bytes:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(header, "_read_seal", fail)
    told = refusal(influence, tiny, "rank", 0)
    assert f"influence.h5 cannot be read: {os.strerror(code)}" in told
    assert "--overwrite" not in told
    assert (tiny / "influence.h5").read_bytes() == before
