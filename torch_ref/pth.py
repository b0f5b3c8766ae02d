"""What `torch.save` wrote, read without trusting it: the pickle in it is walked by hand, and calls nothing.

`torch.load(weights_only=True)` runs no code either, but a file of a few hundred bytes can keep it busy for ever or fill
the memory: it hashes and prints whatever nest of tuples a file holds, unpacks deflated entries of any size, and lets a
tensor stretch its storage. So only what a state dict or a checkpoint needs is understood here, all else is inert or
refused, and no more memory is taken than the file is long.
"""

import io
import math
import pickletools
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch

# Far more than a pickle, or the table of contents of an archive, needs: a state dict's are 2 kB each.
MOST = 1 << 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # how a file begins that PyTorch before 1.6 wrote
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
# What else torch.save writes of tensors and plain objects: it may stand in a file, but none of it is rebuilt.
INERT = {
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_tensor_v3",
    "torch._tensor._rebuild_from_type_v2",
    "torch.QInt8Storage",
    "torch.QUInt8Storage",
    "torch.QInt32Storage",
    "torch.storage.UntypedStorage",
    "torch.per_tensor_affine",
    "torch.per_channel_affine",
    *(str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}


class Inert(NamedTuple):
    """Something that is not rebuilt, by its name."""

    name: str


class Storage:
    """The values that tensors share."""

    def __init__(self, dtype: torch.dtype, length: int):
        self.dtype = dtype
        self.length = length
        self.lent = 0  # values in tensors of it
        self.values = torch.empty(0, dtype=dtype)

    def fill(self, content: io.BytesIO, big_endian: bool = False) -> None:
        if content.getbuffer().nbytes != self.length * self.dtype.itemsize:
            raise ValueError(f"a storage of {self.length} values has {content.getbuffer().nbytes} bytes")
        if self.length:
            if big_endian:
                np.frombuffer(content.getbuffer(), f"u{self.dtype.itemsize}").byteswap(inplace=True)
            self.values = torch.frombuffer(content.getbuffer(), dtype=self.dtype)


class Stored(NamedTuple):
    """A tensor as a file describes it."""

    storage: Storage
    offset: Any
    size: Any
    stride: Any

    def tensor(self) -> torch.Tensor:
        """The tensor, a view of its storage.

        Raises:
          ValueError: It reaches out of its storage, or the tensors of that together have more than twice its values.
        """
        numbers = (self.offset, *self.size, *self.stride)
        # Its values are counted in Python's integers, which do not overflow.
        if len(numbers) > 17 or not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError("has no sound shape")
        if len(self.size) != len(self.stride):
            raise ValueError(f"has {len(self.size)} sizes and {len(self.stride)} strides")
        count, length = math.prod(self.size), self.storage.length
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        if count and (count > length or last >= length):
            raise ValueError(f"has shape {list(self.size)} in a storage of {length} values; save a clone of it")
        self.storage.lent += count
        if self.storage.lent > 2 * length:  # tied weights share; copies of a hundred tensors would fill the memory
            raise ValueError("shares its storage with too many others; save clones of them")
        return self.storage.values.as_strided(self.size, self.stride, self.offset if count else 0)


def kind(value: object) -> str:
    """What a value of a file is, in a word or two; what nests is not printed, it may be endless."""
    return value.name if isinstance(value, Inert) else "Tensor" if isinstance(value, Stored) else type(value).__name__


def read(path: Path | str) -> object:
    """Reads the dicts, lists, numbers and texts of a file; its tensors are `Stored`.

    Raises:
      OSError: It cannot be read.
      ValueError, or whatever else the parts of a damaged file raise: It is none of `torch.save`, or holds anything that
        would have to be called.
    """
    with _Bounded(io.FileIO(path)) as file:
        # As PyTorch decides; zipfile would go by the end, where any bytes may stand in the old format.
        if file.peek(4)[:4] != b"PK\3\4":
            return _read_legacy(file)
        with zipfile.ZipFile(file) as archive:
            return _read_archive(archive, Path(path).stat().st_size)


class _Bounded(io.BufferedReader):
    """A file whose table of contents zipfile does not read where it is long."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > MOST:
            raise ValueError("its table of contents is too long")
        return super().read(size)


def _read_archive(archive: zipfile.ZipFile, size: int) -> object:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise ValueError("an entry stands in it twice")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
        raise ValueError("its entries are packed; torch.save stores them as they are")
    if sum(entry.file_size for entry in entries.values()) > size:
        raise ValueError("its entries are longer than the file")
    folders = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise ValueError("it is a zip archive without a data.pkl")

    def content(name: str) -> io.BytesIO:
        target = io.BytesIO()
        with archive.open(entries[folders[0] + name]) as entry:
            shutil.copyfileobj(entry, target, MOST)
        return target

    if entries[f"{folders[0]}data.pkl"].file_size > MOST:
        raise ValueError("its pickle is too long")
    found, storages = _walk(io.BytesIO(content("data.pkl").getvalue()))
    big_endian = f"{folders[0]}byteorder" in entries and content("byteorder").getvalue() == b"big"
    for key, storage in storages.items():
        if f"{folders[0]}data/{key}" not in entries:
            raise ValueError(f"its data/{key:.40} is missing")
        storage.fill(content(f"data/{key}"), big_endian)
    return found


def _read_legacy(file: BinaryIO) -> object:
    """Five pickles, then each storage: its length as 8 bytes, and its values."""
    head = io.BytesIO(file.read(MOST))
    magic, _ = _walk(head)
    if magic != LEGACY_MAGIC:
        raise ValueError("it does not begin as torch.save does")
    for _ in ("version", "machine"):
        _walk(head)
    found, storages = _walk(head)
    keys, _ = _walk(head)
    if sorted(_of(str, key) for key in _of(list, keys)) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors")
    file.seek(head.tell())
    for key in keys:
        storage = storages[key]
        (length,) = struct.unpack("<q", file.read(8))
        if length != storage.length:
            raise ValueError(f"a storage of {storage.length} values has {length}")
        values = io.BytesIO()
        for start in range(0, length * storage.dtype.itemsize, MOST):
            if not (piece := file.read(min(MOST, length * storage.dtype.itemsize - start))):
                break
            values.write(piece)
        storage.fill(values)
    return found


def _walk(file: io.BytesIO) -> tuple[Any, dict[str, Storage]]:
    """What the next pickle in a file builds, and its storages, still empty, by their keys."""
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    storages: dict[str, Storage] = {}
    for opcode, argument, _ in cast(Iterator[tuple[Any, Any, Any]], pickletools.genops(file)):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop(), storages
            case "MARK":
                marks.append(stack)
                stack = []
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINSTRING":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(opcode.name[-1]) :] = [tuple(stack[-int(opcode.name[-1]) :])]
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items, stack = stack, marks.pop()
                _of(list, stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _set_items(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_global(argument.replace(" ", ".", 1)))
            case "BINPERSID":
                stack.append(_storage(storages, *_of(tuple, stack.pop())))
            case "REDUCE":
                arguments = _of(tuple, stack.pop())
                stack.append(_rebuild(_of(Inert, stack.pop()).name, arguments))
            case "BUILD":
                stack.pop()  # attributes, such as the _metadata of a state dict
            case _:
                raise ValueError(f"it has a {opcode.name} in its pickle")
    raise ValueError("its pickle has no end")


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


def _global(name: str) -> Inert:
    if not (name in REBUILD or name in INERT or name in DTYPES):
        raise ValueError(f"it holds {name[:80]}")
    return Inert(name)


def _storage(storages: dict[str, Storage], what: str, dtype: Inert, key: str, _: str, length: int, *more: None) -> Any:
    """The storage of a persistent id: `more` is the view that a legacy storage may be."""
    if what != "storage" or any(more):
        raise ValueError("it holds other things than storages, or views of them")
    name = _of(Inert, dtype).name
    if name not in DTYPES:
        return Inert(name)
    storage = storages.setdefault(_of(str, key), Storage(DTYPES[name], _of(int, length)))
    if (storage.dtype, storage.length) != (DTYPES[name], length):
        raise ValueError("a storage in it has two types or lengths")
    return storage


def _rebuild(name: str, arguments: tuple[Any, ...]) -> Any:
    if name not in REBUILD:
        return Inert(name)
    return REBUILD[name](*arguments)


def _tensor(storage: Storage, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
    return Stored(_of(Storage, storage), offset, _of(tuple, size), _of(tuple, stride))


# What is rebuilt, from a pickle's arguments.
REBUILD: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda: {},
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
}
