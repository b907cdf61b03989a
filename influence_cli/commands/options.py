"""The options that commands share, one annotated type per option."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated

import typer

from influence_cli.errors import InfluenceError, did_you_mean, require_extra
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
PageSize = Annotated[
    float,
    typer.Option("--page-size", min=1, max=1000, metavar="MB", help="The size that the page of --report may have."),
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
Proxy = Annotated[
    bool,
    typer.Option(
        "--proxy",
        help="Answer by a small smooth network that is trained on the same images, and whose run is replayed.",
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


@dataclass(frozen=True)
class Amount:
    """How many training examples: a share of them, or a count.

    Attributes:
        option: with its value, for messages.
        share: in (0, 1), or None.
        count: ≥ 1, or None.
    """

    option: str
    share: float | None = None
    count: int | None = None

    def of(self, n: int) -> int:
        """Give the count of n training examples; the share is rounded to the nearest.

        Raises:
            InfluenceError: it is none of them, or all.
        """
        count = round((self.share or 0.0) * n) if self.count is None else self.count
        if not 0 < count < n:
            raise InfluenceError(
                f"{self.option}: that is {'none' if count < 1 else 'all'} of {n:,} training examples",
                "give a share that leaves some in and some out, such as 1%",
            )
        return count


def read_amount(option: str, text: str) -> Amount:
    """Read ``1%``, ``0.01`` or a count.

    Raises:
        InfluenceError: it is none of these.
    """
    shown, number = f"{option} {text}", text.strip().removesuffix("%")
    with suppress(ValueError):
        if text.strip().isdecimal() and int(number) > 0:
            return Amount(shown, count=int(number))
        share = float(number) / (100 if number != text.strip() else 1)
        if 0 < share < 1:
            return Amount(shown, share=share)
    raise InfluenceError(f"{shown}: not a share above 0 and below 1, and not a count", f"{option} 1%, 0.01, or 20")


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


def refuse_approximate(beside: Mapping[str, bool]) -> None:
    """Refuse what an index cannot give, before any work.

    Args:
        beside: options that need more than an index has, and whether they were given.
    """
    named = [name for name, is_given in beside.items() if is_given]
    if named:
        raise InfluenceError(
            f"--approximate finds only the strongest influences: it cannot be combined with {' or '.join(named)}",
            "leave one of them out",
        )
    require_extra("faiss", "index", "--approximate")


def refuse_proxy(*, proxy: bool, aggregate: bool, others: tuple[bool, ...]) -> None:
    """Refuse what a proxy cannot say of single predictions, and what needs a store.

    Args:
        proxy: --proxy.
        aggregate: --aggregate.
        others: options of rank that need a store or a solver.
    """
    if proxy and not aggregate:
        raise InfluenceError(
            "--proxy answers for the mean of test images, not for single predictions: another network makes others",
            "add --aggregate",
        )
    refuse_together(
        proxy,
        given(*others),
        message="--proxy replays a run of its own: it cannot be combined with --approximate, --damping-sweep, "
        "--normalise, --on-the-fly, --strict or --skip-unreadable",
        hint="leave one of them out",
    )


@dataclass(frozen=True)
class VerifyOptions:
    """What `influence verify` was asked for; None where an option was not given.

    Attributes:
        words: TEST.
        loo: --loo.
        lds: --lds.
        top: --top.
        subsets: --subsets.
        repeats: --repeats.
        tests: --tests.
        drop: --drop.
        same_run: --same-run.
        measure: --measure.
        methods: --methods.
        plot: --plot.
        on_the_fly: --on-the-fly.
    """

    words: list[str]
    loo: int | None
    lds: bool
    top: str | None
    subsets: int | None
    repeats: int | None
    tests: int | None
    drop: str | None
    same_run: bool
    measure: str
    methods: str | None
    plot: Path | None
    on_the_fly: bool


def refuse_verify(asked: VerifyOptions) -> None:
    """Refuse options of `influence verify` that cannot be combined, values that mean nothing, an impossible plot."""
    from influence_cli.report.plot import check_plot

    kinds = {"--loo": asked.loo, "--lds": asked.lds, "--top": asked.top}
    for one, other in combinations(kinds, 2):
        refuse_together(
            kinds[one], kinds[other], message=f"{one} and {other} are two commands", hint="run one after the other"
        )
    refuse_together(
        asked.lds,
        asked.words,
        message="--lds draws random test examples, so it takes no TEST",
        hint="--tests N says how many",
    )
    refuse_together(
        asked.top,
        asked.words,
        asked.tests,
        message="--tests draws test examples, but TEST names them",
        hint="leave one of them out",
    )
    refuse_together(
        asked.same_run,
        asked.repeats,
        message="--same-run has one seed, so it takes no --repeats",
        hint="more --subsets narrow the interval",
    )
    if asked.plot is not None and not given(asked.loo, asked.top, asked.same_run):
        raise InfluenceError(
            "--plot needs --loo, --top or --same-run: it draws estimated against actual effects", "add --loo 40"
        )
    if asked.methods is not None and not asked.lds:
        raise InfluenceError("--methods needs --lds", "influence verify --lds --methods ekfac,identity")
    for option, value in (("--same-run", asked.same_run), ("--drop", asked.drop), ("--subsets", asked.subsets)):
        if given(value) and not asked.lds:
            raise InfluenceError(f"{option} needs --lds", "influence verify --lds")
    measures = ("loss", "margin")
    if asked.measure not in measures:
        raise InfluenceError(
            f"--measure {asked.measure}: not loss and not margin", did_you_mean(asked.measure, measures)
        )
    for option, value in (("--measure margin", asked.measure == "margin"), ("--tests", asked.tests)):
        if given(value) and not given(asked.lds, asked.top):
            raise InfluenceError(f"{option} needs --lds or --top", "influence verify --top 1%")
    if asked.repeats is not None and not given(*kinds.values()):
        raise InfluenceError("--repeats needs --loo, --lds or --top", "influence verify --loo 40")
    for option, text in (("--top", asked.top), ("--drop", asked.drop)):
        if text is not None:
            read_amount(option, text)
    check_plot(asked.plot)
