"""encode: the latents of an image set, in every format, and latent points read back."""

import csv
import io
import zipfile
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.core.untrained import init
from torch_ref import convert
from vae_jax import VAE, DataError, InputError, TrainConfig, fit
from vae_jax.config import EncodeConfig, EvaluateConfig
from vae_jax.encode import encode
from vae_jax.evaluate import evaluate
from vae_jax.runs.latents import load_points
from vae_jax.runs.trained import read

GB = 10**9


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vae.pth"
    convert.save(convert.to_state_dict(jax.device_get(init(VAE(16, 3), scale=8))), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory, few_images):
    """70 training and 50 test images."""
    path = tmp_path_factory.mktemp("set") / "set.npz"
    sizes = {"train_images": 70, "train_labels": 70, "test_images": 50, "test_labels": 50}
    np.savez(path, **{name: getattr(few_images, name)[:size] for name, size in sizes.items()})
    return str(path)


@pytest.mark.parametrize("batch_size", [7, 64, 4096])
def test_every_image_has_its_row(weights, data, few_images, tmp_path, batch_size):
    out = tmp_path / "deep" / "latents.npz"
    encode(EncodeConfig(weights, out, data=data, split="both", batch_size=batch_size))
    with np.load(out) as file:
        arrays = dict(file)
    images = np.concatenate([few_images.train_images[:70], few_images.test_images[:50]])
    mu, logvar = read(weights).encode(images.reshape(120, 784))
    np.testing.assert_allclose(arrays["mu"], mu, atol=1e-5)
    np.testing.assert_allclose(arrays["logvar"], logvar, atol=1e-5)
    assert arrays["split"].tolist() == ["train"] * 70 + ["test"] * 50
    assert arrays["number"].tolist() == [*range(70), *range(50)]
    assert arrays["label"].tolist() == [*few_images.train_labels[:70], *few_images.test_labels[:50]]


def test_every_format_holds_the_same(weights, data, tmp_path):
    for split in ("test", "both"):
        for suffix in (".npz", ".csv", ".parquet"):
            encode(EncodeConfig(weights, tmp_path / f"latents{suffix}", data=data, split=split))
        with np.load(tmp_path / "latents.npz") as file:
            arrays = dict(file)
        for suffix in (".npz", ".csv", ".parquet"):
            np.testing.assert_array_equal(load_points(tmp_path / f"latents{suffix}", 3, GB), arrays["mu"])
        with (tmp_path / "latents.csv").open() as file:
            rows = list(csv.DictReader(file))
        names = ["number", "label", "mu0", "mu1", "mu2", "logvar0", "logvar1", "logvar2"]
        assert list(rows[0]) == (["split"] if split == "both" else []) + names
        table = pyarrow.parquet.read_table(tmp_path / "latents.parquet")
        assert table.column_names == list(rows[0])
        for row, texts in enumerate(rows):
            assert [int(texts[name]) for name in ("number", "label")] == [
                arrays[name][row] for name in ("number", "label")
            ]
            found = np.array([texts[f"logvar{dimension}"] for dimension in range(3)], np.float32)
            np.testing.assert_array_equal(found, arrays["logvar"][row])
        np.testing.assert_array_equal(table["logvar2"].to_numpy(), arrays["logvar"][:, 2])


def test_labels_are_left_out_where_there_are_none(weights, few_images, tmp_path, capsys):
    np.savez(tmp_path / "set.npz", train_images=few_images.train_images[:20])
    encoded = encode(EncodeConfig(weights, tmp_path / "latents.npz", data=str(tmp_path / "set.npz")))
    assert encoded.label is None and capsys.readouterr().out.endswith("3 latent dimensions; without labels\n")
    with np.load(tmp_path / "latents.npz") as file:
        assert file.files == ["number", "mu", "logvar"]


def test_images_are_those_that_the_run_saw(data, tmp_path):
    config = TrainConfig(
        data=data, binarize="static", seed=3, epochs=1, hidden_dim=8, latent_dim=3,
        workdir=tmp_path / "run", export=tmp_path / "vae.pth",
    )  # fmt: skip
    _, (metrics,) = fit(config)
    encoded = encode(EncodeConfig(config.workdir, tmp_path / "latents.npz", batch_size=16))
    # The divergence has no noise: it is equal where the drawn images are.
    assert encoded.kld().sum() == pytest.approx(metrics.test_kld, rel=1e-4)


def test_the_image_set_of_the_run_is_not_replaced(data, tmp_path):
    config = TrainConfig(data=data, hidden_dim=8, epochs=1, workdir=tmp_path / "run", export=tmp_path / "vae.pth")
    fit(config)
    content = Path(data).read_bytes()
    for refused in (
        lambda: encode(EncodeConfig(config.workdir, Path(data))),
        lambda: evaluate(EvaluateConfig(config.workdir, json=Path(data))),
    ):
        with pytest.raises(InputError, match="this command reads that file"):
            refused()
    assert Path(data).read_bytes() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "x.txt"}, r"--out x.txt: expected a name that ends in .npz, .csv, .parquet"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"split": "all"}, "--split all: expected one of test, train, both"),
        ({"data": "nowhere.npz"}, "--data nowhere.npz: no such file"),
        ({"checkpoint": "best"}, "--checkpoint best: .* is a weights file"),
    ],
)
def test_refusals(weights, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        encode(EncodeConfig(**{"model": weights, "out": tmp_path / "x.npz"} | options))
    assert not list(tmp_path.iterdir())


def test_nothing_that_it_reads_is_replaced(weights, data, tmp_path):
    for model, out, message in (
        (weights, data, "this command reads that file"),
        (tmp_path, tmp_path / "checkpoints" / "x.npz", "is a file of the run itself"),
    ):
        with pytest.raises(InputError, match=message):
            encode(EncodeConfig(model, out, data=data))


def test_latents_that_are_not_finite_are_refused(data, tmp_path):
    params = jax.tree.map(np.array, init(VAE(16, 3)))
    params["encoder"]["fc1"]["bias"][:] = params["encoder"]["fc2_mu"]["kernel"][:] = 1e30
    convert.save(convert.to_state_dict(params), tmp_path / "vae.pth")
    with pytest.raises(InputError, match="encodes train image 0 into values that are not finite; train again"):
        encode(EncodeConfig(tmp_path / "vae.pth", tmp_path / "x.npz", data=data, split="train"))
    assert not (tmp_path / "x.npz").exists()


def npy(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def parquet(**columns) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


GRID = np.arange(24.0).reshape(2, 4, 3)
GRID[0, 1] = np.nan


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npz", npz(z=GRID, mu=np.zeros((5, 3)), other=np.array([None])), GRID),
        ("a.npz", npz(mu=GRID[1]), GRID[1]),
        ("a.npy", npy(GRID.astype(np.float16)), GRID),
        ("a.npy", npy(np.asfortranarray(GRID[1].astype(">f8"))), GRID[1]),
        ("a.csv", b"mu0,mu2,mu1,z0,z1,z2\n9,9,9,1,2,3\n9,9,9,4,5.5,6\n", [[1, 2, 3], [4, 5.5, 6]]),
        ("a.csv", b'"number","mu0","mu2","mu1"\r\n0,1,3,2\r\n', [[1, 2, 3]]),
        ("a.csv", b"\xef\xbb\xbfz0,z1,z2\r\n1,2,3\r\n", [[1, 2, 3]]),  # as Excel saves it
        ("a.parquet", parquet(mu0=[1.0], mu1=[2], mu2=[3.0], label=["x"]), [[1, 2, 3]]),
    ],
)
def test_points_are_read(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    points = load_points(tmp_path / name, 3, GB)
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, np.asarray(expected, np.float32))


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


HUGE = (
    b"\x93NUMPY\x01\x00\x76\x00"
    + b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 3), }".ljust(117)
    + b"\n"
)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"1,2,3", "expected a name that ends in"),
        ("a.npz", b"", "is not a sound .npz file"),
        ("a.npz", npz(mu=np.zeros((4, 2))), r"float64 of shape \[4, 2\]; expected floats of shape \[..., 3\]"),
        ("a.npz", npz(mu=np.zeros(3)), r"shape \[3\]"),
        ("a.npz", npz(mu=np.zeros((0, 3))), "is empty"),
        ("a.npz", npz(mu=np.array([[1, 2, None]])), "Python objects, which are never unpickled"),
        ("a.npz", npz(images=np.zeros((4, 3))), r"holds the arrays \['images'\]; expected z or mu"),
        ("a.npz", npz(mu=np.array([["a", "b", "c"]])), "holds <U1"),
        ("a.npz", npz(mu=np.zeros((2, 3), complex)), "holds complex128"),
        ("a.npz", npz(mu=np.array([[1, 2, 3], [1, np.nan, 3]])), "point 1 holds NaN or infinite values"),
        ("a.npz", npz(mu=np.array([[1, np.inf, 3]])), "point 0 holds NaN or infinite values"),
        ("a.npz", npz(mu=np.array([[1, 1e39, 3]])), "point 0 holds NaN or infinite values"),
        ("a.npz", npz(mu=np.full((2, 3), np.nan)), "all points hold NaN"),
        ("a.npz", zipped("mu.npy", HUGE), r"declares shape \[99999999999, 3\]"),
        ("a.npy", HUGE, r"declares shape \[99999999999, 3\]"),
        ("a.npy", npy(np.zeros((4, 3)))[:-1], "ends after"),
        ("a.csv", b"", "is not a sound table"),
        ("a.csv", b"mu0,mu1,mu2\n", "holds no rows"),
        ("a.csv", b"mu0,mu1\n1,2\n", "has 2 columns mu0, ...; expected 3"),
        ("a.csv", b"mu0,mu1,mu2,mu3\n1,2,3,4\n", "has 4 columns mu0, ...; expected 3"),
        ("a.csv", b"mu0,mu1,mu1\n1,2,3\n", "has 3 columns mu0, ...; expected 3"),
        ("a.csv", b"a,b\n1,2\n", "has the columns a, b; expected z0"),
        ("a.csv", b"mu0,mu1,mu2\n1,2,x\n", "is not a sound table"),
        ("a.csv", b"mu0,mu1,mu2\n1,2\n", "is not a sound table"),
        ("a.csv", b"mu0,mu1,mu2\n1,2,\n", "point 0 holds NaN"),
        ("a.parquet", b"PAR1 but no more", "cannot be read|is not a sound table"),
        ("a.parquet", parquet(mu0=["a"], mu1=["b"], mu2=["c"]), "is not a sound table"),
        ("a.parquet", parquet(mu0=[[1.0]], mu1=[[1.0]], mu2=[[1.0]]), "has the columns|is not a sound table"),
    ],
)
def test_bad_points_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as refusal:
        load_points(tmp_path / name, 3, GB)
    assert "\n" not in str(refusal.value) and str(tmp_path / name) in str(refusal.value)


def test_points_that_take_too_much_memory_are_refused(tmp_path):
    for name, content in (
        ("a.csv", b"mu0,mu1,mu2\n" + b"1,2,3\n" * 1000),
        ("a.parquet", parquet(**{f"mu{dimension}": np.zeros(1000) for dimension in range(3)})),
        ("a.npy", npy(np.zeros((1000, 3)))),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"expected at most 0.0 GB; if the file is sound, raise --max-data-gb"):
            load_points(tmp_path / name, 3, 10_000)
    with pytest.raises(DataError, match="is not a file"):
        load_points(tmp_path, 3, GB)
