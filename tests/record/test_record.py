"""The recording's comparison: what it takes out, and that a changed byte is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import GROUPS
from compare import compare
from keep import changes, describe, stamps
from normalise import normalise

PLACES = {"/tmp/work": "<work>", "/home/me/code": "<code>"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wrote 20 of 20 blocks (95.9 MB) in 15 s", "wrote 20 of 20 blocks (95.9 MB) in <time>"),
        ("done in 3.2 s", "done in <time>"),
        ("the 2 left about 3 min 20 s, less", "the 2 left about <time>, less"),
        ("at most 1.1 GB, about 2 h 5 min", "at most 1.1 GB, about <time>"),
        ('"seconds": 1.503,', '"seconds": <seconds>,'),
        ('"search_seconds":1e-05}', '"search_seconds":<seconds>}'),
        (
            '{"item": "time to fill it, about", "value": 2.11, "unit": "2.1 s"}',
            '{"item": "time to fill it, about", "value": <seconds>, "unit": "<time>"}',
        ),
        ("time to fill it, about   14.27         14 s", "time to fill it, about   <seconds> <time>"),
        ('"time to fill it, about",2.11,2.1 s', '"time to fill it, about",<seconds>,<time>'),
        ('"torch": "2.14.0+cpu"', '"torch": "<version>"'),
        ("1,234/s", "<rate>"),
        ("2026-11-30T11:28:36+00:00,1,move", "<date>,1,move"),
        ('"1","2026-11-30T11:28:36+00:00","ee0fd1701e5ad4c3"', '"1","<date>","<checksum>"'),
        ("its 114 files were moved on 2026-11-30", "its 114 files were moved on <date>"),
        ("process 4711 has it", "process <pid> has it"),
        ("/home/me/code/influence_cli/cli.py, /tmp/work/project", "<code>/influence_cli/cli.py, <work>/project"),
    ],
)
def test_what_differs_from_run_to_run_is_taken_out(text: str, expected: str) -> None:
    assert normalise(text, PLACES) == expected


@pytest.mark.parametrize(
    "text",
    [
        "damping λ = 0.00015 to 0.033 by layer (auto: 0.1 × mean eigenvalue of each layer); l2 = 0.001",
        "influence.h5 is complete (95.9 MB)",
        "  24  test/Ankle-boot/05258.png  Ankle-boot  helpful     1    349  1.146    +0.5440",
        "0 duplicates, 6 outliers, 4 pairs of classes",
        '"rows": 20, "influence": 0.5440',
        "error: there is no test example 99999; valid indices are 0 to 504",
        "3 s/test",
    ],
)
def test_anything_else_stays(text: str) -> None:
    assert normalise(text, PLACES) == text


def test_a_picture_in_a_page_stays_different() -> None:
    one, other = (normalise(f'<img src="data:image/png;base64,{letter * 60}">') for letter in "AB")
    assert one != other
    assert len(one) < 80


def recording(folder: Path, **texts: str) -> Path:
    """Write what a recording of one command holds."""
    place = folder / "commands" / "one" / "001"
    (place / "files").mkdir(parents=True)
    facts = {"group": "one", "line": "influence rank 17", "terminal": False}
    (place / "command.json").write_text(json.dumps(facts))
    for name, text in (
        {"stdout": "a\n", "stderr": "in 3 s\n", "code": "0\n", "files/a.csv.txt": "b\n"} | texts
    ).items():
        (place / name).write_text(text)
    (folder / "recording.json").write_text(json.dumps({"places": PLACES, "groups": ["one"]}))
    return folder


def test_recordings_that_differ_in_a_time_alone_are_the_same(tmp_path: Path) -> None:
    lines, count, differ = compare(recording(tmp_path / "a"), recording(tmp_path / "b", stderr="in 5 s\n"))
    assert (lines, count, differ) == ([], 1, 0)


@pytest.mark.parametrize("name", ["stdout", "stderr", "code", "files/a.csv.txt", "files/b.csv.txt"])
def test_a_changed_byte_is_found(tmp_path: Path, name: str) -> None:
    changed = recording(tmp_path / "b", **{name: "another\n"})
    lines, count, differ = compare(recording(tmp_path / "a"), changed)
    assert (count, differ) == (1, 1)
    assert any(name in line for line in lines)
    assert lines[0] == "=== [one] influence rank 17"


@pytest.mark.parametrize("text", ["a", "a\r\n"])
def test_the_end_of_a_line_counts(tmp_path: Path, text: str) -> None:
    changed = recording(tmp_path / "b")
    (changed / "commands" / "one" / "001" / "stdout").write_text(text, newline="")
    assert compare(recording(tmp_path / "a"), changed)[2] == 1


def test_a_recording_without_a_finished_group_is_refused(tmp_path: Path) -> None:
    (recording(tmp_path / "a") / "recording.json").unlink()
    with pytest.raises(SystemExit, match="no group of it was finished"):
        compare(tmp_path / "a", recording(tmp_path / "b"))


def test_a_rewritten_file_and_a_lost_one_are_seen(tmp_path: Path) -> None:
    for name in ("same.csv", "changed.csv", "lost.csv"):
        (tmp_path / name).write_text("a\n")
    before = stamps(tmp_path)
    (tmp_path / "changed.csv").write_text("ab\n")
    (tmp_path / "lost.csv").unlink()
    (tmp_path / "new.csv").write_text("a\n")
    assert changes(before, stamps(tmp_path)) == (["changed.csv", "new.csv"], ["lost.csv"])


def test_a_store_is_described_by_its_values_and_attributes(tmp_path: Path) -> None:
    import h5py

    texts = []
    for name, value, note in (("a", 0.0, "x"), ("b", 0.0, "x"), ("c", 1e-7, "x"), ("d", 0.0, "y")):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            data = file.create_dataset("rows", data=np.full((100, 3), value, dtype=np.float32))
            data.attrs["note"] = note
        texts.append(describe(tmp_path / f"{name}.h5"))
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_the_list_has_no_group_twice_and_starts_from_groups_before() -> None:
    names = [group.name for group in GROUPS]
    assert len(set(names)) == len(names)
    for position, group in enumerate(GROUPS):
        assert group.start in ("", *names[:position])
        assert group.commands
