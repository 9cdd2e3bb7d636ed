"""The container of GGUF, versions 2 and 3: metadata, descriptions of tensors, and their bytes.

    "GGUF", u32 version, u64 tensors, u64 entries
    entry:   string key, u32 type, value            string: u64 length, UTF-8; array: u32 type, u64 length, values
    tensor:  string name, u32 dimensions, u64 sizes (the fastest first), u32 type, u64 offset
    padding to a multiple of general.alignment (32), from where the offsets count

All numbers are little-endian.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from quantkit.checkpoint import StoredTensor
from quantkit.errors import QuantKitError
from quantkit.formats.gguf_blocks import TYPES

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
NAMES = {kind.number: kind.name for kind in TYPES.values()}
LARGEST_HEADER = 1 << 30  # bytes of metadata; vocabularies take some tens of MB
LARGEST_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says: metadata, and where its tensors are, of dtypes that are names of `TYPES`."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


class Cursor:
    """Reads numbers and strings from the beginning of a file, and stops at its end."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def take(self, count: int) -> bytes:
        if count > min(self.size, LARGEST_HEADER) - self.file.tell():
            raise QuantKitError(
                f"{self.path}: truncated or damaged: {count} more bytes of header are promised than it has; copy it again"
            )
        return self.file.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise QuantKitError(
                f"{self.path}: metadata of an unknown type {kind}; the file is damaged, or newer"
            )
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            return list(struct.unpack(f"<{count}{SCALARS[inner]}", self.take(count * width))) if count else []
        if inner != STRING:
            raise QuantKitError(
                f"{self.path}: metadata with arrays of type {inner}, expected numbers or strings"
            )
        if count > self.size // 8:  # each has a length of eight bytes
            raise QuantKitError(f"{self.path}: damaged: an array of {count} strings; copy it again")
        return [self.string() for _ in range(count)]


def read_gguf(path: Path) -> GGUFFile:
    """Metadata and tensors of a GGUF file; none of its weights.

    Raises:
        QuantKitError: it is truncated or damaged, or a tensor has a type that quantkit does not read.
    """
    with path.open("rb") as file:
        cursor = Cursor(path, file)
        if cursor.size < 24 or cursor.take(4) != MAGIC:
            raise QuantKitError(f"{path}: not a GGUF file ({cursor.size} bytes); copy it again")
        version = cursor.number("I")
        if version not in (2, VERSION):
            raise QuantKitError(f"{path}: GGUF version {version}, expected 2 or {VERSION}")
        count, entries = cursor.number("Q"), cursor.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("I"))
        described = [describe(cursor) for _ in range(count)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
            raise QuantKitError(f"{path}: general.alignment {alignment!r}, expected a multiple of 8")
        data = -(-file.tell() // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset, size in described:
        if name in tensors or offset % alignment or data + offset + size > cursor.size:
            raise QuantKitError(
                f"{path}: truncated or damaged: {name} should lie in the bytes {data + offset} to {data + offset + size} "
                f"of {cursor.size}; copy it again"
            )
        tensors[name] = StoredTensor(path, kind, shape, data + offset, data + offset + size, name)
    return GGUFFile(path, metadata, tensors)


def describe(cursor: Cursor) -> tuple[str, tuple[int, ...], str, int, int]:
    """Name, shape with the slowest dimension first, type, offset and bytes of a tensor."""
    name, dimensions = cursor.string(), cursor.number("I")
    if not 1 <= dimensions <= LARGEST_DIMENSIONS:
        raise QuantKitError(f"{cursor.path}: {name} has {dimensions} dimensions; the file is damaged")
    shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
    number, offset = cursor.number("I"), cursor.number("Q")
    if number not in NAMES:
        raise QuantKitError(
            f"{cursor.path}: {name} is of GGUF's type {number}; quantkit reads {', '.join(TYPES)}: quantize it to one of "
            "these with llama.cpp"
        )
    kind = TYPES[NAMES[number]]
    weights = 1
    for size in shape:
        weights *= size
    if not weights or shape[-1] % kind.block:
        raise QuantKitError(
            f"{cursor.path}: {name} is {list(shape)}, whose rows are no whole blocks of {kind.block} ({kind.name})"
        )
    return name, shape, kind.name, offset, weights // kind.block * kind.bytes


def header_bytes(metadata: dict[str, Any], tensors: list[tuple[str, tuple[int, ...], str]]) -> bytes:
    """All that comes before the tensors' bytes, which follow in this order, each at a multiple of 32.

    Args:
        metadata: strings, bools, numbers (whole ones as u32, in lists i32; floats as f32), lists of one of them.
        tensors: name, shape with the slowest dimension first, and type.
    """
    out = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        kind = UINT32 if type(value) is int else kind_of(value)
        out += [text_bytes(key), struct.pack("<I", kind), value_bytes(value, kind)]
    offset = 0
    for name, shape, kind_name in tensors:
        kind = TYPES[kind_name].number
        out += [text_bytes(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        out.append(struct.pack("<IQ", kind, offset))
        offset += -(-tensor_size(shape, kind_name) // ALIGNMENT) * ALIGNMENT
    header = b"".join(out)
    return header + bytes(-len(header) % ALIGNMENT)


def tensor_size(shape: tuple[int, ...], kind: str) -> int:
    size = TYPES[kind].bytes
    for length in shape:
        size *= length
    return size // TYPES[kind].block


def text_bytes(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def kind_of(value: Any) -> int:
    kinds = {str: STRING, bool: BOOL, int: INT32, float: FLOAT32, list: ARRAY}
    return kinds[type(value)]


def value_bytes(value: Any, kind: int) -> bytes:
    if kind == STRING:
        return text_bytes(value)
    if kind != ARRAY:
        return struct.pack(f"<{SCALARS[kind]}", value)
    inner = kind_of(value[0]) if value else INT32
    head = struct.pack("<IQ", inner, len(value))
    return head + b"".join(value_bytes(item, inner) for item in value)
