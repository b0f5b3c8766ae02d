"""Reads what `torch.save` wrote, without calling anything that the file names.

`torch.load(weights_only=True)` runs no code either. But a file of a few hundred bytes can keep it busy forever or fill
the memory: it hashes tuples nested to any depth, allocates whatever a file asks for, unpacks deflated entries of any
size, lets a tensor reach beyond its storage, and ignores checksums. And it refuses a whole checkpoint for an
`argparse.Namespace` in it. So this module steps through the pickle by itself: it makes dense tensors, numbers, texts,
dicts, lists and tuples, and an empty object in the place of every other.
"""

import dataclasses
import io
import math
import pickletools
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch

from vae_jax.system.console import printable, say
from vae_jax.system.errors import WeightsError

# Limits far above what a checkpoint needs, whose pickle has 10 kB and 200 calls and storages.
MAX_LENGTH = 1 << 20  # bytes of a pickle, of an archive's table of contents, or of a safetensors header
MAX_BUILT = 1 << 16  # calls, objects and storages of a pickle, and the items that its calls copy
LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)  # the first two pickles in a file of PyTorch before 1.6
KINDS = {
    "Bool": "bool", "Byte": "uint8", "Char": "int8", "Short": "int16", "Int": "int32", "Long": "int64",
    "Half": "float16", "BFloat16": "bfloat16", "Float": "float32", "Double": "float64",
    "ComplexFloat": "complex64", "ComplexDouble": "complex128",
}  # fmt: skip
STORAGES: dict[str, torch.dtype] = {f"torch.{kind}Storage": getattr(torch, dtype) for kind, dtype in KINDS.items()}
# Functions that make what people keep beside their weights. Calls of any other are refused: they may be an attack.
MAKERS = {f"pathlib.{kind}" for kind in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
MAKERS |= {f"datetime.{kind}" for kind in ("date", "datetime", "time", "timedelta", "timezone")}
MAKERS |= {f"__builtin__.{kind}" for kind in ("complex", "frozenset", "range", "set", "slice", "xrange")}
MAKERS |= {"collections.deque", "functools.partial", "types.SimpleNamespace"}
# NumPy 1 and 2 name their module differently.
ARRAYS, SCALARS = (
    {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core")} for name in ("_reconstruct", "scalar")
)
# Types of NumPy scalars that are read as Python numbers.
NUMBERS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# How many values an opcode takes off the stack; all above the last mark for those without a number.
TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}


def read(path: Path | str) -> object:
    """Reads tensors, dicts, lists, tuples, numbers and texts, in a few times as much memory as the file is long.

    Objects of other classes, and classes and functions themselves, become empty objects of a class of the same name.

    Raises:
      WeightsError: A tensor is not dense or reaches beyond its storage, or a function is called that is not one of
        `MAKERS`; the message names its key.
      OSError: The file cannot be read.
      Exception: Of any kind, for a damaged file or one that `torch.save` did not write.
    """
    content = Path(path).read_bytes()  # read once: another process may be writing to the file
    is_archive = content[:4] == b"PK\3\4"  # torch.load decides by the same bytes
    tree = _read_archive(content) if is_archive else _read_legacy(content)
    if tree.left_out:
        say(printable(f"weights: objects of {', '.join(sorted(tree.left_out)):.200} in the file are left out"))
    return tree.result


def _read_archive(content: bytes) -> "_Walk":
    # One or two records at the end say how long the table of contents is, which zipfile reads at once.
    signature, length, comment = struct.unpack("<4s8xL4xH", content[-22:])
    if content[-42:-38] == b"PK\6\7":
        length = max(length, int.from_bytes(content[-58:-50], "little"))
    if signature != b"PK\5\6" or comment or length > MAX_LENGTH:
        raise ValueError("it does not end as torch.save's archives do, or its table of contents is too long")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("its entries are packed or overlap; torch.save does neither")
        # zipfile verifies the checksum of each.
        parts = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    if len(parts) < len(entries):
        raise ValueError("it has two entries of the same name")
    if len(parts["data.pkl"]) > MAX_LENGTH:
        raise ValueError(f"its pickle is longer than {MAX_LENGTH:,} bytes; save the model and its optimizer alone")
    tree = _Walk(io.BytesIO(parts["data.pkl"]), len(content))
    for key, storage in tree.storages.items():
        storage.fill(parts[f"data/{key}"], parts.get("byteorder", b"little"))
    return tree


def _read_legacy(content: bytes) -> "_Walk":
    """A file of PyTorch before 1.6: five pickles, then each storage, its length in 8 bytes and its values."""
    head = io.BytesIO(content[:MAX_LENGTH])
    magic, version, _, tree, keys = (_Walk(head, len(content)) for _ in range(5))
    if (magic.result, version.result) != LEGACY_START:
        raise ValueError("it does not begin as torch.save does")
    names = [_of(str, key) for key in _of(list, keys.result)]
    if sorted(names) != sorted(tree.storages):
        raise ValueError("its list of storages does not match its tensors")
    start = head.tell()
    for name in names:
        end = start + 8 + tree.storages[name].values.nbytes
        tree.storages[name].fill(content[start + 8 : end], b"little")
        start = end
    if len(content) != start:
        raise ValueError(f"it has {len(content)} bytes and should have {start}")
    return tree


class _Object:
    """Stands in for what a file names: a subclass for a class or function, an instance for what that makes."""

    name = ""


@dataclasses.dataclass
class _NumPyType(_Object):
    code: str
    order: str = "="


@dataclasses.dataclass(frozen=True)
class _Storage(_Object):
    values: torch.Tensor

    def fill(self, content: bytes, order: bytes) -> None:
        if len(content) != self.values.nbytes:
            raise ValueError(f"a storage of {len(self.values)} values has {len(content)} bytes")
        self.values.view(torch.uint8).numpy()[:] = np.frombuffer(content, np.uint8)
        if order == b"big":
            self.values.untyped_storage().byteswap(self.values.dtype)


class _Walk:
    """The next pickle in a file, stepped through as `torch.load` does.

    Args:
      file: Where it begins.
      room: Bytes that its storages have at most.

    Attributes:
      result: The value that it builds.
      storages: The storages of its tensors, by their keys; their values are yet to be filled in.
      left_out: Names of the classes and functions that empty objects stand in for.
    """

    def __init__(self, file: io.BytesIO, room: int):
        self.storages: dict[str, _Storage] = {}
        self.left_out: set[str] = set()
        self._room = room
        self._lent: Counter[int] = Counter()  # how many bytes tensors take from each storage, by its address
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._built = 0
        self._named: dict[str, type[_Object]] = {}
        self.result = self._run(file)

    def _run(self, file: io.BytesIO) -> Any:
        memo: dict[int, Any] = {}
        for opcode, argument, _ in cast(Iterator[tuple[Any, Any, Any]], pickletools.genops(file)):
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return self._stack.pop()
                case "MARK":
                    self._marks.append(self._stack)
                    self._stack = []
                case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                    self._stack.append(CONSTANTS[opcode.name])
                case "EMPTY_DICT" | "EMPTY_LIST":
                    self._stack.append({} if opcode.name == "EMPTY_DICT" else [])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                    self._stack.append(argument)
                case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                    items = self._take(opcode.name)
                    self._stack.append(tuple(items))
                case "APPEND" | "APPENDS":
                    items = self._take(opcode.name)
                    if not isinstance(self._stack[-1], _Object):
                        _of(list, self._stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = self._take(opcode.name)
                    if not isinstance(self._stack[-1], _Object):
                        # Other keys might hash forever, or all to the same number.
                        if not all(type(key) is str or (type(key) is int and abs(key) < 2**60) for key in items[::2]):
                            raise ValueError("it has keys that are neither texts nor small integers")
                        _of(dict, self._stack[-1]).update(zip(items[::2], items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = self._stack[-1]
                case "BINGET" | "LONG_BINGET":
                    found = memo[argument]
                    self._stack.append(self._lend(found) if isinstance(found, torch.Tensor) else found)
                case "GLOBAL":
                    self._stack.append(self._class(argument.replace(" ", ".", 1)))
                case "BINPERSID":
                    self._stack.append(self._storage(*_of(tuple, self._stack.pop())))
                case "REDUCE":
                    arguments = _of(tuple, self._stack.pop())
                    self._stack.append(self._call(_of(type, self._stack.pop()).name, arguments))
                case "NEWOBJ":
                    _of(tuple, self._stack.pop())
                    self._stack.append(self._object(_of(type, self._stack.pop()).name))
                case "BUILD":
                    self._build(self._stack[-2], self._stack.pop())
                case _:
                    raise ValueError(f"it has a {opcode.name} in its pickle")
        raise ValueError("its pickle has no end")

    def _take(self, opcode: str) -> list[Any]:
        """Takes the values off the stack that an opcode works on."""
        if opcode in TAKEN:
            return [self._stack.pop() for _ in range(TAKEN[opcode])][::-1]
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _refuse(self, problem: str) -> NoReturn:
        # While a value is built, its key and those of the dicts around it lie on the stack.
        levels = ([item for item in level if type(item) in (str, int)] for level in (*self._marks, self._stack))
        keys = ".".join(str(level[-1]) for level in levels if level)
        raise WeightsError(f"key {keys:.80}: {problem}" if keys else f"it {problem}")

    def _count(self, built: int) -> None:
        self._built += built
        if self._built > MAX_BUILT:
            raise ValueError("it builds too many objects")

    def _class(self, name: str) -> type[_Object]:
        if name not in self._named:
            self._count(1)
            self._named[name] = type(name.rpartition(".")[2], (_Object,), {"name": name})
        return self._named[name]

    def _object(self, name: str) -> _Object:
        self._count(1)
        self.left_out.add(name.removeprefix("__builtin__."))
        return self._class(name)()

    def _storage(self, what: str, kind: type, key: str, _: str, length: int, *view: None) -> _Storage:
        self._count(1)
        # Digits alone: other names may stand for the same entry. Only legacy files have a view, which must be None.
        if what != "storage" or view not in ((), (None,)) or not (_of(str, key).isascii() and key.isdecimal()):
            raise ValueError("it refers to something other than a whole storage")
        if _of(type, kind).name not in STORAGES:
            self._refuse(f"is {kind.name:.80}; expected a dense tensor or plain values")
        dtype = STORAGES[kind.name]
        if key not in self.storages:
            self._room -= _of(int, length) * dtype.itemsize
            if length < 0 or self._room < 0:
                raise ValueError("its storages are longer than the file, or have a length below 0")
            self.storages[key] = _Storage(torch.empty(length, dtype=dtype))
        values = self.storages[key].values
        if (values.dtype, len(values)) != (dtype, length):
            raise ValueError("a storage in it has two types or lengths")
        return self.storages[key]

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        # A call copies its arguments.
        self._count(1 + sum(len(argument) for argument in arguments if type(argument) in (tuple, dict)))
        match name, arguments:
            case ("collections.OrderedDict", ()) | ("collections.defaultdict", (_,)):
                return {}
            case "collections.Counter", (dict() as counts,):
                return dict(counts)
            case "torch.serialization._get_layout", (str() as layout,):  # of a sparse tensor, which is refused by name
                return layout
            case "torch.Size", (tuple() as lengths,):
                return lengths
            case "torch.device", (str(),) | (str(), int()):
                return ":".join(map(str, arguments))
            case "torch._utils._rebuild_tensor_v2", (_Storage(), _, tuple(), tuple(), bool(), dict() | None):
                return self._tensor(*arguments[:4])
            case "torch._utils._rebuild_parameter", (torch.Tensor() as tensor, bool(), dict() | None):
                return tensor
            case "_codecs.encode", (str() as text, "latin1"):  # how bytes are written
                return text.encode("latin1")
            case "numpy.dtype", (str() as code, *_):
                return _NumPyType(code)
            case _ if name in ARRAYS:
                return self._object("numpy.ndarray")
            case _, (_NumPyType() as kind, content) if name in SCALARS:
                if kind.code in NUMBERS and kind.order in ("<", ">", "|"):
                    return np.frombuffer(_of(bytes, content), kind.order + kind.code).item()
                return self._object("numpy.generic")
            case _ if name in MAKERS:
                return self._object(name)
            case _:
                self._refuse(f"is {name:.80}; expected a dense tensor or plain values")

    def _build(self, target: Any, attributes: Any) -> None:
        match target, attributes:
            case _NumPyType(), (_, str() as order, *_):
                target.order = order
            case _Object(), _:
                pass
            # The only attribute that a state dict has; others could replace a tensor, or methods of a dict.
            case dict(), {"_metadata": _} if len(attributes) == 1:
                pass
            case _:
                raise ValueError("it sets attributes")

    def _tensor(self, storage: _Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> torch.Tensor:
        # Integers that PyTorch can hold; their products, which might overflow there, do not overflow here.
        numbers = (offset, *shape, *strides)
        sound = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not sound or len(shape) != len(strides) or len(shape) > 8:
            self._refuse("has an impossible shape, stride or offset")
        size = math.prod(shape)
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        length = len(storage.values)
        if size and max(size, last + 1) > length:
            self._refuse(f"has shape {list(shape)} in a storage of {length} values; save a clone of it")
        return self._lend(storage.values.as_strided(shape, strides, offset if size else 0))

    def _lend(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self._lent[storage.data_ptr()] += tensor.nbytes
        # Tied weights share a storage. A hundred tensors that share it would fill the memory once they are copied.
        if self._lent[storage.data_ptr()] > 2 * storage.nbytes():
            self._refuse("shares its storage with too many others; save clones of them")
        return tensor


def _of(expected: type, value: Any) -> Any:
    """The value, if it is of that very type (or, where that is `type`, a stand-in for a class)."""
    if not (isinstance(value, type) and issubclass(value, _Object) if expected is type else type(value) is expected):
        raise ValueError(f"its pickle is damaged: it has {type(value).__name__} in the place of {expected.__name__}")
    return value
