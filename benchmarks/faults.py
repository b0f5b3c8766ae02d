"""`python -m benchmarks.faults`: training runs that are killed, stopped and damaged, compared with an undisturbed run.

Whole processes, as a user starts them, are ended at random moments by kill -9, SIGTERM or Ctrl-C; the same command
starts again until the run is finished. The finished run must equal the undisturbed one, bit for bit.
"""

import collections
import contextlib
import dataclasses
import importlib
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import report
from benchmarks.report import Check, Report
from vae_jax.config import Options, TrainConfig, bounded
from vae_jax.system import command_line
from vae_jax.system.files import require_writable

# Several checkpoints an epoch, and pixels drawn anew in every step.
RUN = TrainConfig(epochs=4, checkpoint_every=0.4, binarize="dynamic")
SECONDS_TO_STOP = 5
# A process that has not ended so many seconds after a signal counts as hanging.
HANGS_S = 60


@dataclasses.dataclass(frozen=True)
class FaultsConfig(Options):
    """Kill, stop and damage training runs at random, and check that nothing is lost."""

    kills: int = bounded(200, 1)
    """Processes to end with kill -9."""
    stops: int = bounded(20, 1)
    """Processes to end with SIGTERM or Ctrl-C."""
    processes: int = bounded(1, 1)
    """Processes that train together; with several, each of the kills loses one of them, in one way or another."""
    flips: int = bounded(300, 1)
    """Bits of the newest checkpoint to flip, one at a time; a third of them in its header."""
    seed: int = 0
    """Seed of the random moments and bits."""
    out: Path = Path("benchmarks/results")
    """Folder for the results."""


def faults(config: FaultsConfig) -> None:
    """Runs the experiments, and writes faults.json and faults.md.

    Raises:
      InputError: A number is too small, or the folder cannot be written.
    """
    config.check()
    experiment = one_process if config.processes == 1 else importlib.import_module("benchmarks.faults_together").run
    name = "faults" if config.processes == 1 else "faults_together"
    require_writable("--out", config.out / f"{name}.json")
    environment = report.environment() | {"load before": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory() as folder:
        result: Report = experiment(config, Path(folder), random.Random(config.seed))
    result.settings = dataclasses.asdict(config) | {"out": None}
    result.environment = environment
    result.write(config.out)
    print(result.to_markdown())
    if not all(check.holds for check in result.checks):
        sys.exit(1)


def one_process(config: FaultsConfig, folder: Path, rng: random.Random) -> Report:
    """Kills, stops and damages runs of one process."""
    whole = run_undisturbed(folder)
    ended = end_at_random(config, folder, rng, whole)
    damages = damage(folder / "undisturbed", config.flips, rng)
    wrong = ended["wrong codes"]
    return Report(
        "faults",
        f"`python -m vae_jax.train --epochs {RUN.epochs} --checkpoint-every {RUN.checkpoint_every} --binarize"
        f" {RUN.binarize}` takes {whole:.0f} seconds. It was ended at random moments, and started again until it was"
        " finished. Then the newest checkpoint of an undisturbed run was damaged: cut, emptied, grown, deleted, and"
        " single bits flipped; after each damage, the newest intact checkpoint was read.",
        {},
        {"Processes ended": ended["by"], "Newest checkpoint": damages},
        [
            Check(
                f"{config.kills} kills: every run ends like the undisturbed one, bit for bit",
                f"{ended['same']} of {ended['runs']} runs, {ended['kills']} kills",
                ended["same"] == ended["runs"] and ended["kills"] >= config.kills,
            ),
            Check(
                f"SIGTERM and Ctrl-C end a process within {SECONDS_TO_STOP} s, with exit code 143 or 130",
                f"{ended['stops']} stops, at most {ended['slowest stop s']:.2f} s, {len(wrong)} wrong codes"
                f"{': ' * bool(wrong)}{', '.join(wrong)}"
                f" ({ended['early']} died of the signal while Python itself was starting)",
                ended["slowest stop s"] <= SECONDS_TO_STOP and not wrong,
            ),
            Check(
                "after any damage, the run goes on from the checkpoint before, or reads the same content",
                f"{sum(row['recovered'] for row in damages)} of {sum(row['damages'] for row in damages)}",
                all(row["recovered"] == row["damages"] for row in damages),
            ),
        ],
    )


def run_undisturbed(folder: Path, **options: Any) -> float:
    """Trains in the folder `undisturbed`; returns the seconds of a whole command."""
    run = folder / "undisturbed"
    Process(run, **options).wait()
    # The second run finds everything compiled, as all later ones do.
    shutil.rmtree(run)
    start = time.perf_counter()
    Process(run, **options).wait()
    return time.perf_counter() - start


def config_in(folder: Path, **options: Any) -> TrainConfig:
    """The options of a run that writes all its files into `folder`."""
    return dataclasses.replace(RUN, workdir=folder / "run", export=folder / "vae.pth", **options)


class Process:
    """A process of the training command.

    Args:
      folder: For the files of its run.
      devices: How many devices its CPU has.
      options: Of the command, beyond those of `RUN`.
    """

    def __init__(self, folder: Path, devices: int = 1, **options: Any):
        folder.mkdir(parents=True, exist_ok=True)
        self._output = folder.with_suffix(f".{options.get('process', 0)}.txt")
        # Compiled once for all processes, so that they spend most of their time training.
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        command = shlex.split(config_in(folder, **options).command)
        with self._output.open("w") as output:
            self.popen = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait(self, seconds: float | None = None) -> bool:
        """Waits for its end, at most so many seconds; returns whether it has ended.

        Raises:
          RuntimeError: It failed; the message is its output.
        """
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        if code:
            raise RuntimeError(f"exit code {code}: {self.text}")
        return True

    def end_within(self, seconds: float) -> tuple[int, bool]:
        """Its exit code, and whether it has ended in so many seconds; if not, it is killed."""
        try:
            return self.popen.wait(seconds), True
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.wait(), False

    @property
    def text(self) -> str:
        """What it has printed."""
        return self._output.read_text()

    @property
    def phase(self) -> str:
        """The phase it has reached, according to its output."""
        text = self.text
        if "saved" in text:
            return "after the export"
        return "training" if "losses: " in text else "starting"


def end_at_random(config: FaultsConfig, folder: Path, rng: random.Random, whole: float) -> dict:
    """Starts runs and ends their processes at random moments, until so many kills and stops are done.

    Args:
      config: How many.
      folder: For the runs; it holds the undisturbed one.
      rng: For the moments.
      whole: Seconds that the undisturbed run took.
    """
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    found: dict[str, Any] = dict.fromkeys(("runs", "same", "kills", "stops", "early"), 0)
    found |= {"slowest stop s": 0.0, "wrong codes": []}
    undisturbed = contents(folder / "undisturbed")
    with tqdm(total=config.kills + config.stops, unit=" ends", disable=None) as bar:
        while found["kills"] < config.kills or found["stops"] < config.stops:
            run = folder / f"run{found['runs']}"
            while not (process := Process(run)).wait(rng.uniform(0, whole)):
                phase, popen = process.phase, process.popen
                if found["stops"] >= config.stops or rng.random() < config.kills / (config.kills + config.stops):
                    counts["kill -9", phase] += 1
                    popen.kill()
                    popen.wait()
                    found["kills"] += 1
                else:
                    number = rng.choice([signal.SIGTERM, signal.SIGINT])
                    counts[number.name, phase] += 1
                    start = time.perf_counter()
                    popen.send_signal(number)
                    code, _ = process.end_within(HANGS_S)
                    found["slowest stop s"] = max(found["slowest stop s"], time.perf_counter() - start)
                    # While Python itself starts, the signal ends it directly; shells report that as the same code.
                    early = code == -number and process.phase == "starting"
                    # A process that has exported its model may end before the signal reaches it.
                    late = code == 0 and process.phase == "after the export"
                    found["early"] += early
                    if code != 128 + number and not early and not late:
                        found["wrong codes"].append(f"{code} after {number.name} while {phase}")
                    found["stops"] += 1
                bar.update()
            found["runs"] += 1
            found["same"] += contents(run) == undisturbed
            shutil.rmtree(run)
    found["by"] = by_phase(counts)
    return found


def by_phase(counts: collections.Counter[tuple[str, str]]) -> list[dict]:
    """A row for each way to end, from the numbers of (way, phase)."""
    phases = ("starting", "training", "after the export")
    return [{"by": by} | {phase: counts[by, phase] for phase in phases} for by in sorted({by for by, _ in counts})]


def contents(folder: Path) -> dict[str, object]:
    """What must be equal in two finished runs: the models, the metrics without the seconds, and all names."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {
        "models": [(folder / name).read_bytes() for name in ("vae.pth", "run/model.pth")],
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "names": sorted(path.name for path in (*folder.iterdir(), *(folder / "run").iterdir())),
        # Which older ones are kept depends on the moments. An unfinished file has no number: an error.
        "newest checkpoint": max(int(path.stem) for path in (folder / "run/checkpoints").iterdir()),
    }


def damage(folder: Path, flips: int, rng: random.Random) -> list[dict]:
    """Damages the newest checkpoint of a run in one way after the other, and reads the newest intact checkpoint."""
    import jax
    import numpy as np

    from vae_jax.data import load
    from vae_jax.runs.checkpoint import Checkpoints
    from vae_jax.runs.workdir import Workdir

    config = config_in(folder)
    workdir = Workdir(config)
    dataset = load(config.data)
    checkpoints = Checkpoints(config, workdir, dataset, dataset.checksum())
    *_, older, newest = workdir.checkpoint_steps()

    def read() -> tuple[int, list[bytes]]:
        """The steps and parameters from which a run would go on."""
        with contextlib.redirect_stderr(io.StringIO()):
            progress = checkpoints.newest()
        assert progress is not None
        leaves = jax.tree.leaves(progress.state.params)
        return int(progress.state.step), [np.asarray(leaf).tobytes() for leaf in leaves]

    file = workdir.checkpoint(newest)
    content = file.read_bytes()
    whole = read()
    assert whole[0] == newest
    counts: collections.Counter[str] = collections.Counter()
    recovered: collections.Counter[str] = collections.Counter()
    for kind, damaged in tqdm(list(damages(content, flips, rng)), unit=" damages", disable=None):
        if damaged is None:
            file.unlink()
        else:
            file.write_bytes(damaged)
        found = read()
        counts[kind] += 1
        # The damage may be harmless; then the content must be the same.
        recovered[kind] += found[0] == older or found == whole
    file.write_bytes(content)
    assert read() == whole
    return [{"damage": kind, "damages": count, "recovered": recovered[kind]} for kind, count in counts.items()]


def damages(content: bytes, flips: int, rng: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Kinds of damage to a safetensors file, with the damaged content, or None for a deleted file.

    Args:
      content: Of the file.
      flips: Bits to flip, one at a time; a third of them in the header.
      rng: For the choice of the bits.
    """
    header = 8 + int.from_bytes(content[:8], "little")  # the length of the JSON text, then that text
    for length in (4, header // 2, header, len(content) // 2, len(content) - 1):
        yield "cut", content[:length]
    yield "emptied", b""
    yield "grown", content + b"\0"
    yield "deleted", None
    for number in range(flips):
        in_header = number % 3 == 0
        bit = rng.randrange(8 * header) if in_header else rng.randrange(8 * header, 8 * len(content))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield f"a bit flipped in the {'header' if in_header else 'arrays'}", bytes(flipped)


if __name__ == "__main__":
    command_line.run(faults, FaultsConfig, "python -m benchmarks.faults")
