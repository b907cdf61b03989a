"""Several files of decisions: what they say together, and that they fit each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from influence_cli.config.load import load_config
from influence_cli.data.datasets import load_split
from influence_cli.errors import InfluenceError
from influence_cli.relabel.reviewed import Reviewed, read_reviewed, reviewed_files
from tests.support.relabel_project import make

HEAD = "index,path,label,decision,new_label\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, ("cat", "dog", "owl"), ("0.png", "1.png"))


def read(folder: Path, *texts: str, overrides: tuple[str, ...] = ()) -> Reviewed:
    files = []
    for number, text in enumerate(texts):
        files.append(folder / f"d{number}.csv")
        files[-1].write_text(HEAD + text)
    config = load_config(folder / "influence.yaml", overrides)
    split = load_split(config, "train", config.train)
    return read_reviewed(files, split, split.classes or (), config.folder)


def rows(found: Reviewed) -> list[tuple[int, str, int | None]]:
    return [(row.index, row.decision, row.new_label) for row in found.rows]


def test_files_and_folders_are_listed_once(folder: Path) -> None:
    (folder / "round").mkdir()
    for name in ("b.csv", "a.csv", "notes.txt"):
        (folder / "round" / name).write_text("")
    listed = reviewed_files([folder / "round" / "b.csv", folder / "round"])
    assert [file.name for file in listed] == ["b.csv", "a.csv"]
    (folder / "empty").mkdir()
    with pytest.raises(InfluenceError, match=r"the folder has no \.csv file"):
        reviewed_files([folder / "empty"])
    with pytest.raises(InfluenceError, match="there is no such file or folder") as error:
        reviewed_files([folder / "round" / "aa.csv"])
    assert "a.csv" in error.value.hint


def test_files_add_up_and_the_same_twice_is_no_mistake(folder: Path) -> None:
    found = read(folder, "2,,dog,drop,\n0,,cat,keep,\n", "0,,cat,keep,\n1,,cat,relabel,owl\n")
    assert rows(found) == [(0, "keep", None), (1, "relabel", 2), (2, "drop", None)]
    assert found.place(1).endswith("d1.csv:3")
    assert found.place(2).endswith("d0.csv:2")


def test_unsure_gives_way_to_a_decision(folder: Path) -> None:
    for texts in (("0,,cat,unsure,\n", "0,,cat,drop,\n"), ("0,,cat,drop,\n", "0,,cat,unsure,\n")):
        assert rows(read(folder, *texts)) == [(0, "drop", None)]
    assert rows(read(folder, "0,,cat,unsure,\n")) == [(0, "unsure", None)]


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("0,,cat,keep,\n", "0,,cat,relabel,dog\n", "d1.csv:2: relabel to dog for index 0, but"),
        ("0,,cat,drop,\n", "1,,cat,keep,\n0,,cat,keep,\n", "d1.csv:3: keep for index 0, but"),
        ("0,,cat,relabel,owl\n", "0,,cat,relabel,dog\n", "d0.csv:2 says relabel to owl"),
    ],
)
def test_a_file_that_contradicts_another_is_refused_by_both_rows(
    folder: Path, first: str, second: str, said: str
) -> None:
    with pytest.raises(InfluenceError) as error:
        read(folder, first, second)
    assert said in error.value.message


def test_a_decision_fits_once_it_was_applied_and_not_if_the_label_is_another(folder: Path) -> None:
    (folder / "labels.csv").write_text("index,label\n0,dog\n")
    (folder / "exclude.csv").write_text("index\n2\n")
    applied = (f"train.labels={folder}/labels.csv", f"train.exclude={folder}/exclude.csv")
    done = read(folder, "0,,cat,relabel,dog\n2,,dog,drop,\n", overrides=applied)
    assert rows(done) == [(0, "relabel", 1), (2, "drop", None)]
    # After that it may be kept, and stays a label that was wrong.
    again = read(folder, "0,,dog,keep,\n", "0,,cat,relabel,dog\n", overrides=applied)
    assert rows(again) == [(0, "relabel", 1)]
    for text in ("0,,cat,keep,\n", "0,,cat,relabel,owl\n"):
        with pytest.raises(InfluenceError, match="stale: the label of index 0 is dog now, but was cat"):
            read(folder, text, overrides=applied)
    with pytest.raises(InfluenceError, match="index 2 is already excluded"):
        read(folder, "2,,dog,keep,\n", overrides=applied)
