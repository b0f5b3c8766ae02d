"""Reads what `torch.save` wrote: inspects the file first, and only then hands it to `torch.load(weights_only=True)`.

`torch.load(weights_only=True)` runs no code. But a file of a few hundred bytes can keep it busy forever or fill the
memory: it hashes tuples nested to any depth, allocates whatever a file asks for, unpacks deflated entries of any size,
lets a tensor reach beyond its storage, and ignores checksums. So this module steps through the pickle first, calls
nothing, and refuses everything that a state dict or a checkpoint does not need.
"""

import dataclasses
import io
import math
import pickletools
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from vae_jax.system.errors import WeightsError

# Limits far above what a checkpoint needs, whose pickle has 10 kB and 200 calls and storages.
MAX_LENGTH = 1 << 20  # bytes of a pickle, of an archive's table of contents, or of a safetensors header
MAX_BUILT = 1 << 16  # calls and storages of a pickle, and the items that its calls copy
LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)  # the first two pickles in a file of PyTorch before 1.6
KINDS = ("Bool Byte Char", "BFloat16 Half Short", "Float Int", "ComplexFloat Double Long", "ComplexDouble")
# Bytes of a value in each.
STORAGES = {f"torch.{kind}Storage": 2**power for power, kinds in enumerate(KINDS) for kind in kinds.split()}
# What else a file may name; `_Walk._call` decides how it may be called.
NAMES = {"collections.Counter", "collections.OrderedDict", "torch.Size", "torch.device"}
NAMES |= {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"}
NAMES |= {str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
# How many values an opcode takes off the stack; all above the last mark for those without a number.
TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}


def read(path: Path | str) -> object:
    """Reads the tensors, dicts, lists, numbers and texts of a file, in a few times as much memory as the file is long.

    Raises:
      WeightsError: An entry is neither a plain value nor a dense tensor within its storage; the message names its key.
      OSError: The file cannot be read.
      Exception: Of any kind, for a damaged file or one that `torch.save` did not write.
    """
    content = Path(path).read_bytes()  # read once: another process may be writing to the file
    if content[:4] == b"PK\3\4":  # torch.load decides by the same bytes
        file = _repack(content)
    else:
        _inspect_legacy(content)
        file = io.BytesIO(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(file, map_location="cpu", weights_only=True)


def _repack(content: bytes) -> io.BytesIO:
    """Inspects an archive, and writes a new one with its pickle and storages.

    zipfile and PyTorch may find different entries in the same bytes. In the new archive they find the same.
    """
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
    kept = {"data.pkl": parts["data.pkl"], "version": b"3\n", "byteorder": parts.get("byteorder", b"little")}
    for key, storage in _Walk(io.BytesIO(parts["data.pkl"])).storages.items():
        kept[f"data/{key}"] = parts[f"data/{key}"]
        if len(kept[f"data/{key}"]) != storage.length * storage.itemsize:
            raise ValueError(f"a storage of {storage.length} values has {len(kept[f'data/{key}'])} bytes")
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, part in kept.items():
            archive.writestr(f"archive/{name}", part)
    file.seek(0)
    return file


def _inspect_legacy(content: bytes) -> None:
    """Inspects a file of PyTorch before 1.6: five pickles, then each storage, its length in 8 bytes and its values."""
    head = io.BytesIO(content[:MAX_LENGTH])
    magic, version, _, tree, keys = (_Walk(head) for _ in range(5))
    if (magic.result, version.result) != LEGACY_START:  # PyTorch would print another version, however deep it nests
        raise ValueError("it does not begin as torch.save does")
    if sorted(_of(str, key) for key in _of(list, keys.result)) != sorted(tree.storages):
        raise ValueError("its list of storages does not match its tensors")
    expected = head.tell() + sum(8 + storage.length * storage.itemsize for storage in tree.storages.values())
    if len(content) != expected:
        raise ValueError(f"it has {len(content)} bytes and should have {expected}")


class _Name(str):
    """A class or a function, or the value that it has made."""


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    itemsize: int
    length: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    size: int


class _Walk:
    """The next pickle in a file, stepped through as `torch.load` does.

    Attributes:
      result: The value that it builds, with stand-ins for tensors and for what it names.
      storages: The storages of its tensors, by their keys.
    """

    def __init__(self, file: io.BytesIO):
        self.storages: dict[str, _Storage] = {}
        self._lent: Counter[str] = Counter()  # how many values tensors take from each storage
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._built = 0
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
                    _of(list, self._stack[-1]).extend(items)
                case "SETITEM" | "SETITEMS":
                    items = self._take(opcode.name)
                    # Others might hash forever, or all to the same number.
                    if not all(type(key) is str or (type(key) is int and abs(key) < 2**60) for key in items[::2]):
                        raise ValueError("it has keys that are neither texts nor small integers")
                    _of(dict, self._stack[-1]).update(zip(items[::2], items[1::2], strict=True))
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = self._stack[-1]
                case "BINGET" | "LONG_BINGET":
                    found = memo[argument]
                    self._stack.append(self._lend(found) if isinstance(found, _Tensor) else found)
                case "GLOBAL":
                    self._stack.append(self._name(argument.replace(" ", ".", 1)))
                case "BINPERSID":
                    self._stack.append(self._storage(*_of(tuple, self._stack.pop())))
                case "REDUCE":
                    arguments = _of(tuple, self._stack.pop())
                    self._stack.append(self._call(_of(_Name, self._stack.pop()), arguments))
                case "BUILD":
                    # The only attribute that a state dict has; others could replace a tensor, or methods of a dict.
                    if _of(dict, self._stack.pop()).keys() != {"_metadata"} or type(self._stack[-1]) is not dict:
                        raise ValueError("it sets attributes")
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

    def _name(self, name: str) -> _Name:
        if name not in NAMES and name not in STORAGES:
            self._refuse(f"is {name:.80}; expected a dense tensor or plain values")
        return _Name(name)

    def _storage(self, what: str, kind: _Name, key: str, _: str, length: int, *view: None) -> _Storage:
        self._count(1)
        # Digits alone: other names may stand for the same entry. Only legacy files have a view, which must be None.
        if what != "storage" or view not in ((), (None,)) or not (_of(str, key).isascii() and key.isdecimal()):
            raise ValueError("it refers to something other than a whole storage")
        storage = _Storage(key, STORAGES[_of(_Name, kind)], _of(int, length))
        if length < 0 or self.storages.setdefault(key, storage) != storage:
            raise ValueError("a storage in it has two types or lengths, or a length below 0")
        return storage

    def _call(self, name: _Name, arguments: tuple[Any, ...]) -> Any:
        # A call copies its arguments.
        self._count(1 + sum(len(argument) for argument in arguments if type(argument) in (tuple, dict)))
        match str(name), arguments:
            case "collections.OrderedDict", ():
                return {}
            case "collections.Counter", (dict() as counts,):
                return dict(counts)
            case ("torch.Size", (tuple(),)) | ("torch.device", (str(),) | (str(), int())):
                return name
            case "torch._utils._rebuild_tensor_v2", (_Storage(), _, tuple(), tuple(), bool(), dict() | None):
                return self._tensor(*arguments[:4])
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, bool(), dict() | None):
                return tensor
            case _:
                self._refuse(f"is {name} of other arguments; expected a dense tensor or plain values")

    def _tensor(self, storage: _Storage, offset: Any, shape: tuple[Any, ...], strides: tuple[Any, ...]) -> _Tensor:
        # Integers that PyTorch can hold; their products, which might overflow there, do not overflow here.
        numbers = (offset, *shape, *strides)
        sound = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not sound or len(shape) != len(strides) or len(shape) > 8:
            self._refuse("has an impossible shape, stride or offset")
        size = math.prod(shape)
        last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
        if size and max(size, last + 1) > storage.length:
            self._refuse(f"has shape {list(shape)} in a storage of {storage.length} values; save a clone of it")
        return self._lend(_Tensor(storage, size))

    def _lend(self, tensor: _Tensor) -> _Tensor:
        self._lent[tensor.storage.key] += tensor.size
        # Tied weights share a storage. A hundred tensors that share it would fill the memory once they are copied.
        if self._lent[tensor.storage.key] > 2 * tensor.storage.length:
            self._refuse("shares its storage with too many others; save clones of them")
        return tensor


def _of(expected: type, value: Any) -> Any:
    if type(value) is not expected:
        raise ValueError(f"its pickle is damaged: it has {type(value).__name__} in the place of {expected.__name__}")
    return value
