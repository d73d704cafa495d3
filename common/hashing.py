"""A hash of integers that is the same everywhere and for ever."""

import numpy as np


def mix(x):
    """splitmix64's finaliser: every bit of an array of 64-bit integers changes every bit of the
    result, uint64."""
    x = x.astype(np.uint64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
