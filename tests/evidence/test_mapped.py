"""Arrays in temporary files, and passes by parts, against the same arithmetic in memory at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.evidence import mapped
from influence_cli.evidence.mapped import large, on_disk, parts_of, row_parts, scratch_folder


@pytest.fixture(params=["memory", "files"])
def values(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Give numbers [23, 7], and have parts of three rows at most."""
    monkeypatch.setattr(mapped, "HELD", 21)
    some = torch.randn(23, 7, generator=torch.Generator().manual_seed(0))
    with on_disk(tmp_path if request.param == "files" else None):
        whole = large(23, 7)
        whole[:] = some
        return whole


def test_parts_cover_all_rows_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "HELD", 20)
    assert [(part.start, part.stop) for part in row_parts(8, 6)] == [(0, 3), (3, 6), (6, 8)]
    assert [(part.start, part.stop) for part in row_parts(2, 100)] == [(0, 1), (1, 2)], "a row at least"
    assert [(part.start, part.stop) for part in parts_of(5, 4)] == [(0, 4), (4, 5)]
    assert list(row_parts(0, 5)) == []


def test_passes_by_parts_are_those_at_once(values: Tensor, tmp_path: Path) -> None:
    targets = torch.arange(23) % 7
    assert torch.equal(mapped.picked(values, targets), values[torch.arange(23), targets])
    assert torch.equal(mapped.likeliest(values), values.argmax(dim=1))
    rows = torch.tensor([3, 22, 3, 0])
    assert torch.equal(mapped.chosen(values, rows), values[rows])
    torch.testing.assert_close(mapped.softmax(values), values.softmax(dim=1))
    total = mapped.add_(mapped.add_(None, values.clone()), values)
    torch.testing.assert_close(mapped.divide_(total, 2), values)
    wanted = (0.5 * values).log_softmax(dim=1)
    torch.testing.assert_close(mapped.log_softmax_(values.half(), 0.5), wanted, rtol=1e-3, atol=1e-3)
    assert mapped.log_softmax_(values, 0.5) is values
    torch.testing.assert_close(values, wanted)
    assert list(tmp_path.iterdir()) == [], "the files have no name"


def test_a_row_that_is_not_judged_has_no_likeliest_class() -> None:
    values = torch.tensor([[0.1, 0.2], [torch.nan, torch.nan]])
    assert mapped.likeliest(values).tolist() == [1, -1]


def test_what_is_in_files_stays_when_its_pages_are_dropped(tmp_path: Path) -> None:
    with on_disk(tmp_path):
        assert mapped.narrow() == torch.float16
        some, none = large(1_000, 50, torch.float16), large(0, 50)
    some[:] = torch.arange(1_000)[:, None]
    mapped.release()
    assert torch.equal(some[:, 7], torch.arange(1_000).half())
    assert none.shape == (0, 50)
    assert not mapped.is_on_disk()
    assert mapped.narrow() == torch.float32


def test_a_folder_without_room_is_told(tmp_path: Path) -> None:
    with on_disk(tmp_path / "missing"), pytest.raises(InfluenceError, match="a temporary file cannot be made") as told:
        large(3, 3)
    assert "TMPDIR" in str(told.value.hint)


def test_the_folder_is_that_of_the_store_unless_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    assert scratch_folder(tmp_path / "influence.h5") == tmp_path
    monkeypatch.setenv("TMPDIR", str(tmp_path / "other"))
    assert scratch_folder(tmp_path / "influence.h5") == tmp_path / "other"
