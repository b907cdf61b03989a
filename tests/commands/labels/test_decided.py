"""`mislabels --reviewed` and `--sample` on a small project: a round of review, and everything that does not fit."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from tests.conftest import Command

HEAD = ["index", "path", "label", "decision", "new_label"]


def rows_of(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def write(path: Path, rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([HEAD, *rows])


@pytest.fixture
def labels(project: Path) -> list[str]:
    data = ImageFolder(project / "train")
    return [data.classes[label] for label in data.targets]


def other(label: str, labels: Sequence[str]) -> str:
    return next(name for name in sorted(set(labels)) if name != label)


def test_decided_labels_count_as_they_were_decided(influence: Command, project: Path, labels: list[str]) -> None:
    """The evidence is that of the data set with the labels that `relabel` writes; the decided images are gone."""
    first = [int(str(row["index"])) for row in rows_of(influence("mislabels", "--top", 12, cwd=project).out)]
    words = ["relabel", "keep", "drop"]
    rows = [
        (index, "", labels[index], words[at % 3], other(labels[index], labels) if at % 3 == 0 else "")
        for at, index in enumerate(first)
    ]
    write(project / "decisions.csv", rows)
    done = influence("mislabels", "--all", "--reviewed", "decisions.csv", cwd=project)
    assert "12 reviewed, 8 were wrong; of the next 50 about " in done.err
    learnt = {row["index"]: row for row in rows_of(done.out)}
    assert len(learnt) == 308
    assert not set(first) & set(learnt)
    influence("relabel", "decisions.csv", "-q", cwd=project)
    applied = ("-s", "train.labels=labels.csv", "-s", "train.exclude=exclude.csv")
    plain = {row["index"]: row for row in rows_of(influence("mislabels", "--all", *applied, cwd=project).out)}
    for index, row in learnt.items():
        assert [row[name] for name in ("label", "suggested")] == [plain[index][name] for name in ("label", "suggested")]
        assert row["confidence"] == pytest.approx(plain[index]["confidence"], abs=1e-5)
        assert 0 < float(str(row["score"])) < 1
    # They may be reviewed against what was applied as well.
    again = influence("mislabels", "--all", "--reviewed", "decisions.csv", *applied, cwd=project)
    assert "12 reviewed, 8 were wrong" in again.err
    assert len(again.out.splitlines()) == 308


def test_from_a_sample_to_a_number(influence: Command, project: Path, labels: list[str]) -> None:
    done = influence("mislabels", "--sample", 60, "--report", "a.html", "-o", "a.csv", cwd=project)
    assert "influence mislabels --reviewed decisions.csv --sample a.csv.run.json" in done.err
    run = json.loads((project / "a.csv.run.json").read_text())
    assert sum(stratum["size"] for stratum in run["sample"]["strata"]) == 320
    drawn = [row["index"] for row in run["sample"]["drawn"]]
    page = (project / "a.html").read_text()
    assert "Drawn at random" in page
    assert all(f'data-index="{index}"' in page for index in drawn)
    rows = [(index, "", labels[index], "keep", "") for index in drawn]
    rows[:6] = [(index, "", labels[index], "relabel", other(labels[index], labels)) for index in drawn[:6]]
    (project / "round").mkdir()
    write(project / "round" / "one.csv", rows[:30])
    write(project / "round" / "two.csv", rows[30:50])
    words = ("mislabels", "--reviewed", "round", "--sample", "a.csv.run.json", "--report", "b.html", "-o", "b.csv")
    part = influence(*words, "--top", "auto", cwd=project)
    assert "by 50 of 60 images drawn at random; the interval takes the 10 that are not decided" in part.err
    run = json.loads((project / "b.csv.run.json").read_text())
    assert run["sampled"]["all"]["decided"] == 50
    assert run["reviewed"] == run["reviewed"] | {"reviewed": 50, "wrong": 6, "unsure": 0, "next": 50}
    assert run["sampled"]["found"] == 6
    assert len((project / "b.csv").read_text().splitlines()) == 1 + run["sampled"]["left"]
    # The next run takes the draw from either file; the page shows what is open of it.
    page = (project / "b.html").read_text()
    assert [index for index in drawn if f'data-index="{index}"' in page] == drawn[50:]
    write(project / "round" / "three.csv", rows[50:])
    whole = influence("mislabels", "--reviewed", "round", "--sample", "b.csv.run.json", cwd=project)
    assert ", by 60 images drawn at random\n" in whole.err
    assert "6 of them are found" in whole.err


def refused(influence: Command, project: Path, *words: object) -> str:
    before = sorted(project.iterdir())
    done = influence("mislabels", *words, cwd=project, code=2)
    assert sorted(project.iterdir()) == before
    assert not done.out
    return done.err


def test_what_does_not_fit_is_refused(influence: Command, project: Path, labels: list[str]) -> None:
    name, wrong = labels[0], other(labels[0], labels)
    for file, row in (
        ("kept.csv", (0, "", name, "keep", "")),
        ("moved.csv", (0, "", name, "relabel", wrong)),
        ("stale.csv", (0, "", wrong, "keep", "")),
        ("far.csv", (999, "", name, "keep", "")),
        ("elsewhere.csv", (0, "train/nowhere/1.png", name, "keep", "")),
    ):
        write(project / file, [row])
    for words, said in (
        (("--reviewed", "none.csv"), "--reviewed none.csv: there is no such file or folder"),
        (
            ("--reviewed", "kept.csv", "--reviewed", "moved.csv"),
            f"moved.csv:2: relabel to {wrong} for index 0, but kept",
        ),
        (("--reviewed", "stale.csv"), "stale.csv:2: stale: the label of index 0 is"),
        (("--reviewed", "far.csv"), "far.csv:2: names the index 999"),
        (("--reviewed", "elsewhere.csv"), "elsewhere.csv:2: stale: index 0 is"),
        (
            ("--reviewed", "kept.csv", "--signal", "loss"),
            "--reviewed teaches the evidence, and --signal loss uses none",
        ),
        (("--sample", "7", "--report", "x.html", "-o", "x.csv"), "--sample 7: too few"),
        (("--sample", "50", "-o", "x.csv"), "--sample 50 needs --report FILE.html"),
        (("--sample", "50", "--report", "x.html"), "--sample 50 needs -o FILE: FILE.run.json keeps the draw"),
        (("--reviewed", "kept.csv", "--truth", "kept.csv"), "--reviewed cannot be combined with --truth"),
        (("--sample", "half"), "--sample half: neither a number nor a run file"),
        (("--sample", "kept.csv", "--reviewed", "kept.csv"), "not a run file"),
    ):
        assert said in refused(influence, project, *words)


def test_decisions_that_do_not_fit_the_sample_are_refused(influence: Command, project: Path, labels: list[str]) -> None:
    influence("mislabels", "--sample", 60, "--report", "a.html", "-o", "a.csv", cwd=project)
    drawn = [row["index"] for row in json.loads((project / "a.csv.run.json").read_text())["sample"]["drawn"]]
    outside = next(index for index in range(320) if index not in drawn)
    write(project / "beside.csv", [(outside, "", labels[outside], "keep", "")])
    words = ("--sample", "a.csv.run.json", "--reviewed")
    assert "none of the 60 images of the sample is decided" in refused(influence, project, *words, "beside.csv")
    # A label that has changed since the draw, in a way that was reviewed later.
    changed = other(labels[drawn[0]], labels)
    (project / "labels.csv").write_text(f"index,label\n{drawn[0]},{changed}\n")
    write(project / "later.csv", [(drawn[0], "", changed, "keep", "")])
    said = refused(influence, project, *words, "later.csv", "-s", "train.labels=labels.csv")
    assert f"later.csv:2: index {drawn[0]} is labelled {changed}, but was {labels[drawn[0]]} when the sample" in said


def test_a_class_that_is_empty_after_decisions_is_named(influence: Command, project: Path, labels: list[str]) -> None:
    name = labels[0]
    own = [index for index, label in enumerate(labels) if label == name]
    write(project / "d.csv", [(index, "", name, "drop", "") for index in own])
    done = influence("mislabels", "--reviewed", "d.csv", cwd=project)
    assert f"d.csv:{1 + len(own)}: no image is left of the class {name} after the decisions" in done.err
    rest = [index for index, label in enumerate(labels) if label != labels[-1]]
    write(project / "d.csv", [(index, "", labels[index], "drop", "") for index in rest])
    assert "no image is left of the class" in refused(influence, project, "--reviewed", "d.csv")


def test_a_round_in_which_everything_is_decided_says_so(influence: Command, project: Path, labels: list[str]) -> None:
    write(project / "d.csv", [(index, "", label, "keep", "") for index, label in enumerate(labels)])
    done = influence("mislabels", "--reviewed", "d.csv", "-o", "x.csv", "--report", "x.html", cwd=project)
    assert "320 reviewed, 0 were wrong" in done.err
    assert "of the next" not in done.err
