"""Does the ranking depend on λ? The same scores at λ × {0.01 … 100}, from the stored coordinates.

Another λ is another division by Λ + l2 + λ, so one scan of a store serves all of them. Compared with the chosen λ: the
share of the top K that is the same, Spearman's correlation over all training examples, the correlation with
``identity`` (plain gradient similarity in the stored coordinates: what is left as λ → ∞), and the effective dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.curvature.choice import SOLVERS
from influence_cli.data.split import Split
from influence_cli.errors import InfluenceError
from influence_cli.influence.inverse import Division
from influence_cli.influence.scores import removal, require_finite
from influence_cli.influence.streams import Piece, averaged, of_all, stored_pieces, training_products
from influence_cli.metrics import pearson, spearman
from influence_cli.model.sample_weights import own_rise
from influence_cli.precompute.prepared import Prepared
from influence_cli.runtime.terminal import Terminal

MULTIPLES = (0.01, 0.1, 1.0, 10.0, 100.0)
# Test examples whose rankings are compared, and the share of the top that must stay at a tenth and at ten times λ.
COMPARED, STABLE = 8, 0.5
NEAR = (0.1, 10.0)


@dataclass(frozen=True)
class AtDamping:
    """The ranking at one λ.

    Attributes:
        multiple: of the chosen λ (of l2, if λ is 0).
        damping: λ in absolute units, as text: one number or a range over layers.
        obstacle: why there is no ranking: λ is at or below a pole; None if there is one.
        effective_dimension: d_eff of the kept coordinates, mean of the checkpoints.
        overlap: share of the top K of the chosen λ that is also here.
        correlation: Spearman's with the scores at the chosen λ, over all training examples.
        identity: Pearson's with plain gradient similarity.
    """

    multiple: float
    damping: str
    obstacle: str | None = None
    effective_dimension: float | None = None
    overlap: float | None = None
    correlation: float | None = None
    identity: float | None = None


def check_method(method: str) -> None:
    """Refuse a method without a spectrum, before any work.

    Raises:
        InfluenceError: at another λ ``method`` would need another solve, or it has no λ.
    """
    if method in (*SOLVERS, "identity", "replay"):
        what = "has no λ" if method in ("identity", "replay") else "has no spectrum: every λ needs its own solve"
        raise InfluenceError(
            f"--damping-sweep: {method} {what}",
            "-s curvature.method=auto (or explicit, ekfac, kfac, arnoldi, fisher)",
        )


def sweep_influence(
    stores: Sequence[Prepared],
    inverses: Sequence[Division],
    gradients: Sequence[Tensor],
    read: np.ndarray,
    top: int,
    terminal: Terminal,
) -> list[AtDamping]:
    """Rank the training examples for some test examples at every λ, in one scan of each store.

    Args:
        stores: what was prepared for each checkpoint.
        inverses: of each, at the chosen λ.
        gradients: coordinates of the test gradients [m, k] under each checkpoint.
        read: bool [n], which training examples could be read when the stores were made.
        top: how many of each effect are compared.
        terminal: progress.
    """
    columns = [_columns(inverse, _beside(prepared)) for prepared, inverse in zip(stores, inverses, strict=True)]
    usable = [n for n in range(len(MULTIPLES)) if all(divisions[n] is not None for divisions, _ in columns)]
    m = len(gradients[0])
    with ExitStack() as stack:
        streams = []
        for prepared, inverse, coordinates, (at, _) in zip(stores, inverses, gradients, columns, strict=True):
            swept = [division for n in usable if (division := at[n]) is not None]
            left = torch.cat(
                [*(removal(each.apply(coordinates), prepared.task.n) for each in (inverse, *swept)), coordinates]
            )
            streams.append(training_products(prepared, left, None, len(stores), terminal, skip=False, stack=stack))
        values = _gathered(streams, (2 + len(usable)) * m, read, stores[0].task.train)
    chosen, *others, plain = values.reshape(2 + len(usable), m, -1)
    return _described(usable, columns, chosen, others, plain, top, both=True)


def sweep_self_influence(
    stores: Sequence[Prepared], inverses: Sequence[Division], read: np.ndarray, top: int, terminal: Terminal
) -> list[AtDamping]:
    """Rank the training examples by self-influence at every λ, in one scan of each store.

    Args:
        stores: what was prepared for each checkpoint.
        inverses: of each, at the chosen λ.
        read: bool [n], which training examples could be read when the stores were made.
        top: how many are compared.
        terminal: progress.
    """
    columns = [_columns(inverse, _beside(prepared)) for prepared, inverse in zip(stores, inverses, strict=True)]
    usable = [n for n in range(len(MULTIPLES)) if all(divisions[n] is not None for divisions, _ in columns)]

    def stream(prepared: Prepared, inverse: Division, at: Sequence[Division | None]) -> Iterator[Piece]:
        task = prepared.task
        swept = [inverse, *(division for n in usable if (division := at[n]) is not None)]

        def work(where: slice, block: np.ndarray) -> Piece:
            rows = torch.from_numpy(block).to(task.device)
            values = [own_rise(each.self_influence(rows), task.train, where) for each in swept]
            return where, removal(torch.stack([*values, rows.square().sum(dim=1)]), task.n).cpu().numpy()

        with terminal.progress(len(task.train), f"scanning {prepared.path.name}") as advance:
            yield from stored_pieces(prepared, work, advance)

    streams = [
        stream(prepared, inverse, at) for prepared, inverse, (at, _) in zip(stores, inverses, columns, strict=True)
    ]
    values = _gathered(streams, 2 + len(usable), read, stores[0].task.train)
    chosen, *others, plain = values[:, None]
    return _described(usable, columns, chosen, others, plain, top, both=False)


def verdict(rows: Sequence[AtDamping], top: int) -> str:
    """Say in one sentence whether the ranking is stable or fragile here."""
    near = [row for row in rows if row.multiple in NEAR]
    if any(row.obstacle for row in near):
        return "fragile here: a tenth of λ is at or below a pole of the curvature, so it gives no ranking"
    least = min((row.overlap for row in near if row.overlap is not None), default=0.0)
    word = "stable" if least >= STABLE else "fragile"
    return f"{word} here: at least {least:.0%} of the first {top:,} stay the same from a tenth of λ to ten times λ"


def _beside(prepared: Prepared) -> float:
    """Give the number that is multiplied where λ is 0: l2; the smallest one above 0 if it differs by parameter."""
    l2 = prepared.task.objective.over(prepared.choice.network)
    return l2 if isinstance(l2, float) else float(l2[l2 > 0].min())


def _columns(inverse: Division, l2: float) -> tuple[list[Division | None], list[tuple[str, str | None]]]:
    """Make the inverse at every λ, None at or below a pole; and its λ and the obstacle, as text."""
    swept: list[Division | None] = []
    told: list[tuple[str, str | None]] = []
    for multiple in MULTIPLES:
        damping = inverse.damping.times(multiple, l2)
        try:
            swept.append(inverse.at(damping))
            told.append((damping.text(), None))
        except InfluenceError as error:
            swept.append(None)
            told.append((damping.text(), error.message))
    return swept, told


def _gathered(streams: Sequence[Iterator[Piece]], rows: int, read: np.ndarray, split: Split) -> np.ndarray:
    """Average streams over the checkpoints into [rows, those that could be read]."""
    values = np.zeros((rows, len(read)), dtype=np.float32)
    for where, piece in of_all(averaged(streams)):
        values[:, where] = piece
    indices = split.indices[read]
    require_finite(values[:, read], "influence at another λ", lambda _, row: split.title(int(indices[row])))
    return values[:, read]


def _described(
    usable: Sequence[int],
    columns: Sequence[tuple[list[Division | None], list[tuple[str, str | None]]]],
    chosen: np.ndarray,
    others: Sequence[np.ndarray],
    plain: np.ndarray,
    top: int,
    *,
    both: bool,
) -> list[AtDamping]:
    """Compare scores [m, n] at every λ with those at the chosen one, mean over the m."""
    first = [_top(row, top, both=both) for row in chosen]
    scores = dict(zip(usable, others, strict=True))
    rows = []
    for number, multiple in enumerate(MULTIPLES):
        texts = [told[number][0] for _, told in columns]
        obstacle = next((told[number][1] for _, told in columns if told[number][1]), None)
        damping = texts[0] + (f", and {len(texts) - 1} more" if len(set(texts)) > 1 else "")
        if number not in scores:
            rows.append(AtDamping(multiple, damping, obstacle))
            continue
        swept = scores[number]
        dimensions = [inverse.effective_dimension for at, _ in columns if (inverse := at[number]) is not None]
        same = [len(a & _top(b, top, both=both)) / max(1, len(a)) for a, b in zip(first, swept, strict=True)]
        rows.append(
            AtDamping(
                multiple,
                damping,
                None,
                float(np.mean(dimensions)),
                float(np.mean(same)),
                _mean([spearman(a, b) for a, b in zip(chosen, swept, strict=True)]),
                _mean([pearson(a, b) for a, b in zip(swept, plain, strict=True)]),
            )
        )
    return rows


def _top(scores: np.ndarray, count: int, *, both: bool) -> set[int]:
    """Find the positions of the largest scores, and ~position of the smallest if both effects count; no zeros."""
    order = np.lexsort((np.arange(len(scores)), -scores))
    positions = {int(at) for at in order[:count] if scores[at] > 0}
    if both:
        positions |= {~int(at) for at in order[::-1][:count] if scores[at] < 0}
    return positions


def _mean(values: Sequence[float]) -> float | None:
    """Average the finite values; None if there are none."""
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else None
