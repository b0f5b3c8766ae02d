"""`python -m benchmarks published TABLE`: trains the models of published tables, and prints ours beside the figures.

Each model is a run of `vae_jax.train`: stopped at any time, the same command goes on. Every figure is stored with the
passes over the training set that it has had.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import tyro

from benchmarks import report
from benchmarks.report import Report
from benchmarks.turns import isolated
from vae_jax.config import FLOAT32_MAX, ImageOrder, Objective, Options, TrainConfig, bounded, option_name
from vae_jax.runs.sweep_folder import short
from vae_jax.system import command_line
from vae_jax.system.files import replacing, require_writable

Cell = Literal["vae-1", "vae-5", "vae-50", "iwae-1", "iwae-5", "iwae-50"]
DecoderBias = Literal["zero", "data-mean"]
# Where the paper's code (https://github.com/yburda/iwae) departs from the paper, or decides what that leaves open.
VARIATIONS = ("adam_b1", "second_moments", "decoder_bias", "train_images", "image_order")
FULL_PASSES = sum(3**i for i in range(8))
# log p(x) is estimated from so many samples an image.
SAMPLES = 5000


class Published(NamedTuple):
    """A figure of the paper."""

    nll: float
    active_units: int


# Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, table 1 (one stochastic layer).
BURDA2015: dict[Cell, Published] = {
    "vae-1": Published(86.76, 19),
    "vae-5": Published(86.47, 20),
    "vae-50": Published(86.35, 20),
    "iwae-1": Published(86.76, 19),
    "iwae-5": Published(85.54, 22),
    "iwae-50": Published(84.78, 25),
}


@dataclasses.dataclass(frozen=True)
class PublishedConfig(Options):
    """Train the models of a published table, and compare: stopped at any time, the same command goes on.

    burda2015 is table 1 of Importance Weighted Autoencoders (one stochastic layer); pytorch-examples is the model of
    pytorch/examples, which is this program's own, with five seeds.
    """

    table: Annotated[Literal["burda2015", "pytorch-examples"], tyro.conf.Positional]
    """Whose figures to reproduce."""
    cells: Annotated[tuple[Cell, ...], tyro.conf.arg(metavar="NAME-K ...")] = ("vae-1",)
    """Models of burda2015: vae or iwae, and the samples an image in training."""
    passes: int = bounded(FULL_PASSES, 1)
    """Stop burda2015 after so many passes over the training images; 3,280 are the paper's."""
    adam_b1: float = bounded(0.9, 0, 0.999999)
    """Adam's decay of mean gradients in burda2015: the paper says 0.9, its code has 0.99."""
    second_moments: float = bounded(0.0, 0, FLOAT32_MAX)
    """What Adam's means of squares start from in burda2015: 0 as usual, or 1 as in the paper's code."""
    decoder_bias: DecoderBias = "zero"
    """The decoder's last bias at the start of burda2015: 0, or the logits of the mean image as in the paper's code."""
    train_images: int = bounded(60_000, 1, 60_000)
    """Train burda2015 on the first so many images: all, or 59,600 as in the paper's code."""
    image_order: ImageOrder = "shuffled"
    """Their order in burda2015: drawn anew in each pass, or as they are stored, as in the paper's code."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = bounded((), 0, 2**32 - 1)
    """Seeds; by default 0 for burda2015, and 0 to 4 for pytorch-examples."""
    at_once: int = bounded(1, 1, 64)
    """Models to train at once, a process each."""
    workdir: Path = Path("runs/published")
    """Folder for the runs."""
    out: Path = Path(__file__).parent / "results"
    """Folder for published.json and published.md."""


def published(config: PublishedConfig) -> None:
    """Trains, measures, and adds the figures to the results.

    Raises:
      InputError: An option cannot be used.
      SystemExit: A run has failed or was stopped, and has said why.
    """
    config.check()
    for suffix in ("json", "md"):
        require_writable("--out", config.out / f"published.{suffix}")
    if config.table == "burda2015":
        seeds = config.seeds or (0,)
        runs = [burda2015(config, cell, seed) for cell in config.cells for seed in seeds]
    else:
        runs = [pytorch_examples(config, seed) for seed in config.seeds or range(5)]
    with ThreadPoolExecutor(config.at_once) as pool:
        try:
            for row in pool.map(train_and_measure, runs):
                add(row, config.out)
        except subprocess.CalledProcessError as error:
            sys.exit(error.returncode)
    print((config.out / "published.md").read_text())


class Run(NamedTuple):
    """A model of a table."""

    table: str
    name: str
    config: TrainConfig


def burda2015(config: PublishedConfig, cell: Cell, seed: int) -> Run:
    """A cell of table 1: 784-200-200-50, tanh, the decoder in reverse.

    Unless the options say otherwise, what the paper leaves open is as usual in this program: the KL divergence of the
    VAE in closed form, the decoder's bias at 0, second moments from 0, all 60,000 images, shuffled. Other images or
    another start are written to files in the workdir.
    """
    kind, samples = cell.split("-")
    objective: Objective = "iwae" if kind == "iwae" else "elbo"
    usual = PublishedConfig(config.table)
    name = cell + "".join(
        f"-{option_name(field)}-{short(getattr(config, field))}"
        for field in VARIATIONS
        if getattr(config, field) != getattr(usual, field)
    )
    folder = config.workdir / f"burda2015-{name}-seed-{seed}"
    run = TrainConfig(
        binarize="dynamic",
        batch_size=20,
        image_order=config.image_order,
        learning_rate_schedule="burda2015",
        adam_b1=config.adam_b1,
        adam_eps=1e-4,
        hidden_dims=(200, 200),
        latent_dim=50,
        activation="tanh",
        initialization="glorot",
        objective=objective,
        training_samples=int(samples),
        seed=seed,
        epochs=config.passes,
        workdir=folder,
        export=folder / "vae.pth",
    )
    if config.train_images < usual.train_images:
        run = dataclasses.replace(run, data=str(write_first_images(config)))
    if (config.second_moments, config.decoder_bias) != (usual.second_moments, usual.decoder_bias):
        start = folder.with_name(f"{folder.name}-start.pth")
        require_writable("--workdir", start)
        if not start.exists():  # a run is known by these bytes, which another version may write otherwise
            isolated("benchmarks.published:write_start", config, run, start)
        run = dataclasses.replace(run, init=start)
    return Run(config.table, name, run)


def write_first_images(config: PublishedConfig) -> Path:
    """Writes the first training images, and all test images, to a file in the folder of the runs."""
    import numpy as np

    from vae_jax import load

    file = config.workdir / f"mnist-{config.train_images}.npz"
    require_writable("--workdir", file)
    if file.exists():
        return file
    mnist = load()
    config.workdir.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part, part.open("wb") as stream:
        np.savez(stream, train_images=mnist.train_images[: config.train_images], test_images=mnist.test_images)
    return file


def write_start(config: PublishedConfig, run: TrainConfig, file: Path) -> None:
    """Writes the weights and the Adam state that a run starts from, for `--init`.

    Call it in a process of its own: it occupies the GPU.
    """
    import numpy as np
    import torch

    from torch_ref.model import MLP
    from vae_jax import create_state, load
    from vae_jax.core.settings import fixed_settings
    from vae_jax.runs.export import state_dict_of

    images = load(run.data).train_images.reshape(-1, 784)
    with fixed_settings():
        state = create_state(run, 784, images=len(images))
        weights = state_dict_of(state.model, state.params, 784)
    if config.decoder_bias == "data-mean":
        mean = np.clip(images.mean(axis=0) / 255, 0.001, 0.999)
        weights["decoder.fc3.bias"] = torch.tensor(np.log(mean / (1 - mean)), dtype=torch.float32)
    model = MLP(run.hidden_dims, run.latent_dim, 784, run.activation)
    model.load_state_dict(weights)
    adam = torch.optim.Adam(model.parameters(), run.learning_rate, (run.adam_b1, 0.999), run.adam_eps)
    for parameter in model.parameters():
        adam.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.full_like(parameter, config.second_moments),
        }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as part:
        torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, part)


def pytorch_examples(config: PublishedConfig, seed: int) -> Run:
    """The documented model with default options."""
    folder = config.workdir / f"pytorch-examples-seed-{seed}"
    return Run(config.table, "vae", TrainConfig(seed=seed, workdir=folder, export=folder / "vae.pth"))


def train_and_measure(run: Run) -> dict[str, Any]:
    """Trains to the end, or goes on to it, and returns the run's figures."""
    config, python = run.config, sys.executable
    command = [python, *config.command_words[1:]]
    subprocess.run(command, check=True)
    history = [json.loads(line) for line in (config.workdir / "metrics.jsonl").read_text().splitlines()]
    row: dict[str, Any] = {
        "table": run.table,
        "model": run.name,
        "seed": config.seed,
        "passes": len(history),
        "train loss": history[-1]["train_loss"],
        "test loss": history[-1]["test_loss"],
        "training s": sum(epoch["seconds"] for epoch in history),
    }
    if run.table == "burda2015":
        figures = config.workdir / f"evaluation-{len(history)}.json"
        if not figures.exists():
            words = [str(config.workdir), "--importance-samples", str(SAMPLES), "--json", str(figures)]
            subprocess.run([python, "-m", "vae_jax.evaluate", *words], check=True)
        found = json.loads(figures.read_text())
        row |= {"nll": -found["log_px"], "std. error": found["log_px_stderr"], "active units": found["active_units"]}
    options = json.loads((config.workdir / "config.json").read_text())
    return row | {"device": options["device"], "date": report.environment()["date"][:10]}


def add(row: dict[str, Any], folder: Path) -> None:
    """Adds a row to published.json in place of the same one, and writes published.md."""
    file, key = folder / "published.json", ("table", "model", "seed", "passes")
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [old for old in rows if [old[name] for name in key] != [row[name] for name in key]] + [row]
    rows.sort(key=lambda row: [str(row[name]).zfill(8) for name in key])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("published.json", json.dumps({"rows": rows}, indent=1) + "\n"),
        ("published.md", to_markdown(rows)),
    ):
        with replacing(folder / name) as part:
            part.write_text(text)


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """The tables, ours beside the published figures; what was not trained in full says so in its first column."""
    burda, examples = ([row for row in rows if row["table"] == table] for table in ("burda2015", "pytorch-examples"))
    tables: dict[str, list[dict[str, Any]]] = {}
    if burda:
        tables["Importance Weighted Autoencoders, table 1: nats per image, binary pixels drawn anew in each pass"] = [
            {
                "model": row["model"] if row["passes"] == FULL_PASSES else f"{row['model']}, NOT IN FULL",
                "passes": f"{row['passes']:,} of {FULL_PASSES:,}",
                "-L_5000": f"{row['nll']:.2f} ± {row['std. error']:.2f}",
                "paper": f"{BURDA2015[_cell(row)].nll:.2f}" if row["passes"] == FULL_PASSES else None,
                "active units": row["active units"],
                "paper's": BURDA2015[_cell(row)].active_units if row["passes"] == FULL_PASSES else None,
            }
            | {name: row[name] for name in ("seed", "device", "date")}
            for row in burda
        ]
    if examples:
        tables["pytorch/examples, 10 epochs: nats per image, grey pixels (a cross entropy, not a log-likelihood)"] = [
            {"": "training loss", "ours": _mean(examples, "train loss"), "published": "106.1 to 106.4"},
            {"": "test loss", "ours": _mean(examples, "test loss"), "published": "105.56 to 105.59"},
        ]
    about = (
        "Our figures beside published ones. ± is the standard error over the test images, and over seeds the standard"
        " deviation. A row that is not trained in full cannot be compared with the paper."
    )
    return Report("published", about, {}, tables).to_markdown()


def _cell(row: dict[str, Any]) -> Cell:
    return next(cell for cell in get_args(Cell) if f"{row['model']}-".startswith(f"{cell}-"))


def _mean(rows: list[dict[str, Any]], name: str) -> str:
    values = [row[name] for row in rows]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} ({len(values)} seeds)"


def main() -> None:
    command_line.run(published, PublishedConfig, "python -m benchmarks published")


if __name__ == "__main__":
    main()
