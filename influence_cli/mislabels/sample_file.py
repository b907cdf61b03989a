"""The draw of a sample in a run file: written by the run that draws it, read by those that estimate from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError, near_path
from influence_cli.mislabels.sample import Sample

KEY = "sample"


def sample_facts(sample: Sample) -> dict[str, object]:
    """Give the JSON of a sample: strata with their sizes by label and their scores, and what was drawn, in order."""
    scores = [[None if np.isnan(end) else float(end) for end in ends] for ends in sample.scores]
    return {
        "split": sample.split,
        "examples": sample.length,
        "classes": list(sample.classes),
        "seed": sample.seed,
        "strata": [
            {"size": int(counts.sum()), "score": ends, "labels": counts.tolist()}
            for counts, ends in zip(sample.counts, scores, strict=True)
        ],
        "drawn": [
            {"index": int(index), "stratum": int(stratum), "label": int(label)}
            for index, stratum, label in zip(sample.drawn, sample.strata, sample.labels, strict=True)
        ],
        "decided_before": sample.before.tolist(),
    }


def read_sample(path: Path, split: Split, classes: Sequence[str]) -> Sample:
    """Read the draw from a run file, and check that it is of this data set.

    Args:
        path: ``FILE.run.json`` of the run that drew it.
        split: the examples now.
        classes: names by number.

    Raises:
        InfluenceError: unreadable, without a sample, or of another data set.
    """
    where = f"--sample {near_path(path)}"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InfluenceError(f"{where}: {error.strerror}", "--sample 100 draws a sample") from error
    except ValueError as error:
        raise InfluenceError(
            f"{where}: not a run file", "the run file of --sample N -o FILE is FILE.run.json"
        ) from error
    drawn = facts.get(KEY) if isinstance(facts, dict) else None
    if drawn is None:
        raise InfluenceError(f"{where}: this run drew no sample", "name the run file of --sample N -o FILE")
    try:
        sample = _sample(drawn)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise InfluenceError(
            f"{where}: the sample in it has been changed by hand", "draw a new one: --sample 100"
        ) from error
    another = {
        f"{sample.split} labels": sample.split != split.name,
        f"{sample.length:,} examples, not {len(split.labels):,}": sample.length != len(split.labels),
        "other classes": sample.classes != tuple(classes),
    }
    for what, differs in another.items():
        if differs:
            raise InfluenceError(f"{where}: the sample is of another data set ({what})", "draw a new one: --sample 100")
    return sample


def _sample(facts: dict[str, Any]) -> Sample:
    counts = np.array([stratum["labels"] for stratum in facts["strata"]], dtype=np.int64)
    scores = np.array([stratum["score"] for stratum in facts["strata"]], dtype=np.float64)
    index, stratum, label = (
        np.array([row[key] for row in facts["drawn"]], dtype=np.int64) for key in ("index", "stratum", "label")
    )
    before, length = np.array(facts["decided_before"], dtype=np.int64), int(facts["examples"])
    classes = tuple(str(name) for name in facts["classes"])
    drawn = np.bincount(stratum, minlength=len(counts))
    fits = (
        counts.shape == (len(drawn), len(classes))
        and scores.shape == (len(drawn), 2)
        and (drawn <= counts.sum(axis=1)).all()
        and len(np.unique(index)) == len(index)
        and all(0 <= place < length for place in (*index, *before))
        and all(0 <= number < len(classes) for number in label)
    )
    if not fits:
        raise ValueError("a sample that does not fit itself")
    return Sample(
        str(facts["split"]), length, classes, int(facts["seed"]), counts, scores, index, stratum, label, before
    )
