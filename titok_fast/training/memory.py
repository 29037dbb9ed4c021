"""What a training process asks of the C library's memory, on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next update.

    An update makes gradients and activations of gigabytes, and frees them. glibc would give them
    back to the system and take fresh pages of 4 KiB for the next: under a hypervisor a good part of
    the update's time. Peak memory is the same, give or take fragments.

    Returns:
        Whether the C library is one that can be told so (glibc).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
