"""The wheel: it holds all that the package needs, and runs outside the repository."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import vae_jax

ROOT = Path(__file__).parent.parent


def test_the_wheel_runs_outside_the_repository(tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        f"--wheel-dir={tmp_path}",
    ]
    subprocess.run([*build, str(ROOT)], check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {
        "vae_jax/data/mnist.npz",
        "vae_jax/data/MNIST-NOTICE.md",
        "vae_jax/pictures/explorer/index.html",
        "vae_jax/pictures/explorer/main.js",
        "vae_jax/pictures/explorer/style.css",
        "vae_jax/py.typed",
        "vae_jax/__init__.pyi",
    } <= names
    assert {name.split("/")[0] for name in names} == {
        "vae_jax",
        "torch_ref",
        f"vae_jax-{vae_jax.__version__}.dist-info",
    }
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    options = [
        "--epochs=1",
        "--hidden-dim=8",
        "--latent-dim=2",
        "--batch-size=2000",
        "--workdir=run",
        "--export=vae.pth",
    ]
    result = subprocess.run(
        [sys.executable, "-m", "vae_jax", "train", *options],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "vae.pth").stat().st_size > 50_000
    where = subprocess.run(
        [sys.executable, "-c", "import vae_jax; print(vae_jax.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(tmp_path / "site"))
