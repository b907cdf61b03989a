"""mislabels in the words of FiftyOne and cleanlab: the columns, the sign, and what each of them reads."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest

from influence_cli.errors import InfluenceError
from influence_cli.report.dialects import COLUMNS, DIALECTS, in_dialect
from tests.conftest import Command, edit

ROW = {
    "rank": 1,
    "index": 7,
    "path": "a/7.png",
    "label": "cat",
    "suggested": "dog",
    "confidence": 0.9,
    "score": 0.95,
    "loss": 3.0,
    "flagged": True,
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_columns_are_the_dialects(dialect: str) -> None:
    (row,) = in_dialect([ROW], dialect)
    assert tuple(row) == COLUMNS[dialect]


def test_cleanlab_counts_quality_and_fiftyone_mistakes() -> None:
    (quality,), (mistake,) = in_dialect([ROW], "cleanlab"), in_dialect([ROW], "fiftyone")
    assert quality["label_score"] == pytest.approx(0.05)
    assert mistake["mistakenness"] == 0.95


def test_fiftyone_takes_files_by_absolute_path() -> None:
    (row,) = in_dialect([ROW], "fiftyone")
    assert row["filepath"] == Path.cwd() / "a/7.png"
    assert row["tags"] == "label_issue"
    assert next(in_dialect([ROW | {"flagged": False}], "fiftyone"))["tags"] is None
    with pytest.raises(InfluenceError, match="example 7 is not an image file"):
        list(in_dialect([ROW | {"path": None}], "fiftyone"))


def test_the_lines_of_the_docs_load_it_for_cleanlab(
    influence: Command, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/formats.md: the columns and types of Datalab.get_issues("label"), an example a row, by position."""
    influence("mislabels", "--all", "--format", "cleanlab", "-o", "issues.csv", "-q", cwd=project)
    rows = [json.loads(line) for line in influence("mislabels", "--all", "-q", cwd=project).out.splitlines()]
    docs = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    code = re.findall(r"```python\n(.*?)```", docs, flags=re.DOTALL)[-1]
    monkeypatch.chdir(project)
    names: dict[str, pd.DataFrame] = {}
    exec(code, names)
    issues = names["issues"]
    assert list(issues.columns) == ["is_label_issue", "label_score", "given_label", "predicted_label"]
    assert issues.index.tolist() == list(range(len(rows)))
    assert issues["is_label_issue"].dtype == bool
    assert 0 < issues["is_label_issue"].sum() < len(rows)
    by_index = {row["index"]: row for row in rows}
    assert issues["label_score"].tolist() == [1 - by_index[index]["score"] for index in issues.index]
    assert issues["given_label"].tolist() == [by_index[index]["label"] for index in issues.index]
    # Low is bad: what is flagged has the lowest quality, and differs from what is predicted.
    flagged = issues[issues["is_label_issue"]]
    assert flagged["label_score"].max() <= issues[~issues["is_label_issue"]]["label_score"].min()
    clean = names["clean"]
    assert len(clean) == len(rows) - len(flagged)


def test_cleanlab_itself_takes_the_issues(influence: Command, project: Path) -> None:
    """CleanLearning.fit(label_issues=…) leaves out what is_label_issue names."""
    from cleanlab.classification import CleanLearning

    influence("mislabels", "--all", "--format", "cleanlab", "-o", "issues.csv", "-q", cwd=project)
    issues = pd.read_csv(project / "issues.csv", index_col="index", keep_default_na=False).sort_index()
    labels = issues["given_label"].astype("category").cat.codes.to_numpy()
    seen = CleanLearning()._process_label_issues_arg(issues[["is_label_issue"]], labels)
    assert seen["is_label_issue"].sum() == issues["is_label_issue"].sum()


def test_the_csv_for_fiftyone(influence: Command, project: Path) -> None:
    """What its importer asks for: a column filepath of absolute paths, one row a file, values as text."""
    text = influence("mislabels", "--top", 100, "--format", "fiftyone", "-q", cwd=project).out
    rows = list(csv.DictReader(io.StringIO(text)))
    paths = [Path(row["filepath"]) for row in rows]
    assert len(set(paths)) == 100
    assert all(path.is_absolute() and path.is_file() for path in paths)
    assert all(path.parent.name == row["ground_truth"] for path, row in zip(paths, rows, strict=True))
    values = [float(row["mistakenness"]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert {row["tags"] for row in rows} == {"label_issue", ""}


def test_where_a_dialect_does_not_fit(influence: Command, project: Path) -> None:
    assert "one row per label" in influence("rank", 3, "--format", "fiftyone", cwd=project, code=2).err
    assert (
        "--explain cannot be combined"
        in influence("mislabels", "--explain", 3, "--format", "cleanlab", cwd=project, code=2).err
    )
    (project / "data.py").write_text(
        "from torchvision.datasets import ImageFolder\n\n\nclass Bare:\n    classes = None\n\n"
        "    def __init__(self, root):\n        self.data = ImageFolder(root)\n\n"
        "    def __len__(self):\n        return len(self.data)\n\n"
        "    def __getitem__(self, index):\n        return self.data[index]\n"
    )
    edit(project, "dataset: torchvision.datasets.ImageFolder", "dataset: ./data.py:Bare")
    assert "are not image files" in influence("mislabels", "--format", "fiftyone", cwd=project, code=2).err
