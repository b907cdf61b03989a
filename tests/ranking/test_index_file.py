"""The index file: what is damaged, truncated, of another store or for another λ is told in a line, never searched."""

from __future__ import annotations

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from influence_cli.config.load import load_config
from influence_cli.errors import InfluenceError
from influence_cli.influence.ensemble import make_closed_forms
from influence_cli.influence.inverse import Inverse
from influence_cli.model.task import load_tasks
from influence_cli.precompute.prepare import prepare_all
from influence_cli.precompute.prepared import Prepared
from influence_cli.ranking import index_build, index_file
from influence_cli.ranking.index_build import build_indexes
from influence_cli.ranking.index_file import PIECE, TAIL, Index, open_index, padded, seal_index, write_index
from influence_cli.runtime.terminal import Terminal
from tests.conftest import Command, edit
from tests.support.small_project import flip, refusal

NAME = "influence.h5.index"
ANEW = "\n  influence index rebuilds it"


@pytest.fixture
def indexed(influence: Command, tiny: Path) -> Path:
    """The project with a store and its index."""
    influence("index", cwd=tiny)
    return tiny


@pytest.fixture(scope="module")
def opened(stored: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared, Inverse]:
    """An index with lists, and what it belongs to; do not change it."""
    folder = Path(shutil.copytree(stored, tmp_path_factory.mktemp("lists") / "project"))
    terminal = Terminal(quiet=True)
    config = load_config(folder / "influence.yaml", ())
    (prepared,) = prepare_all(config, load_tasks(config), terminal)
    (inverse,) = make_closed_forms([prepared], terminal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_build, "FLAT_BELOW", 100)
        (index,) = build_indexes([prepared], [inverse], terminal=terminal)
    return index.path, prepared, inverse


def test_any_program_with_faiss_opens_it(opened: tuple[Path, Prepared, Inverse]) -> None:
    search = faiss.read_index(str(opened[0]))
    assert (search.ntotal, search.metric_type) == (320, faiss.METRIC_INNER_PRODUCT)
    assert sorted(path.name for path in opened[0].parent.glob("influence.h5*")) == ["influence.h5", NAME]


def test_a_flipped_bit_is_told_wherever_it_is(opened: tuple[Path, Prepared, Inverse], tmp_path: Path) -> None:
    path, (whole, *belongs) = tmp_path / "copy", (opened[0].read_bytes(), *opened[1:])
    path.write_bytes(whole)
    assert open_index(path, *belongs).search.ntotal == 320
    size = len(whole)
    for place in (*range(0, size, size // 40), *range(size - TAIL.size - 8, size)):
        path.write_bytes(whole)
        flip(path, place)
        with pytest.raises(InfluenceError, match=r"is damaged: |is not an index of influence") as caught:
            open_index(path, *belongs)
        assert caught.value.hint == "influence index rebuilds it"


def test_what_is_cut_short_or_something_else_is_told(opened: tuple[Path, Prepared, Inverse], tmp_path: Path) -> None:
    path, (whole, *belongs) = tmp_path / "copy", (opened[0].read_bytes(), *opened[1:])
    for content in (whole[:-1], whole[: len(whole) // 2], b"", b"x" * 100, whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(InfluenceError, match="copy is not an index of influence, or it is truncated"):
            open_index(path, *belongs)
    path.write_bytes(whole[1:])
    with pytest.raises(InfluenceError, match=r"copy is damaged: its footer \(checksums and origin\) does not match"):
        open_index(path, *belongs)
    path.unlink()
    with pytest.raises(InfluenceError, match="there is no index"):
        open_index(path, *belongs)


def test_lists_are_verified_when_they_are_looked_into(tmp_path: Path) -> None:
    """Of a file of many MB, those are read alone that a search needs."""
    n, width, count = 5_000, 513, 16
    vectors = np.random.default_rng(0).standard_normal((n, width)).astype(np.float32)
    vectors[:, -1] = 0
    means = faiss.IndexFlatIP(width)
    kind = faiss.ScalarQuantizer.QT_fp16
    search = faiss.IndexIVFScalarQuantizer(means, width, count, kind, faiss.METRIC_INNER_PRODUCT, False)
    search.is_trained = True
    numbers = np.arange(n) * count // n
    search.add_core(n, faiss.swig_ptr(vectors), None, faiss.swig_ptr(numbers))
    means.add(np.eye(count, width, dtype=np.float32))
    part, path = tmp_path / "i.part", tmp_path / "i"
    facts = {"lists": count, "probes": 1, "factor": 1, "faiss": faiss.__version__}
    seal_index(Index(part, np.arange(n), facts, write_index(part, search)), path, {})
    assert path.stat().st_size > 4 * PIECE
    flip(path, path.stat().st_size - PIECE // 2)  # in the last list

    checked, found = index_file._read_seal(path)
    checked.check([(0, found["lists_at"][0])])
    read = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    index = Index(
        path, np.arange(n), found["facts"], read, lambda own: checked.check(index_file._places(read, np.unique(own)))
    )
    (rows,) = index.candidates(np.eye(1, width - 1, dtype=np.float32), 20)
    inside = vectors[numbers == 0, 0]
    assert rows.tolist() == np.argsort(-inside)[:20].tolist()
    with pytest.raises(InfluenceError, match="is damaged: the checksum of its MB"):
        index.candidates(np.eye(count, width - 1, dtype=np.float32)[-1:], 20)


def test_damage_is_told_by_the_command(influence: Command, indexed: Path) -> None:
    flip(indexed / NAME, 500)
    message = refusal(influence, indexed, "rank", 3, "--approximate")
    assert message == f"error: {NAME} is damaged: the checksum of its MB 0 does not match{ANEW}"


def test_an_index_older_than_its_store_is_refused(influence: Command, indexed: Path) -> None:
    with (indexed / "train" / "a" / "000.png").open("ab") as file:
        file.write(b" ")
    influence("gradients", "--overwrite", cwd=indexed)
    message = refusal(influence, indexed, "rank", 3, "--approximate")
    assert message == (
        f"error: {NAME} is older than its store influence.h5; what differs: the training files (a path, or what one "
        f"of them holds){ANEW}"
    )
    influence("index", cwd=indexed)
    influence("rank", 3, "--approximate", cwd=indexed)


def test_so_is_one_of_other_coordinates(influence: Command, indexed: Path) -> None:
    edit(indexed, "gradients: {", "gradients: {budget: 12kB, ")
    influence("gradients", "--overwrite", cwd=indexed)
    message = refusal(influence, indexed, "rank", 3, "--approximate")
    assert "what differs: the rows, or their kept coordinates" in message


def test_a_store_made_again_of_the_same_keeps_its_index(influence: Command, indexed: Path) -> None:
    influence("gradients", "--overwrite", cwd=indexed)
    influence("rank", 3, "--approximate", cwd=indexed)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("curvature.damping=0.5", "λ = 0, but it is 0.5 now"),
        ("l2=0.25", "l2 = 0.01, but it is 0.25 now"),
    ],
)
def test_one_for_another_damping_is_refused(influence: Command, indexed: Path, setting: str, said: str) -> None:
    message = refusal(influence, indexed, "rank", 3, "--approximate", "-s", setting)
    assert message == f"error: {NAME} was made for {said}\n  influence index rebuilds it for this one"
    influence("index", "-s", setting, cwd=indexed)
    influence("rank", 3, "--approximate", "-s", setting, cwd=indexed)


def test_one_of_another_method_over_the_same_gradients_is_refused(influence: Command, tiny: Path) -> None:
    influence("index", "-s", "curvature.method=identity", cwd=tiny)
    message = refusal(influence, tiny, "rank", 3, "--approximate", "-s", "curvature.method=fisher")
    assert "was made for curvature.method: identity, but it is fisher now" in message


def test_a_failed_write_leaves_what_was_there(
    influence: Command, indexed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in indexed.glob("influence.h5*")}

    def full(*_: object) -> None:
        raise RuntimeError("write error")

    with monkeypatch.context() as patch:
        patch.setattr(faiss, "write_index", full)
        assert "cannot be written: the disk is full or gone" in refusal(influence, indexed, "index")
    with monkeypatch.context() as patch:
        patch.setattr(
            "influence_cli.runtime.disk.flush", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        assert "cannot be written" in refusal(influence, indexed, "index")
    assert {path.name: path.read_bytes() for path in indexed.glob("influence.h5*")} == before


def test_vectors_are_padded_with_zeros() -> None:
    vectors = np.arange(6, dtype=np.float64).reshape(2, 3)
    wide = padded(vectors, 5)
    assert wide.dtype == np.float32
    assert np.array_equal(wide[:, :3], vectors)
    assert not wide[:, 3:].any()
    assert padded(wide, 5).shape == (2, 5)
