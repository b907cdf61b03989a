"""Rows of ``mislabels`` with the column names of other tools: CSV for FiftyOne and cleanlab (see docs/formats.md).

What each tool reads was taken from its source: the CSV importer of FiftyOne 1.x (fiftyone/utils/csv.py) and
``Datalab.get_issues("label")`` of cleanlab 2.9.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from influence_cli.errors import InfluenceError

DIALECTS = ("fiftyone", "cleanlab")
# The tag that FiftyOne shows on a label that is probably wrong.
TAG = "label_issue"

COLUMNS = {
    "fiftyone": ("filepath", "ground_truth", "predictions", "confidence", "mistakenness", "tags", "loss", "index"),
    "cleanlab": ("index", "is_label_issue", "label_score", "given_label", "predicted_label"),
}


def in_dialect(rows: Iterable[Mapping[str, object]], dialect: str) -> Iterator[dict[str, object]]:
    """Rename the columns of ``mislabels``, and reverse the score if the other tool counts the other way.

    Args:
        rows: index, path, label, suggested, confidence, score, loss, and ``flagged``: whether the label is among the
            first of the ranking, as many as are probably wrong.
        dialect: one of `DIALECTS`.

    Yields:
        Rows with the dialect's `COLUMNS`. FiftyOne's ``mistakenness`` is the score, high for a wrong label; cleanlab's
        ``label_score`` is 1 − score, the quality of the label, low for a wrong one.

    Raises:
        InfluenceError: the dialect is FiftyOne, and an example is not a file.
    """
    for row in rows:
        if dialect == "cleanlab":
            yield {
                "index": row["index"],
                "is_label_issue": row["flagged"],
                "label_score": None if row["score"] is None else 1.0 - float(str(row["score"])),
                "given_label": row["label"],
                "predicted_label": row["suggested"],
            }
        else:
            if row["path"] is None:
                raise InfluenceError(
                    f"--format fiftyone: example {row['index']} is not an image file, and FiftyOne needs image files",
                    "--format cleanlab names examples by position",
                )
            yield {
                "filepath": Path(str(row["path"])).absolute(),
                "ground_truth": row["label"],
                "predictions": row["suggested"],
                "confidence": row["confidence"],
                "mistakenness": row["score"],
                "tags": TAG if row["flagged"] else None,
                "loss": row["loss"],
                "index": row["index"],
            }
