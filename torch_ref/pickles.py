"""What `torch.save` wrote: inspected first, and only then read by `torch.load(weights_only=True)`.

That one runs no code, but a file of a few hundred bytes can keep it busy for ever or fill the memory: it hashes and
prints whatever nest of tuples a file holds, allocates what is asked for, unpacks deflated entries of any size, lets a
tensor stretch its storage, and takes changed bytes for weights. So the pickle is walked by hand before, calling
nothing, and whatever a state dict or a checkpoint has no need of is refused.
"""

import dataclasses
import io
import math
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from vae_jax.config import InputError

# Far more than a pickle, or the table of contents of an archive, needs: a state dict's are 2 kB each.
MOST = 1 << 20
# Far more storages and calls, with the lengths of what they are given, than a pickle needs: a checkpoint's are 200.
MOST_BUILT = 1 << 16
LEGACY_START = (0x1950A86A20F9469CFC6C, 1001)  # how a file begins that PyTorch before 1.6 wrote
# Bytes of a value.
STORAGES = {
    f"torch.{name}Storage": size
    for names, size in (
        ("Bool Byte Char", 1),
        ("BFloat16 Half Short", 2),
        ("Float Int", 4),
        ("ComplexFloat Double Long", 8),
        ("ComplexDouble", 16),
    )
    for name in names.split()
}
# What else a file may name; `_Walk._call` says how it may be called.
NAMES = {"collections.Counter", "collections.OrderedDict", "torch.Size", "torch.device"}
NAMES |= {"torch._utils._rebuild_parameter", "torch._utils._rebuild_tensor_v2"}
NAMES |= {str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


class WeightsError(InputError):
    """A state dict, a parameter tree or a weights file is not one of this model."""


def read(path: Path | str) -> object:
    """Reads the tensors, dicts, lists, numbers and texts of a file, taking no more memory than a few times its length.

    Raises:
      WeightsError: Something in it is no plain value, nor a dense tensor within its storage; naming the key.
      OSError: It cannot be read.
      ValueError, or whatever else the parts of a damaged file raise: It is none of `torch.save`.
    """
    content = Path(path).read_bytes()  # what is inspected is what is loaded, whoever writes to the file meanwhile
    if content[:4] == b"PK\3\4":  # as PyTorch decides
        _inspect_archive(content)
    else:
        _inspect_legacy(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _inspect_archive(content: bytes) -> None:
    """Raises for an archive that `torch.load` must not get, or may see otherwise than zipfile does."""
    # zipfile has its own notions of where the table of contents lies, how long it is and what its extra fields mean;
    # PyTorch looks for names in the folder of the first entry, without regard to case.
    end = len(content) - 22
    signature, count, length, start, comment = struct.unpack_from("<4s6xH2LH", content, end)
    if content[end - 20 : end - 16] == b"PK\6\7":  # PyTorch writes the long form too
        end -= 76
        (place,) = struct.unpack_from("<8xQ", content, end + 56)
        signature_64, count, length, start = struct.unpack_from("<4s28x3Q", content, end)
        if signature_64 != b"PK\6\6" or place != end:
            raise ValueError("its end is not where it says")
    if signature != b"PK\5\6" or comment or start + length != end:
        raise ValueError("it does not end as an archive of torch.save does")
    if length > MOST:
        raise ValueError("its table of contents is too long")

    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        lengths = {entry.filename: entry.file_size for entry in entries}
        folder = entries[0].filename.split("/")[0]
        if not len(entries) == len({name.lower() for name in lengths}) == count:
            raise ValueError("an entry stands in it twice, or not in its count")
        for entry in entries:
            if not entry.filename.startswith(f"{folder}/") or (entry.flag_bits ^ entries[0].flag_bits) & 0x800:
                raise ValueError("its entries stand in several folders, or have names in two encodings")
            if entry.compress_type or entry.file_size != entry.compress_size:
                raise ValueError("its entries are packed; torch.save stores them as they are")
            # What is marked as a folder PyTorch does not read: it would take what lies in the memory.
            if entry.extra or entry.external_attr & 0x10:
                raise ValueError("its table of contents has extra fields, or folders; torch.save writes neither")
        if sum(lengths.values()) > len(content) or min(entry.header_offset for entry in entries):
            raise ValueError("its entries are longer than the file, or none is at its start")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"its {name:.40} is damaged, or was saved without checksums")
        pickle = archive.read(f"{folder}/data.pkl")
    if len(pickle) > MOST:
        raise ValueError(f"its pickle is longer than {MOST:,} bytes; save the model and its optimizer alone")
    walk = _Walk(io.BytesIO(pickle))
    for key, storage in walk.storages.items():
        found = lengths.get(f"{folder}/data/{key}")
        if found != storage.length * storage.itemsize:
            raise ValueError(f"a storage of {storage.length} values has {found} bytes")


def _inspect_legacy(content: bytes) -> None:
    """Raises for what `torch.load` must not get: five pickles, then each storage, its length as 8 bytes and values."""
    head = io.BytesIO(content[:MOST])
    magic, version, _, tree, keys = (_Walk(head) for _ in range(5))
    if (magic.result, version.result) != LEGACY_START:  # PyTorch would print another version, however it nests
        raise ValueError("it does not begin as torch.save does")
    if sorted(_of(str, key) for key in _of(list, keys.result)) != sorted(tree.storages):
        raise ValueError("its list of storages is not that of its tensors")
    place = head.tell()
    for storage in map(tree.storages.__getitem__, keys.result):
        (length,) = struct.unpack_from("<q", content, place)
        if length != storage.length:
            raise ValueError(f"a storage of {storage.length} values has {length}")
        place += 8 + length * storage.itemsize
    if place != len(content):
        raise ValueError(f"it has {len(content)} bytes and should have {place}")


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or a function, or what it made."""

    name: str


@dataclasses.dataclass
class _Storage:
    """The values that tensors share."""

    itemsize: int
    length: int
    lent: int = 0  # values in tensors of it


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    count: int


class _Walk:
    """The next pickle in a file: `torch.load` takes the same steps.

    Attributes:
      result: What it builds, in short.
      storages: What tensors in it stand on, by their keys.
    """

    def __init__(self, file: io.BytesIO):
        self.storages: dict[str, _Storage] = {}
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._built = 0
        self.result = self._run(file)

    def _run(self, file: io.BytesIO) -> Any:
        memo: dict[int, Any] = {}
        for opcode, argument, _ in cast(Iterator[tuple[Any, Any, Any]], pickletools.genops(file)):
            stack = self._stack
            match opcode.name:
                case "PROTO":
                    pass
                case "STOP":
                    return stack.pop()
                case "MARK":
                    self._marks.append(stack)
                    self._stack = []
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode.name])
                case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                    stack.append(argument)
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[opcode.name]())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack[-int(opcode.name[-1]) :] = [tuple(stack[-int(opcode.name[-1]) :])]
                case "TUPLE":
                    items = self._pop_mark()
                    self._stack.append(tuple(items))
                case "APPEND":
                    item = stack.pop()
                    _of(list, stack[-1]).append(item)
                case "APPENDS":
                    items = self._pop_mark()
                    _of(list, self._stack[-1]).extend(items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case "SETITEMS":
                    items = self._pop_mark()
                    _set_items(self._stack[-1], items)
                case "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "BINGET" | "LONG_BINGET":
                    if isinstance(memo[argument], _Tensor):
                        self._lend(memo[argument])
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(self._global(argument.replace(" ", ".", 1)))
                case "BINPERSID":
                    self._count(1)
                    stack.append(self._storage(*_of(tuple, stack.pop())))
                case "REDUCE":
                    arguments = _of(tuple, stack.pop())
                    stack.append(self._call(_of(_Name, stack.pop()).name, arguments))
                case "BUILD":
                    # Attributes: of a state dict, its versions. Those of a tensor would replace all of it.
                    if _of(dict, stack.pop()).keys() != {"_metadata"} or type(stack[-1]) is not dict:
                        raise ValueError("it sets attributes")
                case _:
                    raise ValueError(f"it has a {opcode.name} in its pickle")
        raise ValueError("its pickle has no end")

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _count(self, built: int) -> None:
        self._built += built
        if self._built > MOST_BUILT:
            raise ValueError("it builds too many objects")

    def _refuse(self, problem: str) -> NoReturn:
        # A value is built when its key, and those of the dicts that it is in, lie on the stack.
        levels = ([item for item in level if type(item) in (str, int)] for level in (*self._marks, self._stack))
        keys = ".".join(str(level[-1]) for level in levels if level)
        raise WeightsError(f"key {keys:.80}: {problem}" if keys else f"it {problem}")

    def _global(self, name: str) -> _Name:
        if name not in NAMES and name not in STORAGES:
            self._refuse(f"is {name:.80}; expected a dense tensor or plain values")
        return _Name(name)

    def _storage(self, what: str, kind: _Name, key: str, _: str, length: int, *more: None) -> _Storage:
        """The storage of a persistent id: `more` is the view that one of a legacy file may be."""
        # Digits alone: names of entries, and old texts, have several encodings.
        if what != "storage" or more not in ((), (None,)) or not (_of(str, key).isascii() and key.isdecimal()):
            raise ValueError("it holds other things than storages, or views of them")
        found = _Storage(STORAGES[_of(_Name, kind).name], _of(int, length))
        storage = self.storages.setdefault(key, found)
        if (storage.itemsize, storage.length) != (found.itemsize, found.length) or length < 0:
            raise ValueError("a storage in it has two types or lengths, or a length below 0")
        return storage

    def _call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        # A call copies what it is given.
        self._count(1 + sum(len(argument) for argument in arguments if type(argument) in (tuple, dict)))
        match name, arguments:
            case "collections.OrderedDict", ():
                return {}
            case "collections.Counter", (dict() as counts,):
                return dict(counts)
            case ("torch.Size", (tuple(),)) | ("torch.device", (str(),) | (str(), int())):
                return _Name(name)
            case "torch._utils._rebuild_tensor_v2", (_Storage(), _, tuple(), tuple(), bool(), dict() | None):
                return self._tensor(*arguments[:4])
            case "torch._utils._rebuild_parameter", (_Tensor() as tensor, bool(), dict() | None):
                return tensor
            case _:
                self._refuse(f"is {name} of other arguments; expected a dense tensor or plain values")

    def _tensor(self, storage: _Storage, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> _Tensor:
        numbers = (offset, *size, *stride)
        # Its values are counted in Python's integers, which do not overflow.
        if len(numbers) > 17 or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            self._refuse("has no sound shape")
        if len(size) != len(stride):
            self._refuse(f"has {len(size)} sizes and {len(stride)} strides")
        count = math.prod(size)
        last = offset + sum((size - 1) * stride for size, stride in zip(size, stride, strict=True))
        if count and (count > storage.length or last >= storage.length):
            self._refuse(f"has shape {list(size)} in a storage of {storage.length} values; save a clone of it")
        return self._lend(_Tensor(storage, count))

    def _lend(self, tensor: _Tensor) -> _Tensor:
        tensor.storage.lent += tensor.count
        if tensor.storage.lent > 2 * tensor.storage.length:  # tied weights share; a hundred copies fill the memory
            self._refuse("shares its storage with too many others; save clones of them")
        return tensor


def _of(expected: type, value: Any) -> Any:
    if type(value) is not expected:
        raise ValueError(f"its pickle is damaged, {type(value).__name__} stands for {expected.__name__}")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashes of other keys can be made to collide, or take for ever.
        if not (type(key) is str or (type(key) is int and abs(key) < 2**60)):
            raise ValueError(f"it has a {type(key).__name__} as a key")
        _of(dict, target)[key] = value
