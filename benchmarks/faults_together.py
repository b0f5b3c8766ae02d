"""`python -m benchmarks.faults --processes N`: runs of several processes that lose one of them again and again.

A process is killed, stopped (as by a machine that hangs) or terminated at a random moment. The others must end soon.
Then all start again with the same command, sometimes as one process with one or several devices.
"""

import collections
import random
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from benchmarks.faults import HANGS_S, RUN, Process, by_phase, contents, run_undisturbed
from benchmarks.report import Check, Report

if TYPE_CHECKING:
    from benchmarks.faults import FaultsConfig

HEARTBEAT_S = 10
# Of the start; where one is lost then, the others wait so long.
TIMEOUT_S = 45
WAYS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP, "terminated": signal.SIGTERM}
# What a command prints that nobody has thought of.
UNEXPECTED = ("Traceback", "Check failure", "Fatal Python error")


class Layout(NamedTuple):
    """How a run is started."""

    processes: int
    devices: int  # of each process


def run(config: "FaultsConfig", folder: Path, rng: random.Random) -> Report:
    """Loses so many processes as `kills` says."""
    shards = 2 * config.processes
    options = {"shards": shards, "heartbeat": HEARTBEAT_S, "initialization_timeout": TIMEOUT_S}
    whole = run_undisturbed(folder, **options)
    layouts = [Layout(config.processes, 1), Layout(config.processes, 2), Layout(1, 2), Layout(1, 1)]
    lost = lose_at_random(config.kills, folder, rng, whole, layouts, options)
    return Report(
        "faults_together",
        f"Runs of `--shards {shards} --heartbeat {HEARTBEAT_S} --initialization-timeout {TIMEOUT_S} --epochs"
        f" {RUN.epochs} --checkpoint-every {RUN.checkpoint_every} --binarize {RUN.binarize}` in {config.processes}"
        f" processes, or one, with one device or two each; one process alone takes {whole:.0f} seconds. At random"
        " moments one process was lost; then all started again, until the run was finished.",
        {},
        {"Processes lost": lost["by"], "How the others ended": lost["ends"]},
        [
            Check(
                f"{config.kills} processes lost: every run ends like the undisturbed one, bit for bit",
                f"{lost['same']} of {lost['runs']} runs, {lost['lost']} lost",
                lost["same"] == lost["runs"] and lost["lost"] >= config.kills,
            ),
            Check(
                f"no other process lives longer than {HANGS_S} s after one is lost",
                f"{lost['survivors']} others, at most {lost['slowest s']:.1f} s, {lost['hung']} longer",
                not lost["hung"],
            ),
            Check(
                "the others end without a traceback",
                f"{len(lost['unexpected'])} with one" + "".join(f"; {text}" for text in lost["unexpected"][:3]),
                not lost["unexpected"],
            ),
        ],
    )


def lose_at_random(
    losses: int, folder: Path, rng: random.Random, whole: float, layouts: list[Layout], options: dict[str, Any]
) -> dict:
    """Starts runs and loses one of their processes at random moments, until so many are lost.

    Args:
      losses: How many.
      folder: For the runs; it holds the undisturbed one.
      rng: For moments, ways and layouts.
      whole: Seconds that the undisturbed run took.
      layouts: Half of the starts are of the first kind, the others of one of all.
      options: Of the command.
    """
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    ends: collections.Counter[tuple[str, str, int]] = collections.Counter()
    found: dict[str, Any] = dict.fromkeys(("runs", "same", "lost", "survivors", "hung"), 0)
    found |= {"slowest s": 0.0, "unexpected": []}
    undisturbed = contents(folder / "undisturbed")
    with tqdm(total=losses, unit=" lost", disable=None) as bar:
        while found["lost"] < losses:
            run = folder / f"run{found['runs']}"
            while True:
                layout = layouts[0] if rng.random() < 0.5 else rng.choice(layouts)
                processes = start(run, layout, options)
                if wait(processes, rng.uniform(0, layout.processes * whole)):
                    break
                victim, way = rng.choice(processes), rng.choice(list(WAYS))
                phase, moment = processes[0].phase, time.perf_counter()
                victim.popen.send_signal(WAYS[way])
                others = [process for process in processes if process is not victim]
                for other in others:
                    code, in_time = other.end_within(max(0.0, HANGS_S - (time.perf_counter() - moment)))
                    found["hung"] += not in_time
                    found["slowest s"] = max(found["slowest s"], time.perf_counter() - moment)
                    ends[way, phase, code] += 1
                    if code < 0 or any(word in other.text for word in UNEXPECTED):
                        found["unexpected"].append(f"{way} while {phase}: code {code}, {other.text.strip()[-200:]}")
                if way != "terminated":
                    victim.popen.kill()
                _, in_time = victim.end_within(HANGS_S)
                found["hung"] += not in_time
                counts[way, phase] += 1
                found["survivors"] += len(others)
                found["lost"] += 1
                bar.update()
            found["runs"] += 1
            found["same"] += contents(run) == undisturbed
            shutil.rmtree(run)
    found["by"] = by_phase(counts)
    found["ends"] = [
        {"one was": way, "while": phase, "exit code": code, "others": count}
        for (way, phase, code), count in sorted(ends.items())
    ]
    return found


def start(folder: Path, layout: Layout, options: dict[str, Any]) -> list[Process]:
    """Starts the processes of a run."""
    if layout.processes == 1:
        return [Process(folder, layout.devices, **options)]
    with socket.create_server(("", 0)) as server:
        together = options | {"coordinator": f"localhost:{server.getsockname()[1]}", "processes": layout.processes}
    return [Process(folder, layout.devices, **together, process=number) for number in range(layout.processes)]


def wait(processes: list[Process], seconds: float) -> bool:
    """Waits for the end of all, at most so many seconds; returns whether they have ended.

    Raises:
      RuntimeError: One failed.
    """
    end = time.perf_counter() + seconds
    ended = [process.wait(max(0.0, end - time.perf_counter())) for process in processes]
    return all(ended)
