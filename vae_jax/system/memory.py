"""How much memory there is."""

import os
from pathlib import Path


def memory() -> int:
    """Bytes of memory that this process can use: the machine's, or a container's limit where that is lower."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or a container without a limit
        return size
