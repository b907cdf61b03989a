"""gradients: what the store holds, that it outlives every kill, and that it is never used for something else."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from influence_cli.curvature.choice import SOLVERS
from influence_cli.runtime.terminal import Terminal
from influence_cli.store.store import Rows, Store
from tests.conftest import Command, edit
from tests.support import fork_server
from tests.support.copies import copied

SLOW = """
import time
from torchvision.datasets import ImageFolder


class Slow(ImageFolder):
    def __getitem__(self, index):
        time.sleep(0.002)
        return super().__getitem__(index)
"""
STOPPING = """
from pathlib import Path
from torchvision.datasets import ImageFolder


class Stopping(ImageFolder):
    def __getitem__(self, index):
        folder = Path(self.root).parent
        if index == 200 and (folder / "interrupt").exists() and (folder / "influence.h5").exists():
            raise KeyboardInterrupt
        return super().__getitem__(index)
"""
MEMORY = """
import numpy as np
import torch


def make(part):
    with np.load(f"{part}.npz") as data:
        return torch.utils.data.TensorDataset(torch.tensor(data["x"]), torch.tensor(data["y"]))
"""
BLOCKS = 40
FOLDER = "torchvision.datasets.ImageFolder\n  args: "


def closed_form(project: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Give gradients [n, 500], losses, outputs and GGN of the softmax regression by its formulas, in float64."""
    data = ImageFolder(project / "train")
    pixels = np.stack([np.asarray(image.convert("L"), dtype=np.float64) / 255 for image, _ in data])
    x = pixels.reshape(-1, 7, 4, 7, 4).mean(axis=(2, 4)).reshape(len(pixels), 49)
    y = np.array(data.targets)
    state = torch.load(project / "model.pt")
    outputs = x @ state["2.weight"].double().numpy().T + state["2.bias"].double().numpy()
    odds = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    p = odds / odds.sum(axis=1, keepdims=True)
    delta = p - np.eye(10)[y]
    gradients = np.concatenate([(delta[:, :, None] * x[:, None, :]).reshape(len(x), -1), delta], axis=1)
    # ∂f_c/∂θ: x in the rows of the weight that belong to c, 1 at its bias.
    jacobian = np.zeros((len(x), 10, 500))
    for c in range(10):
        jacobian[:, c, 49 * c : 49 * (c + 1)] = x
        jacobian[:, c, 490 + c] = 1
    inner = np.einsum("nc,cd->ncd", p, np.eye(10)) - p[:, :, None] * p[:, None, :]
    ggn = np.einsum("ncp,ncq->pq", jacobian, np.einsum("ncd,ndp->ncp", inner, jacobian), optimize=True) / len(x)
    return gradients, -np.log(p[np.arange(len(y)), y]), outputs, ggn


def contents(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: values[()].tobytes() for name, values in file.items()}


def column(path: Path, name: str) -> np.ndarray:
    with h5py.File(path) as file:
        return np.asarray(file[name])


def flip(path: Path, name: str, at: int) -> None:
    with h5py.File(path) as file:
        place = file[name].id.get_offset() + at
    with path.open("r+b") as raw:
        raw.seek(place)
        old = raw.read(1)[0]
        raw.seek(place)
        raw.write(bytes([old ^ 1]))


def clear(path: Path, *blocks: int) -> None:
    with h5py.File(path, "r+") as file:
        for block in blocks:
            file["flags"][block] = 0


def use_memory(project: Path) -> None:
    """Replace the image folders by the same data in memory, without files or class names."""
    for part in ("train", "test"):
        data = ImageFolder(project / part)
        x = np.stack([np.asarray(image.convert("L"), dtype=np.float32)[None] / 255 for image, _ in data])
        np.savez(project / f"{part}.npz", x=x, y=np.array(data.targets))
        edit(project, f"{FOLDER}{{root: {part}}}", f"./memory.py:make\n  args: {{part: {part}}}")
    text = (project / "influence.yaml").read_text()
    (project / "influence.yaml").write_text(re.sub(r"  transform: .*\n", "", text))
    (project / "memory.py").write_text(MEMORY)


@pytest.fixture
def filled(stored: Path, tmp_path: Path) -> Iterator[Path]:
    """A project with a complete store, which a test may change."""
    with copied(stored, tmp_path / "project") as folder:
        yield folder


# --- what the store holds


def test_rows_are_the_gradients_in_the_eigenbasis_of_the_ggn(influence: Command, project: Path) -> None:
    done = influence("gradients", cwd=project)
    gradients, losses, outputs, ggn = closed_form(project)
    path = project / "influence.h5"
    basis, spectrum = column(path, "basis"), column(path, "spectrum")
    size = basis.shape[1]
    assert np.allclose(basis.T @ basis, np.eye(size), atol=1e-5)
    assert np.allclose(spectrum, np.linalg.eigvalsh(ggn)[::-1][:size], atol=1e-6)
    assert np.allclose(column(path, "coordinates"), gradients @ basis, atol=1e-5)
    # What the basis leaves out, no training gradient has.
    assert np.allclose(column(path, "coordinates") @ basis.T, gradients, atol=1e-4)
    assert np.allclose(column(path, "losses"), losses, atol=1e-5)
    assert np.allclose(column(path, "outputs"), outputs, atol=1e-5)
    assert column(path, "labels").tolist() == ImageFolder(project / "train").targets
    assert column(path, "indices").tolist() == list(range(320))
    assert done.out == ""
    assert "wrote 5 of 5 blocks" in done.err
    assert "influence.h5 is complete (1.5 MB)" in done.err
    assert "next: influence rank" in done.err


@pytest.mark.parametrize("method", ["identity", *SOLVERS])
@pytest.mark.quick("identity", "cg")
def test_methods_without_a_basis_keep_raw_gradients(influence: Command, project: Path, method: str) -> None:
    influence("gradients", "-s", f"curvature.method={method}", cwd=project)
    gradients, losses, _, _ = closed_form(project)
    with h5py.File(project / "influence.h5") as file:
        assert "basis" not in file
        assert "spectrum" not in file
        assert np.allclose(file["coordinates"], gradients, atol=1e-5)
        assert np.allclose(file["losses"], losses, atol=1e-5)


def test_every_checkpoint_has_a_store_of_its_own(influence: Command, project: Path) -> None:
    state = torch.load(project / "model.pt")
    torch.save({name: value * 0.5 for name, value in state.items()}, project / "half.pt")
    edit(project, "checkpoint: model.pt", "checkpoint: [model.pt, half.pt]")
    influence("gradients", cwd=project)
    assert not (project / "influence.h5").exists()
    outputs = closed_form(project)[2]
    assert np.allclose(column(project / "influence.0.h5", "outputs"), outputs, atol=1e-5)
    assert np.allclose(column(project / "influence.1.h5", "outputs"), outputs / 2, atol=1e-5)


@pytest.mark.parametrize("words", [("gradients",), ("rank", 0), ("mislabels", "--signal", "self-influence")])
@pytest.mark.quick("words0")
def test_size_and_time_are_announced_before_anything_is_written(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[object, ...]
) -> None:
    said: list[tuple[str, list[str]]] = []
    say = Terminal.say

    def listen(self: Terminal, text: str) -> None:
        said.append((text, [path.name for path in project.glob("*.h5*") if path.suffix != ".lock"]))
        say(self, text)

    monkeypatch.setattr(Terminal, "say", listen)
    influence(*words, cwd=project)
    text, there = next(item for item in said if item[0].startswith("making "))
    assert there == []
    found = re.search(r"320 training examples, 500 parameters, at most ([\d.]+) ([kM])B, about [\d.]+ s$", text)
    assert found, text
    size = (project / "influence.h5").stat().st_size
    assert size <= float(found[1]) * {"k": 1e3, "M": 1e6}[found[2]]


def test_the_budget_limits_the_coordinates_and_says_what_is_lost(influence: Command, project: Path) -> None:
    influence("gradients", "-s", "gradients.budget=300kB", cwd=project)
    path = project / "influence.h5"
    size = column(path, "coordinates").shape[1]
    assert 50 < size < 150
    # A few kB of names and places come on top of the data.
    assert path.stat().st_size <= 300_000 + 32_000
    gradients, _, _, ggn = closed_form(project)
    largest = np.linalg.eigh(ggn)[1][:, ::-1][:, :size]
    kept = np.square(gradients @ largest).sum(axis=1)
    assert np.allclose(np.square(column(path, "coordinates")).sum(axis=1), kept, rtol=1e-4)
    done = influence("rank", 0, "-s", "gradients.budget=300kB", cwd=project)
    warning = next(line for line in done.err.splitlines() if line.startswith("warning: the store keeps"))
    assert "restricted to the span of the kept coordinates" in warning
    assert "gradients.budget" in warning
    # With room for all that counts there is nothing to say.
    assert "warning" not in influence("rank", 0, "-s", "gradients.store=all.h5", cwd=project).err


@pytest.mark.parametrize("method", ["explicit", "identity"])
def test_a_budget_that_holds_no_store_is_an_error(influence: Command, project: Path, method: str) -> None:
    words = ("gradients", "-s", f"curvature.method={method}", "-s", "gradients.budget=1kB")
    done = influence(*words, cwd=project, code=2)
    assert "gradients.budget is 1.0 kB" in done.err
    assert not list(project.glob("*.h5*"))


# --- resume


def test_a_resume_computes_only_the_missing_blocks(influence: Command, filled: Path) -> None:
    path = filled / "influence.h5"
    before = contents(path)
    # Finished blocks are whole, but hold ones: if they were computed again, the ones would go.
    with Store.open(path, write=True) as store:
        size = store.layout.k
        losses, outputs, state = (store.column(name) for name in ("losses", "outputs", "state"))
        for block in (0, 2, 3):
            at = store.layout.rows(block)
            digest = int(store.digests()[block])
            store.write(block, Rows(np.ones((64, size)), losses[at], outputs[at], state[at], digest))
        store.clear(np.array([1, 4]))
    with h5py.File(path, "r+") as file:
        file["coordinates"][64:128] = file["coordinates"][256:] = 0
    assert "wrote 2 of 5 blocks" in influence("gradients", cwd=filled).err
    found = column(path, "coordinates")
    for block in range(5):
        rows = found[64 * block : 64 * (block + 1)]
        if block in (1, 4):
            assert rows.tobytes() == before["coordinates"][256 * size * block : 256 * size * (block + 1)]
        else:
            assert (rows == 1).all()


@pytest.mark.parametrize(
    "words", [("gradients",), ("rank", 0, "--top", 1), ("mislabels", "--signal", "self-influence", "--top", 1)]
)
@pytest.mark.quick("words0", "words1")
def test_every_command_finishes_what_is_missing(influence: Command, filled: Path, words: tuple[object, ...]) -> None:
    before = contents(filled / "influence.h5")
    clear(filled / "influence.h5", 0, 3)
    assert "wrote 2 of 5 blocks" in influence(*words, cwd=filled).err
    assert contents(filled / "influence.h5") == before
    assert "wrote" not in influence(*words, cwd=filled).err


def test_a_resume_keeps_the_block_of_the_store(influence: Command, filled: Path) -> None:
    before = contents(filled / "influence.h5")
    clear(filled / "influence.h5", 2)
    assert "wrote 1 of 5 blocks" in influence("gradients", "-s", "gradients.block=7", cwd=filled).err
    assert contents(filled / "influence.h5") == before


def test_what_a_killed_start_left_behind_is_cleared_away(influence: Command, project: Path) -> None:
    (project / "influence.h5.part").write_bytes(b"half a file")
    influence("gradients", cwd=project)
    assert [path.name for path in project.glob("*.h5*")] == ["influence.h5"]


def test_overwrite_makes_the_store_anew(influence: Command, filled: Path) -> None:
    before = contents(filled / "influence.h5")
    with h5py.File(filled / "influence.h5", "r+") as file:
        file["outputs"][...] = 0
    done = influence("gradients", "--overwrite", cwd=filled)
    assert "wrote 5 of 5 blocks" in done.err
    assert contents(filled / "influence.h5") == before


def start(project: Path, *words: str) -> fork_server.Popen:
    """Begin ``influence gradients`` in a process of its own, in one thread, so that two passes give the same bytes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("INFLUENCE_")}
    return fork_server.Popen(
        [sys.executable, "-m", "influence_cli", "gradients", *words],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
    )


def finished(path: Path) -> int:
    """Count the finished blocks of a store that another process may be writing."""
    try:
        with h5py.File(path, locking=False) as file:
            return int(file["flags"][()].sum())
    except OSError:
        return 0


def wait_for(process: fork_server.Popen, path: Path, blocks: int) -> None:
    while finished(path) < blocks:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def slow(project: Path) -> None:
    (project / "slow.py").write_text(SLOW)
    edit(project, f"{FOLDER}{{root: train}}", "./slow.py:Slow\n  args: {root: train}")
    edit(project, "{block: 64}", f"{{block: {320 // BLOCKS}}}")


def test_ctrl_c_ends_with_130_and_says_what_is_kept(influence: Command, project: Path) -> None:
    slow(project)
    process = start(project)
    wait_for(process, project / "influence.h5", 5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    kept = finished(project / "influence.h5")
    assert 5 <= kept < BLOCKS
    assert f"{kept} of {BLOCKS} blocks are kept; run the same command to resume" in err
    assert f"wrote {BLOCKS - kept} of {BLOCKS} blocks" in influence("gradients", cwd=project).err


def test_an_interrupt_inside_the_data_set_keeps_the_blocks_before_it(influence: Command, project: Path) -> None:
    (project / "stopping.py").write_text(STOPPING)
    edit(project, f"{FOLDER}{{root: train}}", "./stopping.py:Stopping\n  args: {root: train}")
    (project / "interrupt").touch()
    done = influence("gradients", cwd=project, code=130)
    assert "3 of 5 blocks are kept" in done.err
    (project / "interrupt").unlink()
    assert "wrote 2 of 5 blocks" in influence("gradients", cwd=project).err


def test_a_store_that_another_process_fills_is_in_use(influence: Command, filled: Path) -> None:
    code = "import h5py, sys\nwith h5py.File('influence.h5', 'r+'):\n    print(flush=True)\n    sys.stdin.read()"
    with fork_server.Popen(
        [sys.executable, "-c", code], cwd=filled, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()
        for words in (("gradients",), ("rank", 0), ("mislabels", "--signal", "self-influence")):
            done = influence(*words, cwd=filled, code=2)
            assert "influence.h5 is in use by another process" in done.err
            assert "wait until that command has finished" in done.err
        other.communicate()
    influence("rank", 0, cwd=filled)


# --- damage


def advised(err: str) -> list[str]:
    """Take the command out of an error's hint."""
    found = re.search(r"^  .*?influence (gradients(?: --[a-z]+)+)", err, re.MULTILINE)
    assert found, err
    return found[1].split()


def test_fsck_of_a_whole_store_says_so(influence: Command, filled: Path) -> None:
    before = (filled / "influence.h5").read_bytes()
    assert "every checksum is right and every example is unchanged" in influence("gradients", "--fsck", cwd=filled).err
    assert (filled / "influence.h5").read_bytes() == before


# Bytes of a row, and the byte of it whose lowest bit changes: large enough to matter.
DAMAGE = [
    *((name, width, at, row) for row in (0, 70) for name, width, at in (
        ("coordinates", 455 * 4, 3), ("losses", 4, 3), ("outputs", 40, 3),
        ("labels", 8, 0), ("indices", 8, 0), ("state", 1, 0),
    )),
    ("inputs", 8, 0, 1), ("checksums", 8, 0, 1), ("basis", 455 * 4, 3, 2), ("spectrum", 8, 6, 1), ("header", 1, 0, 50),
]  # fmt: skip


@pytest.mark.quick("coordinates-*-70", "labels-*-70", "checksums-*", "spectrum-*", "header-*")
@pytest.mark.parametrize(("name", "width", "at", "row"), DAMAGE)
def test_a_flipped_bit_is_found_and_the_advice_mends_it(
    influence: Command, filled: Path, name: str, width: int, at: int, row: int
) -> None:
    path = filled / "influence.h5"
    before = contents(path)
    flip(path, name, row * width + at)
    err = influence("gradients", "--fsck", cwd=filled, code=2).err
    assert "damaged" in err
    if name not in ("basis", "spectrum", "header"):
        assert f"1 damaged blocks: {row // 64 if name not in ('inputs', 'checksums') else row}" in err
    influence(*advised(err), cwd=filled)
    assert contents(path) == before
    influence("gradients", "--fsck", cwd=filled)


@pytest.mark.parametrize("words", [("rank", 0), ("mislabels", "--signal", "self-influence")])
@pytest.mark.parametrize("name", ["coordinates", "losses", "labels"])
def test_damage_is_found_by_the_commands_that_read_the_store(
    influence: Command, filled: Path, words: tuple[object, ...], name: str
) -> None:
    flip(filled / "influence.h5", name, {"coordinates": 455 * 4, "losses": 4, "labels": 8}[name] * 130)
    done = influence(*words, cwd=filled, code=2)
    assert done.out == ""
    assert "is damaged: the checksum of block 2 does not match" in done.err
    assert "influence gradients --repair" in done.err


def test_damage_leaves_the_default_without_self_influence(influence: Command, filled: Path) -> None:
    flip(filled / "influence.h5", "coordinates", 455 * 4 * 130)
    done = influence("mislabels", cwd=filled)
    assert '"self_influence": null' in done.out
    assert "warning: no self_influence: " in done.err
    assert "the checksum of block 2 does not match" in done.err


def test_fsck_finds_a_changed_image_and_the_advice_mends_it(influence: Command, project: Path) -> None:
    """The image keeps its path, size and time of change: only its pixels tell."""
    source = ImageFolder(project / "train").samples[150][0]
    image = Path(source).with_suffix(".bmp")
    Image.open(source).save(image)
    Path(source).unlink()
    influence("gradients", cwd=project)
    status = image.stat()
    pixels = np.asarray(Image.open(image)).copy()
    pixels[8:16] = 255 - pixels[8:16]
    Image.fromarray(pixels).save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert image.stat().st_size == status.st_size
    influence("gradients", cwd=project)
    err = influence("gradients", "--fsck", cwd=project, code=2).err
    assert "1 damaged blocks: 2" in err
    influence(*advised(err), cwd=project)
    influence("gradients", "--fsck", cwd=project)
    influence("gradients", "-s", "gradients.store=new.h5", "-s", "curvature.method=identity", cwd=project)
    assert np.allclose(column(project / "influence.h5", "losses"), column(project / "new.h5", "losses"), atol=1e-6)


def test_repair_of_a_whole_store_changes_nothing(influence: Command, filled: Path) -> None:
    before = (filled / "influence.h5").read_bytes()
    assert "wrote" not in influence("gradients", "--repair", cwd=filled).err
    assert (filled / "influence.h5").read_bytes() == before


# --- what a store belongs to


def test_a_copy_of_a_project_keeps_its_store(influence: Command, filled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(filled, copy, copy_function=shutil.copyfile)  # as cp -r: every file has a time of its own
    rows = influence("rank", 3, cwd=filled).out

    first = influence("rank", 3, cwd=copy)
    second = influence("rank", 3, cwd=copy)

    said = "the training files have other times of change than then, and the same contents"
    assert said in first.err
    assert "making influence.h5" not in first.err
    assert first.out == second.out == rows.replace(str(filled), str(copy))
    assert said not in second.err


def test_a_store_of_large_files_goes_by_their_times(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("influence_cli.model.data_fingerprint.CONTENT_BYTES", 1000)
    influence("gradients", "-q", cwd=project)
    os.utime(ImageFolder(project / "train").samples[5][0])
    assert "what differs: the training files" in influence("gradients", cwd=project, code=2).err


def other_weights(project: Path) -> None:
    state = torch.load(project / "model.pt")
    state["2.bias"][3] += 0.01
    torch.save(state, project / "model.pt")


def changed_file(project: Path) -> None:
    path = ImageFolder(project / "train").samples[5][0]
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


def other_labels(project: Path) -> None:
    (project / "labels.csv").write_text("index,label\n300,Bag\n")
    edit(project, "  transform:", "  labels: labels.csv\n  transform:")


def excluded(project: Path) -> None:
    (project / "out.csv").write_text("index\n300\n")
    edit(project, "  transform:", "  exclude: out.csv\n  transform:")


def same_loss_elsewhere(project: Path) -> None:
    (project / "losses.py").write_text(
        "from functools import partial\n\nimport torch\n\n"
        "mine = partial(torch.nn.functional.cross_entropy, reduction='none')\n"
    )
    edit(project, "l2: 0.01", "l2: 0.01\nloss: {factory: ./losses.py:mine}")


def set_(old: str, new: str) -> Callable[[Path], None]:
    return lambda project: edit(project, old, new)


CHANGES = [
    (other_weights, "the checkpoint's weights"),
    (changed_file, "the training files (a path, or what one of them holds)"),
    (other_labels, "the training labels"),
    (excluded, "the training examples in use (number, order or exclusions)"),
    (set_("{Grayscale", "{Resize: {size: [28, 28]}}, {Grayscale"), "train.transform"),
    (set_("dtype: float32", "dtype: float16"), "train.transform"),
    (same_loss_elsewhere, "the loss (cross_entropy in the store, ./losses.py:mine now)"),
    (set_("{block: 64}", "{store_dtype: float16}"), "gradients.store_dtype (float32 in the store, float16 now)"),
    (set_("l2: ", "curvature: {method: cg}\nl2: "), "the curvature (explicit ggn in the store, raw gradients now)"),
    (
        set_("l2: ", "curvature: {matrix: hessian}\nl2: "),
        "the curvature (explicit ggn in the store, explicit hessian now)",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), CHANGES, ids=[said for _, said in CHANGES])
def test_a_store_of_something_else_is_refused_and_the_difference_named(
    influence: Command, filled: Path, change: Callable[[Path], None], said: str
) -> None:
    before = (filled / "influence.h5").read_bytes()
    change(filled)
    done = influence("gradients", cwd=filled, code=2)
    differences = done.err.split("what differs: ")[1].splitlines()[0].split("; ")
    assert said in differences
    if change is not excluded:  # without an example the labels and files are others too
        assert differences == [said]
    assert "-s gradients.store=OTHER.h5" in done.err
    assert (filled / "influence.h5").read_bytes() == before
    influence(*advised(done.err), cwd=filled)
    influence("gradients", cwd=filled)


def test_other_layers_are_named(influence: Command, project: Path) -> None:
    (project / "deep.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 10), nn.Linear(10, 10))\n"
    )
    state = torch.load(project / "model.pt") | {"3.weight": torch.eye(10), "3.bias": torch.zeros(10)}
    torch.save(state, project / "model.pt")
    edit(project, "./model.py:build", "./deep.py:build")
    influence("gradients", "-s", "gradients.layers='2'", cwd=project)
    done = influence("gradients", "-s", "gradients.layers='3'", cwd=project, code=2)
    assert "what differs: the tracked layers\n" in done.err


def test_other_versions_are_named(influence: Command, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("influence_cli.model.fingerprint.version", lambda name: {"torchvision": "99.0"}[name])
    done = influence("gradients", cwd=filled, code=2)
    assert "the versions of torch or torchvision (torch" in done.err
    assert "torchvision 99.0 now)" in done.err


def test_other_examples_in_memory_are_named(influence: Command, project: Path) -> None:
    use_memory(project)
    influence("gradients", cwd=project)
    with np.load(project / "train.npz") as data:
        x, y = data["x"], data["y"]
    np.savez(project / "train.npz", x=x[:, :, ::-1], y=y)
    done = influence("gradients", cwd=project, code=2)
    named = "the training examples themselves; a file that the code of the data set reads (train.npz)"
    assert f"what differs: {named}\n" in done.err


SAME = [
    "l2=0.5", "seed=3", "curvature.damping=0.1", "gradients.budget=4GB", "gradients.block=9", "device=cpu",
    "train.n=5000",     "test.args.root=train", "curvature.method=explicit", "gradients.layers='2'",
]  # fmt: skip


@pytest.mark.parametrize("word", SAME)
def test_what_the_rows_do_not_depend_on_keeps_the_store(influence: Command, filled: Path, word: str) -> None:
    done = influence("gradients", "-s", word, cwd=filled)
    assert "making" not in done.err
    assert "wrote" not in done.err


def test_the_seed_keeps_a_store_of_examples_in_memory(influence: Command, project: Path) -> None:
    """The seed says which examples are hashed, not what they are."""
    use_memory(project)
    influence("gradients", cwd=project)
    assert "wrote" not in influence("gradients", "-s", "seed=3", cwd=project).err


def test_a_copy_of_the_store_serves_as_well(influence: Command, filled: Path) -> None:
    shutil.copy(filled / "influence.h5", filled / "copy.h5")
    assert "wrote" not in influence("gradients", "-s", "gradients.store=copy.h5", cwd=filled).err
