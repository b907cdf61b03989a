"""The options that commands share, one annotated type each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from influence_cli.errors import InfluenceError

ConfigFile = Annotated[
    Path, typer.Option("-c", "--config", envvar="INFLUENCE_CONFIG", help="The YAML file of the run.", metavar="FILE")
]
Set = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a config key, such as curvature.damping=0.01."),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Only warnings and errors on stderr.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More on stderr.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="table, jsonl, json, csv, tsv or parquet; for mislabels also fiftyone or cleanlab (CSV). "
        "Default: table on a terminal, else jsonl.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Write the rows to FILE (its suffix sets the format) and the run's facts to FILE.run.json.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Also write a page with the images, readable offline."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png|svg", help="Also draw a plot (needs matplotlib: influence-cli[plot])."),
]
Top = Annotated[
    int, typer.Option("--top", min=1, metavar="K", help="Rows to show (for rank: an effect and test example).")
]
All = Annotated[bool, typer.Option("--all", help="All rows instead of the top.")]
OnTheFly = Annotated[
    bool,
    typer.Option(
        "--on-the-fly", help="Store no gradients: score by a layer pass over the training data, on all coordinates."
    ),
]
DampingSweep = Annotated[
    bool, typer.Option("--damping-sweep", help="Also say how the ranking changes at λ × 0.01 to 100, from the store.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Exit 2 without results if a solver (cg, lissa, …) does not converge.")
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", metavar="float32|tf32|bf16", help="Of the layer pass; the same as -s precision=…"),
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Go on without examples that cannot be read, and list them.")
]

DEFAULT_CONFIG = Path("influence.yaml")


def given(*values: object) -> bool:
    """Say whether any of some options was given: a flag that is set, or a value that is there, 0 included."""
    return any(value is not None and value is not False and value != [] for value in values)


def refuse_together(*options: object, message: str, hint: str) -> None:
    """Refuse options that exclude each other.

    Args:
        options: their values; it is an error where every one was given.
        message: what is wrong with that.
        hint: what to do instead.

    Raises:
        InfluenceError: all of them were given.
    """
    if all(given(value) for value in options):
        raise InfluenceError(message, hint)


def with_precision(overrides: list[str] | None, precision: str | None) -> list[str]:
    """Add --precision to the overrides of --set."""
    return [*(overrides or []), *([] if precision is None else [f"precision={precision}"])]
