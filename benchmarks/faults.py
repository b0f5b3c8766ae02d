"""`python -m benchmarks.faults`: runs that are killed, stopped and damaged, against one that is not.

Whole processes, as a user starts them, end at random moments by kill -9, SIGTERM or Ctrl-C; the same command starts
again until the run is finished. What it then leaves has to be that of an undisturbed run, bit for bit.
"""

import collections
import contextlib
import dataclasses
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
from pathlib import Path

from tqdm import tqdm

from benchmarks import report
from benchmarks.report import Check, Report
from vae_jax import cli
from vae_jax.config import InputError, TrainConfig, require_writable

# Several checkpoints an epoch, pixels drawn anew in every step.
RUN = TrainConfig(epochs=4, checkpoint_every=0.4, binarize="dynamic")
SECONDS_TO_STOP = 5
# After so many seconds a process that was told to stop is taken for one that never will.
HANGS_S = 60


@dataclasses.dataclass(frozen=True)
class FaultsConfig:
    """Kill and damage training runs at random, and look whether anything of them is lost."""

    kills: int = 200
    """Processes to end with kill -9."""
    stops: int = 20
    """Processes to end with SIGTERM or Ctrl-C."""
    flips: int = 20
    """Bits to flip in each file of the newest checkpoint, one after the other."""
    seed: int = 0
    """Seed of the moments."""
    out: Path = Path("benchmarks/results")
    """Folder for the results."""


def faults(config: FaultsConfig) -> None:
    """Measures and writes faults.json and faults.md.

    Raises:
      InputError: A number is too small.
    """
    for name in ("kills", "stops", "flips"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} {getattr(config, name)}: expected a whole number of at least 1")
    require_writable("--out", config.out / "faults.json")
    rng = random.Random(config.seed)
    environment = report.environment() | {"load before": "not noted"}
    with tempfile.TemporaryDirectory() as folder:
        undisturbed = Path(folder) / "undisturbed"
        Life(undisturbed).wait()
        # The second one finds everything compiled, as all that follow.
        shutil.rmtree(undisturbed)
        start = time.perf_counter()
        Life(undisturbed).wait()
        whole = time.perf_counter() - start
        found = ends(config, Path(folder), rng, whole)
        damages = damaged(undisturbed, config.flips, rng)
    result = Report(
        "faults",
        f"`python -m vae_jax.train --epochs {RUN.epochs} --checkpoint-every {RUN.checkpoint_every} --binarize"
        f" {RUN.binarize}`, ended at a random moment of its {whole:.0f} seconds and started again until it is finished;"
        " and its newest checkpoint with one file after the other damaged: cut, emptied, grown, deleted, bits flipped.",
        dataclasses.asdict(config) | {"out": None},
        {"Processes ended": found["ended"], "Newest checkpoint": damages},
        [
            Check(
                f"{config.kills} kills: every run ends as the undisturbed one, bit for bit",
                f"{found['same']} of {found['runs']} runs, {found['kills']} kills",
                found["same"] == found["runs"] and found["kills"] >= config.kills,
            ),
            Check(
                f"stopped within {SECONDS_TO_STOP} s, exit code 130 or 143",
                f"{found['stops']} stops, at most {found['slowest stop s']:.2f} s, {found['wrong codes']} wrong codes"
                f" ({found['early']} died of the signal while Python itself was starting)",
                found["slowest stop s"] <= SECONDS_TO_STOP and not found["wrong codes"],
            ),
            Check(
                "damage to any one file: the older checkpoint, or the same content",
                f"{sum(row['recovered'] for row in damages)} of {sum(row['damages'] for row in damages)}",
                all(row["recovered"] == row["damages"] for row in damages),
            ),
        ],
        environment,
    )
    result.write(config.out)
    print(result.to_markdown())
    if not all(check.holds for check in result.checks):
        sys.exit(1)


def config_in(folder: Path) -> TrainConfig:
    """The options of a run that leaves all it leaves in `folder`."""
    return dataclasses.replace(RUN, workdir=folder / "run", export=folder / "vae.pth")


class Life:
    """One process of the training command."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder.with_suffix(".txt")
        with self.output.open("w") as output:
            command = shlex.split(config_in(folder).command)
            # Compiled once: most of a life is training then, not compiling.
            environment = os.environ | {
                "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)

    def wait(self) -> None:
        """Waits for its end.

        Raises:
          RuntimeError: It failed; the message is what it printed.
        """
        if self.process.wait():
            raise RuntimeError(f"exit code {self.process.returncode}: {self.output.read_text()}")

    def lives_for(self, seconds: float) -> bool:
        """Waits; whether it is still there afterwards."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            self.wait()
            return False
        return True

    @property
    def phase(self) -> str:
        """What it was at, by what it has printed."""
        text = self.output.read_text()
        if "saved" in text:
            return "after the export"
        return "training" if "losses are" in text else "starting"


def ends(config: FaultsConfig, folder: Path, rng: random.Random, whole: float) -> dict:
    """Runs that are ended again and again, until so many processes are."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    found = {"runs": 0, "same": 0, "kills": 0, "stops": 0, "slowest stop s": 0.0, "early": 0, "wrong codes": 0}
    undisturbed = left(folder / "undisturbed")
    with tqdm(total=config.kills + config.stops, unit=" ends", disable=None) as bar:
        while found["kills"] < config.kills or found["stops"] < config.stops:
            run = folder / f"run{found['runs']}"
            while True:
                life = Life(run)
                if not life.lives_for(rng.uniform(0, whole)):
                    break
                kill = found["stops"] >= config.stops or rng.random() < config.kills / (config.kills + config.stops)
                if kill:
                    counts["kill -9", life.phase] += 1
                    life.process.kill()
                    life.process.wait()
                    found["kills"] += 1
                else:
                    number = rng.choice([signal.SIGTERM, signal.SIGINT])
                    counts[number.name, life.phase] += 1
                    start = time.perf_counter()
                    life.process.send_signal(number)
                    try:
                        code = life.process.wait(HANGS_S)
                    except subprocess.TimeoutExpired:
                        life.process.kill()
                        code = life.process.wait()
                    found["slowest stop s"] = max(found["slowest stop s"], time.perf_counter() - start)
                    # Python, while it starts, dies of the signal itself, which shells count in the same way; one that
                    # was through may have ended well before it heard of it.
                    early = code == -number and life.phase == "starting"
                    late = code == 0 and life.phase == "after the export"
                    found["early"] += early
                    found["wrong codes"] += code != 128 + number and not early and not late
                    found["stops"] += 1
                bar.update()
            found["runs"] += 1
            found["same"] += left(run) == undisturbed
            shutil.rmtree(run)
    phases = ("starting", "training", "after the export")
    found["ended"] = [
        {"by": by} | {phase: counts[by, phase] for phase in phases} for by in sorted({by for by, _ in counts})
    ]
    return found


def left(folder: Path) -> dict[str, object]:
    """What a finished run has left: the bytes of its models, its metrics but for the seconds, and every name."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {
        "models": [(folder / name).read_bytes() for name in ("vae.pth", "run/model.pth")],
        "metrics": [{name: value for name, value in line.items() if name != "seconds"} for line in lines],
        "names": sorted(path.name for path in (*folder.iterdir(), *(folder / "run").iterdir())),
        "newest": max(int(path.name) for path in (folder / "run/checkpoints").iterdir()),
    }


def damaged(folder: Path, flips: int, rng: random.Random) -> list[dict]:
    """Damages the newest checkpoint, one file and one way after the other, and reads the newest one that is whole."""
    import jax

    from vae_jax.checkpoint import Checkpoints
    from vae_jax.data import load

    images = load()
    checkpoints = folder / "run/checkpoints"
    *_, older, newest = sorted(int(path.name) for path in checkpoints.iterdir())

    def read() -> tuple[int, list[bytes]]:
        """Steps and parameters of what a run would go on from."""
        with contextlib.redirect_stderr(io.StringIO()):
            progress = Checkpoints(config_in(folder), len(images.train_images), 784, images.checksum()).newest()
        assert progress is not None
        params = jax.device_get(progress.state.params)
        return int(progress.state.step), [leaf.tobytes() for leaf in jax.tree.leaves(params)]

    whole = read()
    assert whole[0] == newest
    rows = []
    for file in sorted(path for path in (checkpoints / str(newest)).rglob("*") if path.is_file()):
        content = file.read_bytes()
        damages = [b"", content[:-1], content[: len(content) // 2], content + b"\0", None]
        for _ in range(flips):
            bit = rng.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            damages.append(bytes(flipped))
        recovered = 0
        for damage in damages:
            if damage is None:
                file.unlink()
            else:
                file.write_bytes(damage)
            found = read()
            # The newest one counts where the damage is harmless, as the loss of the last line's end is.
            recovered += found[0] == older or found == whole
            file.write_bytes(content)
        rows.append(
            {
                "file": str(file.relative_to(checkpoints / str(newest))),
                "bytes": len(content),
                "damages": len(damages),
                "recovered": recovered,
            }
        )
    assert read() == whole
    return rows


if __name__ == "__main__":
    cli.run(faults, FaultsConfig, "python -m benchmarks.faults")
