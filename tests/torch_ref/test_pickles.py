"""Files that `torch.save` did not write, or wrote to do harm, and what else a checkpoint may hold."""

import argparse
import collections
import datetime
import io
import os
import pickle
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fuzz.fuzz_weights import number, numbers, text
from torch_ref import convert
from torch_ref.model import VAE
from torch_ref.pickles import LEGACY_START
from vae_jax.system.errors import WeightsError


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return VAE(hidden_dim=6, latent_dim=2, pixels=9).state_dict()


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_files_that_are_not_weights(tmp_path, state_dict):
    good = tmp_path / "good.pth"
    torch.save(state_dict, good)
    marker = tmp_path / "code-was-run"
    contents = {
        "empty": b"",
        "text": b"hello",
        "truncated": good.read_bytes()[:-200],
        "pickle": pickle.dumps(Evil(marker), protocol=2),
        "other pickle": pickle.dumps({"a": 1}),
    }
    paths = {name: tmp_path / f"{name}.pth" for name in contents}
    for name, content in contents.items():
        paths[name].write_bytes(content)
    torch.save({"encoder.fc1.weight": Evil(marker)}, paths.setdefault("code", tmp_path / "code.pth"))
    torch.save([1, 2], paths.setdefault("list", tmp_path / "list.pth"))
    with zipfile.ZipFile(paths.setdefault("zip", tmp_path / "zip.pth"), "w") as archive:
        archive.writestr("hello", "hello")
    paths["missing"] = tmp_path / "missing.pth"
    paths["folder"] = tmp_path
    for name, path in paths.items():
        with pytest.raises(WeightsError) as caught:
            convert.load(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value), name
    assert not marker.exists()


def archive(pickle: bytes, packed: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """A file such as torch.save writes, with any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packed) as target:
        parts = {"data.pkl": b"\x80\x02" + pickle + b".", "data/0": bytes(4), "version": b"3\n"}
        for name, content in (parts | entries).items():
            target.writestr(f"archive/{name}", content)
    return file.getvalue()


def first_weight(storage: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A pickle with encoder.fc1.weight as a view of a storage of so many float32."""
    sizes, strides = numbers(list(size)), numbers(list(stride))
    kept = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(storage) + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + kept + number(offset) + sizes + strides + b"\x89NtR"
    return b"}" + text("encoder.fc1.weight") + tensor + b"s"


PAIRS = b"K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60
# Their hashes are all 0.
COLLIDING = b"".join(number(key * (2**61 - 1)) + b"N" for key in range(1, 60_000))
MANY = b"}(" + b"".join(number(key) + b"N" for key in range(1000)) + b"uq\x00"
# What a short file asks for, and the refusal. torch.load(weights_only=True) does not come back from the first three.
HOSTILE = {
    "a hash without end": (archive(b"}" + PAIRS + b"Ns"), "keys that are neither texts nor small integers"),
    "a text without end": (archive(PAIRS + b")R"), "it has tuple in the place of type"),
    "colliding hashes": (archive(b"}(" + COLLIDING + b"u"), "keys that are neither texts nor small integers"),
    "a version without end": (number(LEGACY_START[0]) + b"." + PAIRS + b"." + b"}." * 3, "does not begin"),
    "bytes by the gigabyte": (archive(b"cbuiltins\nbytearray\n" + number(10**12) + b"\x85R"), "builtins.bytearray"),
    "a tensor by its size": (archive(b"ctorch\nFloatTensor\n" + number(10**12) + b"\x85R"), "it is torch.FloatTensor"),
    "code": (archive(b"cposix\nsystem\n" + text("exit") + b"\x85R"), "it is posix.system; expected"),
    "a long pickle": (archive(b"N" * (1 << 20)), "its pickle is longer than 1,048,576 bytes"),
    "deflated": (archive(b"}", zipfile.ZIP_DEFLATED, junk=bytes(1 << 20)), "its entries are packed"),
    "many entries": (archive(b"}", **{f"{name}": b"" for name in range(20_000)}), "table of contents is too long"),
    "spread": (archive(first_weight(1, 0, (10**6, 10**6), (0, 0))), "key encoder.fc1.weight: .* storage of 1 values"),
    "too large": (archive(first_weight(1, 0, (2**28,), (1,))), "key encoder.fc1.weight: .* in a storage of 1 values"),
    "out of bounds": (archive(first_weight(1, 1, (1,), (1,))), "key encoder.fc1.weight: .* in a storage of 1 values"),
    "backwards": (archive(first_weight(1, 0, (1,), (-1,))), "key encoder.fc1.weight: has an impossible"),
    "before its start": (archive(first_weight(1, -1, (1,), (1,))), "key encoder.fc1.weight: has an impossible"),
    "overflow": (archive(first_weight(1, 0, (2**63,), (1,))), "key encoder.fc1.weight: has an impossible"),
    "dimensions": (archive(first_weight(1, 0, (1,) * 9000, (1,) * 9000)), "key encoder.fc1.weight: has an impossible"),
    "short storage": (archive(first_weight(2**40, 0, (1,), (1,))), "its storages are longer than the file"),
    "attributes of a tensor": (archive(first_weight(1, 0, (1,), (1,))[:-1] + b"}bs"), "it sets attributes"),
    "many copies": (archive(MANY + b"ccollections\nCounter\nq\x01" + b"h\x01h\x00\x85R" * 9000), "too many objects"),
    "many calls": (archive(b"ccollections\nOrderedDict\nq\x01" + b"h\x01)R" * 90_000), "it builds too many objects"),
    "lines": (archive(b"}" + text("\n\x1b[31m") + b"Ns"), r"has no key of this model, but \\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "a\nb.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        convert.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_nothing_is_called(tmp_path, state_dict, monkeypatch):
    """Neither what the file names, nor torch.load, which would look for it."""
    monkeypatch.setattr(torch, "load", None)
    marker = tmp_path / "code-was-run"
    for kind, value in (("code", Evil(marker)), ("a module", VAE(6, 2, 9)), ("a class", Evil)):
        torch.save({"model": state_dict, "more": value}, tmp_path / "a.pth")
        with pytest.raises(WeightsError, match=r"key more: is .*system;") if kind == "code" else nullcontext():
            convert.load(tmp_path / "a.pth")
    assert not marker.exists()


def rezipped(content: bytes, extra: bytes = b"", attributes: int = 0, **others: bytes) -> bytes:
    """The same archive with more entries, in other folders or not, or with extra fields or attributes."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w") as target:
        for name, value in [(name, source.read(name)) for name in source.namelist()] + list(others.items()):
            entry = zipfile.ZipInfo(name)
            entry.extra, entry.external_attr = extra, attributes
            target.writestr(entry, value)
    return file.getvalue()


def patched(content: bytes, place: int, new: bytes) -> bytes:
    """The same length, with other bytes that many from the end."""
    return content[: len(content) - place] + new + content[len(content) - place + len(new) :]


# What zipfile and PyTorch's reader may see differently, made of a good archive. PyTorch's ends with a long end record
# of 56 bytes, its place in 20, and the short one in 22.
AMBIGUOUS = {
    "bytes before": lambda good: good[:4] + good,
    "bytes after": lambda good: good + bytes(4),
    "comment": lambda good: patched(good, 2, b"\4\0") + b"abcd",
    "two archives": lambda good: good + good,
    "two end records": lambda good: good + good[-22:],
    "another count": lambda good: patched(good, 98 - 32, b"\1"),
    "another count, short": lambda good: patched(rezipped(good), 12, b"\1"),
    "another table": lambda good: patched(good, 98 - 48, bytes(8)),
    "another table, short": lambda good: patched(rezipped(good), 6, bytes(4)),
    "another long end": lambda good: patched(good, 42 - 8, bytes(8)),
    "capitals": lambda good: rezipped(good, **{"archive/DATA.PKL": b"\x80\x02}" + PAIRS + b"Ns."}),
    "another folder": lambda good: rezipped(good, **{"other/data.pkl": b"\x80\x02}."}),
    "extra field": lambda good: rezipped(good, b"\x75\x70\1\0\1"),
    "folders": lambda good: rezipped(good, attributes=0x10),
    "a bit": lambda good: good.replace(b"\x80\x3f", b"\x80\xbf", 1),
}  # fmt: skip


REFUSED = {"bytes after", "comment", "two end records", "another table", "another table, short"}
REFUSED |= {"another folder", "a bit"}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_archives_that_two_readers_may_take_differently(name, tmp_path, state_dict):
    """What zipfile has found is read, or nothing."""
    path = tmp_path / "vae.pth"
    file = io.BytesIO()
    torch.save({key: torch.ones_like(value) for key, value in state_dict.items()}, file)
    for content in (file.getvalue(), rezipped(file.getvalue()), file.getvalue()[:-98] + file.getvalue()[-22:]):
        path.write_bytes(content)
        convert.load(path)
    changed = AMBIGUOUS[name](file.getvalue())
    assert changed not in (file.getvalue(), rezipped(file.getvalue()))
    path.write_bytes(changed)
    if name in REFUSED:
        with pytest.raises(WeightsError, match="is not a file of plain tensors"):
            convert.load(path)
    else:
        assert all((tensor == 1).all() for tensor in convert.load(path).values())


def test_bytes_after_a_legacy_file(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "vae.pth", _use_new_zipfile_serialization=False)
    with (tmp_path / "vae.pth").open("ab") as file:
        file.write(b"x")
    with pytest.raises(WeightsError, match="bytes and should have"):
        convert.load(tmp_path / "vae.pth")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
def test_what_else_a_checkpoint_may_hold(tmp_path, state_dict):
    path = tmp_path / "checkpoint.pth"
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5]).state_dict()  # its milestones are a Counter
    more = {"size": torch.Size([2, 3]), "device": torch.device("cuda:0"), "type": torch.float32, "schedule": schedule}
    torch.save({"model": state_dict} | more, path)
    assert all(torch.equal(value, state_dict[key]) for key, value in convert.load(path).items())
    others = {
        "sparse": torch.eye(2).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "meta": torch.ones(1, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.quint8),
        "conjugate": torch.ones(1, dtype=torch.complex64).conj(),
        "bytes": bytearray(b"abc"),
    }
    for name, value in others.items():
        torch.save({"model": state_dict, "more": {"first": 1, name: value}}, path)
        with pytest.raises(WeightsError, match=f"key more.{name}: is .*; expected a dense tensor or plain values"):
            convert.load(path)


class Settings(dict):
    """Whatever a program keeps its options in."""


BESIDE = {
    "argparse": (argparse.Namespace(lr=1e-3, data=Path("data")), "argparse.Namespace, pathlib.PosixPath"),
    "a class of the program": ([Settings(beta=4)], "Settings"),
    "an array": ({"mean": np.ones(3)}, "numpy.ndarray"),
    "a random state": ((np.random.get_state(), 3), "numpy.ndarray"),  # noqa: NPY002 - what programs of old keep
    "a date": (datetime.datetime(2026, 1, 1), "datetime.datetime"),
    "a set": ({"encoder", "decoder"}, "of set"),
    "a text of numpy": (np.str_("a"), "numpy.generic"),
    "a class": (torch.optim.Adam, ""),
    "a function": (torch.nn.functional.relu, ""),
    "a dict of dicts": (collections.defaultdict(dict, a={"b": 1}), ""),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_weights_are_left_out(name, legacy, tmp_path, state_dict, capsys):
    value, named = BESIDE[name]
    torch.save({"args": value, "model": state_dict}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    loaded = convert.load(tmp_path / "a.pth")
    assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)
    printed = capsys.readouterr().out
    assert (
        printed.endswith(f"{named} in the file are left out\n") and printed.count("\n") == 1 if named else not printed
    )


@pytest.mark.parametrize(
    "value", [np.float64(0.1), np.float32(0.1), np.int64(-3), np.uint8(200), np.bool_(True), np.array(7, ">i4")[()]]
)
def test_numbers_of_numpy_are_numbers(value, tmp_path):
    torch.save({"value": value}, tmp_path / "a.pth")
    (found,) = convert.read(tmp_path / "a.pth").values()
    assert found == value.item()
    assert type(found) is type(value.item())


def test_objects_in_the_place_of_weights_are_refused(tmp_path, state_dict):
    path = tmp_path / "a.pth"
    arrays = {key: value.numpy() for key, value in state_dict.items()}
    model = VAE(6, 2, 9)
    for content, message in (
        (arrays, "key encoder.fc1.weight: is ndarray; expected a dense tensor"),
        (state_dict | {"decoder.fc2.bias": argparse.Namespace()}, "key decoder.fc2.bias: is Namespace; expected"),
        (model, r"holds VAE; expected what model.state_dict\(\) returns"),
        ({"model": model}, "key model: is VAE; expected a state dict"),
    ):
        torch.save(content, path)
        with pytest.raises(WeightsError, match=message):
            convert.load(path)


def test_tensors_that_share_a_storage(tmp_path, state_dict):
    tied = state_dict | {"encoder.fc2_logvar.weight": state_dict["encoder.fc2_mu.weight"]}
    torch.save(tied, tmp_path / "tied.pth")
    loaded = convert.load(tmp_path / "tied.pth")
    assert all(torch.equal(loaded[key], tied[key]) for key in tied)
    square = {key: torch.ones(5, 5) if key.endswith("weight") else torch.ones(5) for key in state_dict}
    torch.save(
        square | dict.fromkeys((key for key in square if "weight" in key), torch.ones(5, 5)), tmp_path / "all.pth"
    )
    with pytest.raises(WeightsError, match=r"key encoder.fc2_logvar.weight: shares its storage with too many others"):
        convert.load(tmp_path / "all.pth")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_sound_file_is_read_bit_for_bit(state_dict, dtype, new_format, tmp_path):
    path = tmp_path / "vae.pth"
    state_dict = {key: value.to(dtype) for key, value in state_dict.items()}
    flat = torch.cat([value.flatten() for value in state_dict.values()])
    views, start = {}, 0
    for key, value in state_dict.items():
        views[key] = flat[start : start + value.numel()].reshape(value.shape)
        start += value.numel()
    kinds = {
        "plain": state_dict,
        "model.state_dict()": VAE(6, 2, 9).to(dtype).state_dict() | state_dict,  # with its _metadata
        "parameters": {key: torch.nn.Parameter(value) for key, value in state_dict.items()},
        "one storage": views,
        "strided": {key: value.t().contiguous().t() for key, value in state_dict.items()},
        "every other": {key: value.repeat_interleave(2, 0)[::2] for key, value in state_dict.items()},
    }
    for name, kind in kinds.items():
        torch.save(kind, path, _use_new_zipfile_serialization=new_format)
        loaded = convert.load(path)
        reference = torch.load(path, weights_only=True)
        for key, value in state_dict.items():
            assert loaded[key].dtype == dtype, name
            assert loaded[key].numpy().tobytes() == value.numpy().tobytes(), name
            assert torch.equal(loaded[key], reference[key]), name


def test_files_of_other_machines(state_dict, tmp_path):
    """A GPU's, and one that keeps the bytes of a number the other way round."""
    path = tmp_path / "vae.pth"
    torch.save(state_dict, path)
    with zipfile.ZipFile(path) as source:
        entries = {name.split("/", 1)[1]: source.read(name) for name in source.namelist()}
    for name, content in entries.items():
        if name.startswith("data/"):
            entries[name] = np.frombuffer(content, "<f4").astype(">f4").tobytes()
    pickle = entries.pop("data.pkl").replace(text("cpu"), text("cuda:0"))
    path.write_bytes(archive(pickle[2:-1], **entries | {"byteorder": b"big"}))
    loaded = convert.load(path)
    assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)


def test_fuzzing():
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.fuzz_weights", "--inputs", "600"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "600 inputs" in result.stdout
