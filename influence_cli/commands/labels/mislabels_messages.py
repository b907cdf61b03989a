"""What influence mislabels says on stderr: how many labels are wrong, and how well the signals find known ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from influence_cli.errors import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from influence_cli.data.label_files import Truth
    from influence_cli.data.split import Split
    from influence_cli.mislabels.data_issues import DataIssues
    from influence_cli.mislabels.find import Mislabels
    from influence_cli.results.run import Session


def describe(session: Session, result: Mislabels, split: Split, classes: Sequence[str]) -> None:
    """Say on stderr how many labels are wrong, and which data issues there are beyond single labels."""
    from influence_cli.pages.mislabels import issues_record, noise_record
    from influence_cli.pages.wrong_labels import wrong_label_lines

    session.run.issues = issues_record(result, split, classes)
    if result.doubt:
        session.terminal.say(f"no estimate of wrong labels: {result.doubt}")
    for line in wrong_label_lines(result, session.run.reviewed, session.run.sampled):
        session.terminal.say(line)
    if result.noise is None:
        return
    session.run.noise = noise_record(result, result.noise, classes)
    say, noise = session.terminal.say, result.noise
    count = len(result.flagged)
    if count:
        expected = noise.expected_precision(result.order)
        steps = sorted({step for step in (count // 10, count // 3, count) if step})
        shares = ", ".join(f"{expected[step - 1] * step:,.0f} of the first {step:,}" for step in steps)
        say(f"if the evidence is right, about {shares} are wrong")
        pairs = session.run.noise.pairs
        total = sum(p.count for p in pairs)
        if total:
            most = ", ".join(f"{p.label} but really {p.true} ({p.count / total:.0%})" for p in pairs[:3])
            say(f"most often labelled {most}")
    issues = _data_issues(result.issues, classes)
    if issues:
        say(f"also: {'; '.join(issues)}")


def _data_issues(issues: DataIssues, classes: Sequence[str]) -> list[str]:
    """Name the data issues beyond single labels; kinds of which there are none are left out."""
    texts = [
        counted(len(rows), word) + more
        for rows, word, more in (
            (issues.duplicates, "duplicate pair", " with different labels"),
            (issues.alike, "near-duplicate pair", " with different labels"),
            (issues.outliers, "unusual image", ""),
        )
        if len(rows)
    ]
    if issues.confused:
        named = ", ".join(f"{classes[a]} and {classes[b]}" for a, b, _, _ in issues.confused[:3])
        others = f" (and {counted(len(issues.confused) - 3, 'other pair')})" if len(issues.confused) > 3 else ""
        texts.append(f"{named} are mixed up in both directions{others}")
    return texts


def score(session: Session, result: Mislabels, known: Truth) -> None:
    """Say on stderr, and note in the run file, how well each signal finds the wrong labels."""
    import numpy as np

    from influence_cli.mislabels.evaluation import CHECKED, qualities, recovery
    from influence_cli.mislabels.suspicion import likeliest

    facts = result.facts
    wrong = known.wrong[facts.indices]
    right: dict[str, float] = {}
    if known.true is not None and wrong.any():
        true = known.true[facts.indices][wrong]
        shares = {**result.log_probabilities, "loss": facts.probabilities}
        right = {name: float((likeliest(values)[wrong] == true).mean()) for name, values in shares.items()}
        session.run.memorised_share = float((facts.predicted[wrong] == facts.labels[wrong]).mean())
    # A label that is not judged comes last.
    signals = {name: np.where(np.isnan(values), -np.inf, values) for name, values in result.signals.items()}
    table = qualities(signals, wrong, right)
    session.run.truth = tuple(table)
    session.run.recovery = recovery(signals, wrong)
    say = session.terminal.say
    say(f"{int(wrong.sum()):,} of {len(wrong):,} labels are wrong according to --truth")
    shares_checked = "".join(f"{f'{share:.0%}':>7}" for share in CHECKED)
    say(f"{'':15}{'AP':>6}{'95%':>13}{'AUROC':>7}   found at … checked{'':16}suggested")
    say(f"{'signal':15}{'':26}{shares_checked}{'right':>10}")
    for q in table:
        interval = f"{q.interval[0]:.3f}–{q.interval[1]:.3f}"
        shares_found = "".join(f"{share:7.3f}" for share in q.found)
        suggested = "" if q.suggested is None else f"{q.suggested:10.3f}"
        say(f"{q.signal:15}{q.average_precision:6.3f}{interval:>13}{q.auroc:7.3f}{shares_found}{suggested}")
