"""Settings of the C library's allocator for training on a CPU."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees, for the next update.

    An update allocates and frees gigabytes of gradients and activations. By default glibc returns
    them to the system and gets new pages of 4 KiB for the next update, which under a hypervisor is
    a good part of its time. Peak memory stays the same, apart from fragmentation.

    Returns:
        Whether the C library supports it (glibc does).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
