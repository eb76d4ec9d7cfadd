"""Reads the header of a GGUF file and believes no number in it.

``gguf.GGUFReader`` 0.19.0 believes them all: an array length of 2**40 in a file of a hundred bytes
makes it take 6 GB, and an honest vocabulary of 49k tokens costs it 3 s. So the header is read here,
once: every count is bounded by the bytes that are left before anything is allocated, and what was
checked is what is used. The ``gguf`` package keeps the tables of types and the dequantising.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from models.json_file import brief

SUPPORTED_VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16  # metadata keys, and tensors; the largest real files have a few thousand
MAX_ELEMENTS = 1 << 20  # in all arrays of a file: Python objects, far larger than their bytes
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 1 << 10  # of a key or a tensor's name; llama.cpp allows 63 for the latter
MAX_STRING_BYTES = 1 << 25  # in all strings of a file; Gemma's vocabulary has 2.4 MB

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SCALARS = {
    gguf.GGUFValueType.UINT8: struct.Struct("<B"),
    gguf.GGUFValueType.INT8: struct.Struct("<b"),
    gguf.GGUFValueType.UINT16: struct.Struct("<H"),
    gguf.GGUFValueType.INT16: struct.Struct("<h"),
    gguf.GGUFValueType.UINT32: _U32,
    gguf.GGUFValueType.INT32: struct.Struct("<i"),
    gguf.GGUFValueType.FLOAT32: struct.Struct("<f"),
    gguf.GGUFValueType.BOOL: struct.Struct("<?"),
    gguf.GGUFValueType.UINT64: _U64,
    gguf.GGUFValueType.INT64: struct.Struct("<q"),
    gguf.GGUFValueType.FLOAT64: struct.Struct("<d"),
}


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    Attributes:
      shape: row-major, as NumPy counts: the reverse of the order in the file.
      kind: how it is quantised.
      offset: bytes from the start of the file.
      num_bytes: bytes it takes there.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class Header(NamedTuple):
    """A GGUF file's metadata and table of tensors; every number lies within the file.

    Attributes:
      path: the file.
      metadata: key -> str, number, bool, or a list of one of these.
      tensors: name -> where it lies.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """A position in the file that cannot be moved past its end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.position = 0
        self.elements_left = MAX_ELEMENTS
        self.string_bytes_left = MAX_STRING_BYTES

    def error(self, problem: str) -> ValueError:
        return ValueError(
            f"{self.path}: {problem} (at byte {self.position} of {len(self.data)}); expected a "
            "whole GGUF file, so download or convert it again"
        )

    def need(self, num_bytes: int, what: str) -> None:
        left = len(self.data) - self.position
        if num_bytes > left:
            raise self.error(f"{what} needs {num_bytes} bytes and {left} are left")

    def scalar(self, kind: struct.Struct, what: str) -> Any:
        self.need(kind.size, what)
        (value,) = kind.unpack_from(self.data, self.position)
        self.position += kind.size
        return value

    def string(self, what: str) -> str:
        length = self.scalar(_U64, what)
        self.need(length, what)
        self.string_bytes_left -= length
        if self.string_bytes_left < 0:
            raise self.error(f"{what} makes more than {MAX_STRING_BYTES} bytes of text in all")
        try:
            text = str(self.data[self.position : self.position + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error
        self.position += length
        return text

    def name(self, what: str) -> str:
        text = self.string(what)
        if len(text) > MAX_NAME_BYTES:
            raise self.error(f"{what} is {brief(text)}, of {len(text)} characters")
        return text

    def value_type(self, what: str) -> gguf.GGUFValueType:
        number = self.scalar(_U32, what)
        try:
            return gguf.GGUFValueType(number)
        except ValueError as error:
            raise self.error(f"{what} has the unknown type {number}") from error

    def value(self, what: str) -> Any:
        kind = self.value_type(what)
        if kind == gguf.GGUFValueType.STRING:
            return self.string(what)
        if kind == gguf.GGUFValueType.ARRAY:
            return self.array(what)
        return self.scalar(_SCALARS[kind], what)

    def array(self, what: str) -> list[Any]:
        kind = self.value_type(what)
        count = self.scalar(_U64, what)
        if kind == gguf.GGUFValueType.ARRAY:
            raise self.error(f"{what} is an array of arrays, which no supported model uses")
        scalar = _SCALARS.get(kind)
        element_bytes = _U64.size if scalar is None else scalar.size  # a string has its length
        self.need(count * element_bytes, what)
        self.elements_left -= count
        if self.elements_left < 0:
            raise self.error(f"{what} makes more than {MAX_ELEMENTS} elements in all")
        if scalar is None:
            return [self.string(what) for _ in range(count)]
        start, self.position = self.position, self.position + count * element_bytes
        return [value for (value,) in scalar.iter_unpack(self.data[start : self.position])]


def read_header(path: str | os.PathLike[str]) -> Header:
    """Reads and checks everything in a GGUF file but the weights.

    Args:
      path: the file.

    Returns:
      Metadata and tensor table.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: naming the file, when it is not GGUF, is truncated or contradicts itself.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; expected GGUF")
    cursor = _Cursor(path, np.memmap(path, np.uint8, "r").data)
    cursor.need(4, "the magic number")
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise ValueError(f"{path}: starts with {magic!r}; expected a GGUF file")
    cursor.position = 4
    version = cursor.scalar(_U32, "the version")
    if version not in SUPPORTED_VERSIONS:
        raise cursor.error(
            f"version {version:#x} is not one of {SUPPORTED_VERSIONS}, little-endian"
        )
    num_tensors = _count(cursor, "tensors", 24)
    num_keys = _count(cursor, "metadata keys", 13)

    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} occurs twice")
        metadata[key] = cursor.value(f"metadata {key!r}")

    tensors: dict[str, TensorInfo] = {}
    for _ in range(num_tensors):
        name = cursor.name("a tensor's name")
        if name in tensors:
            raise cursor.error(f"tensor {name!r} occurs twice")
        tensors[name] = _tensor(cursor, name)
    return Header(path, metadata, _place(cursor, metadata, tensors))


def _count(cursor: _Cursor, what: str, least_bytes: int) -> int:
    """Reads a number of entries, each of which takes ``least_bytes`` at least."""
    count = cursor.scalar(_U64, f"the number of {what}")
    cursor.need(count * least_bytes, f"a table of {count} {what}")
    if count > MAX_ENTRIES:
        raise cursor.error(f"{count} {what} are more than {MAX_ENTRIES}")
    return count


def _tensor(cursor: _Cursor, name: str) -> TensorInfo:
    """Reads one row of the tensor table; its offset still counts from the data section."""
    what = f"tensor {name!r}"
    num_dimensions = cursor.scalar(_U32, what)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.error(f"{what} has {num_dimensions} dimensions, not 1..{MAX_DIMENSIONS}")
    # Python integers do not overflow, whatever the file says.
    shape = tuple(cursor.scalar(_U64, what) for _ in range(num_dimensions))[::-1]
    number = cursor.scalar(_U32, what)
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError as error:
        raise cursor.error(f"{what} has the unknown quantisation type {number}") from error
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block_size:
        raise cursor.error(f"{what} has rows of {shape[-1]}, not a multiple of {block_size}")
    num_bytes = math.prod(shape) // block_size * block_bytes
    return TensorInfo(shape, kind, cursor.scalar(_U64, what), num_bytes)


def _place(
    cursor: _Cursor, metadata: dict[str, Any], tensors: dict[str, TensorInfo]
) -> dict[str, TensorInfo]:
    """Returns the tensors with offsets into the file, none beyond its end, none overlapping."""
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment is {brief(alignment)}, not a power of two")
    data_start = -(-cursor.position // alignment) * alignment
    placed = {}
    end = data_start
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        info = info._replace(offset=data_start + info.offset)
        if info.offset % alignment or info.offset < end:
            raise cursor.error(f"tensor {name!r} overlaps another one or is not aligned")
        end = info.offset + info.num_bytes
        if end > len(cursor.data):
            raise cursor.error(f"tensor {name!r} ends at byte {end}, beyond the end of the file")
        placed[name] = info
    return placed


def check_kinds(header: Header) -> None:
    """Checks, on blocks of zeros, that every type of tensor in a file can be dequantised.

    Raises:
      ValueError: naming the file and the first tensor of a type that the gguf package cannot read.
    """
    for name, info in {info.kind: (name, info) for name, info in header.tensors.items()}.values():
        _, block_bytes = gguf.GGML_QUANT_SIZES[info.kind]
        try:
            gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), info.kind)
        except NotImplementedError as error:
            raise ValueError(
                f"{header.path}: tensor {name!r} is stored as {info.kind.name}, which the gguf "
                "package cannot dequantise; expected F32, F16, BF16 or one of its quantised types"
            ) from error


def read_tensor(header: Header, name: str) -> np.ndarray:
    """Reads and dequantises one tensor of a file that passed ``check_kinds``.

    Args:
      header: from ``read_header``.
      name: one of ``header.tensors``.

    Returns:
      Array of the tensor's shape, float32; it may be a view of the file.
    """
    info = header.tensors[name]
    data = np.memmap(header.path, np.uint8, "r", info.offset, (info.num_bytes,))
    # A dequantiser works on whole rows of blocks. A plain array's views are cheap, a memmap's not.
    rows = data.view(np.ndarray).reshape(*info.shape[:-1], -1)
    return gguf.quants.dequantize(rows, info.kind).reshape(info.shape)
