import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fuzz_weights import number, numbers, text
from torch_ref import convert
from torch_ref.convert import LAYOUTS, WeightsError
from torch_ref.model import VAE
from torch_ref.pth import LEGACY_START

KEYS = {
    "documented": ["encoder.fc1", "encoder.fc2_mu", "encoder.fc2_logvar", "decoder.fc1", "decoder.fc2"],
    "fc-mu": ["encoder.fc1", "encoder.fc_mu", "encoder.fc_logvar", "decoder.fc1", "decoder.fc2"],
    "pytorch-examples": ["fc1", "fc21", "fc22", "fc3", "fc4"],
}


@pytest.fixture
def state_dict():
    torch.manual_seed(0)
    return VAE(hidden_dim=6, latent_dim=2, pixels=9).state_dict()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(state_dict, layout):
    converted = convert.to_state_dict(convert.to_params(state_dict), layout)
    assert list(converted) == [f"{name}.{kind}" for name in KEYS[layout] for kind in ("weight", "bias")]
    for ours, theirs in zip(converted.values(), state_dict.values(), strict=True):
        assert torch.equal(ours, theirs)
    assert convert.check(converted) == layout
    assert convert.sizes(converted) == (6, 2, 9)
    back = convert.to_state_dict(convert.to_params(converted))
    assert all(torch.equal(back[key], state_dict[key]) for key in state_dict)


def test_kernels_are_transposed_weights(state_dict):
    params = convert.to_params(state_dict)
    np.testing.assert_array_equal(params["encoder"]["fc1"]["kernel"], state_dict["encoder.fc1.weight"].numpy().T)
    assert params["encoder"]["fc1"]["kernel"].shape == (9, 6)


def test_conversion_copies(state_dict):
    params = convert.to_params(state_dict)
    converted = convert.to_state_dict(params)
    before = converted["decoder.fc2.bias"].clone(), state_dict["decoder.fc2.bias"].clone()
    params["decoder"]["fc2"]["bias"][:] = 7
    assert torch.equal(converted["decoder.fc2.bias"], before[0])
    assert torch.equal(state_dict["decoder.fc2.bias"], before[1])


def test_the_file_is_plain(state_dict, tmp_path):
    path = tmp_path / "vae.pth"
    convert.save(convert.to_state_dict(convert.to_params(state_dict)), path)
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == list(state_dict)
    for tensor in loaded.values():
        assert type(tensor) is torch.Tensor
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    VAE(6, 2, 9).load_state_dict(loaded, strict=True)


def change(key, new):
    return lambda state_dict: state_dict | {key: new(state_dict.get(key))}


# What is done to a good state dict, and what the refusal says.
BAD = {
    "missing": (lambda state_dict: dict(list(state_dict.items())[:-1]), "key decoder.fc2.bias: missing"),
    "nothing": (lambda _: {}, "has no key of this model, but none at all; expected decoder.fc1.bias"),
    "extra": (change("encoder.fc3.bias", lambda _: torch.zeros(1)), "key encoder.fc3.bias: unknown"),
    "not a string": (change(3, lambda _: torch.zeros(1)), "key 3: unknown"),
    "not a tensor": (change("decoder.fc2.bias", lambda _: [1.0]), "key decoder.fc2.bias: is list"),
    "sparse": (
        change("decoder.fc2.weight", torch.Tensor.to_sparse),
        "key decoder.fc2.weight: is (Tensor|torch._utils._rebuild_sparse)",
    ),
    "transposed": (change("decoder.fc2.weight", torch.t), r"key decoder.fc2.weight: has shape \[6, 9\]"),
    "flat": (change("decoder.fc1.weight", torch.ravel), r"key decoder.fc1.weight: has shape \[12\]"),
    "column": (change("encoder.fc1.bias", lambda t: t[:, None]), r"key encoder.fc1.bias: has shape \[6, 1\]"),
    "other size": (change("encoder.fc2_mu.bias", lambda _: torch.zeros(3)), "key encoder.fc2_mu.weight: has shape"),
    "empty": (lambda _: dict(VAE(6, 0, 9).state_dict()), "expected at least one value"),
    "half": (change("decoder.fc2.bias", torch.Tensor.half), "key decoder.fc2.bias: has type torch.float16"),
    "integer": (change("decoder.fc2.bias", torch.Tensor.int), "key decoder.fc2.bias: has type torch.int32"),
    "mixed": (change("decoder.fc2.bias", torch.Tensor.double), "key decoder.fc2.bias: has type torch.float64"),
    "nan": (change("encoder.fc1.weight", lambda t: t * float("nan")), "key encoder.fc1.weight: holds values that"),
    "infinite": (change("encoder.fc1.bias", lambda t: t / 0), "key encoder.fc1.bias: holds values that are NaN or inf"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", BAD)
def test_bad_state_dicts_are_refused_by_name(state_dict, name, tmp_path):
    apply, message = BAD[name]
    bad = apply(dict(state_dict))
    with pytest.raises(WeightsError, match=message):
        convert.to_params(bad)
    torch.save(bad, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        convert.load(tmp_path / "bad.pth")
    assert str(tmp_path / "bad.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_parameter_trees_are_refused(state_dict):
    params = convert.to_params(state_dict)
    params["encoder"]["fc9"] = params["encoder"].pop("fc1")
    with pytest.raises(WeightsError, match=r"key encoder.fc1.bias: missing"):
        convert.to_state_dict(params)


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
    "a hash without end": (archive(b"}" + PAIRS + b"Ns"), "it has a tuple as a key"),
    "a text without end": (archive(PAIRS + b")R"), "tuple stands for _Name"),
    "hashes that collide": (archive(b"}(" + COLLIDING + b"u"), "it has a int as a key"),
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
    "backwards": (archive(first_weight(1, 0, (1,), (-1,))), "key encoder.fc1.weight: has no sound shape"),
    "before its start": (archive(first_weight(1, -1, (1,), (1,))), "key encoder.fc1.weight: has no sound shape"),
    "overflow": (archive(first_weight(1, 0, (2**63,), (1,))), "key encoder.fc1.weight: has no sound shape"),
    "dimensions": (archive(first_weight(1, 0, (1,) * 9000, (1,) * 9000)), "key encoder.fc1.weight: has no sound shape"),
    "short storage": (archive(first_weight(2**40, 0, (1,), (1,))), "a storage of 1099511627776 values has 4 bytes"),
    "attributes of a tensor": (archive(first_weight(1, 0, (1,), (1,))[:-1] + b"}bs"), "it sets attributes"),
    "many copies": (archive(MANY + b"ccollections\nCounter\nq\x01" + b"h\x01h\x00\x85R" * 9000), "too many objects"),
    "many calls": (archive(b"ccollections\nOrderedDict\nq\x01" + b"h\x01)R" * 90_000), "it builds too many objects"),
    "lines": (archive(b"}" + text("\n\x1b[31m") + b"Ns"), r"has no key of this model, but \\n"),
}  # fmt: skip


@pytest.fixture
def loads(monkeypatch):
    """The calls of torch.load."""
    calls, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: [calls.append(options), load(*args, **options)][1])
    return calls


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name, tmp_path, loads):
    content, message = HOSTILE[name]
    path = tmp_path / "a\nb.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        convert.load(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700
    assert len(loads) == (name == "lines")


def test_torch_load_is_the_reader(tmp_path, state_dict, loads):
    torch.save(state_dict, tmp_path / "vae.pth")
    convert.load(tmp_path / "vae.pth")
    assert loads == [{"map_location": "cpu", "weights_only": True}]


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
    "capitals": lambda good: rezipped(good, **{"archive/DATA.PKL": b"\x80\x02}."}),
    "another folder": lambda good: rezipped(good, **{"other/data.pkl": b"\x80\x02}."}),
    "extra field": lambda good: rezipped(good, b"\x75\x70\1\0\1"),
    "folders": lambda good: rezipped(good, attributes=0x10),
    "a bit": lambda good: good.replace(b"\x80\x3f", b"\x80\xbf", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_archives_that_two_readers_may_take_differently(name, tmp_path, state_dict, loads):
    path = tmp_path / "vae.pth"
    file = io.BytesIO()
    torch.save({key: torch.ones_like(value) for key, value in state_dict.items()}, file)
    for content in (file.getvalue(), rezipped(file.getvalue()), file.getvalue()[:-98] + file.getvalue()[-22:]):
        path.write_bytes(content)
        convert.load(path)
    loads.clear()
    changed = AMBIGUOUS[name](file.getvalue())
    assert changed not in (file.getvalue(), rezipped(file.getvalue()))
    path.write_bytes(changed)
    with pytest.raises(WeightsError, match="is not a file of plain tensors"):
        convert.load(path)
    assert not loads


def test_bytes_after_a_legacy_file(tmp_path, state_dict, loads):
    torch.save(state_dict, tmp_path / "vae.pth", _use_new_zipfile_serialization=False)
    with (tmp_path / "vae.pth").open("ab") as file:
        file.write(b"x")
    with pytest.raises(WeightsError, match="bytes and should have"):
        convert.load(tmp_path / "vae.pth")
    assert not loads


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:torch.quantize_per_tensor")
def test_what_else_a_checkpoint_may_hold(tmp_path, state_dict, loads):
    path = tmp_path / "checkpoint.pth"
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 3, 5]).state_dict()  # its milestones are a Counter
    more = {"size": torch.Size([2, 3]), "device": torch.device("cuda:0"), "type": torch.float32, "schedule": schedule}
    torch.save({"model": state_dict} | more, path)
    assert all(torch.equal(value, state_dict[key]) for key, value in convert.load(path).items())
    loads.clear()
    others = {
        "sparse": torch.eye(2).to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "meta": torch.ones(1, device="meta"),
        "quantized": torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.quint8),
        "conjugate": torch.ones(1, dtype=torch.complex64).conj(),
        "bytes": bytearray(b"abc"),
        "code": os.system,
    }
    for name, value in others.items():
        torch.save({"model": state_dict, "more": {"first": 1, name: value}}, path)
        with pytest.raises(WeightsError, match=f"key more.{name}: is .*; expected a dense tensor or plain values"):
            convert.load(path)
    assert not loads


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "link.pth").symlink_to("/dev/zero")
    (tmp_path / "empty.pth").touch()
    for name in ("pipe.pth", "link.pth", "empty.pth", "."):
        with pytest.raises(WeightsError, match="is empty, or not a regular file; name a weights file"):
            convert.load(tmp_path / name)
    with pytest.raises(WeightsError, match="cannot be read"):
        convert.load(tmp_path / ("x" * 5000))


def test_a_file_too_large_for_the_memory_is_not_read(tmp_path):
    for name in ("large.pth", "large.safetensors"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(1 << 42)  # it takes no room on the disk
        with pytest.raises(WeightsError, match=r"takes 4,398.0 GB; expected at most .* an eighth of the memory"):
            convert.load(tmp_path / name)


def test_a_long_safetensors_header_is_not_read(tmp_path):
    path = tmp_path / "long.safetensors"
    path.write_bytes((2 << 20).to_bytes(8, "little") + b" " * (2 << 20))
    with pytest.raises(WeightsError, match="its header is too long"):
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
        [sys.executable, "-m", "tests.fuzz_weights", "--inputs", "600"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "600 inputs" in result.stdout


def test_an_interrupted_save_leaves_the_old_file(tmp_path, state_dict, monkeypatch):
    path = tmp_path / "vae.pth"
    convert.save(state_dict, path)
    before = path.read_bytes()

    def interrupted(_, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.save(state_dict, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_through_a_link(tmp_path, state_dict):
    (tmp_path / "link.pth").symlink_to(tmp_path / "real.pth")
    convert.save(state_dict, tmp_path / "link.pth")
    assert (tmp_path / "link.pth").is_symlink()
    assert convert.load(tmp_path / "real.pth").keys() == state_dict.keys()


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "torch_ref.convert", *map(str, arguments)], capture_output=True, text=True
    )


def test_command(tmp_path, state_dict):
    torch.save(state_dict, tmp_path / "in.pth")
    result = run(tmp_path / "in.pth", tmp_path / "out.pth", "--layout", "pytorch-examples")
    assert result.returncode == 0, result.stderr
    assert "9-6-2" in result.stdout
    assert sorted(torch.load(tmp_path / "out.pth", weights_only=True))[:2] == ["fc1.bias", "fc1.weight"]

    result = run(tmp_path / "missing.pth", tmp_path / "other.pth")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {tmp_path / 'missing.pth'}: cannot be read (No such file")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "other.pth").exists()
