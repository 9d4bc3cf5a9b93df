"""Every random stream of a run, from the one seed of its configuration."""

from __future__ import annotations

import numpy as np

__all__ = ["derive_seed"]


def derive_seed(*entropy: int) -> int:
    """A 31-bit seed from another seed, a purpose and counters; never 0, which OpenMM replaces by its own."""
    return 1 + int(np.random.SeedSequence(entropy).generate_state(1)[0]) % (2**31 - 2)
