"""A hash of integers that is the same on every machine and in every version."""

import numpy as np


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Hash an array of 64-bit integers: every input bit changes every output bit.

    The finalizer of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014).

    Args:
        x: Array of int64 or uint64, of any shape.

    Returns:
        A uint64 array of the same shape.
    """
    x = x.astype(np.uint64)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
