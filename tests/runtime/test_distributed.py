"""Jobs of several processes, as torchrun starts them, give what one process gives; and each way in which they end."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from influence_cli import load_config, load_tasks
from influence_cli.data.split import spread
from influence_cli.errors import InfluenceError
from influence_cli.influence.scores import Running, merged
from influence_cli.influence.streams import Piece, averaged
from influence_cli.passes.probe import SAMPLE
from influence_cli.runtime import distributed
from influence_cli.store.store import READ, SKIPPED, Store
from tests.conftest import Command, edit
from tests.support.copies import copied
from tests.support.ranks import Job, run
from tests.support.small_project import EKFAC, N, make, with_training

# Rows of the store of most tests here: its last block is not full.
UNEVEN = 5
# Columns with a row an example; a file in one piece has some more, to fill its last block.

COLUMNS = ("coordinates", "scales", "losses", "outputs", "labels", "indices", "state")

# A fit of a dozen batches.
FIT = ("gradients", *EKFAC, "-s", "gradients.block=2")
# Of mislabels: the readout is fitted to sums of the processes' parts, and small components amplify their rounding.
READOUT = 1e-4

# Another network, and two checkpoints of one run.
FEATURES = (
    "{name: twin, factory: ./model.py:build, checkpoint: second.pt, transform: [{Grayscale: {num_output_channels: 1}}, "
    "ToImage, {ToDtype: {dtype: float32, scale: true}}]}"
)
TWO = ("-s", "model.checkpoint=[second.pt, model.pt]", "-s", "model.ensemble=tracin", "-s", "model.learning_rates=0.1")


Run = Callable[..., Job]


@pytest.fixture(scope="module")
def job() -> Run:
    """Run a job: ``job(folder, "rank", 3, ranks=4, code=2)``."""
    return run


@pytest.fixture(scope="module")
def made(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small project with a training function, and blocks whose last one is not full; do not change it."""
    folder = with_training(make(tmp_path_factory.mktemp("made") / "project"))
    edit(folder, "block: 8", f"block: {UNEVEN}")
    return folder


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it that a test may change."""
    with copied(made, tmp_path / "project") as folder:
        yield folder


@pytest.fixture(scope="module")
def pair(made: Path, job: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The project with a store in one file, and with one in shards; do not change what they have."""
    one, several = (Path(shutil.copytree(made, tmp_path_factory.mktemp(name) / "project")) for name in ("one", "many"))
    job(one, "gradients", "-q", ranks=1)
    job(several, "gradients", "-q")
    return one, several


def content(path: Path) -> dict[str, np.ndarray]:
    """Read all of a store through HDF5, as any other tool would."""
    with h5py.File(path) as file:
        n = json.loads(bytes(file["header"][()]))["layout"]["n"]
        names = [name for name in file if name not in ("header", "summary_xxh3")]
        return {name: np.asarray(file[name][()])[: n if name in COLUMNS else None] for name in names}


def assert_same_store(found: Path, wanted: Path) -> None:
    """Compare two stores number by number; rounded ones may differ by a step."""
    own, others = content(found), content(wanted)
    with Store.open(found) as store:
        assert store.done().all()
        assert not len(store.damaged())
        assert store.summary() is not None
    assert own.keys() == others.keys()
    for name in own.keys() - {"checksums"}:
        a, b = own[name], others[name]
        if name in ("labels", "indices", "state", "flags", "inputs", "kept"):
            assert np.array_equal(a, b), name
        else:
            step = 1 if a.dtype.kind == "i" else 1e-5 * float(np.abs(b).max())
            np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0, atol=step, err_msg=name)


def rows_of(text: str, folder: Path) -> list[dict[str, str]]:
    """Read CSV; files are named from the project."""
    return list(csv.DictReader(io.StringIO(text.replace(str(folder), "."))))


def assert_same_rows(found: list[dict[str, str]], wanted: list[dict[str, str]], within: float = 1e-5) -> None:
    """Compare rows cell by cell, numbers as numbers."""
    assert wanted
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.keys() == b.keys()
        for name, cell in a.items():
            try:
                number = float(b[name])
            except ValueError:
                assert cell == b[name], (name, a, b)
            else:
                assert float(cell) == pytest.approx(number, rel=within, abs=within / 10, nan_ok=True), (name, a, b)


def errors(done: Job) -> list[str]:
    """List the error lines of all ranks."""
    return [line for line in "".join(done.err).splitlines() if line.startswith("error: ")]


@pytest.mark.quick("explicit", "ekfac-*", "float16")
@pytest.mark.parametrize(
    ("ranks", "block", "deep", "words"),
    [
        pytest.param(2, UNEVEN, False, (), id="explicit"),
        pytest.param(2, UNEVEN, False, ("-s", "curvature.matrix=hessian"), id="hessian"),
        pytest.param(4, 8, True, EKFAC, id="ekfac-more-ranks-than-blocks"),
        pytest.param(2, UNEVEN, True, ("-s", "curvature.method=kfac"), id="kfac"),
        pytest.param(
            2, UNEVEN, False, ("-s", "curvature.method=identity", "-s", "gradients.store_dtype=float16"), id="float16"
        ),
        pytest.param(2, N, False, ("-s", "gradients.store_dtype=int8"), id="int8-one-block"),
    ],
)
def test_a_job_makes_the_store_that_one_process_makes(
    tmp_path: Path,
    small_made: Path,
    job: Run,
    influence: Command,
    ranks: int,
    block: int,
    deep: bool,
    words: tuple[str, ...],
) -> None:
    one = with_training(Path(shutil.copytree(small_made, tmp_path / "one")), deep=deep)
    words = ("gradients", *words, "-s", f"gradients.block={block}")
    several = Path(shutil.copytree(one, tmp_path / "several"))
    influence(*words, cwd=one)
    done = job(several, *words, ranks=ranks)
    assert done.done("block") == list(range(0, N, block)), "every block once"
    assert f"wrote {-(-N // block)} of {-(-N // block)} blocks" in done.err[0]
    assert_same_store(several / "influence.h5", one / "influence.h5")
    before = content(several / "influence.h5")
    told = influence(*words, "--compact", "--fsck", cwd=several).err
    assert "wrote" not in told, "nothing is computed"
    assert "every checksum is right and every example is unchanged" in told
    assert not list(several.glob("influence.h5.*"))
    after = content(several / "influence.h5")
    assert before.keys() == after.keys()
    for name in before.keys() - {"checksums"}:  # they have the number of the block in its file
        assert after[name].tobytes() == before[name].tobytes(), name


@pytest.mark.quick("all-matrix", "stdin-aggregate", "on-the-fly-*", "train")
@pytest.mark.parametrize(
    ("ranks", "words", "stdin"),
    [
        pytest.param(4, ("0", "3", "misclassified", "5", "--all", "--matrix", "matrix.h5"), "", id="all-matrix"),
        pytest.param(2, ("-", "--aggregate", "--top", "7"), "1\n4\n2\n", id="stdin-aggregate"),
        pytest.param(2, ("0", "-", "5", "-", "--top", "3"), "1\n4\n2\n", id="stdin-named-twice"),
        pytest.param(2, ("0", "2", "--on-the-fly", "--normalise", "relatif"), "", id="on-the-fly-relatif"),
        pytest.param(2, ("1", "-s", "curvature.method=cg"), "", id="cg"),
        pytest.param(2, ("--train", "5"), "", id="train"),
    ],
)
def test_rank_gives_the_rows_of_one_process(
    pair: tuple[Path, Path], job: Run, influence: Command, ranks: int, words: tuple[str, ...], stdin: str
) -> None:
    one, several = pair
    if "curvature.method=cg" in words:
        words = (*words, "-s", "gradients.store=cg.h5")
    alone = influence("rank", *words, "--format", "csv", cwd=one, stdin=stdin)
    done = job(several, "rank", *words, "-o", "rows.csv", ranks=ranks, stdin=stdin)
    assert_same_rows(rows_of((several / "rows.csv").read_text(), several), rows_of(alone.out, one))
    assert json.loads((several / "rows.csv.run.json").read_text())["processes"] == ranks
    assert done.out[0] == ""
    if "--matrix" in words:
        with h5py.File(several / "matrix.h5") as own, h5py.File(one / "matrix.h5") as others:
            assert own.keys() == others.keys()
            for name in own:
                np.testing.assert_allclose(own[name][()], others[name][()], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        pytest.param(2, ("--signals",), id="signals"),
        pytest.param(4, ("--on", "test", "-s", "test.args.root=train"), id="on-test"),
        pytest.param(2, ("--signal", "self-influence", "--on-the-fly", "--top", "24"), id="self-influence"),
        pytest.param(2, ("--signal", "self-influence", "-s", "model.checkpoint=[model.pt, second.pt]"), id="two"),
        pytest.param(2, ("--signals", "-s", f"evidence.features={FEATURES}"), id="features"),
        pytest.param(2, ("--signal", "trajectory", *TWO), id="trajectory"),
    ],
)
@pytest.mark.quick("signals")
def test_mislabels_gives_the_rows_of_one_process(
    pair: tuple[Path, Path], job: Run, influence: Command, ranks: int, words: tuple[str, ...]
) -> None:
    one, several = pair
    for folder in pair:
        shutil.copyfile(folder / "model.pt", folder / "second.pt")
    alone = influence("mislabels", *words, "--format", "csv", cwd=one)
    done = job(several, "mislabels", *words, "--format", "csv", ranks=ranks)
    assert_same_rows(rows_of(done.out[0], several), rows_of(alone.out, one), READOUT)


def test_mislabels_by_files_gives_the_rows_of_one_process(pair: tuple[Path, Path], job: Run) -> None:
    one, several = pair
    words = ("mislabels", "--top", "99", "--format", "csv")
    alone = job(one, *words, ranks=1, files=True)
    done = job(several, *words, files=True)
    assert "of disk for temporary files" in alone.err[0]
    assert "of disk for temporary files" in done.err[0]
    assert done.err[1] == ""
    assert_same_rows(rows_of(done.out[0], several), rows_of(alone.out[0], one), READOUT)


@pytest.mark.quick("self-check-stdin", "lds")
@pytest.mark.parametrize(
    ("words", "stdin"),
    [
        pytest.param((), "", id="self-check"),
        pytest.param(("-",), "1\n4\n", id="self-check-stdin"),
        pytest.param(("--loo", "4"), "", id="newton"),
        pytest.param(("-", "--loo", "4"), "0\n3\n", id="newton-stdin"),
        pytest.param(("--lds", "--subsets", "4", "--repeats", "2", "--tests", "3"), "", id="lds"),
    ],
)
def test_verify_gives_the_rows_of_one_process(
    pair: tuple[Path, Path], job: Run, words: tuple[str, ...], stdin: str
) -> None:
    one, several = pair
    alone = job(one, "verify", *words, "--format", "csv", ranks=1, stdin=stdin)
    done = job(several, "verify", *words, "--format", "csv", stdin=stdin, shared=True)
    assert_same_rows(rows_of(done.out[0], several), rows_of(alone.out[0], one))
    trained = sorted(path.name for path in several.rglob("*.npz"))
    assert trained == sorted(path.name for path in one.rglob("*.npz"))
    if "--lds" in words:
        assert len(done.done("training")) == len(trained) == 8, "every retraining once"


def test_help_and_the_version_are_printed_once(project: Path, job: Run) -> None:
    assert job(project, "--version").out[0].startswith("influence ")
    shown = job(project, "rank", "-h")
    assert shown.out[0].count("Usage") == 1
    assert shown.err == ["", ""]


def test_a_command_that_is_not_shared_runs_in_the_first_process(project: Path, job: Run) -> None:
    done = job(project, "check", ranks=4)
    assert "check runs in one process: 3 of 4 processes have ended" in done.err[0]
    assert done.err[1:] == [""] * 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("gradients", "-s", "curvature.dampng=1"), "unknown key 'dampng'"),
        (("rank", "99"), "99"),
        (("rank", "--nonsense"), "--nonsense"),
    ],
)
def test_a_mistake_is_told_once(pair: tuple[Path, Path], job: Run, words: tuple[str, ...], told: str) -> None:
    done = job(pair[1], *words, code=2)
    (line,) = errors(done)
    assert told in line
    assert "rank 0" not in line


def test_an_image_without_a_loss_is_named_by_the_rank_that_reads_it(tmp_path: Path, job: Run) -> None:
    """Batches of a fit go round: the second one is the second process's; no example before it is looked at with it."""
    project = with_training(make(tmp_path / "project"), deep=True)
    for number in range(24, 144):
        (project / "train" / "c" / f"{number:03d}.png").hardlink_to(project / "train" / "c" / "005.png")
    assert 18 not in spread(load_tasks(load_config(project / "influence.yaml"))[0].train, SAMPLE)
    model = (project / "model.py").read_text()
    (project / "model.py").write_text(
        model.replace("nn.AvgPool2d(2)", "Spoil(2)")
        + """

class Spoil(nn.AvgPool2d):
    def forward(self, x):
        means = super().forward(x)
        return means / (means.amax(dim=(1, 2, 3), keepdim=True) < 0.99)
"""
    )
    white(project / "train" / "c" / "008.png")
    done = job(project, "gradients", *EKFAC, "-s", "gradients.block=18", code=2)
    (line,) = errors(done)
    assert line.startswith(f"error: rank 1 on {socket.gethostname()}: ")
    assert "training example 18 " in line


def test_an_image_that_cannot_be_read_is_named_with_the_rank_that_reads_it(project: Path, job: Run) -> None:
    (project / "train" / "c" / "023.png").write_bytes(b"no image")
    done = job(project, "rank", "0", "--on-the-fly", "-s", "curvature.method=identity", code=2)
    (line,) = errors(done)
    assert "023.png" in line
    assert line.startswith(f"error: rank 1 on {socket.gethostname()}: ")
    done = job(project, "gradients", "--skip-unreadable")
    assert done.err[0].count("warning: skipped: ") == 1
    with Store.open(project / "influence.h5") as store:
        assert store.column("state").tolist() == [READ] * (N - 1) + [SKIPPED]
        assert store.done().all()
    done = job(project, "mislabels", "--skip-unreadable", "--top", "99", "--format", "csv")
    assert "023.png" in done.err[0], "the first process says what another has left out"
    assert done.err[1] == ""
    assert len(rows_of(done.out[0], project)) == N - 1


@pytest.mark.parametrize("what", ["image", "label", "config"])
def test_processes_that_do_not_see_the_same_do_not_begin(tmp_path: Path, made: Path, job: Run, what: str) -> None:
    folders = [Path(shutil.copytree(made, tmp_path / name)) for name in ("a", "b")]
    image = folders[1] / "train" / "a" / "000.png"
    if what == "config":
        for folder in folders:
            edit(folder, "root: train", f"root: {tmp_path}/a/train")
            edit(folder, "root: test", f"root: {tmp_path}/a/test")
        edit(folders[1], "l2: 0.01", "l2: 0.02")
        told = "the config"
    elif what == "image":
        os.utime(image, (0, 0))
        told = "the training files"
    else:
        image.rename(folders[1] / "train" / "b" / "000.png")
        told = "the training labels"
    done = job(folders, "gradients", code=2)
    (line,) = errors(done)
    host = socket.gethostname()
    assert f"rank 1 (host {host}) does not see the same as rank 0 (host {host}); what differs: " in line
    assert told in line
    assert not list(tmp_path.glob("*/influence.h5*"))


def white(path: Path) -> None:
    """Put a white image in the place of another."""
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def whole(made: Path, job: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store with blocks of one row that one pass of one process makes."""
    folder = Path(shutil.copytree(made, tmp_path_factory.mktemp("whole") / "project"))
    job(folder, "gradients", "-s", "gradients.block=1", ranks=1)
    return folder / "influence.h5"


def assert_ended(done: Job, killed: int) -> None:
    """Check that the others have noticed that one has gone."""
    assert done.codes[killed] == -9
    for rank, code in enumerate(done.codes):
        if rank != killed:
            assert code in (2, -6), done.codes
    told = "".join(done.err)
    assert "another process of this job has ended" in told or -6 in done.codes, told


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.slow
def test_a_job_goes_on_after_a_kill_in_mid_fill(
    tmp_path: Path, project: Path, whole: Path, job: Run, killed: int
) -> None:
    """With the same number of processes, another, and one."""
    words = ("gradients", "-s", "gradients.block=1")
    first = job(project, *words, kill=[killed, "block", 3], pause=0.02, code=None)
    assert_ended(first, killed)
    with Store.open(project / "influence.h5") as store:
        kept = set(np.flatnonzero(store.done()).tolist())
    assert len(kept) >= 3
    for ranks in (3, 1) if killed else (2,):
        folder = Path(shutil.copytree(project, tmp_path / str(ranks)))
        again = job(folder, *words, ranks=ranks)
        assert sorted(again.done("block")) == sorted(set(range(N)) - kept), "what was done is not done again"
        assert_same_store(folder / "influence.h5", whole)


@pytest.fixture(scope="module")
def fitted(job: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with two layers, and what one pass of one process makes in batches of 2."""
    folder = with_training(make(tmp_path_factory.mktemp("fitted") / "project"), deep=True)
    job(folder, *FIT, ranks=1)
    return folder


@pytest.mark.quick("same-number")
@pytest.mark.parametrize(
    ("stage", "number", "ranks"),
    [
        pytest.param("covariances", 2, 1, id="other-number"),
        pytest.param("eigenvalues", 2, 2, id="same-number"),
        pytest.param("eigenvalues", 0, 2, id="a-stage-behind"),
    ],
)
def test_a_job_goes_on_after_a_kill_in_mid_fit(
    tmp_path: Path, fitted: Path, job: Run, stage: str, number: int, ranks: int
) -> None:
    """Each rank keeps what it has summed; another number of processes begins anew."""
    project = Path(shutil.copytree(fitted, tmp_path / "project"))
    whole = (project / "influence.h5").rename(tmp_path / "whole.h5")
    first = job(project, *FIT, kill=[1, stage, number], code=None, pause=0.02)
    assert_ended(first, 1)
    assert not (project / "influence.h5").exists()
    assert list(project.glob("influence.h5.fit*"))
    again = job(project, *FIT, ranks=ranks)
    if ranks == 2:
        assert "resuming with the factors in" in again.err[0]
        for name in ("covariances", "eigenvalues"):
            done = [*first.done(name), *again.done(name)]
            assert sorted(set(done)) == list(range(0, N, 2))
            assert len(done) <= N // 2 + 1, "the batch in hand is done again, no other"
    assert not list(project.glob("influence.h5.fit*"))
    assert_same_store(project / "influence.h5", whole)


def test_a_reader_that_has_gone_ends_all_well(pair: tuple[Path, Path], job: Run) -> None:
    done = job(pair[1], "rank", "0", "1", "--all", "--format", "csv", closed=True)
    assert "error" not in "".join(done.err)


def test_ctrl_c_keeps_what_is_done_and_is_told_once(project: Path, whole: Path, job: Run) -> None:
    words = ("gradients", "-s", "gradients.block=1")
    first = job(project, *words, interrupt=["block", 3], pause=0.02, code=None)
    # One that waits for the others may hear of their end before its own Ctrl-C.
    assert 130 in first.codes
    assert set(first.codes) <= {130, 2}
    (line,) = [line for line in "".join(first.err).splitlines() if line.startswith("interrupted: ")]
    assert line == "interrupted: influence.h5: finished blocks are kept; run the same command to resume"
    again = job(project, *words)
    assert len(again.done("block")) < N
    assert_same_store(project / "influence.h5", whole)


@pytest.mark.slow
def test_a_job_that_is_started_again_begins_anew(project: Path, whole: Path, job: Run) -> None:
    """It meets where it met before: the addresses there are those of processes that are gone, the counts theirs."""
    words = ("gradients", "-s", "gradients.block=1")
    first = job(project, *words, restart=0, kill=[1, "block", 2], pause=0.02, code=None)
    assert_ended(first, 1)
    job(project, *words, restart=1, late=[1, 0.5])
    assert_same_store(project / "influence.h5", whole)


@pytest.mark.slow
def test_torchrun_starts_a_job_again(tmp_path: Path, made: Path, job: Run) -> None:
    """The second process ends itself at the first of its rows, once."""
    folder = Path(shutil.copytree(made, tmp_path / "project"))
    one = Path(shutil.copytree(made, tmp_path / "one"))
    job(one, "gradients", ranks=1)
    (folder / "model.py").write_text(
        (folder / "model.py").read_text()
        + """

import os
import signal
from pathlib import Path

if os.environ.get("RANK") == "1":
    from influence_cli import fill

    own = fill.block_rows

    def block_rows(*words):
        marker = Path(__file__).with_name("killed")
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*words)

    fill.block_rows = block_rows
"""
    )
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")
    done = subprocess.run(
        [sys.executable, *launch, "-m", "influence_cli", "gradients", "-s", "gradients.block=1"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "killed").exists()
    job(one, "gradients", "-s", "gradients.block=1", "--overwrite", ranks=1)
    assert_same_store(folder / "influence.h5", one / "influence.h5")


def test_shares_cover_all_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in range(1, 9):
        for count in range(25):
            parts = []
            for rank in range(size):
                monkeypatch.setattr(distributed, "_job", distributed._Job(rank, size))
                parts.append(list(range(count))[distributed.share(count)])
            assert [one for part in parts for one in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("count", [1, 3, 40, None])
@pytest.mark.parametrize("relative", [False, True])
def test_merged_parts_are_what_one_pass_gives(count: int | None, relative: bool) -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(-5, 6, (3, 30)).astype(np.float32)  # many of them equal
    values[:, [4, 17]] = np.nan
    ranked = values / 2 if relative else None

    def running(rows: slice) -> Running:
        found = Running(3, count)
        where = np.arange(rows.start, rows.stop)
        found.add(where, values[:, rows], None if ranked is None else ranked[:, rows])
        return found

    whole = running(slice(0, 30)).results()
    edges = [0, 0, 7, 19, 30]  # a process without a row, too
    parts = [running(slice(*pair)).results() for pair in pairwise(edges)]
    for own, wanted in zip(merged(parts, count), whole, strict=True):
        for name, expected in vars(wanted).items():
            if expected is None:
                assert getattr(own, name) is None
            else:
                np.testing.assert_array_equal(getattr(own, name), expected, err_msg=name)


def test_streams_of_other_rows_do_not_meet() -> None:
    """Each process takes its part of the blocks: of two checkpoints they have to be the same rows."""

    def stream(*edges: int) -> Iterator[Piece]:
        for start, stop in pairwise(edges):
            yield slice(start, stop), np.ones((1, stop - start), dtype=np.float32)

    ((where, values), *_) = averaged([stream(5, 15), stream(5, 10, 15)])
    assert (where, values.shape) == (slice(5, 10), (1, 5))
    assert list(averaged([stream(), stream(5, 10)])) == [], "a process without a row"
    with pytest.raises(InfluenceError, match="different block sizes"):
        list(averaged([stream(5, 15), stream(7, 15)]))


@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", "0")])
def test_a_rank_that_there_is_not_is_refused(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, rank: str, size: str
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    done = influence("gradients", cwd=project, code=2)
    assert "torchrun sets them" in done.err  # no process is the first one here: each tells
