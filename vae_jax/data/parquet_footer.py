"""The sizes that a Parquet file declares for its columns.

pyarrow tells them too, but ends the whole process where its statistics are damaged. The footer is in Thrift's compact
protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md, its fields are those of
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift.
"""

import struct
from pathlib import Path
from typing import Any

# Numbers of the fields that lead to a column's sizes.
ROW_GROUPS, COLUMNS, META_DATA, PATH, NUM_VALUES, UNCOMPRESSED = 4, 1, 3, 3, 5, 6
TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT, INTEGERS = 1, 2, 3, 7, 8, 9, 10, 12, (4, 5, 6)
DEEPEST = 32


def column_sizes(path: Path) -> list[tuple[str, int, int]]:
    """The dotted name of each column in each group of rows, the number of its values, and its bytes uncompressed.

    Raises:
      ValueError: The footer is damaged.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length, magic = struct.unpack("<I4s", file.read(8).rjust(8, b"\0"))
        if magic != b"PAR1" or length + 12 > size:
            raise ValueError("no Parquet footer")
        file.seek(size - 8 - length)
        footer = _Reader(file.read(length))
    try:
        columns = [column[META_DATA] for group in footer.struct()[ROW_GROUPS] for column in group[COLUMNS]]
        return [
            (b".".join(column[PATH]).decode("utf-8", "replace"), int(column[NUM_VALUES]), int(column[UNCOMPRESSED]))
            for column in columns
        ]
    except (KeyError, IndexError, TypeError, struct.error) as error:
        raise ValueError(f"a damaged Parquet footer ({type(error).__name__})") from None


class _Reader:
    """Reads Thrift values; structures become dictionaries by field number."""

    def __init__(self, content: bytes):
        self._content = content
        self._place = 0
        self._depth = 0

    def struct(self) -> dict[int, Any]:
        self._depth += 1
        if self._depth > DEEPEST:
            raise ValueError("a Parquet footer that is nested too deeply")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._integer()
            fields[number] = header & 15 == TRUE if header & 15 in (TRUE, FALSE) else self._value(header & 15)
        self._depth -= 1
        return fields

    def _value(self, kind: int) -> Any:
        if kind in INTEGERS:
            return self._integer()
        if kind == BINARY:
            return self._take(self._varint())
        if kind in (LIST, SET):
            header = self._byte()
            count = header >> 4 if header >> 4 < 15 else self._varint()
            return [self._value(header & 15) for _ in range(count)]
        if kind == STRUCT:
            return self.struct()
        if kind == DOUBLE:
            return self._take(8)
        if kind in (TRUE, FALSE, BYTE):
            return self._byte()
        raise ValueError(f"a Parquet footer with a value of type {kind}")

    def _integer(self) -> int:
        zigzag = self._varint()
        return (zigzag >> 1) ^ -(zigzag & 1)

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a Parquet footer with a number that is too long")

    def _byte(self) -> int:
        self._place += 1
        return self._content[self._place - 1]

    def _take(self, count: int) -> bytes:
        if self._place + count > len(self._content):
            raise ValueError("a Parquet footer that is cut")
        self._place += count
        return self._content[self._place - count : self._place]
