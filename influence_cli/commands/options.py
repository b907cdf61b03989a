"""The options that commands share, one annotated type per option."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from influence_cli.errors import InfluenceError
from influence_cli.report.dialects import DIALECTS

ConfigFile = Annotated[
    Path, typer.Option("-c", "--config", envvar="INFLUENCE_CONFIG", help="The YAML config.", metavar="FILE")
]
Set = Annotated[
    list[str] | None,
    typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a config key, such as curvature.damping=0.01."),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print only warnings and errors on stderr.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print more details on stderr.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="table, jsonl, json, csv, tsv or parquet. Default: table on a terminal, otherwise jsonl.",
    ),
]
LabelFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="table, jsonl, json, csv, tsv or parquet; fiftyone or cleanlab: CSV for that tool. "
        "Default: table on a terminal, otherwise jsonl.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        help="Write the rows to FILE (its suffix sets the format) and the facts of the run to FILE.run.json.",
    ),
]
Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Also write an HTML page with the images. It works offline."),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE.png|svg", help="Also draw a plot (needs matplotlib: influence-cli[plot])."),
]
Top = Annotated[
    int,
    typer.Option(
        "--top", min=1, metavar="K", help="Rows to show; for rank: images per list (helpful, harmful) and test image."
    ),
]
All = Annotated[bool, typer.Option("--all", help="Show all rows.")]
OnTheFly = Annotated[
    bool,
    typer.Option("--on-the-fly", help="Store no gradients: pass over the training data instead, with all coordinates."),
]
DampingSweep = Annotated[
    bool, typer.Option("--damping-sweep", help="Also say how the ranking changes at λ × 0.01 to λ × 100.")
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="If a solver (cg, lissa, …) does not converge, stop with exit code 2 and no results."
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision", metavar="float32|tf32|bf16", help="Precision of the layer pass; the same as -s precision=…"
    ),
]
SkipUnreadable = Annotated[
    bool, typer.Option("--skip-unreadable", help="Continue without the examples that cannot be read, and list them.")
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


def rows_to_show(top: str) -> int | None:
    """Read --top: a number of rows, or None for ``auto``."""
    if top == "auto":
        return None
    if not top.isdecimal() or int(top) < 1:
        raise InfluenceError(f"--top {top}: not a number from 1 and not auto", "--top 50, or --top auto")
    return int(top)


def refuse_mislabels(
    on: str,
    explain: int | None,
    *,
    format: str | None,
    plot: Path | None,
    report: Path | None,
    damping_sweep: bool,
    on_the_fly: bool,
) -> None:
    """Refuse options that cannot be combined, a plot and a page that could not be written."""
    from influence_cli.report.html import check_page
    from influence_cli.report.plot import check_plot

    refuse_together(
        explain,
        format in DIALECTS,
        message=f"--explain cannot be combined with --format {format}",
        hint="that format has one row per label",
    )
    refuse_together(
        explain,
        plot,
        message="--explain cannot be combined with --plot",
        hint="--plot draws all labels: leave one of them out",
    )
    refuse_together(
        damping_sweep,
        given(on == "test", on_the_fly, explain),
        message="--damping-sweep ranks training labels from a store: it cannot be combined with --on test, "
        "--on-the-fly or --explain",
        hint="leave one of them out",
    )
    refuse_together(
        explain,
        report,
        message="--explain cannot be combined with --report",
        hint="--report shows all labels: leave one of them out",
    )

    check_plot(plot)
    check_page(report)
