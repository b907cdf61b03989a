"""Is the checkpoint a minimum of the objective that the config describes, and if not: what was trained instead?

At a minimum ∇R + l2·θ = 0 for every parameter, R the mean loss. Where that fails, the way in which it fails says which
part of the objective the config has wrong: a common factor, weight decay on all or on none of the biases, or layers
that did not take part in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from influence_cli.errors import few

# What is left, relative to the larger of ‖∇R‖ and ‖l2·θ‖, up to which the two cancel.
CANCELS = 0.1
# Relative to a typical example's gradient: below the first there is nothing to see, up to the second a near minimum.
NOTHING, NEAR = 1e-4, 0.1
# A factor this close to 1 is no other factor.
SAME = 0.1


@dataclass(frozen=True)
class Part:
    """The gradient of the objective in one parameter tensor.

    Attributes:
        name: of the parameter.
        slope: ‖∇R‖.
        size: ‖θ‖.
        l2: λ₂ of the parameter, against the plain mean.
        product: ∇R·θ.
        typical: root mean square of ‖gᵢ‖.
        plain: whether it is a bias, or the weight of a norm: often trained without weight decay.
    """

    name: str
    slope: float
    size: float
    l2: float
    product: float
    typical: float
    plain: bool

    @property
    def decay(self) -> float:
        """Give ‖l2·θ‖."""
        return self.l2 * self.size

    def left(self, factor: float = 1.0, l2: float | None = None) -> float:
        """Compute ‖c·∇R + l2·θ‖."""
        l2 = self.l2 if l2 is None else l2
        square = factor**2 * self.slope**2 + 2 * factor * l2 * self.product + l2**2 * self.size**2
        return float(np.sqrt(max(0.0, square)))

    def is_zero(self, noise: float, factor: float = 1.0, l2: float | None = None) -> bool:
        """Say whether ‖c·∇R + l2·θ‖ is 0: nothing beside an example's gradient, or what is left of two that cancel."""
        decay = (self.l2 if l2 is None else l2) * self.size
        floor = max(NOTHING, noise) * factor * self.typical
        return self.left(factor, l2) <= max(floor, CANCELS * max(factor * self.slope, decay))


@dataclass(frozen=True)
class Explanation:
    """What the gradient of the objective says.

    Attributes:
        verdict: ``minimum``, ``factor``, ``decay``, ``plain``, ``layers``, ``off`` or ``unclear``.
        text: in plain words, with the line to write where there is one; empty at a minimum.
    """

    verdict: str
    text: str


def explain(
    parts: Sequence[Part], n: int, rules: Mapping[str, float], *, scale: float = 1.0, noise: float = 0.0
) -> Explanation:
    """Find out what the pattern of the gradient means.

    Args:
        parts: one per tracked parameter.
        n: training examples.
        rules: l2 by pattern, as the config has it.
        scale: D/n, λ₂ of the parts relative to that of the rules.
        noise: relative error of a mean over a sample, as a share of a typical gradient; 0 for all examples.
    """
    seen = [part for part in parts if max(part.slope, part.decay) > max(NOTHING, noise) * part.typical]
    if not seen or all(part.is_zero(noise) for part in parts):
        return Explanation("minimum", "")
    factor = _factor(seen)
    if factor is not None and abs(factor - 1) > SAME and all(part.is_zero(noise, factor) for part in parts):
        return Explanation("factor", _factor_text(factor, n, rules))
    text = _without_decay(parts, seen, rules, noise)
    if text:
        return Explanation("plain", text)
    text = _with_decay(parts, seen, scale, noise)
    if text:
        return Explanation("decay", text)
    off = [part for part in seen if part.left() > max(NEAR, noise) * part.typical and not part.is_zero(noise)]
    if off and len(off) < len(parts) and _layers(off) != _layers(parts):
        names = _layers(off)
        return Explanation(
            "layers",
            f"the gradient is far from 0 in {few(names, 6)} and not in the other layers: these were frozen, or in "
            "another learning-rate group, when the checkpoint was trained; gradients.layers can leave them out",
        )
    if off:
        return Explanation(
            "off",
            "the gradient is far from 0 in every layer: usual after augmentation, dropout or early stopping; if there "
            "was none of these, check loss, l2 and the transform",
        )
    return Explanation(
        "unclear",
        "the gradient is small but not 0: training stopped before its minimum, or augmentation or dropout moved that",
    )


def _without_decay(parts: Sequence[Part], seen: Sequence[Part], rules: Mapping[str, float], noise: float) -> str:
    """Say that biases and norms had no weight decay, if that explains the gradient; otherwise nothing."""
    bare = [part for part in parts if part.plain and not part.is_zero(noise) and part.is_zero(noise, 1.0, 0.0)]
    weights = [part for part in parts if not part.plain]
    if not bare or not weights:
        return ""
    for factor in (1.0, _factor([part for part in seen if not part.plain])):
        if factor is not None and all(part.is_zero(noise, factor, 0.0 if part.plain else part.l2) for part in parts):
            return _plain_text(bare, factor, rules)
    return ""


def _with_decay(parts: Sequence[Part], seen: Sequence[Part], scale: float, noise: float) -> str:
    """Say which weight decay explains the gradient, where the config has none; nothing if none does."""
    penalty = _penalty(seen)
    if penalty is None or any(part.l2 for part in parts):
        return ""
    if all(part.is_zero(noise, 1.0, penalty) for part in parts):
        there, line = "in every layer: training had weight decay", f"l2: {penalty / scale:.4g}"
    elif all(part.is_zero(noise, 1.0, 0.0 if part.plain else penalty) for part in parts):
        there = "but for biases and norms, where it is 0: training had weight decay on the other weights"
        line = _mapping(bare_patterns(parts), penalty / scale)
    else:
        return ""
    return f"the gradient of the loss is −{penalty:.3g}·θ {there}; write {line}"


def _factor(parts: Sequence[Part]) -> float | None:
    """Find c > 0 that minimises Σ‖c·∇R + l2·θ‖², each tensor relative to its own parts; None without l2."""
    scales = [max(part.slope, part.decay, 1e-300) ** -2 for part in parts]
    below = sum(scale * part.slope**2 for scale, part in zip(scales, parts, strict=True))
    above = -sum(scale * part.l2 * part.product for scale, part in zip(scales, parts, strict=True))
    return above / below if below > 0 and above > 0 else None


def _penalty(parts: Sequence[Part]) -> float | None:
    """Find l2 > 0 that minimises Σ‖∇R + l2·θ‖² over the weights."""
    weights = [part for part in parts if not part.plain] or list(parts)
    below, above = sum(part.size**2 for part in weights), -sum(part.product for part in weights)
    return above / below if below > 0 and above > 0 else None


def _factor_text(factor: float, n: int, rules: Mapping[str, float]) -> str:
    kind = "a summed loss" if abs(factor / n - 1) < SAME / 2 else "a weighted or summed loss, or another l2"
    return (
        f"the gradient is zero if the mean loss is multiplied by c = {factor:.4g}: {kind}; write "
        f"{_rules({pattern: value / factor for pattern, value in rules.items()})}"
    )


def _plain_text(bare: Sequence[Part], factor: float, rules: Mapping[str, float]) -> str:
    value = next((value for value in reversed(list(rules.values())) if value), 0.0) / factor
    more = "" if abs(factor - 1) <= SAME else f", and the mean loss is multiplied by c = {factor:.4g}"
    return (
        f"the gradient of the loss alone is zero in {few([part.name for part in bare], 4)}: no weight decay on biases "
        f"or norms{more}; write {_mapping(bare_patterns(bare), value)}"
    )


def bare_patterns(parts: Sequence[Part]) -> list[str]:
    """Give patterns of the biases, and the names of norm weights."""
    plain = [part.name for part in parts if part.plain]
    names = [name for name in plain if name.rpartition(".")[2] != "bias"]
    return ["*bias", *names] if len(names) < len(plain) else names


def _mapping(patterns: Sequence[str], value: float) -> str:
    return _rules({**dict.fromkeys(patterns, 0.0), "*": value})


def _rules(rules: Mapping[str, float]) -> str:
    """Write l2 ready to paste."""
    if list(rules) == ["*"]:
        return f"l2: {rules['*']:.6g}"
    return "l2: {" + ", ".join(f'"{pattern}": {value:.6g}' for pattern, value in rules.items()) + "}"


def _layers(parts: Sequence[Part]) -> list[str]:
    """Name the layers of some parameters, in order."""
    return list(dict.fromkeys(part.name.rpartition(".")[0] or part.name for part in parts))
