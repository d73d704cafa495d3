"""Settings of malloc, the function that provides memory. Only glibc, on Linux, has them."""

import ctypes
import sys

M_TRIM_THRESHOLD = -1  # bytes; numbers of the settings, from glibc's malloc.h
M_MMAP_THRESHOLD = -3  # bytes
M_MMAP_MAX = -4  # number of blocks


def set_malloc(setting: int, value: int) -> None:
    """Change a setting of this process's malloc. With another C library, do nothing.

    Args:
        setting: One of the constants above; `man mallopt` explains them.
        value: New value.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:
            mallopt(setting, value)
