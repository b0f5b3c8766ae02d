"""SIGINT and SIGTERM wait, are noted, raise an exception, or end the process."""

import signal
import subprocess
import sys
import threading

import pytest

from vae_jax.system import signals


def run(script: str) -> tuple[int, str, str]:
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def test_a_deferred_signal_comes_at_the_end_of_the_block():
    done = []
    with pytest.raises(KeyboardInterrupt), signals.defer_signals():
        signal.raise_signal(signal.SIGINT)
        done.append("rest of the block")
    assert done


def test_a_deferred_signal_outlives_an_error():
    with pytest.raises(KeyboardInterrupt), signals.defer_signals():
        signal.raise_signal(signal.SIGINT)
        raise OSError


def test_a_request_to_stop():
    with signals.stop_on_signal("to go on: do it again") as stop:
        assert not stop.requested
        stop.raise_if_requested()
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        with pytest.raises(signals.Interrupted, match="to go on: do it again") as interrupted:
            stop.raise_if_requested()
    assert interrupted.value.signum == signal.SIGTERM
    assert isinstance(interrupted.value, KeyboardInterrupt)


def test_a_second_signal_does_what_it_did_before():
    script = (
        "import signal\n"
        "from vae_jax.system.signals import stop_on_signal\n"
        "try:\n"
        "    with stop_on_signal() as stop:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "        print(stop.signum, flush=True)\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n"
        "    with stop_on_signal() as stop:\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        print(stop.signum, flush=True)\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        print('still here', flush=True)\n"
    )
    assert run(script) == (-signal.SIGTERM, "2\n15\n", "")


@pytest.mark.parametrize("signum", signals.STOPS)
def test_a_second_signal_ends_a_command_while_it_writes(signum, tmp_path):
    script = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from vae_jax.system.files import replacing\n"
        "from vae_jax.system.signals import end_on_signal, stop_on_signal\n"
        "end_on_signal('to go on: train')\n"
        f"with stop_on_signal(), replacing(Path({str(tmp_path / 'a.pth')!r})) as part:\n"
        f"    for _ in range(4):\n"
        f"        signal.raise_signal({signum})\n"
        "        print('heard', flush=True)\n"
    )
    code, output, error = run(script)
    assert code == 128 + signum and output.count("heard") < 3 and error == "to go on: train\ninterrupted\n"
    assert not (tmp_path / "a.pth").exists()


@pytest.mark.parametrize("signum", signals.STOPS)
def test_raise_on_signal(signum):
    with pytest.raises(signals.Interrupted, match=f"stopped by {signum.name}"), signals.raise_on_signal():
        signal.raise_signal(signum)


@pytest.mark.parametrize("signum", signals.STOPS)
def test_end_on_signal(signum):
    script = (
        "import signal\n"
        "from vae_jax.system import signals\n"
        "signals.end_on_signal('to go on: do it again')\n"
        "try:\n"
        f"    signal.raise_signal({signum.value})\n"
        "finally:\n"
        "    print('still here', flush=True)\n"
    )
    assert run(script) == (128 + signum, "", "to go on: do it again\ninterrupted\n")


def test_handlers_are_as_before_after_each_block():
    before = [signal.getsignal(signum) for signum in signals.STOPS]
    for block in (signals.stop_on_signal, signals.defer_signals, signals.raise_on_signal):
        with block():
            assert [signal.getsignal(signum) for signum in signals.STOPS] != before
        assert [signal.getsignal(signum) for signum in signals.STOPS] == before


def test_other_threads_leave_signals_alone():
    before = [signal.getsignal(signum) for signum in signals.STOPS]
    found = []

    def work():
        with signals.stop_on_signal() as stop, signals.defer_signals(), signals.raise_on_signal():
            found.extend([stop.requested, *(signal.getsignal(signum) for signum in signals.STOPS)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False, *before]
