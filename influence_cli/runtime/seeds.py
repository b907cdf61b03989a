"""Seeds: one number made of several, and the generators that take it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """Mix numbers into a seed that every library accepts: in [0, 2³²)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_all(seed: int) -> None:
    """Seed the global generators of random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, and put them back at the end."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_all(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
