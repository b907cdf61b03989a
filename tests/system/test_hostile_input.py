"""Input that nobody meant well: bombs, loops, labels and pixels that cannot be, sets of one, and names of control
characters. Images are in tests/system/test_hostile_images.py, made-up bytes in tests/system/test_fuzz.py."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from influence_cli.curvature.choice import SOLVERS
from tests.conftest import Command, Ended, edit
from tests.support.small_project import growth, refusal
from tests.system.test_hostile_names import NAMES

COMMANDS = (("check",), ("gradients",), ("rank", 0), ("mislabels",))
METHODS = ("explicit", "ekfac", "kfac", "arnoldi", "fisher", "identity", *SOLVERS)
# No number that is not finite may be in any row.
NOT_FINITE = re.compile(r"\b(nan|inf|infinity)\b", re.IGNORECASE)
TENSORS = """
import torch


def make(file):
    images, labels = torch.load(file)
    return torch.utils.data.TensorDataset(images, labels)
"""


def rows_of(done: Ended) -> list[dict[str, object]]:
    """Read the rows of a command that succeeded, every number finite."""
    assert not NOT_FINITE.search(done.out)
    assert "Warning" not in done.err
    return [json.loads(line) for line in done.out.splitlines()]


# --- a checkpoint


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_command_runs_the_code_of_a_checkpoint(influence: Command, tiny: Path, zipped: bool) -> None:
    state = {"state_dict": torch.load(tiny / "model.pt"), "hook": Evil(tiny / "owned")}
    torch.save(state, tiny / "model.pt", _use_new_zipfile_serialization=zipped)
    influence("check", cwd=tiny)
    assert not (tiny / "owned").exists()
    # As all there is.
    torch.save({"state_dict": Evil(tiny / "owned")}, tiny / "model.pt", _use_new_zipfile_serialization=zipped)
    for words in COMMANDS:
        said = refusal(influence, tiny, *words)
        assert "influence.yaml:2: " in said
        assert "the keys 'state_dict' (posix.system, not run)" in said
    assert not (tiny / "owned").exists()


def test_a_packed_checkpoint_is_refused_before_it_is_unpacked(influence: Command, tiny: Path) -> None:
    torch.save(torch.load(tiny / "model.pt") | {"more": torch.zeros(2**26)}, tiny / "large.pt")
    with (
        zipfile.ZipFile(tiny / "large.pt") as plain,
        zipfile.ZipFile(tiny / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    said = refusal(influence, tiny, "check", "-s", "model.checkpoint=packed.pt")
    assert re.search(r"packed\.pt is compressed, 268 MB in a file of \d+ kB; nothing was read", said)


# --- a config


def bomb(path: Path) -> None:
    names = "abcdefghi"
    path.write_text(
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise(names))
    )


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bomb": (bomb, "big.yaml:1: anchors and aliases are not supported"),
    "100 MB": (lambda path: path.write_bytes(b"a: [" + b"1," * 50_000_000 + b"]"), "100,000,005 bytes or more"),
    "device without end": (lambda path: path.symlink_to("/dev/zero"), "100,001 bytes or more"),
    "link to itself": (lambda path: path.symlink_to(path.name), "Too many levels of symbolic links"),
    "brackets": (lambda path: path.write_text("a: " + "[" * 90_000), "big.yaml:1: nested too deeply"),
    "braces": (lambda path: path.write_text("a: " + "{b: " * 20_000), "big.yaml:1: nested too deeply"),
    "as many values as fit": (lambda path: path.write_text("a: [" + "1," * 49_000 + "]"), "unknown key 'a'"),
    "a long number": (lambda path: path.write_text("seed: 0x" + "f" * 90_000), "is not a usable number"),
    "a long key": (lambda path: path.write_text("k" * 1000 + ": 1"), "unknown key 'kkk"),
    "a zero byte": (lambda path: path.write_text('model: {factory: "a\\0b"}'), "big.yaml:1: a zero byte in 'a\\x00b'"),
    "control characters": (lambda path: path.write_text('"a\\e[31m\\n\\u202e": 1'), "unknown key"),
    "not text": (lambda path: path.write_bytes(bytes(range(256))), "not a text file in UTF-8"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.slow
def test_a_config_without_measure_is_one_line(influence: Command, tiny: Path, name: str) -> None:
    write, message = CONFIGS[name]
    write(tiny / "big.yaml")
    said = refusal(influence, tiny, "check", "-c", "big.yaml")
    assert message in said
    assert len(said) < 2100
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", said)


@pytest.mark.slow
def test_a_config_without_measure_takes_no_memory(tiny: Path) -> None:
    for number, name in enumerate(("bomb", "100 MB", "device without end", "brackets", "as many values as fit")):
        CONFIGS[name][0](tiny / f"{number}.yaml")
    codes, grown = growth(tiny, ["check", "-q"], *(["check", "-c", f"{number}.yaml"] for number in range(5)))
    assert codes == [2] * 5
    assert grown < 100


def test_a_list_on_stdin_that_is_none_is_refused_at_its_line(influence: Command, tiny: Path) -> None:
    assert "stdin:2: a line of more than 20,000" in refusal(influence, tiny, "rank", "-", stdin="0\n" + "x" * 10**7)
    assert "stdin:1: there is no test example 99" in refusal(influence, tiny, "rank", "-", stdin="9" * 4000)
    assert "stdin:1: '99999" in refusal(influence, tiny, "rank", "-", stdin="9" * 5000)
    assert "stdin:1: there is no class '99999" in refusal(influence, tiny, "rank", "-", stdin="0\t" + "9" * 5000)


def test_an_array_larger_than_its_file_is_refused(influence: Command, tiny: Path) -> None:
    np.save(tiny / "labels.npy", np.zeros(24, dtype=np.int64))
    content = (tiny / "labels.npy").read_bytes()
    (tiny / "labels.npy").write_bytes(content.replace(b"(24,), }            ", b"(8000000000000,), }"))
    for words in (
        ("check", "-s", "train.labels=labels.npy"),
        ("check", "-s", "train.exclude=labels.npy"),
        ("mislabels", "--truth", "labels.npy"),
        ("mislabels", "--pred-probs", "labels.npy"),
    ):
        assert "labels.npy is not a readable .npy file" in refusal(influence, tiny, *words)


# --- links


def test_a_folder_that_leads_to_itself_is_refused_by_name(influence: Command, tiny: Path) -> None:
    (tiny / "train" / "b" / "twice").mkdir()
    (tiny / "train" / "b" / "twice" / "back").symlink_to("../../a")
    for name, target in (("up", ".."), ("here", "."), ("other", "../b/twice")):
        link = tiny / "train" / "a" / name
        link.symlink_to(target)
        for words in COMMANDS:
            said = refusal(influence, tiny, *words)
            assert re.search(
                f"influence.yaml:5: {tiny}/train/[ab]/.* leads back to {tiny}/train/[ab][a-z/]*: its images", said
            )
        link.unlink()
    shutil.rmtree(tiny / "train" / "b" / "twice")
    # A link to images elsewhere is none, and a link to itself is no folder.
    (tiny / "elsewhere").mkdir()
    Image.new("L", (8, 8)).save(tiny / "elsewhere" / "0.png")
    (tiny / "train" / "a" / "more").symlink_to(tiny / "elsewhere")
    (tiny / "train" / "a" / "self").symlink_to("self")
    assert len(influence("mislabels", "--all", cwd=tiny).out.splitlines()) == 25


def test_a_link_to_itself_in_any_other_place_is_one_line(influence: Command, tiny: Path) -> None:
    for name in ("loop.png", "loop.csv", "loop.npy", "loop.pt", "loop.h5", "loop"):
        (tiny / name).symlink_to(name)
    for words in (
        ("rank", "loop.png"),
        ("check", "-s", "model.checkpoint=loop.pt"),
        ("check", "-s", "train.labels=loop.csv"),
        ("check", "-s", "train.exclude=loop.npy"),
        ("check", "-s", "train.args.root=loop"),
        ("mislabels", "--truth", "loop.csv"),
        ("mislabels", "--pred-probs", "loop.npy"),
        ("relabel", "loop.csv"),
        ("compare", "loop.csv", "loop.csv"),
    ):
        assert "loop" in refusal(influence, tiny, *words)
    # The store is made in its place.
    assert len(rows_of(influence("rank", 0, "--top", 1, "-q", "-s", "gradients.store=loop.h5", cwd=tiny))) == 2


def test_a_store_that_is_a_pipe_is_not_waited_for(influence: Command, tiny: Path) -> None:
    os.mkfifo(tiny / "influence.h5")
    for words in (("gradients",), ("rank", 0)):
        assert "influence.h5 is not a file" in refusal(influence, tiny, *words)


# --- labels and pixels


def in_memory(tiny: Path, part: str, change: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    """Let both sets be tensors, one of them changed."""
    from torchvision.datasets import ImageFolder

    (tiny / "tensors.py").write_text(TENSORS)
    for name in ("train", "test"):
        data = ImageFolder(tiny / name)
        images = torch.stack([torch.tensor(np.asarray(image.convert("L"))).float()[None] / 255 for image, _ in data])
        labels = torch.tensor(data.targets)
        if name == part:
            change(images, labels)
        torch.save((images, labels), tiny / f"{name}.tensors")
    head = (tiny / "influence.yaml").read_text().partition("train:")[0]
    sections = "".join(f"{name}: {{dataset: ./tensors.py:make, args: {{file: {name}.tensors}}}}\n" for name in ("train", "test"))  # fmt: skip  # noqa: E501
    (tiny / "influence.yaml").write_text(f"{head}{sections}gradients: {{block: 8}}\n")


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_a_label_of_a_data_set_that_no_class_has_is_named(
    influence: Command, tiny: Path, part: str, label: int
) -> None:
    in_memory(tiny, part, lambda _, labels: labels.__setitem__(5, label))
    kind = "training" if part == "train" else "test"
    for words in COMMANDS:
        said = refusal(influence, tiny, *words)
        assert f"{kind} example 5 has the label {label}, but the model has 3 outputs, so label" in said


def test_a_label_of_a_file_that_no_class_has_is_named(influence: Command, tiny: Path) -> None:
    np.save(tiny / "three.npy", np.full(24, 3))
    np.save(tiny / "minus.npy", np.arange(24) % 3 - 1)
    (tiny / "given.csv").write_text("index,true_label\n1,b\n5,3\n")
    (tiny / "far.csv").write_text("index,true_label\n24,b\n")
    (tiny / "decisions.csv").write_text("index,label,decision,new_label\n1,a,keep,\n5,a,relabel,3\n")
    for option in (("check", "-s", "train.labels={}"), ("mislabels", "--truth", "{}")):
        for name, message in (
            ("three.npy", "three.npy has the label 3, but there are 3 classes"),
            ("minus.npy", "minus.npy has the label -1, but there are 3 classes"),
            ("given.csv", "given.csv:3: there is no class '3'"),
            ("far.csv", "far.csv:2: names the index 24; valid indices are 0 to 23"),
        ):
            assert message in refusal(influence, tiny, *(word.format(name) for word in option))
    assert "decisions.csv:3: there is no class '3'" in refusal(influence, tiny, "relabel", "decisions.csv")
    assert "--target: there is no class '3'" in refusal(influence, tiny, "rank", 0, "--target", "3")
    assert "stdin:1: there is no class '3'" in refusal(influence, tiny, "rank", "-", stdin="0\t3\n")


@pytest.mark.quick("nan")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_training_pixel_that_is_no_number_names_its_example(influence: Command, tiny: Path, bad: float) -> None:
    in_memory(tiny, "train", lambda images, _: images[20, 0, 2].__setitem__(3, bad))
    for words in (
        *COMMANDS,
        ("check", "--full"),
        ("gradients", "--skip-unreadable"),
        ("rank", 0, "--on-the-fly"),
        *(("mislabels", "--signal", signal) for signal in ("loss", "readout", "gradient-norm")),
        *(("rank", 0, "-s", f"curvature.method={method}") for method in METHODS),
    ):
        assert "training example 20" in refusal(influence, tiny, *words)
    (tiny / "out.csv").write_text("index\n20\n")
    rows_of(influence("rank", 0, "--all", "-s", "train.exclude=out.csv", "-s", "gradients.store=b.h5", cwd=tiny))


def test_a_test_pixel_that_is_no_number_names_its_example(influence: Command, tiny: Path) -> None:
    in_memory(tiny, "test", lambda images, _: images[4, 0, 2].__setitem__(3, np.nan))
    for words in ((4,), ("0:6",), ("misclassified",), ("0:6", "--aggregate"), ("--train", 0), (4, "--on-the-fly")):
        assert "test example 4" in refusal(influence, tiny, "rank", *words)
    assert "test example 4" in refusal(influence, tiny, "mislabels", "--signal", "test-influence")
    assert "test example 4" in refusal(influence, tiny, "check")
    # Who does not ask for it gets an answer.
    assert len(rows_of(influence("rank", 0, "--top", 1, cwd=tiny))) == 2


# --- few, and the same


def keep(tiny: Path, *kept: str) -> None:
    """Remove all training images but some."""
    for path in (tiny / "train").glob("*/*"):
        if f"{path.parent.name}/{path.stem}" not in kept:
            path.unlink()
    edit(tiny, "args: {root: train}", "args: {root: train, allow_empty: true}")


def test_a_class_with_one_image_is_ranked_and_named_where_that_is_too_few(influence: Command, tiny: Path) -> None:
    for path in sorted((tiny / "train" / "a").iterdir())[1:]:
        path.unlink()
    influence("check", cwd=tiny)
    influence("gradients", "-q", cwd=tiny)
    assert len(rows_of(influence("rank", 0, "--all", cwd=tiny))) == 17
    done = influence("mislabels", "--all", cwd=tiny)
    assert "these have fewer and are not judged, they come last without a score: a (1)" in done.err
    rows = rows_of(done)
    assert [row["label"] for row in rows if row["score"] is None] == ["a"]
    assert rows[-1]["label"] == "a"
    explained = rows_of(influence("mislabels", "--explain", 0, cwd=tiny))
    assert {row["name"]: row["value"] is None for row in explained}["readout"]
    assert {row["kind"] for row in explained} == {"signal"}
    (tiny / "truth.csv").write_text("index,true_label\n0,b\n5,c\n")
    assert "2 of 17 labels are wrong" in influence("mislabels", "--truth", "truth.csv", cwd=tiny).err
    assert len(rows_of(influence("mislabels", "--all", "--signal", "loss", cwd=tiny))) == 17


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.quick("explicit")
def test_one_training_image_gives_numbers(influence: Command, tiny: Path, method: str) -> None:
    keep(tiny, "b/001")
    words = ("-s", f"curvature.method={method}", "-s", "curvature.max_iterations=2000")
    influence("check", *words, cwd=tiny)
    influence("gradients", *words, cwd=tiny)
    assert len(rows_of(influence("rank", 0, 1, *words, "-o", "r.json", cwd=tiny))) == 0
    assert not NOT_FINITE.search((tiny / "r.json").read_text() + (tiny / "r.json.run.json").read_text())
    assert len(rows_of(influence("rank", 0, "--on-the-fly", *words, cwd=tiny))) == 1
    if method in SOLVERS:
        assert "one solve per example" in refusal(influence, tiny, "mislabels", "--signal", "self-influence", *words)
    else:
        assert len(rows_of(influence("rank", "--train", 0, "--all", *words, cwd=tiny))) == 6
        assert len(rows_of(influence("mislabels", "--signal", "self-influence", *words, cwd=tiny))) == 1


def test_of_one_training_image_the_label_cannot_be_doubted(influence: Command, tiny: Path) -> None:
    keep(tiny, "b/001")
    for signal in ("combined", "readout", "neighbours", "logistic"):
        assert "the only label is b: no label can be suspected" in refusal(
            influence, tiny, "mislabels", "--signal", signal
        )
    for signal in ("loss", "margin", "gradient-norm", "test-influence"):
        assert len(rows_of(influence("mislabels", "--signal", signal, cwd=tiny))) == 1
    said = refusal(influence, tiny, "verify", 0, "--loo", 1)
    assert "--loo 1: there is 1 training example\n  two are needed" in said


def test_the_same_image_twice_has_the_same_numbers_twice(influence: Command, tiny: Path) -> None:
    first = min((tiny / "train" / "a").iterdir())
    shutil.copy(first, first.with_name("zz.png"))
    os.link(first, first.with_name("zy.png"))
    first.with_name("zx.png").symlink_to(first)
    shutil.copy(first, tiny / "train" / "b" / "zz.png")
    for method in ("auto", "ekfac", "identity"):
        words = ("-s", f"curvature.method={method}", "-s", f"gradients.store={method}.h5")
        rows = rows_of(influence("rank", 0, "--all", *words, cwd=tiny))
        assert len(rows) == 28
        same = [row["influence"] for row in rows if row["label"] == "a" and row["index"] in (0, 8, 9, 10)]
        assert len(same) == 4
        assert np.allclose(same, same[0], rtol=1e-4, atol=1e-9)
    assert len(rows_of(influence("mislabels", "--all", cwd=tiny))) == 28
    # A duplicate with another label is said to be one.
    influence("mislabels", "-o", "rows.json", cwd=tiny)
    assert "duplicates" in (tiny / "rows.json.run.json").read_text()


def test_what_is_listed_twice_is_answered_twice(influence: Command, tiny: Path) -> None:
    path = min((tiny / "test" / "a").iterdir())
    done = influence("rank", "-", 0, "--top", 1, cwd=tiny, stdin=f"{path}\n0\n{path}\ta\n0:1\n")
    rows = rows_of(done)
    assert [row["test"] for row in rows] == [None] * 2 + [0] * 2 + [None] * 2 + [0] * 4
    assert len({row["influence"] for row in rows if row["effect"] == "helpful"}) <= 2


# --- names: rows and pages of such names are in tests/system/test_hostile_names.py


@pytest.mark.quick("<script>*", "line*", "=cmd*", "*red")
@pytest.mark.parametrize("name", [*NAMES, "\x07bell\x9b31m", "\udcff"])
def test_an_error_about_any_name_is_one_printable_line(influence: Command, tiny: Path, name: str) -> None:
    path = tiny / "train" / "a" / f"{name.replace('/', '')}.png"
    path.write_bytes(b"")
    shutil.copy(path, tiny / path.name)
    for words in (("gradients",), ("check", "--full"), ("mislabels",), ("rank", path.name), ("relabel", path.name)):
        said = refusal(influence, tiny, *words)
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", said)
    done = influence("rank", path.name, 0, "--top", 1, "--skip-unreadable", cwd=tiny)
    assert len([line for line in done.err.splitlines() if "skipped: " in line]) == 2
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]", done.err)
