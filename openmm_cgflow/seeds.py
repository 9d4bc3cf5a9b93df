"""Every random stream of a run, from the one seed of its configuration."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

__all__ = ["Stream", "derive_seed"]


class Stream(IntEnum):
    """What random numbers are for: two purposes never share a stream. A change of a number changes results."""

    FIRST_FAST_ATOMS = 1
    """Thermal draws that the first pool of fast atoms starts from."""
    FIRST_POOL = 2
    """Dynamics of the first pool."""
    CHAINS = 3
    """Dynamics of later chains, with the number of the call."""
    TIES = 4
    """Which of equally near ancestors a chain starts from, with the number of the call."""
    FLOW = 5
    """Weights of the untrained flow."""
    DRAWS = 6
    """Draws that become samples."""
    CHAINS_OF_SAMPLES = 7
    """Dynamics of samples' fast atoms, with the number of the batch."""
    EVALUATION = 8
    """Bootstrap and noise floors of an evaluation, and the exact samples of a synthetic target."""
    PMF = 9
    """Weights of the unfitted potential of mean force."""
    RESPONSE = 10
    """Weights of the unfitted response."""
    SWITCHING = 11
    """Dynamics of switching to anchors, with the number of the call."""
    ANCHOR_ERRORS = 12
    """Bootstrap of anchors' free energies."""
    ANCHOR_WEIGHTS = 13
    """Weights of anchors in each member of the ensemble."""
    JOINT = 14
    """Weights of the untrained density of fast atoms."""
    PILOT = 15
    """Draws whose weights say which of the later ones become samples."""
    MORE_SAMPLES = 16
    """Samples that are drawn after those of the run itself."""
    VERIFIED = 20
    """Conformations that are checked by switching."""
    VERIFICATION_ERRORS = 21
    """Bootstrap of the check by switching."""
    SET_OUT = 22
    """Dynamics before switching."""
    ON_THE_WAY = 23
    """Dynamics while switching, with the number of the move."""


def derive_seed(*entropy: int) -> int:
    """A 31-bit seed from another seed, a purpose and counters; never 0, which OpenMM replaces by its own."""
    return 1 + int(np.random.SeedSequence([int(number) for number in entropy]).generate_state(1)[0]) % (2**31 - 2)
