"""Which states remain while a training goes on."""

from __future__ import annotations

import math

from influence_cli.recording.states import stride_after


def test_between_one_and_two_roots_remain() -> None:
    kept: set[int] = set()
    for step in range(5_000):
        stride = stride_after(step)
        if step % stride == 0:
            kept.add(step)
        # As the recorder drops them: only when the stride has grown.
        if step == stride * stride:
            kept = {each for each in kept if each % stride == 0}
        steps = step + 1
        assert math.isqrt(steps) <= len(kept) <= 2 * math.isqrt(steps) + 2
        assert kept == set(range(0, steps, stride))
