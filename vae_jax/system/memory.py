"""How much memory there is."""

from pathlib import Path

import psutil


def memory() -> int:
    """Bytes of memory that this process can use: the machine's, or a container's limit where that is lower."""
    size = psutil.virtual_memory().total
    try:
        return min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or a container without a limit
        return size
