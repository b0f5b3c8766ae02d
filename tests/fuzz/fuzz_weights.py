"""Damaged and hostile weights files: `python -m tests.fuzz.fuzz_weights --inputs 100000`, or `--minutes 5`.

Every input is a sound state dict or checkpoint with bytes changed, its pickle rewritten, its archive repacked or its
entries spoilt, or a file made to do harm. What `torch_ref` makes of it has to be finite weights of matching shapes, or
a `WeightsError` of one printable line, in little memory and time, with no code of the file run. The first one that is
not is kept and named, with exit code 1; a crash or a hang is one too, for the work is done in a child.
"""

import argparse
import io
import json
import mmap
import os
import pickletools
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from tests.fuzz.fuzz_data import NUMBERS, damaged
from torch_ref import convert, optimizer
from torch_ref.layouts import LAYOUTS
from torch_ref.model import VAE
from vae_jax.system.errors import WeightsError

MAX_SECONDS = 10.0
MAX_GROWTH_MB = 200
ADDRESS_SPACE = 2 << 30  # what a child may map on top of what it starts with
CHUNK = 5000  # inputs a child
NAMES = ("plain.pth", "plain.safetensors", "odd\n\x1b[31m\udcff.pth")

# Pieces of pickles. A nest of pairs, each holding the one before twice: to hash or to print it takes 2^60 steps.
NEST = b"K\x01\x85q\xc8" + b"h\xc8h\xc8\x86q\xc8" * 60
GLOBALS = [
    "os system", "posix system", "builtins eval", "builtins bytearray", "__builtin__ bytearray", "torch load",
    "torch.hub load", "torch FloatTensor", "torch UntypedStorage", "torch Tensor", "torch.nn.parameter Parameter",
    "torch Size", "torch device", "torch float32", "torch HalfStorage", "torch QInt8Storage", "torch NoStorage",
    "torch.storage UntypedStorage", "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter", "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_nested_tensor", "torch._utils _rebuild_wrapper_subclass",
    "torch._utils _rebuild_meta_tensor_no_storage", "torch._tensor _rebuild_from_type_v2", "collections OrderedDict",
    "collections Counter", "numpy.core.multiarray _reconstruct", "numpy._core.multiarray scalar", "numpy dtype",
    "_codecs encode", "argparse Namespace", "pathlib PosixPath", "a\x1bb c", " ",
]  # fmt: skip
HOSTILE_NUMBERS = [*NUMBERS, -1, -(2**31), 2**40, 10**12, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 2**1000]


def text(value: str) -> bytes:
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def numbers(values: list[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def opcodes(rng: np.random.Generator, canary: Path) -> bytes:
    """A piece of a pickle that fits nowhere."""
    name = str(rng.choice(GLOBALS)).replace(" ", "\n", 1).encode()
    hostile = HOSTILE_NUMBERS[rng.integers(len(HOSTILE_NUMBERS))]
    pieces = [
        b"cposix\nsystem\n(" + text(f"touch '{canary}'") + b"tR",
        b"c" + name + b"\n",
        b"c" + name + b"\n(" + number(hostile) + b"tR",
        b"c" + name + b"\n)\x81",
        NEST,
        NEST + b")R",
        b"}" + NEST + b"Ns",
        number(hostile),
        b"G" + struct.pack(">d", rng.choice([0.0, -1.0, 0.5, np.nan, np.inf, 1e300])),
        b"r" + struct.pack("<I", int(rng.choice([0, 2**31, 2**32 - 1]))),
        b"j" + struct.pack("<I", int(rng.choice([0, 5, 2**32 - 1]))),
        b"h" + rng.bytes(1),
        b"q" + rng.bytes(1),
        b"X" + struct.pack("<I", 2**32 - 1),
        b"\x8e" + struct.pack("<Q", 2**60),  # bytes of that length
        b"I" + b"9" * 5000 + b"\n",
        text("\n\x1b[31m\u202e"),
        text("x" * 5000),
        *(bytes([byte]) for byte in b"()]}NQRbtuesa.012l\x85\x86\x87\x88\x8f\x93\x94\x81"),
    ]
    return pieces[rng.integers(len(pieces))]


def rewritten(pickle: bytes, rng: np.random.Generator, canary: Path) -> bytes:
    """The same pickle with one to three of its opcodes changed, or bytes that are damaged."""
    if rng.random() < 0.2:
        return damaged(pickle, rng)
    places = [place for _, _, place in pickletools.genops(pickle) if place is not None]
    parts = [pickle[start:end] for start, end in zip(places, [*places[1:], len(pickle)], strict=True)]
    for _ in range(rng.integers(1, 4)):
        place, other = (int(place) for place in rng.integers(0, len(parts), 2))
        match rng.integers(0, 5):
            case 0:
                parts[place] = opcodes(rng, canary)
            case 1:
                parts.insert(place, opcodes(rng, canary))
            case 2:
                parts.pop(place)
                parts.append(b".")
            case 3:
                parts[place], parts[other] = parts[other], parts[place]
            case 4:
                # A number where there is one: a size, a stride, an offset, a length, a step.
                small = [index for index, part in enumerate(parts) if part[:1] in (b"K", b"M", b"J")]
                if small:
                    parts[int(rng.choice(small))] = number(HOSTILE_NUMBERS[rng.integers(len(HOSTILE_NUMBERS))])
    return b"".join(parts)


def sound_tree(rng: np.random.Generator) -> dict[str, Any]:
    """A state dict, or a checkpoint with one and an Adam of some steps, or of none."""
    hidden_dim, latent_dim, pixels = (int(size) for size in rng.integers(1, 7, 3))
    layout = list(LAYOUTS)[rng.integers(len(LAYOUTS))]
    model = VAE(hidden_dim, latent_dim, pixels).to(torch.float64 if rng.random() < 0.5 else torch.float32)
    state_dict = convert.to_state_dict(convert.to_params(model.state_dict()), layout)
    if rng.random() < 0.5:
        return state_dict
    adam = torch.optim.Adam(model.parameters())
    if rng.random() < 0.8:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        adam.step()
    names = [("model", "optimizer"), ("model_state_dict", "optimizer_state_dict"), ("state_dict", "optimizer")]
    model_key, optimizer_key = names[rng.integers(len(names))]
    return {model_key: state_dict, optimizer_key: adam.state_dict(), "epoch": 3, "losses": [1.5, 1.25]}


def saved(tree: object, legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(tree, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


class Evil:
    """Touches a file where it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


def spoil_tensor(tensor: torch.Tensor, rng: np.random.Generator) -> Any:
    """Something else in its place, sound or not."""
    changes: list[Callable[[], Any]] = [
        lambda: tensor.half(),
        lambda: tensor.bfloat16(),
        lambda: tensor.double(),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.long(),
        lambda: tensor > 0,
        lambda: tensor * float(rng.choice([np.nan, np.inf, -1, 0])),
        lambda: tensor.t(),
        lambda: tensor.t().contiguous().t(),
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor[:0],
        lambda: tensor.reshape(*[1] * int(rng.integers(1, 70)), -1),
        lambda: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape),
        lambda: torch.zeros((), dtype=tensor.dtype).expand(10**6, 10**6),
        lambda: torch.cat([tensor, tensor])[: len(tensor)],
        lambda: tensor.to_sparse(),
        lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: torch.nn.Parameter(tensor),
        lambda: tensor.clone().requires_grad_(),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8),
        lambda: torch.nested.nested_tensor([tensor, tensor]),
        lambda: tensor.numpy(),
        lambda: tensor.tolist(),
        lambda: None,
    ]
    return changes[rng.integers(len(changes))]()


def spoil(tree: dict[Any, Any], rng: np.random.Generator, canary: Path) -> dict[Any, Any]:
    """A copy with one entry changed, somewhere down in it."""
    tree = dict(tree)
    if not tree:
        return tree
    key = list(tree)[rng.integers(len(tree))]
    value = tree[key]
    if isinstance(value, dict) and rng.random() < 0.95:
        return tree | {key: spoil(value, rng, canary)}
    if isinstance(value, list) and value and isinstance(value[0], dict) and rng.random() < 0.9:
        group = value[0]
        many = [group] * int(rng.integers(1, 4))
        half = [group | {"params": [0, 1, 2, 3, 4]}, group | {"params": [5, 6, 7, 8, 9]}]
        return tree | {key: [[spoil(group, rng, canary)], many, half][rng.integers(3)]}
    match rng.integers(0, 5):
        case 0:
            del tree[key]
        case 1:
            names = ["extra", "\n\x1b[31m", 3, 2**70, (1, 2), 1.5, None, "model", "x" * 10_000, "optimizer"]
            tree[names[rng.integers(len(names))]] = tree.pop(key) if rng.random() < 0.5 else value
        case 2 if isinstance(value, torch.Tensor):
            tree[key] = torch.zeros(*(int(size) for size in rng.integers(0, 8, rng.integers(0, 4))), dtype=value.dtype)
        case 3 | 4 if isinstance(value, torch.Tensor):
            tree[key] = spoil_tensor(value, rng)
        case _:
            values = [0, -1, 2**40, 0.5, float("nan"), float("inf"), True, None, "x", [], {}, (0.9, 0.99), 1e-8, 2**70]
            values += [Evil(canary), os.system, [Evil(canary)], set(), 1j, np.float64(1), range(3)]
            values += [argparse.Namespace(lr=1), Path(), np.ones(2), np.str_("x"), VAE(1, 1, 1), torch.optim.Adam]
            tree[key] = values[rng.integers(len(values))]
    return tree


def repacked(content: bytes, rng: np.random.Generator, canary: Path) -> bytes:
    """A sound archive with a pickle rewritten, or entries that are changed, left out, packed or doubled."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    kind = rng.integers(0, 10)
    place = int(rng.integers(0, len(entries)))
    name, value = entries[place]
    if kind < 6:
        place = next(place for place, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
        entries[place] = (entries[place][0], rewritten(entries[place][1], rng, canary))
    elif kind == 6:
        entries[place] = (name, [b"", value[:-1], value + b"\0", b"big", b"\xff" * len(value)][rng.integers(5)])
    elif kind == 7:
        entries.pop(place)
    elif kind == 8:
        names = [name, "data.pkl", "other/data.pkl", "archive/constants.pkl", "\n", "../../x", "/etc/x", name + "/"]
        entries.append((names[rng.integers(len(names))], value))
    packed = zipfile.ZIP_DEFLATED if kind == 9 else zipfile.ZIP_STORED
    if kind == 9 and rng.random() < 0.05:
        entries.append(("archive/data/99", bytes(50 << 20)))
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", packed) as archive:
        warnings.simplefilter("ignore")  # names that stand twice
        for name, value in entries:
            archive.writestr(name, value)
    return file.getvalue()


def relegated(content: bytes, rng: np.random.Generator, canary: Path) -> bytes:
    """A file of the old format with one of its five pickles rewritten."""
    file = io.BytesIO(content)
    ends = [0]
    for _ in range(5):
        for _ in pickletools.genops(file):
            pass
        ends.append(file.tell())
    place = int(rng.choice([0, 1, 2, 3, 3, 3, 3, 4, 4]))
    start, end = ends[place : place + 2]
    return content[:start] + rewritten(content[start:end], rng, canary) + content[end:]


def reheaded(content: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file with another header."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    entry = header[list(header)[rng.integers(len(header))]]
    match rng.integers(0, 5):
        case 0:
            entry["shape"] = [int(size) for size in rng.choice([0, 1, 2, 2**31, 2**62], int(rng.integers(0, 5)))]
        case 1:
            entry["shape"] = [1] * int(rng.integers(0, 3000)) + entry.get("shape", [])
        case 2:
            entry["data_offsets"] = [int(offset) for offset in rng.choice([0, 4, 8, 2**40, 2**63 - 1], 2)]
        case 3:
            entry["dtype"] = str(rng.choice(["F16", "BF16", "F8_E4M3", "BOOL", "I64", "C64", "F4", "X"]))
        case 4:
            header[str(rng.choice(["__metadata__", "\n", "x" * 10_000]))] = entry
    packed = json.dumps(header).encode()
    stated = len(packed) if rng.random() < 0.8 else int(rng.choice([0, 1, 2**20, 2**31, 2**62]))
    return struct.pack("<Q", stated) + packed + content[8 + length :]


def bomb(rng: np.random.Generator) -> bytes:
    """A file that asks for more than it holds."""
    count = int(rng.choice([1, 2**20, 2**28, 10**12, 2**62]))
    extent = int(rng.choice([1, 2**28, 10**12, 2**62]))
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + b"tQ"
    dims = int(rng.choice([0, 1, 1, 2, 2, 3, 65, 30_000]))
    sizes, strides = [extent] * min(dims, 3) + [1] * (dims - 3), [int(rng.choice([0, 1, -1, 2**62]))] * dims
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(int(rng.choice([0, -1, 1, 2**62])))
    tensor += numbers(sizes) + numbers(strides) + b"\x89NtR"
    keys = [f"{name}.{kind}" for name in LAYOUTS["fc-mu"] for kind in ("weight", "bias")]
    pickles = [
        b"}(" + b"".join(text(key) + tensor for key in keys) + b"u.",
        b"}(" + b"".join(number(key * (2**61 - 1)) + b"N" for key in range(20_000)) + b"u.",  # all hash to 0
        b"K\x01" + b"\x85" * 200_000 + b".",
        b"(" * 200_000 + b"t" * 200_000 + b".",
        b"N" * (1 << 21) + b".",
        tensor + b".",
    ]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + pickles[rng.integers(len(pickles))])
        archive.writestr("a/data/0", bytes(4))
        if rng.random() < 0.1:
            for entry in range(20_000):
                archive.writestr(f"a/{entry}", b"")
    return file.getvalue()


class Inputs:
    """Writes damaged inputs, each by its seed and number, from a stock of sound files."""

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.seed = seed
        self.trees = [sound_tree(rng) for _ in range(60)]
        self.archives = [saved(tree, False) for tree in self.trees]
        self.legacy = [saved(tree, True) for tree in self.trees]
        plain = [convert.to_state_dict(convert.to_params(convert.model_of(tree))) for tree in self.trees]
        self.safetensors = [safetensors.torch.save(state_dict) for state_dict in plain]

    def check_stock(self, folder: Path) -> None:
        """Raises AssertionError where a sound file is refused: then damaged ones would tell nothing."""
        for name, stock in ((NAMES[0], self.archives), (NAMES[0], self.legacy), (NAMES[1], self.safetensors)):
            for content in stock:
                (folder / name).write_bytes(content)
                assert check(folder / name, True) == check(folder / name, False) == "loaded"

    def write(self, folder: Path, index: int, canary: Path) -> Path:
        """Writes an input into an empty folder.

        Returns:
          The path to give to `load`.
        """
        rng = np.random.default_rng([self.seed, index])
        path = folder / NAMES[0]
        kind, stock = rng.random(), int(rng.integers(len(self.trees)))
        if kind < 0.001:
            return self._write_no_file(folder, rng)
        if kind < 0.02:
            path = folder / NAMES[2]
        if kind < 0.002:
            content = bomb(rng)
        elif kind < 0.3:
            content = repacked(self.archives[stock], rng, canary)
        elif kind < 0.4:
            content = relegated(self.legacy[stock], rng, canary)
        elif kind < 0.6:
            content = saved_spoilt(self.trees[stock], rng, canary)
        elif kind < 0.7:
            path = folder / NAMES[1]
            content = self.safetensors[stock]
            content = reheaded(content, rng) if rng.random() < 0.5 else damaged(content, rng)
        elif kind < 0.99:
            content = (self.archives if rng.random() < 0.6 else self.legacy)[stock]
            # Archives are read from their end.
            content = damaged(content, rng) if rng.random() < 0.5 else damaged(content[::-1], rng)[::-1]
        else:
            content = (self.archives, self.legacy)[rng.integers(2)][stock]
        path.write_bytes(content)
        return path

    @staticmethod
    def _write_no_file(folder: Path, rng: np.random.Generator) -> Path:
        path = folder / NAMES[rng.integers(len(NAMES))]
        match rng.integers(0, 5):
            case 0:
                os.mkfifo(path)
            case 1:
                path.symlink_to("/dev/zero")
            case 2:
                path.symlink_to(path)
            case 3:
                return folder
            case 4:
                return folder / ("x" * 5000)
        return path


def saved_spoilt(tree: dict[str, Any], rng: np.random.Generator, canary: Path) -> bytes:
    """The file of a tree with one or two entries spoilt; the tree itself where that cannot be saved or is no change."""
    legacy = rng.random() < 0.3
    try:
        spoilt = spoil(tree, rng, canary)
        return saved(spoil(spoilt, rng, canary) if rng.random() < 0.2 else spoilt, legacy)
    except Exception:  # some things do not exist: a flat bias transposed, a sparse tensor in the old format
        return saved(tree, legacy)


def check(path: Path, whole: bool) -> str:
    """Reads a file: the whole checkpoint, or its model alone.

    Returns:
      `loaded`, or `refused`.

    Raises:
      AssertionError: What came out is neither sound weights nor a `WeightsError` of one printable line.
    """
    try:
        read = optimizer.load_checkpoint(path) if whole else convert.load(path)
    except WeightsError as error:
        message = str(error)
        assert message.isprintable(), f"not one printable line: {message[:500]!r}"
        assert len(message) < 1000 + 10 * len(str(path)), f"a long message: {message[:500]}"
        assert "MemoryError" not in message and "allocate" not in message, f"the memory gave out: {message}"
        return "refused"
    if isinstance(read, optimizer.Checkpoint):
        check_params(convert.to_state_dict(read.params))
        if read.adam:
            count, mu, nu, (learning_rate, b1, eps) = read.adam
            assert type(count) is int and 0 <= count < 2**31, count
            assert all(type(value) is float and 0 < value < float("inf") for value in (learning_rate, eps))
            assert type(b1) is float and 0 <= b1 < 1, b1
            shapes = [
                {key: (tensor.shape, tensor.dtype) for key, tensor in convert.to_state_dict(tree).items()}
                for tree in (read.params, mu, nu)
            ]
            assert shapes[0] == shapes[1] == shapes[2], shapes
            check_params(convert.to_state_dict(mu))
            assert all((tensor >= 0).all() for tensor in convert.to_state_dict(nu).values())
    else:
        check_params(read)
    return "loaded"


def check_params(state_dict: convert.StateDict) -> None:
    """Raises AssertionError where they are no weights of the PyTorch model."""
    with torch.device("meta"):
        model = VAE(*convert.sizes(state_dict))
    assert {key: value.shape for key, value in state_dict.items()} == {
        key: value.shape for key, value in model.state_dict().items()
    }
    for tensor in state_dict.values():
        assert tensor.dtype in (torch.float32, torch.float64)
        assert torch.isfinite(tensor).all()


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def work(inputs: Inputs, first: int, last: int, folder: Path, progress: mmap.mmap, ends: float) -> dict[str, Any]:
    """Reads the inputs from `first` to before `last`, or until the clock says `ends`; in the child.

    Raises:
      AssertionError: One of them is not taken as it should be.
    """
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    canary = folder.parent / "canary"
    outcomes: Counter[str] = Counter()
    slowest, base, peak = 0.0, 0, 0
    for index in range(first, last):
        if time.monotonic() > ends:
            break
        progress[:8] = struct.pack("<q", index)
        empty(folder)
        path = inputs.write(folder, index, canary)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()  # of this process alone, however busy the machine
        outcomes[check(path, index % 3 > 0)] += 1
        seconds = time.process_time() - began
        slowest = max(slowest, seconds)
        assert not canary.exists(), "code in it was run"
        assert seconds < MAX_SECONDS, f"took {seconds:.1f} s"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        base = base or before
        assert peak - before < MAX_GROWTH_MB * 1000, f"took {(peak - before) / 1000:.0f} MB"
    return {"outcomes": outcomes, "slowest": slowest, "peak": peak, "growth": peak - base}


def watched(inputs: Inputs, first: int, last: int, parent: Path, ends: float) -> dict[str, Any]:
    """`work` in a child that may crash or hang.

    Exits with code 1, naming the input, where it does, or where an input is not taken as it should be.
    """
    folder, report = parent / "input", parent / "report.json"
    progress = mmap.mmap(-1, 8)
    progress[:8] = struct.pack("<q", first)
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            report.write_text(json.dumps(work(inputs, first, last, folder, progress, ends)))
            code = 0
        except BaseException:
            report.write_text(traceback.format_exc(chain=False))
        os._exit(code)
    seen, since, status = progress[:8], time.monotonic(), None
    while status is None:
        time.sleep(0.02)
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif progress[:8] != seen:
            seen, since = progress[:8], time.monotonic()
        elif time.monotonic() - since > 6 * MAX_SECONDS:  # on a busy machine, the child's own clock is the judge
            os.kill(child, signal.SIGKILL)
            since = float("inf")
    if status == 0:
        return json.loads(report.read_text())
    kept = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for path in folder.iterdir():
        path.rename(kept / path.name)
    what = report.read_text() if status == 1 else f"crashed or hung, exit status {status}"
    print(f"input {struct.unpack('<q', progress[:8])[0]} of seed {inputs.seed}, kept in {kept}: {what}")
    sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.monotonic()
    inputs = Inputs(options.seed)
    outcomes: Counter[str] = Counter()
    slowest, peak, growth = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        parent = Path(name)
        (parent / "input").mkdir()
        inputs.check_stock(parent / "input")
        for first in range(0, options.inputs, CHUNK):
            last = min(first + CHUNK, options.inputs)
            found = watched(inputs, first, last, parent, start + 60 * options.minutes)
            outcomes.update(found["outcomes"])
            slowest, peak, growth = (
                max(slowest, found["slowest"]), max(peak, found["peak"]), max(growth, found["growth"])
            )  # fmt: skip
    print(
        f"{sum(outcomes.values()):,} inputs in {time.monotonic() - start:.0f} s: {outcomes['refused']:,} refused with a"
        f" WeightsError, {outcomes['loaded']:,} sound; no code run, no crash; slowest {slowest:.2f} s,"
        f" memory peak {peak / 1000:.0f} MB, of that {growth / 1000:.0f} MB by inputs"
    )


if __name__ == "__main__":
    main()
