"""explore: what the page holds, and what is refused. tests/pictures/test_explorer_page.py opens it in a browser."""

import base64
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.core.untrained import init
from torch_ref import convert
from vae_jax import VAE, InputError, TrainConfig, fit
from vae_jax.config import ExploreConfig
from vae_jax.explore import choose, explore
from vae_jax.pictures.explorer import page
from vae_jax.runs.trained import Trained, read


def save(path: Path, vae: VAE, scale: float = 1.0) -> Path:
    convert.save(convert.to_state_dict(jax.device_get(init(vae, scale=scale))), path)
    return path


def block(content: str, name: str) -> str:
    """The text of one of the page's elements with data."""
    found = re.findall(rf'<script type="[^"]*" id="{name}">([^<]*)</script>', content)
    assert len(found) == 1
    return found[0]


def test_the_page_of_a_run(few_images_file, few_images, tmp_path, capsys):
    config = TrainConfig(
        data=str(few_images_file), binarize="static", epochs=2, hidden_dim=8, latent_dim=3,
        workdir=tmp_path / "run", export=tmp_path / "vae.pth",
    )  # fmt: skip
    _, metrics = fit(config)
    out = tmp_path / "deep" / "page.html"
    explore(ExploreConfig(config.workdir, out, images=50))
    content = out.read_text()
    assert capsys.readouterr().out.endswith(f"saved {out}: 0.1 MB, with 50 test images; open it in a browser\n")
    facts = json.loads(block(content, "facts"))
    assert (facts["name"], facts["data"], facts["shape"]) == ("run", "few.npz", [28, 28])
    assert facts["training"]["test_loss"] == metrics[-1].test_loss
    assert facts["training"]["seconds"] == pytest.approx(metrics[0].seconds + metrics[1].seconds)
    assert facts["options"]["hidden_dim"] == "8" and facts["options"]["epochs"] == "2"
    assert facts["labels"] == few_images.test_labels[facts["numbers"]].tolist()
    # The images are those that the run saw, with their posteriors.
    images = np.frombuffer(zlib.decompress(base64.b64decode(block(content, "images"))), np.uint8).reshape(50, 784)
    assert set(np.unique(images)) == {0, 255}
    posteriors = np.frombuffer(base64.b64decode(block(content, "posteriors")), "<f4").reshape(2, 50, 3)
    np.testing.assert_allclose(posteriors, np.array(read(config.workdir).encode(images)), atol=1e-5)
    assert sum(facts["kld"]) == pytest.approx(metrics[-1].test_kld, rel=1e-4)
    # Nobody who gets the page learns where on this machine things were.
    assert str(tmp_path) not in content


@pytest.mark.parametrize("half", [False, True])
def test_the_sizes_and_weights_of_the_default_model(tmp_path, half):
    weights = save(tmp_path / "vae.pth", VAE())
    explore(ExploreConfig(weights, tmp_path / "page.html", half=half))
    assert (tmp_path / "page.html").stat().st_size < (2.3e6 if half else 4.5e6)
    content = (tmp_path / "page.html").read_text()
    assert np.bincount(json.loads(block(content, "facts"))["labels"]).tolist() == [50] * 10
    stored = np.frombuffer(base64.b64decode(block(content, "weights")), "<f2" if half else "<f4")
    params = read(weights).params
    kernel = params["encoder"]["fc1"]["kernel"].ravel()
    assert len(stored) == 652_824
    np.testing.assert_array_equal(stored[: len(kernel)], kernel.astype(np.float16) if half else kernel)
    np.testing.assert_array_equal(stored[-784:], params["decoder"]["fc2"]["bias"].astype(stored.dtype))


def test_names_are_text(few_images, tmp_path):
    data = tmp_path / "{{weights}}<!--.npz"
    np.savez(data, **few_images._asdict())
    weights = save(tmp_path / "<script>.pth", VAE(8, 2))
    explore(ExploreConfig(weights, tmp_path / "page.html", data=str(data), images=5))
    content = (tmp_path / "page.html").read_text()
    facts = json.loads(block(content, "facts"))
    assert (facts["name"], facts["data"]) == ("<script>.pth", "{{weights}}<!--.npz")
    assert content.count("<script") == 5 and "<!--" not in content


def test_the_policy_allows_this_script_and_style_only(few_images_file, tmp_path):
    explore(ExploreConfig(save(tmp_path / "vae.pth", VAE(8, 2)), tmp_path / "page.html", data=str(few_images_file)))
    content = (tmp_path / "page.html").read_text()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', content)
    assert "unsafe" not in policy and policy.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"\b(eval|Function|fetch|XMLHttpRequest|innerHTML|WebSocket)\b", page.program())
    assert not re.search(r"\s(on\w+|style)=", content.partition("<body>")[2].partition('id="facts"')[0])


def test_a_chosen_image_of_every_label():
    label = np.array([7, 7, 7, 7, 0, 7, 3, 3, 0, 7])
    assert choose(label, 10, 3).tolist() == [0, 4, 6]
    assert choose(label, 10, 7).tolist() == [0, 1, 2, 4, 6, 7, 8]
    assert choose(label, 10, 99).tolist() == list(range(10))
    assert choose(None, 10, 5).tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "page.txt"}, r"--out page.txt: expected a name that ends in .html"),
        ({"images": 0}, "--images 0: expected a whole number from 1 to 10000"),
        ({"data": "nowhere.npz"}, "--data nowhere.npz: no such file"),
        ({"out": "/proc/page.html"}, "--out /proc/page.html: cannot be written"),
        ({"model": "nowhere"}, "nowhere: does not exist"),
        ({"checkpoint": "best"}, "--checkpoint best: .* is a weights file"),
    ],
)
def test_bad_options_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "vae.pth", VAE(8, 2))
    with pytest.raises(InputError, match=message) as refusal:
        explore(ExploreConfig(**({"model": "vae.pth", "out": "page.html"} | options)))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["vae.pth"]


def test_models_that_the_page_cannot_show_are_refused(few_images_file, tmp_path):
    out, data = tmp_path / "page.html", str(few_images_file)
    for vae, scale, half, message in (
        (VAE(9000, 2), 1, False, r"would take 75.\d MB; expected at most 50; add --half, or ask for fewer --images"),
        (VAE(18000, 2), 1, True, r"would take 75.\d MB; expected at most 50; ask for fewer --images"),
        (VAE(8, 1), 1, False, "has 1 latent dimension, and the map shows 2"),
        (VAE(8, 2), 1e7, True, "--half: the model has weights beyond 65504"),
    ):
        weights = save(tmp_path / "vae.pth", vae, scale)
        with pytest.raises(InputError, match=message):
            explore(ExploreConfig(weights, out, data=data, half=half))
    state = convert.load(save(tmp_path / "vae.pth", VAE(8, 2)))
    state["encoder.fc2_logvar.bias"] += 200
    convert.save(state, tmp_path / "vae.pth")
    with pytest.raises(InputError, match="the KLD of its test images is not finite"):
        explore(ExploreConfig(tmp_path / "vae.pth", out, data=data))
    with pytest.raises(InputError, match="Dense: the page runs the documented model and MLPs, and no other module"):
        import flax.linen

        page.layers_of(Trained(flax.linen.Dense(2), {}, 784, 2))
    assert not out.exists()


def test_what_is_read_is_not_replaced(few_images_file, tmp_path):
    config = TrainConfig(
        data=str(few_images_file), epochs=1, hidden_dim=8, latent_dim=2,
        workdir=tmp_path / "run", export=tmp_path / "vae.pth",
    )  # fmt: skip
    fit(config)
    (tmp_path / "link.html").symlink_to(config.workdir / "model.pth")
    (tmp_path / "data.html").symlink_to(few_images_file)
    (tmp_path / "export.html").symlink_to(config.export)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("link", "data", "export"):
        with pytest.raises(InputError, match="name another file to write"):
            explore(ExploreConfig(config.workdir, tmp_path / f"{name}.html"))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_command_refuses_in_one_line(tmp_path):
    command = [sys.executable, "-m", "vae_jax", "explore", str(tmp_path), "--out", str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
