"""evaluate: the estimator of log p(x) against exact values, and what the command says of a model."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.core.untrained import init
from torch_ref import convert
from vae_jax import VAE, InputError, NonFiniteLossError, TrainConfig, fit, load, measure
from vae_jax.config import EvaluateConfig
from vae_jax.evaluate import evaluate


def test_one_sample_is_the_bound_and_more_come_closer():
    model = VAE(hidden_dim=16, latent_dim=4, pixels=30)
    params, key = init(model, scale=12), jax.random.key(2)
    images = jax.random.uniform(key, (2000, 30))
    results = [measure(model, params, images, key, importance_samples=samples) for samples in (1, 30)]
    single = results[0]
    assert single.log_px is not None and single.log_px_stderr is not None and results[1].log_px is not None
    assert abs(single.log_px + single.loss) < 2 * np.hypot(single.log_px_stderr, single.loss_stderr)
    assert results[1].log_px > single.log_px + 2 * single.log_px_stderr
    assert results[1].loss == single.loss


def test_measure_averages_over_images():
    model = VAE(hidden_dim=16, latent_dim=3, pixels=12)
    params, key = init(model), jax.random.key(0)
    # Two latent dimensions that say nothing, one of them at an offset.
    kernel = params["encoder"]["fc2_mu"]["kernel"]
    params["encoder"]["fc2_mu"]["kernel"] = kernel.at[:, :2].set(0).at[:, 2].multiply(10)
    images = jax.random.uniform(key, (50, 12))
    result = measure(model, params, images, key)
    mu, logvar = (np.asarray(part, np.float64) for part in model.apply({"params": params}, images, method="encode"))
    per_latent = -0.5 * (1 + logvar - mu**2 - np.exp(logvar))
    assert result.images == 50 and result.active_units == 1
    assert result.log_px is None and result.log_px_stderr is None
    np.testing.assert_allclose(result.kld_per_latent, per_latent.mean(axis=0), atol=1e-5)
    assert result.kld == pytest.approx(per_latent.sum(axis=1).mean(), abs=1e-5)
    assert result.kld_stderr == pytest.approx(per_latent.sum(axis=1).std(ddof=1) / np.sqrt(50), abs=1e-5)
    assert result.loss == pytest.approx(result.bce + result.kld, abs=1e-5)


def test_a_figure_that_is_not_finite_is_an_error(tmp_path):
    model = VAE(hidden_dim=8, latent_dim=2)
    params = init(model)
    params["encoder"]["fc2_logvar"]["bias"] += 200
    convert.save(convert.to_state_dict(jax.device_get(params)), tmp_path / "vae.pth")
    out = tmp_path / "figures.json"
    with pytest.raises(NonFiniteLossError, match=r"the loss of this model is nan \(bce nan, kld inf\)"):
        evaluate(EvaluateConfig(tmp_path / "vae.pth", images=5, json=out))
    assert not out.exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights file of an untrained model of the documented sizes."""
    path = tmp_path_factory.mktemp("weights") / "vae.pth"
    convert.save(convert.to_state_dict(jax.device_get(init(VAE()))), path)
    return path


def test_command_writes_the_figures(weights, tmp_path, capsys):
    out = tmp_path / "deep" / "figures.json"
    result = evaluate(EvaluateConfig(weights, images=30, importance_samples=3, json=out))
    figures = json.loads(out.read_text())
    assert figures == {"model": str(weights), "data": "mnist", "split": "test", "seed": 0} | json.loads(
        json.dumps(dataclasses.asdict(result))
    )
    assert len(figures["kld_per_latent"]) == 20 and figures["bce_stderr"] > 0
    printed = capsys.readouterr().out
    assert f"{result.loss:.2f}" in printed and "log p(x), K = 3" in printed and "not a log-likelihood" in printed


def test_layouts_and_safetensors_give_the_same_figures(weights, tmp_path):
    state_dict = convert.load(weights)
    layouts: dict[str, convert.Layout] = {"a.pth": "fc-mu", "b.pth": "pytorch-examples", "c.safetensors": "documented"}
    results = [evaluate(EvaluateConfig(weights, images=5))]
    for name, layout in layouts.items():
        convert.save(convert.to_state_dict(convert.to_params(state_dict), layout), tmp_path / name)
        results.append(evaluate(EvaluateConfig(tmp_path / name, images=5)))
    assert len(set(results)) == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the metrics of a run on a few images, drawn once from their grey values."""
    folder = tmp_path_factory.mktemp("run")
    few = {name: array[:300] for name, array in load()._asdict().items()}
    np.savez(folder / "few.npz", **few)
    config = TrainConfig(
        data=str(folder / "few.npz"), binarize="static", beta=4.0, seed=7, epochs=1, hidden_dim=8, latent_dim=3,
        workdir=folder / "run", export=folder / "vae.pth",
    )  # fmt: skip
    _, (metrics,) = fit(config)
    return config.workdir, metrics


def test_a_run_is_measured_on_its_own_images(run, capsys):
    workdir, metrics = run
    result = evaluate(EvaluateConfig(workdir))
    assert "trained with beta 4.0" in capsys.readouterr().out
    assert (result.images, result.binarize) == (300, "static")
    # The divergence has no noise: it is equal where the drawn images are.
    assert result.kld == pytest.approx(metrics.test_kld, rel=1e-5)
    assert result.bce == pytest.approx(metrics.test_bce, abs=5 * result.bce_stderr)
    other = evaluate(EvaluateConfig(workdir, seed=8))
    assert other.kld != pytest.approx(metrics.test_kld, rel=1e-5)


def test_a_run_keeps_its_own_weights(run, tmp_path):
    workdir, metrics = run
    (workdir.parent / "vae.pth").write_bytes(b"another run's")
    assert evaluate(EvaluateConfig(workdir)).kld == pytest.approx(metrics.test_kld, rel=1e-5)
    shutil.copy(workdir / "config.json", tmp_path)
    with pytest.raises(InputError, match="has no checkpoint that can be read"):
        evaluate(EvaluateConfig(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "model.pth", "metrics.jsonl"])
def test_the_figures_replace_no_file_of_the_run(run, name):
    before = (run[0] / name).read_bytes()
    with pytest.raises(InputError, match="is a file of the run itself"):
        evaluate(EvaluateConfig(run[0], json=run[0] / name))
    assert (run[0] / name).read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", "abc"), ("seed", -1), ("seed", None), ("data", 5), ("data_dir", 5), ("binarize", "foo"), ("beta", "x")],
)
def test_a_damaged_config(run, tmp_path, name, value):
    options = json.loads((run[0] / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(options))
    (tmp_path / "model.pth").touch()
    with pytest.raises(InputError, match=f"config.json: its {name} is "):
        evaluate(EvaluateConfig(tmp_path))
    for text in ("[", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config\.json"):
            evaluate(EvaluateConfig(tmp_path))


def test_one_image_has_no_standard_error(run, tmp_path):
    np.savez(tmp_path / "two.npz", train_images=np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(InputError, match=r"has 1 image; a standard error needs two"):
        evaluate(EvaluateConfig(run[0], data=str(tmp_path / "two.npz")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere.pth"}, "nowhere.pth: does not exist"),
        ({"model": "."}, "is not a run"),
        ({"data": "digits"}, "--data digits"),
        ({"images": 10_001}, "--images 10001: --data mnist has 10000 test images"),
        ({"images": 1}, "--images 1"),
        ({"importance_samples": -1}, "--importance-samples -1"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"importance_samples": 3 * 10**9}, "--importance-samples 3000000000"),
        ({"batch_size": 10**400}, "--batch-size 1000000"),
        ({"data": ""}, "--data : no such file"),
        ({"max_data_gb": -1.0}, "--max-data-gb -1.0"),
        ({"seed": -1}, "--seed -1"),
        ({"json": "/dev/null/x.json"}, "--json /dev/null/x.json"),
    ],
)
def test_refusals(weights, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    paths = {name: type(weights)(value) for name, value in options.items() if name in ("model", "json")}
    with pytest.raises(InputError, match=message):
        evaluate(dataclasses.replace(EvaluateConfig(weights), **(options | paths)))


def test_refuses_weights_of_another_image_size(tmp_path):
    path = tmp_path / "small.pth"
    convert.save(convert.to_state_dict(jax.device_get(init(VAE(8, 2, 64)))), path)
    with pytest.raises(InputError, match=r"small.pth: takes images of 64 pixels, but those of --data mnist have 784"):
        evaluate(EvaluateConfig(path))


def test_command_line_refuses_in_one_line():
    command = [sys.executable, "-m", "vae_jax.evaluate", "nowhere.pth"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
