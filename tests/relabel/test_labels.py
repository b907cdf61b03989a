"""Decisions become files that a config reads back, all of them or none, and the data set is not touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from influence_cli.config.load import load_config
from influence_cli.data.datasets import load_split
from influence_cli.errors import InfluenceError
from influence_cli.relabel.labels import apply_decisions
from influence_cli.runtime.transaction import NewFile, write_together
from tests.conftest import Command, edit
from tests.support.relabel_project import HEADER, decide, listing, make, rows_of, tree

OUTPUTS = ("labels.csv", "exclude.csv", "moves.csv")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def read_back(folder: Path, labels: str, exclude: str, on: str = "train") -> tuple[list[int], list[int]]:
    """Give labels and positions as a config with these files has them."""
    words = [f"{on}.labels={folder / labels}", f"{on}.exclude={folder / exclude}"]
    config = load_config(folder / "influence.yaml", words)
    section = config.train if on == "train" else config.test
    assert section is not None
    split = load_split(config, on, section)
    return split.labels.tolist(), split.indices.tolist()


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_the_files_say_what_was_decided(folder: Path, influence: Command, suffix: str) -> None:
    before = tree(folder)
    own = [position // 4 for position in range(24)]
    decide(folder, (0, "relabel", "=SUM(A1)"), (5, "relabel", 'a "quoted", one'), (9, "drop"), (10, "keep"),
           (11, "unsure"), (23, "relabel", "-minus"))  # fmt: skip
    files = [f"l.{suffix}", f"e.{suffix}"]
    done = influence("relabel", "decisions.csv", "--labels", files[0], "--exclude", files[1], cwd=folder)
    expected = own.copy()
    expected[0], expected[5], expected[23] = 1, 2, 0
    assert read_back(folder, *files) == (expected, [i for i in range(24) if i != 9])
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [tuple(row) for row in rows] == [HEADER] * 4
    assert [(row["index"], row["decision"], row["new_label"]) for row in rows] == [
        (0, "relabel", "=SUM(A1)"), (5, "relabel", 'a "quoted", one'), (9, "drop", None), (23, "relabel", "-minus"),
    ]  # fmt: skip
    assert "6 decisions: 3 relabelled, 1 dropped, 1 kept, 1 unsure (left as they are)" in done.err
    assert "1 from -minus to =SUM(A1)" in done.err
    assert f"  labels: l.{suffix}\n  exclude: e.{suffix}\n" in done.err
    assert f"-s train.labels=l.{suffix} -s train.exclude=e.{suffix}" in done.err
    assert "train it again" in done.err
    assert tree(folder) == before
    assert not list(folder.glob(".*"))


def test_the_manifest_lists_the_moves(folder: Path, influence: Command) -> None:
    decide(folder, (1, "relabel", "emoji 🦉"), (2, "drop"))
    influence("relabel", "decisions.csv", cwd=folder)
    data, paths = folder / "data", [path for path, _ in listing(folder)]
    # The name is taken in the other folder: there is one of it in each.
    assert rows_of(folder / "moves.csv") == [
        {"from": paths[1], "to": str(data / "train" / "emoji 🦉" / (Path(paths[1]).stem + "-2.png"))},
        {"from": paths[2], "to": str(data / "dropped" / "-minus" / Path(paths[2]).name)},
    ]


def test_what_was_decided_before_is_carried_on(folder: Path, influence: Command) -> None:
    decide(folder, (0, "relabel", "plain"), (1, "relabel", "plain"), (2, "drop"))
    influence("relabel", "decisions.csv", cwd=folder)
    edit(folder, "{root: data/train}}", "{root: data/train}, labels: labels.csv, exclude: exclude.csv}")
    done = influence("relabel", "decisions.csv", cwd=folder, code=2)
    assert "error: labels.csv exists already" in done.err
    assert "--force replaces it and keeps its content, because influence.yaml:3 names it" in done.err
    done = influence("relabel", "decisions.csv", "--force", cwd=folder, code=2)
    assert "decisions.csv:2: stale: the label of index 0 is plain now, but was -minus" in done.err
    assert "3 lines are wrong: 2, 3, 5" in done.err
    # Back to its own label, and one more.
    text = ",".join(HEADER) + "\n0,,plain,relabel,-minus\n3,,-minus,drop,\n"
    (folder / "more.csv").write_text(text)
    done = influence("relabel", "more.csv", "--force", cwd=folder)
    assert "influence.yaml already names both files" in done.err
    assert "including influence.yaml:3" in done.err
    assert [row["index"] for row in rows_of(folder / "labels.csv")] == ["1"]
    assert [row["index"] for row in rows_of(folder / "exclude.csv")] == ["2", "3"]


def test_without_a_change_the_files_are_there_all_the_same(folder: Path, influence: Command) -> None:
    decide(folder, (0, "keep"), (1, "unsure"))
    done = influence("relabel", "decisions.csv", cwd=folder)
    assert done.out == ""
    assert "nothing changes" in done.err
    assert "next:" not in done.err
    assert read_back(folder, "labels.csv", "exclude.csv")[1] == list(range(24))


def test_the_test_set_has_files_of_its_own(folder: Path, influence: Command) -> None:
    decide(folder, (0, "relabel", "plain"), part="test")
    done = influence("relabel", "decisions.csv", "--on", "test", cwd=folder)
    assert "name them under test:" in done.err
    assert "train it again" not in done.err
    assert not (folder / "labels.csv").exists()
    assert read_back(folder, "test-labels.csv", "test-exclude.csv", "test")[0][0] == 4
    # They are decisions about other files than the training set's.
    done = influence("relabel", "decisions.csv", cwd=folder, code=2)
    assert "decisions.csv:2: stale: index 0 is data/train" in done.err


def test_a_data_set_of_arrays_is_relabelled_by_numbers(tmp_path: Path, influence: Command) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\n\n"
        "def data():\n    return TensorDataset(torch.zeros(6, 2), torch.arange(6) % 3)\n"
    )
    (tmp_path / "influence.yaml").write_text(
        "model: {factory: ./mine.py:data, checkpoint: missing.pt}\ntrain: {dataset: ./mine.py:data}\n"
    )
    (tmp_path / "decisions.csv").write_text("index,label,decision,new_label\n0,0,relabel,2\n1,1,drop,\n")
    done = influence("relabel", "decisions.csv", "-v", cwd=tmp_path)
    assert "no moves.csv" in done.err
    assert (tmp_path / "labels.csv").read_text() == "index,label\n0,2\n"
    assert not (tmp_path / "moves.csv").exists()
    done = influence("relabel", "decisions.csv", "--apply-moves", cwd=tmp_path, code=2)
    assert "the train data set is not an ImageFolder" in done.err
    (tmp_path / "decisions.csv").write_text("index,path,label,decision,new_label\n0,a.png,0,drop,\n")
    done = influence("relabel", "decisions.csv", "--force", cwd=tmp_path, code=2)
    assert "decisions.csv:2: names the file a.png, but this data set has no files" in done.err
    done = influence("relabel", "decisions.csv", "--on", "test", cwd=tmp_path, code=2)
    assert "the config has no test data set" in done.err


def test_it_is_one_call_from_python(folder: Path) -> None:
    path = decide(folder, (0, "relabel", "plain"), (1, "drop"))
    result = apply_decisions(load_config(folder / "influence.yaml"), path)
    assert result.overrides.tolist() == [0]
    assert result.labels[0] == 4
    assert result.exclude.tolist() == [1]
    assert result.pairs() == [("-minus", "plain", 1)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.csv"], "there is no file missing.csv"),
        (["influence.yaml"], "influence.yaml: decisions must be a .csv file"),
        ([], "relabel needs a file of decisions"),
        (["decisions.csv", "--on", "val"], "--on val: there is no such set"),
        (["decisions.csv", "--labels", "l.txt"], "l.txt: labels and exclusions are .csv or .npy"),
        (["decisions.csv", "--labels", "no/l.csv"], "there is no folder no"),
        (["decisions.csv", "--labels", "data"], "data is a folder"),
        (["decisions.csv", "--labels", "a.csv", "--exclude", "./a.csv"], "would be both the labels and the exclusions"),
        (["decisions.csv", "--labels", "decisions.csv", "--force"], "would be both the decisions and the labels"),
        (["decisions.csv", "--exclude", "moves.csv"], "would be both the exclusions and the moves"),
        (["decisions.csv", "-o", "labels.csv"], "would be both the file of -o and the labels"),
        (["decisions.csv", "--exclude", "there.csv"], "there.csv exists already"),
        (["decisions.csv", "--apply-moves", "--labels", "a.csv"], "--apply-moves writes no label file"),
        (["--undo", "--apply-moves"], "--undo cannot be combined with"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder: Path, influence: Command, words: list[str], message: str
) -> None:
    decide(folder, (0, "relabel", "plain"))
    (folder / "there.csv").write_text("mine")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = influence("relabel", *words, cwd=folder, code=2)
    assert message in done.err
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_all_images_dropped_is_refused(folder: Path, influence: Command) -> None:
    decide(folder, *((index, "drop") for index in range(24)))
    done = influence("relabel", "decisions.csv", cwd=folder, code=2)
    assert "decisions.csv leaves no train example" in done.err


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_every_file_as_it_was(
    folder: Path, influence: Command, monkeypatch: pytest.MonkeyPatch, fails_at: int, there: bool
) -> None:
    decide(folder, (0, "relabel", "plain"), (1, "drop"))
    for name in OUTPUTS if there else ():
        (folder / name).write_text(f"old {name}")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    original, count = Path.replace, 0

    def replace(self: Path, target: Any) -> Path:
        nonlocal count
        if "influence-part" in self.name:
            count += 1
            if count == fails_at + 1:
                raise OSError(28, "No space left on device")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    done = influence("relabel", "decisions.csv", "--force", cwd=folder, code=2)
    assert f"{OUTPUTS[fails_at]} cannot be written: No space left on device" in done.err
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_file_that_does_not_read_back_is_not_written(tmp_path: Path) -> None:
    def fail(_: Path) -> None:
        raise InfluenceError("not what was meant")

    files = [
        NewFile(tmp_path / "a.txt", lambda path: path.write_text("a") and None),
        NewFile(tmp_path / "b.txt", lambda path: path.write_text("b") and None, fail),
    ]
    with pytest.raises(InfluenceError, match="not what was meant"):
        write_together(files)
    assert not list(tmp_path.iterdir())


def test_a_link_is_kept_and_what_it_points_to_replaced(folder: Path, influence: Command) -> None:
    (folder / "real.csv").write_text("old")
    (folder / "labels.csv").symlink_to("real.csv")
    decide(folder, (0, "relabel", "plain"))
    influence("relabel", "decisions.csv", "--force", cwd=folder)
    assert (folder / "labels.csv").is_symlink()
    assert rows_of(folder / "real.csv")[0]["label"] == "plain"


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_names_that_are_not_utf8_are_written_and_read(tmp_path: Path, influence: Command) -> None:
    folder = make(tmp_path, ("cat", "d\udcffg"), ("a\udcfe.png", "b.png"))
    (folder / "decisions.csv").write_bytes(
        b"index,path,label,decision,new_label\n0,data/train/cat/a\xfe.png,cat,relabel,d\xffg\n2,,d\xffg,drop,\n"
    )
    influence("relabel", "decisions.csv", cwd=folder)
    assert read_back(folder, "labels.csv", "exclude.csv") == ([1, 0, 1, 1], [0, 1, 3])


def test_labels_of_files_that_have_moved_since_are_refused(folder: Path, influence: Command) -> None:
    decide(folder, (0, "relabel", "plain"), (5, "drop"))
    influence("relabel", "decisions.csv", cwd=folder)
    (folder / "data").rename(folder / "images")
    edit(folder, "root: data/train", "root: images/train")
    # A project that is moved as a whole stays the same.
    assert read_back(folder, "labels.csv", "exclude.csv")[0][0] == 4
    next(path for path in sorted((folder / "images" / "train" / "-minus").iterdir())).unlink()
    with pytest.raises(InfluenceError, match=r"(?s)labels.csv:2: index 0 is now .*, but was ") as caught:
        read_back(folder, "labels.csv", "exclude.csv")
    assert "moved, added or removed" in caught.value.hint


def test_the_run_file_counts_the_decisions(folder: Path, influence: Command) -> None:
    decide(folder, (0, "relabel", "plain"), (1, "drop"))
    influence("relabel", "decisions.csv", "-o", "applied.csv", cwd=folder)
    assert [row["decision"] for row in rows_of(folder / "applied.csv")] == ["relabel", "drop"]
    run = json.loads((folder / "applied.csv.run.json").read_text())
    assert run["decisions"] == {"keep": 0, "relabel": 1, "drop": 1, "unsure": 0}
    assert run["relabelled"] == [{"label": "-minus", "new_label": "plain", "count": 1}]
