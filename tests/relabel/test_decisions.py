"""A file of decisions is taken as a whole or refused by its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from influence_cli.config.load import load_config
from influence_cli.data.datasets import load_split
from influence_cli.errors import InfluenceError
from influence_cli.relabel.decisions import read_decisions
from tests.conftest import Command
from tests.support.relabel_project import decide, listing, make

CLASSES = ("cat", "dog", "owl")
NAMES = ("0.png", "1.png")
HEAD = "index,path,label,decision,new_label\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path, CLASSES, NAMES)


def read(folder: Path, text: str | bytes, *overrides: str) -> list[tuple[int, str, int | None]]:
    path = folder / "decisions.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    config = load_config(folder / "influence.yaml", overrides)
    split = load_split(config, "train", config.train)
    found = read_decisions(path, split, split.classes or (), config.folder)
    return [(row.index, row.decision, row.new_label) for row in found.rows]


TAKEN = [
    (HEAD, []),
    (HEAD + "0,data/train/cat/0.png,cat,keep,\n", [(0, "keep", None)]),
    (HEAD + "0,,cat,relabel,dog\n2,,dog,drop,\n3,,dog,unsure,\n",
     [(0, "relabel", 1), (2, "drop", None), (3, "unsure", None)]),
    ("index,label,decision\n5,owl,drop\n", [(5, "drop", None)]),
    ("decision,new_label,label,index\nrelabel,owl,cat,1\n", [(1, "relabel", 2)]),
    ("index,label,decision,new_label\n1,0,relabel,2\n", [(1, "relabel", 2)]),
    ("index , label,decision,new_label\n 1 , cat , relabel , owl \n\n", [(1, "relabel", 2)]),
    ("\ufeffindex,label,decision\r\n5,owl,drop\r\n", [(5, "drop", None)]),
    (HEAD + "0,,cat,relabel,dog\n0,,cat,relabel,dog\n", [(0, "relabel", 1)]),
    (HEAD + "0,,cat,relabel,dog\n0,data/train/cat/0.png,0,relabel,1\n", [(0, "relabel", 1)]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), TAKEN)
def test_decisions_are_read(folder: Path, text: str, expected: object) -> None:
    assert read(folder, text) == expected


REFUSED = [
    ("index,label,decison\n", "csv:1: unknown column 'decison'", "did you mean 'decision'?"),
    ("index,label,decision,note\n", "csv:1: unknown column 'note'", "known: decision, index"),
    ("index,label,decision,label\n", "csv:1: the column 'label' appears twice", "index,path,label"),
    ("index;label;decision\n0;cat;keep\n", "csv:1: the columns are separated by semicolons", "commas"),
    ("index,decision\n0,keep\n", "csv:1: the column 'label' is missing", "index,path,label"),
    ("", "csv is empty", ""),
    (b"index,label,decision\n\xff,cat,keep\n", "csv is not a readable .csv file", ""),
    (HEAD + "0,,cat,keep\n", "csv:2: 4 fields, but the header has 5", ""),
    (HEAD + "0,,cat,keep,\n\n6,,cat,keep,\n", "csv:4: names the index 6; valid indices are 0 to 5", ""),
    (HEAD + "-1,,cat,keep,\n", "csv:2: names the index -1", ""),
    (HEAD + "1.5,,cat,keep,\n", "csv:2: 1.5 is not a whole number", ""),
    (HEAD + "x,,cat,keep,\n", "csv:2: 'x' is not a whole number", ""),
    (HEAD + "0,,cat,kep,\n", "csv:2: unknown decision 'kep'", "did you mean 'keep'?"),
    (HEAD + "0,,cat,,\n", "csv:2: unknown decision ''", "drop, keep, relabel, unsure"),
    (HEAD + "0,,cta,keep,\n", "csv:2: there is no class 'cta'", "did you mean 'cat'?"),
    (HEAD + "0,,cat,relabel,dgo\n", "csv:2: there is no class 'dgo'", "did you mean 'dog'?"),
    (HEAD + "0,,cat,relabel,3\n", "csv:2: there is no class '3'", ""),
    (HEAD + "0,,cat,relabel,\n", "csv:2: relabel without a new_label", "known: cat, dog, owl"),
    ("index,label,decision\n0,cat,relabel\n", "csv:2: relabel without a new_label", ""),
    (HEAD + "0,,cat,relabel,cat\n", "csv:2: relabels index 0 from cat to itself", "write keep"),
    (HEAD + "0,,cat,drop,dog\n", "csv:2: new_label is 'dog', but the decision is drop", ""),
    (HEAD + "0,,dog,keep,\n", "csv:2: stale: the label of index 0 is cat now, but was dog when reviewed", "again"),
    (HEAD + "0,data/train/cat/1.png,cat,keep,\n", "csv:2: stale: index 0 is ", "review them again"),
    (HEAD + "0,data/train/cat/9.png,cat,keep,\n", "when reviewed, which is gone", ""),
    (HEAD + "0,data/test/cat/0.png,cat,keep,\n", "csv:2: stale: index 0 is ", "another data set"),
    (HEAD + "0,,cat,keep,\n0,,cat,drop,\n", "csv:3: drop for index 0, but line 2 says keep", "keep only one"),
    (HEAD + "0,,cat,relabel,dog\n0,,cat,relabel,owl\n",
     "csv:3: relabel to owl for index 0, but line 2 says relabel to dog", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message", "hint"), REFUSED)
def test_what_does_not_fit_is_refused_by_its_line(folder: Path, text: str | bytes, message: str, hint: str) -> None:
    with pytest.raises(InfluenceError) as caught:
        read(folder, text)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_an_example_that_is_left_out_has_nothing_to_decide(folder: Path) -> None:
    (folder / "out.csv").write_text("index\n1\n")
    with pytest.raises(InfluenceError, match="index 1 is already excluded"):
        read(folder, HEAD + "1,,cat,keep,\n", f"train.exclude={folder / 'out.csv'}")


def test_the_label_of_now_is_that_of_the_label_file(folder: Path) -> None:
    (folder / "labels.csv").write_text("index,label\n1,owl\n")
    override = f"train.labels={folder / 'labels.csv'}"
    assert read(folder, HEAD + "1,,owl,relabel,cat\n", override) == [(1, "relabel", 0)]
    with pytest.raises(InfluenceError, match="is owl now, but was cat"):
        read(folder, HEAD + "1,,cat,relabel,owl\n", override)


def test_an_image_that_is_gone_is_told(folder: Path) -> None:
    config = load_config(folder / "influence.yaml")
    split = load_split(config, "train", config.train)
    path = decide(folder, (2, "keep"))
    Path(listing(folder)[2][0]).unlink()
    with pytest.raises(InfluenceError, match=r"decisions.csv:2: .*0.png is gone"):
        read_decisions(path, split, CLASSES, folder)


def test_the_command_counts_the_wrong_lines_and_writes_nothing(folder: Path, influence: Command) -> None:
    lines = "".join(f"{index},,cat,relabel,dgo\n" for index in (0, 1, 0, 1, 0, 1, 0))
    (folder / "decisions.csv").write_text(HEAD + "0,,cat,keep,\n" + lines)
    before = {path.name for path in folder.iterdir()}
    done = influence("relabel", "decisions.csv", cwd=folder, code=2)
    assert done.out == ""
    assert done.err.splitlines() == [
        "error: decisions.csv:3: there is no class 'dgo'",
        "  did you mean 'dog'? known: cat, dog, owl; 7 lines are wrong: 3, 4, 5, 6, 7, …",
    ]
    assert {path.name for path in folder.iterdir()} == before


def test_cells_guarded_against_formulas_are_read_either_way(tmp_path: Path) -> None:
    folder = make(tmp_path, ("+1", "'=x", "=x", "cat"), ("0.png",))
    text = "index,label,decision,new_label\n"
    assert read(folder, text + "0,''=x,relabel,cat\n") == [(0, "relabel", 3)]
    assert read(folder, text + "2,'=x,relabel,cat\n") == [(2, "relabel", 3)]
    assert read(folder, text + "2,=x,relabel,'+1\n") == [(2, "relabel", 1)]
    assert read(folder, text + "1,'+1,relabel,=x\n") == [(1, "relabel", 2)]
    assert read(folder, text + "1,+1,drop,\n") == [(1, "drop", None)]


def test_a_guarded_path_is_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path, ("=x", "cat"), ("0.png",))
    monkeypatch.chdir(folder / "data" / "train")
    for path in ("'=x/0.png", "=x/0.png"):
        assert read(folder, HEAD + f"0,{path},=x,drop,\n") == [(0, "drop", None)]


def test_a_project_that_was_moved_as_a_whole_stays_the_same(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for old in ("/mnt/old/project", "../elsewhere"):
        assert read(folder, HEAD + f"2,{old}/data/train/dog/0.png,dog,drop,\n") == [(2, "drop", None)]
        for other in ("data/train/dog/1.png", "data/train/cat/0.png", "data/test/dog/0.png", "dog/0.png", "0.png"):
            with pytest.raises(InfluenceError, match="stale: index 2 is "):
                read(folder, HEAD + f"2,{old}/{other},dog,drop,\n")
    # The old place may still be there, as where the project was copied.
    copy = make(tmp_path_factory.mktemp("copy"), CLASSES, NAMES)
    text = HEAD + f"2,{copy}/data/train/dog/0.png,dog,drop,\n"
    assert read(folder, text) == [(2, "drop", None)]


@pytest.mark.skipif(os.name == "nt", reason="names are not bytes there")
def test_a_name_that_is_not_utf8_moves_along_too(tmp_path: Path) -> None:
    folder = make(tmp_path, ("cat", "dog"), ("a\udcfe.png",))
    assert read(folder, HEAD + "0,/mnt/old/data/train/cat/a\ufffd.png,cat,drop,\n") == [(0, "drop", None)]
    with pytest.raises(InfluenceError, match="stale: index 1 is "):
        read(folder, HEAD + "1,/mnt/old/data/train/cat/a\ufffd.png,dog,drop,\n")


def test_an_index_of_the_other_set_asks_for_on(folder: Path) -> None:
    with pytest.raises(InfluenceError) as caught:
        read(folder, HEAD + "6,,cat,keep,\n")
    assert "--on test" in caught.value.hint
