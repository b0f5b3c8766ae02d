"""Published tables: what a cell starts from, the row that its run leaves, and what the table says of it."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import published
from benchmarks.published import FULL_PASSES, PublishedConfig, Run, add, burda2015, to_markdown, train_and_measure
from vae_jax import InputError, TrainConfig, create_state, load
from vae_jax.core.modules import module_of
from vae_jax.runs.progress import initial_progress, read_init


def test_a_cell_is_the_paper_s_unless_an_option_says_otherwise(tmp_path):
    run = burda2015(PublishedConfig("burda2015", workdir=tmp_path), "iwae-5", 3)
    assert (run.name, run.config.workdir) == ("iwae-5", tmp_path / "burda2015-iwae-5-seed-3")
    assert (run.config.data, run.config.init, run.config.epochs) == ("mnist", None, 3280)
    assert (run.config.objective, run.config.training_samples, run.config.seed) == ("iwae", 5, 3)
    assert not list(tmp_path.iterdir())


def test_a_cell_as_the_paper_s_code_has_it(tmp_path):
    config = PublishedConfig(
        "burda2015",
        adam_b1=0.99,
        second_moments=1,
        decoder_bias="data-mean",
        train_images=59_600,
        image_order="stored",
        workdir=tmp_path,
    )
    run = burda2015(config, "vae-1", 0)
    ending = "adam-b1-0.99-second-moments-1-decoder-bias-data-mean-train-images-59600-image-order-stored"
    assert run.name == f"vae-1-{ending}"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert burda2015(config, "vae-1", 0) == run and len(written) == 2
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    images, mnist = load(run.config.data).train_images, load().train_images
    assert np.array_equal(images, mnist[:59_600])

    model = module_of(run.config, 784)
    state = initial_progress(run.config, 784, len(images), model, read_init(run.config, 784, model)).state
    usual = create_state(run.config, images=len(images))
    means = 1 / (1 + np.exp(-np.asarray(state.params["decoder"]["fc3"]["bias"], np.float64)))
    assert np.allclose(means, np.clip(images.reshape(-1, 784).mean(axis=0) / 255, 0.001, 0.999), atol=1e-6)
    state.params["decoder"]["fc3"]["bias"] = usual.params["decoder"]["fc3"]["bias"]
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, usual.params))
    assert all((np.asarray(leaf) == 1).all() for leaf in jax.tree.leaves(state.opt_state.nu))
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(state.opt_state.mu))
    assert int(state.opt_state.count) == 0 and state.adam == (0.99, 0.999, 1e-4)


@pytest.mark.parametrize("changes", [{"train_images": 100}, {"second_moments": 1}])
def test_a_workdir_that_cannot_be_written_is_one_line(changes, tmp_path):
    (tmp_path / "file").touch()
    config = PublishedConfig("burda2015", workdir=tmp_path / "file/runs", out=tmp_path, **changes)
    with pytest.raises(InputError, match=rf"--workdir {tmp_path}/file/runs/.* cannot be written"):
        published.published(config)


def test_a_run_becomes_a_row(tmp_path, few_images_file, monkeypatch):
    monkeypatch.setattr(published, "SAMPLES", 2)
    config = TrainConfig(data=str(few_images_file), binarize="dynamic", hidden_dim=8, latent_dim=2, epochs=1)
    folder = tmp_path / "run"
    run = Run("burda2015", "vae-1", dataclasses.replace(config, workdir=folder, export=folder / "vae.pth"))
    row = train_and_measure(run)
    assert (row["passes"], row["model"], row["device"]) == (1, "vae-1", "cpu")
    assert math.isfinite(row["nll"]) and row["std. error"] > 0 and 0 <= row["active units"] <= 2
    assert train_and_measure(run) | {"date": row["date"]} == row  # neither trained nor measured again
    add(row, tmp_path)
    add(row | {"passes": 2}, tmp_path)
    add(row, tmp_path)
    assert [found["passes"] for found in json.loads((tmp_path / "published.json").read_text())["rows"]] == [1, 2]
    assert (tmp_path / "published.md").read_text().count("vae-1, NOT IN FULL") == 2


@pytest.mark.parametrize("name", ["vae-5", "vae-5-adam-b1-0.99", "vae-50"])
def test_only_what_is_trained_in_full_stands_beside_the_paper_s_figures(name):
    row = {"table": "burda2015", "model": name, "nll": 86.5, "std. error": 0.2, "active units": 20, "seed": 0}
    row |= {"device": "cpu", "date": "2026-01-01", "passes": FULL_PASSES}
    paper = "86.35" if name == "vae-50" else "86.47"
    full, short = (to_markdown([row | {"passes": passes}]) for passes in (FULL_PASSES, FULL_PASSES - 1))
    assert f"| {name} | 3,280 of 3,280 | 86.50 ± 0.20 | {paper} |" in full
    assert f"| {name}, NOT IN FULL | 3,279 of 3,280 | 86.50 ± 0.20 |  |" in short and paper not in short
