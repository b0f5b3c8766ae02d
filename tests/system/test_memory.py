"""The machine's memory, and the limits of a container."""

from pathlib import Path

from vae_jax.system.memory import memory


def test_memory_is_at_most_the_machines():
    kilobytes = int(Path("/proc/meminfo").read_text().split()[1])
    assert 0 < memory() <= 1024 * kilobytes
