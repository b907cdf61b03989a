"""A kill at every change on disk of gradients, the fit, verify and relabel: what a rerun makes of what is left.

Each command runs once under a layer that records the folder at every moment (tests/support/crash_points.py). Then
the folder is put back to each of them, the command runs again as a user would have
it, and everything has to be as one pass leaves it.
"""

from __future__ import annotations

import csv
import io
import signal
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from influence_cli.curvature import ekfac, explicit
from influence_cli.curvature.progress import Progress
from influence_cli.errors import InfluenceError
from influence_cli.metrics import bootstrap_lds
from influence_cli.precompute import fill_store, fit, fit_file
from influence_cli.relabel import move_log
from influence_cli.relabel.move_log import read_log
from influence_cli.retrain import lds, training
from influence_cli.retrain.training import Again
from influence_cli.runtime import disk
from influence_cli.runtime.jobs import Arrays
from influence_cli.store.store import Store
from tests.conftest import Command, edit
from tests.support import relabel_project
from tests.support.copies import copied
from tests.support.crash_points import STORE, State, watch
from tests.support.relabel_project import decide
from tests.support.small_project import BLOCKS, EKFAC, flip, make, place_of, with_training

RETRAINED = (*STORE, "influence.retrained", "influence.retrained/**/*", "rows.csv", "rows.csv.part")
LABELS = ("labels.csv", "exclude.csv", "moves.csv")
MOVED = ("data", "data/**/*", "moves.log.csv")
DECIDED = (
    (0, "relabel", "emoji 🦉"),
    (1, "relabel", 'a "quoted", one'),
    (6, "relabel", "-minus"),
    (9, "drop"),
    (12, "keep"),
)
MOVES = 4
Row = tuple[str, ...]


@pytest.fixture(scope="module")
def small(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project without a store; do not change it."""
    return make(tmp_path_factory.mktemp("small") / "project")


@pytest.fixture
def project(small: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy that a test may change."""
    with copied(small, tmp_path / "project") as folder:
        yield folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Images and decisions about them."""
    folder = relabel_project.make(tmp_path)
    decide(folder, *DECIDED)
    return folder


def counted(monkeypatch: pytest.MonkeyPatch, holder: object, *names: str) -> list[str]:
    """Count the calls of some functions that have come to their end."""
    done: list[str] = []

    def wrap(name: str) -> None:
        own = getattr(holder, name)

        def call(*args: object, **how: object) -> object:
            result = own(*args, **how)
            done.append(name)
            return result

        monkeypatch.setattr(holder, name, call)

    for name in names:
        wrap(name)
    return done


# --- gradients and the fit


def test_gradients_lose_one_block_at_most(influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    influence("gradients", "-q", cwd=project)
    whole = (project / "influence.h5").read_bytes()
    (project / "influence.h5").unlink()
    computed = counted(monkeypatch, fill_store, "block_rows")
    with monkeypatch.context() as patch:
        moments = watch(patch, project, lambda: len(computed))
        influence("gradients", "-q", cwd=project)
    assert moments.read() == {"influence.h5": whole}
    assert len(moments.found) > 10 * BLOCKS
    flags = set()
    for content, before in moments.tried():
        moments.put(content)
        kept = 0
        if "influence.h5" in dict(content):
            with Store.open(project / "influence.h5") as store:
                # What a reader would find where a file system has no locks: whole blocks, or none.
                kept = int(store.done().sum())
                assert store.damaged().tolist() == []
                flags.add(kept)
                if kept < BLOCKS:
                    with pytest.raises(InfluenceError, match="is not complete"):
                        list(store.scan())
        computed.clear()
        influence("gradients", "-q", cwd=project)
        assert moments.read() == {"influence.h5": whole}
        assert len(computed) == BLOCKS - kept
        assert before + len(computed) <= BLOCKS + 1
    assert flags == set(range(BLOCKS + 1))


@pytest.mark.slow
def test_a_repair_lets_no_damage_get_under_a_checksum(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    influence("gradients", "-q", cwd=project)
    whole = (project / "influence.h5").read_bytes()
    for name, row in (("labels", 9), ("coordinates", 10)):
        flip(project / "influence.h5", place_of(project, name, row))
    with monkeypatch.context() as patch:
        moments = watch(patch, project, lambda: 0)
        influence("gradients", "--repair", "-q", cwd=project)
    assert moments.read() == {"influence.h5": whole}
    for content, _ in moments.tried():
        moments.put(content)
        influence("gradients", "--repair", "-q", cwd=project)
        assert moments.read() == {"influence.h5": whole}
        # Without the option a run tells of the damage, or has mended it.
        moments.put(content)
        with Store.open(project / "influence.h5") as store:
            damaged = bool(len(store.damaged()))
        done = influence("rank", 0, "-q", cwd=project, code=2 if damaged else 0)
        assert (done.out == "") == damaged
        if not damaged:
            assert moments.read() == {"influence.h5": whole}


FITS = {
    "ekfac": (("_add_covariances", "_add_eigenvalues", "_decompose_layer"), 2 * BLOCKS + 1),
    "explicit": (("_add_batch_ggn",), BLOCKS),
    "explicit, of an output layer": (("output_curvature",), BLOCKS),
}


@pytest.mark.quick("ekfac")
@pytest.mark.parametrize("kind", FITS)
def test_a_fit_loses_one_batch_at_most(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Where its progress is saved after every batch: otherwise it is the batches of half a minute."""
    steps, total = FITS[kind]
    words = ("-s", f"curvature.method={kind.partition(',')[0]}")
    if kind == "explicit":
        with_training(project, deep=True)
    monkeypatch.setattr(fit_file, "SAVE_EVERY", -1.0)
    monkeypatch.setattr(fit, "BATCH", 8)
    monkeypatch.setattr(explicit, "ROWS", 8)
    batches = counted(monkeypatch, ekfac if kind == "ekfac" else explicit, *steps)
    with monkeypatch.context() as patch:
        moments = watch(patch, project, lambda: len(batches))
        influence("gradients", "-q", *words, cwd=project)
    whole = moments.read()
    assert list(whole) == ["influence.h5"]
    assert len(batches) == total
    begun = [moment for moment in moments.found.items() if "influence.h5" not in dict(moment[0])]
    # A moment at which the fit is over and no store is there yet: nothing of the fit is lost then either.
    assert max(before for _, before in begun) == total
    left = [moment for moment in moments.found.items() if len(dict(moment[0])) == 2 and moment not in begun]
    assert left
    for content, before in begun + left:
        moments.put(content)
        batches.clear()
        influence("gradients", "-q", *words, cwd=project)
        assert moments.read() == whole
        assert before + len(batches) <= total + 1


@pytest.mark.parametrize("call", [2, 3, 8, 12])
@pytest.mark.quick("3", "8")
def test_ctrl_c_in_the_midst_of_a_batch_counts_no_half_of_it_twice(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """What is saved is whole batches, although the accumulators are added to one after the other."""
    influence("gradients", "-q", *EKFAC, cwd=project)
    whole = (project / "influence.h5").read_bytes()
    (project / "influence.h5").unlink()
    add, calls = Progress.add, []

    def interrupted(self: Progress, name: str, value: torch.Tensor) -> None:
        add(self, name, value)
        calls.append(name)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "add", interrupted)
        done = influence("gradients", *EKFAC, cwd=project, code=130)
    assert "influence.h5.fit: finished work is kept" in done.err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "resuming with the factors in influence.h5.fit" in influence("gradients", *EKFAC, cwd=project).err
    assert (project / "influence.h5").read_bytes() == whole


# --- verify


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the retrainings that have come to their end; they take no time, so that their files are alike."""
    outcomes, found = Again.outcomes, []

    def count(self: Again, *args: object) -> Arrays:
        result = outcomes(self, *args)  # type: ignore[arg-type]
        found.append(len(found))
        return result

    monkeypatch.setattr(Again, "outcomes", count)
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: 0.0))
    return found


def check_verify(
    influence: Command,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    trained: list[int],
    words: tuple[object, ...],
    total: int,
) -> None:
    with monkeypatch.context() as patch:
        moments = watch(patch, project, lambda: len(trained), RETRAINED)
        influence("verify", *words, "-q", "-o", "rows.csv", cwd=project)
    whole = moments.read()
    assert len(trained) == total == sum(name.endswith(".npz") for name in whole)
    assert not any(name.endswith(".part") for name in whole)
    for content, before in moments.tried():
        moments.put(content)
        trained.clear()
        influence("verify", *words, "-q", "-o", "rows.csv", cwd=project)
        assert moments.read() == whole
        assert before + len(trained) <= total + 1


@pytest.mark.slow
def test_verify_trains_one_half_again_at_most(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, trained: list[int]
) -> None:
    """With its store, which is made before the first training."""
    monkeypatch.setattr(lds, "bootstrap_lds", partial(bootstrap_lds, draws=10))
    words = ("--lds", "--subsets", 3, "--repeats", 1, "--tests", 6, "-s", "gradients.block=24")
    check_verify(influence, with_training(project), monkeypatch, trained, words, 3)


def test_verify_leaves_one_out_again_at_most(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, trained: list[int]
) -> None:
    words = (0, "--loo", 2)
    with_training(project, deep=True)
    influence("gradients", "-q", cwd=project)
    check_verify(influence, project, monkeypatch, trained, words, 3)


# --- relabel


@pytest.mark.parametrize("named", [False, True], ids=["new", "named by the config"])
def test_label_files_change_together(
    influence: Command, images: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """Also those that carry on what the config names: a half of them would make the same decisions stale."""
    words: tuple[str, ...] = ("relabel", "decisions.csv", "-q", "-o", "rows.csv")
    if named:
        decide(images, (3, "relabel", "plain"), (20, "drop"), name="first.csv")
        influence("relabel", "first.csv", "-q", cwd=images)
        edit(images, "{root: data/train}}", "{root: data/train}, labels: labels.csv, exclude: exclude.csv}")
        words += ("--force",)
    with monkeypatch.context() as patch:
        moments = watch(patch, images, lambda: 0, ("*.csv", "*.csv.part", ".*"))
        influence(*words, cwd=images)
    whole = moments.read()
    assert not any(name.startswith(".") for name in whole)
    assert len(moments.found) > 15
    finished = 0
    for content, _ in moments.tried():
        moments.put(content)
        state = dict(content)
        note = any(name.endswith("changes.json") for name in state)
        complete = not note and all(state.get(name) == whole[name] for name in LABELS)
        # The files are whole then: the same command would be for another time, and says so.
        done = influence(*words, cwd=images, code=2 if complete else 0)
        if complete:
            finished += 1
            assert ("stale: the label of" if named else "exists already") in done.err
            if not named:
                influence(*words, "--force", cwd=images)
        now = moments.read()
        assert {name: now[name] for name in LABELS} == {name: whole[name] for name in LABELS}
        assert not any(name.startswith(".") for name in now)
        if not (named and complete):
            assert now == whole
    assert finished


def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every row of a log the same time."""
    then = datetime(2026, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(move_log, "datetime", SimpleNamespace(now=lambda zone: then))


def rows(state: State) -> list[Row]:
    """Split a log into its rows."""
    log = state["moves.log.csv"]
    assert isinstance(log, bytes)
    return list(map(tuple, csv.reader(io.StringIO(log.decode(), newline=""))))


def of(event: str, rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row[2] == event]


def check_moves(
    influence: Command,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    end: str,
    check_log: Callable[[list[Row], list[Row]], None],
) -> None:
    made = counted(monkeypatch, disk, "unlink")
    with monkeypatch.context() as patch:
        moments = watch(patch, images, lambda: len(made), MOVED)
        influence(*words, "-q", cwd=images)
    whole = moments.read()
    assert len(made) == MOVES
    finished = 0
    for content, before in moments.tried():
        moments.put(content)
        made.clear()
        batches = read_log(images / "moves.log.csv")
        complete = bool(batches) and batches[-1].state == end
        finished += complete
        influence(*words, "-q", cwd=images, code=2 if complete else 0)
        now = moments.read()
        assert {name: now[name] for name in now if name[:4] == "data"} == {
            name: whole[name] for name in whole if name[:4] == "data"
        }
        # A file is moved once: between its two names there is nothing to do twice.
        assert before + len(made) == MOVES
        check_log(rows(now), rows(whole))
    assert finished


def test_moves_are_made_once(influence: Command, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen(monkeypatch)

    def check_log(found: list[Row], whole: list[Row]) -> None:
        # A row that says what is about to be done is there twice where the kill came before that was done; the one
        # that says that it was done is not there where the kill came before the row. A plan that was cut off is planned
        # again from its first row.
        lacking = [row for row in whole if row not in found]
        assert lacking == of("moved", lacking)
        assert len(lacking) <= 1
        twice = [row for row in set(found) if found.count(row) > 1]
        assert len(twice) <= 1 or twice == of("plan", twice)
        assert len(found) <= len(set(found)) + len(twice)
        assert set(found) <= set(whole)

    words = ("relabel", "decisions.csv", "--apply-moves")
    check_moves(influence, images, monkeypatch, words, "applied", check_log)


def test_moves_are_taken_back_once(influence: Command, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen(monkeypatch)
    before = relabel_project.tree(images)
    influence("relabel", "decisions.csv", "--apply-moves", "-q", cwd=images)

    def check_log(found: list[Row], whole: list[Row]) -> None:
        # Each run that takes moves back says first how many are left, and a move that was back by then has no row.
        assert len(of("back", found)) <= 2
        lacking = [row for row in whole if row not in found and row[2] != "back"]
        assert lacking == of("returned", lacking)
        assert len(lacking) <= 1
        others = [row for row in found if row[2] != "back"]
        assert len(others) == len(set(others))
        assert set(others) <= set(whole)

    check_moves(influence, images, monkeypatch, ("relabel", "--undo"), "undone", check_log)
    assert relabel_project.tree(images) == before
