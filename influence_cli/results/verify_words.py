"""What `influence verify` says of its numbers, in sentences: numbers in, text out."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING

from influence_cli.results.record import FitRecord, LeftOutRecord

if TYPE_CHECKING:
    from influence_cli.precompute.prepared import Prepared
    from influence_cli.retrain.lds import Datamodeling
    from influence_cli.retrain.leave_one_out import LeftOut
    from influence_cli.retrain.strongest import StrongestLeftOut
    from influence_cli.runtime.terminal import Terminal

# Correlations from which estimates count as right and as roughly right; how far a slope may be from 1.
RIGHT, ROUGHLY, NEARLY_ONE = 0.99, 0.8, 0.05
# From this far on the objective may be another one.
FACTOR = 0.5
MEASURED = {"loss": "loss", "margin": "margin log(p/(1 − p)) with its sign changed"}


def describe_left_out(left_out: LeftOut, prepared: Prepared, terminal: Terminal) -> LeftOutRecord:
    """Say how well estimated and actual effects on one test example agree, and what that means."""
    classes, say = prepared.task.classes, terminal.say
    test, k = left_out.test, len(left_out.rows)
    parts = {
        "all": slice(None),
        "most influential": slice(0, left_out.influential),
        "random": slice(left_out.influential, None),
    }
    fits = []
    name = f"test example {test.index}" if test.index is not None else str(test.path)
    say(f"{name}, loss of {classes[test.target]}: estimated against actual effect of {k:,} left-out training examples")
    for title, part in parts.items():
        size = len(left_out.rows[part])
        r, b, a = left_out.fit(part)
        if size > 2:
            say(f"  {title} ({size:,}): r = {r:.6f}, actual = {a:+.2e} + {b:.4f} × estimated")
        fits.append(FitRecord(_finite(r), _finite(b), _finite(a), size))
    if k > 2:
        say(f"  {_verdict(*left_out.fit()[:2], prepared)}")
    return LeftOutRecord(test.index, test.path, *fits)


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _verdict(r: float, slope: float, prepared: Prepared) -> str:
    if r >= RIGHT and abs(slope - 1) <= NEARLY_ONE:
        return "influence is accurate here, in size too"
    if r >= RIGHT:
        reason = (
            "with few training examples one example has more than a first-order effect, and λ shrinks the estimate"
            if slope > 1
            else "a training that stops before its minimum goes only part of the way"
        )
        return f"influence is proportional here: the actual effect is {slope:.2f} times the estimate ({reason})"
    if r >= ROUGHLY:
        return "influence is roughly right here: trust the order, not each number"
    if prepared.choice.output is not None and prepared.task.convex_loss:
        return "influence does not predict retraining here: run influence verify to see why"
    return (
        "influence does not predict single retrainings here; that alone says little, because a deep network takes "
        "another path without one example: --lds is the test"
    )


def is_poor(left_out: LeftOut) -> bool:
    """Say whether estimated and actual effects disagree, in order or by a factor."""
    r, slope, _ = left_out.fit()
    return len(left_out.rows) > 2 and not (r >= ROUGHLY and abs(slope - 1) <= FACTOR)


def lds_words(lds: Datamodeling) -> Iterator[tuple[str, bool]]:
    """Give sentences on linear datamodeling scores, and whether each is a warning."""
    yield (_same_run_words(lds) if lds.plan.same_run else _halves_words(lds)), False
    agreement = lds.agreement()
    if agreement is not None:
        yield (
            f"one half of the repeats scores {agreement:.3f} on the other: noise in the losses limits every method",
            False,
        )
    for number, name in enumerate(lds.methods):
        value, low, high = lds.mean(number)
        if low <= 0:
            yield (
                f"{name}: {value:.3f} ({low:.3f} to {high:.3f}) may be chance; more --subsets narrow the interval",
                True,
            )
        if fits := lds.fit(number):
            titles = zip(("Spearman", "Pearson", "slope"), ((value, low, high), *fits), strict=True)
            yield f"{name}: " + ", ".join(f"{title} {a:.3f} ({b:.3f} to {c:.3f})" for title, (a, b, c) in titles), False
        if number:
            value, low, high = lds.difference(number)
            verdict = "better than" if low > 0 else "worse than" if high < 0 else "not measurably different from"
            yield f"{name} is {verdict} {lds.methods[0]}: difference {value:+.3f} ({low:+.3f} to {high:+.3f})", False
        for at in range(1, lds.scores.shape[1]):
            value, low, high = lds.gain(number, at)
            verdict = "improves" if low > 0 else "worsens" if high < 0 else "does not measurably change"
            yield f"{name}: checkpoint {at + 1} {verdict} the score: {value:+.3f} ({low:+.3f} to {high:+.3f})", False


def _halves_words(lds: Datamodeling) -> str:
    half = "halves" if lds.plan.left_out is None else f"subsets that leave out {lds.left_out:,} examples"
    return (
        f"linear datamodeling score: rank correlation (Spearman), over {lds.actual.shape[2]:,} {half}, between the "
        f"summed influence of the left-out examples and the actual {MEASURED[lds.plan.measure]}; mean over "
        f"{len(lds.tests):,} test examples, 95% interval by bootstrap over both"
    )


def _same_run_words(lds: Datamodeling) -> str:
    return (
        f"the same run without {lds.left_out:,} random examples, {lds.actual.shape[2]:,} times: correlation over these "
        f"between the predicted and the actual change of the {MEASURED[lds.plan.measure]}; mean over "
        f"{len(lds.tests):,} test examples, 95% interval by bootstrap over both"
    )


def top_words(found: StrongestLeftOut, n: int) -> Iterator[str]:
    """Give the sentences on training without the strongest helpful images."""
    count, means = found.rows.shape[1], found.means()
    rise = "loss rises" if found.measure == "loss" else "margin log(p/(1 − p)) falls"
    (actual, _, _), (random, _, _), (value, low, high) = means.values()
    yield (
        f"Trained without its {count:,} strongest helpful images ({count / n:.1%} of all), a test example's {rise} by "
        f"{actual:.3g}; without {count:,} random ones by {random:.3g}."
    )
    repeats = f" and {len(found.actual)} repeats" if len(found.actual) > 1 else ""
    verdict = "" if low > 0 else " It may be chance: more tests or repeats narrow the interval."
    yield (
        f"The difference is {value:+.3g} (95%: {low:+.3g} to {high:+.3g}, bootstrap over {len(found.tests):,} test "
        f"examples{repeats}). Influence predicted {float(found.estimated.mean()):.3g}.{verdict}"
    )
