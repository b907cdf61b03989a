"""What `influence mislabels` refuses: options that do not go together, or that ask for what is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from influence_cli.commands.options import given, refuse_together
from influence_cli.errors import InfluenceError
from influence_cli.report.dialects import DIALECTS

if TYPE_CHECKING:
    from pathlib import Path

    from influence_cli.data.split import Split
    from influence_cli.mislabels.find import Mislabels
    from influence_cli.results.run import Session


def rows_to_show(top: str) -> int | None:
    """Read --top: a number of rows, or None for ``auto``."""
    if top == "auto":
        return None
    if not top.isdecimal() or int(top) < 1:
        raise InfluenceError(f"--top {top}: not a number from 1 and not auto", "--top 50, or --top auto")
    return int(top)


def refuse_options(
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


def check_method(session: Session, signal: str, *, damping_sweep: bool) -> None:
    """Refuse a curvature from which what is asked for cannot be computed."""
    from influence_cli.influence.ensemble import refuse_source

    if signal == "self-influence" or damping_sweep:
        option = "--damping-sweep" if damping_sweep else "--signal self-influence"
        refuse_source(session.config.model.ensemble, option, "there is no self-influence")
    if damping_sweep:
        from influence_cli.ranking.damping_sweep import check_method

        check_method(session.config.curvature.method)


def require_count(result: Mislabels, counting: dict[str, bool]) -> None:
    """Refuse options that need the number of wrong labels, where it cannot be estimated."""
    if result.noise is None and any(counting.values()):
        obstacle = result.evidence.obstacle
        raise InfluenceError(
            f"{next(option for option, given in counting.items() if given)}: the number of wrong labels cannot be "
            f"estimated here: {obstacle.message if obstacle else 'there is no readout'}"
        )


def check_images(session: Session, split: Split, on: str) -> None:
    """Refuse --format fiftyone for examples that are not image files."""
    if session.format == "fiftyone" and (split.paths is None or split.files is not None):
        raise InfluenceError(
            f"--format fiftyone: the {on} examples are not image files, and FiftyOne needs image files",
            "--format cleanlab names examples by position",
        )
