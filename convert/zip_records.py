"""Where the files in a zip archive lie.

An archive ends with a directory, and a trailer that says where the directory
is; each file has a header of its own before its bytes
(https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT). Nothing is ever
extracted. Whatever the directory says is checked: files lie within the archive,
apart from each other, under names that occur once.
"""

import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

TRAILER = struct.Struct("<4s4H2LH")
TRAILER_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s6H3L5H2L")
HEADER = struct.Struct("<4s5H3L2H")

ENCRYPTED = 1 << 0 | 1 << 6 | 1 << 13
STORED = 0
IN_EXTRA_FIELD = 0xFFFFFFFF  # The number needs 64 bits and stands there.
EXTRA_64 = 1

# Far more than a checkpoint has; bounds the memory that a directory can ask for.
MAX_DIRECTORY_SIZE = 16_000_000


class Record(NamedTuple):
    """One file of an archive.

    Args:
        offset: Position of its first byte.
        size: How many bytes it has in the archive.
        compressed: Whether these are not the file's own bytes.
    """

    offset: int
    size: int
    compressed: bool


class _Entry(NamedTuple):
    name: str
    header: int
    size: int
    compressed: bool


def read_records(file: Path) -> dict[str, Record]:
    """Every file of an archive, by its name.

    Raises:
        ValueError: If the archive is truncated or corrupt, or holds files that are
            encrypted or named to lie outside of it.
        OSError: If it cannot be read.
    """
    size = file.stat().st_size
    records: dict[str, Record] = {}
    with open(file, "rb") as stream:
        start, directory = _read_directory(stream, size)
        entries = sorted(_parse_directory(directory), key=lambda entry: entry.header)
        ends = [*(entry.header for entry in entries), start][1:]
        for entry, end in zip(entries, ends, strict=True):
            if entry.name in records:
                raise ValueError(f"it is corrupt: it holds {entry.name!r} twice")
            record = _locate(stream, entry)
            if record.offset + record.size > end:
                raise ValueError(
                    f"it is corrupt: {entry.name!r} runs into what follows it, "
                    f"{record.offset + record.size - end} bytes too far"
                )
            records[entry.name] = record
    # Folders are named with a slash at the end.
    return {name: record for name, record in records.items() if not name.endswith("/")}


def _read_directory(stream: BinaryIO, size: int) -> tuple[int, bytes]:
    """The directory and where it starts."""
    tail = _read(stream, max(0, size - TRAILER.size - 0xFFFF), min(size, TRAILER.size + 0xFFFF))
    position = tail.rfind(b"PK\5\6")
    if position < 0 or len(tail) - position < TRAILER.size:
        raise ValueError("it is truncated: a zip archive without its end")
    *_, length, start, comment = TRAILER.unpack_from(tail, position)
    if position + TRAILER.size + comment != len(tail):
        raise ValueError("it is corrupt: a zip archive with something behind its end")

    end = size - len(tail) + position
    if end >= LOCATOR_64.size:
        locator = LOCATOR_64.unpack(_read(stream, end - LOCATOR_64.size, LOCATOR_64.size))
        if locator[0] == b"PK\6\7":
            end = locator[2]
            signature, *_, length, start = TRAILER_64.unpack(_read(stream, end, TRAILER_64.size))
            if signature != b"PK\6\6":
                raise ValueError("it is corrupt: a zip archive without its 64-bit end")
    if start + length != end:
        raise ValueError("it is corrupt: its directory is not where the archive says")
    if length > MAX_DIRECTORY_SIZE:
        raise ValueError(f"it is corrupt: a directory of {length} bytes")
    return start, _read(stream, start, length)


def _parse_directory(directory: bytes) -> list[_Entry]:
    entries = []
    position = 0
    while position < len(directory):
        if len(directory) - position < ENTRY.size:
            raise ValueError("it is corrupt: its directory ends within an entry")
        fields = ENTRY.unpack_from(directory, position)
        signature, _, _, flags, method, _, _, _, size, full_size = fields[:10]
        lengths, header = fields[10:13], fields[16]
        position += ENTRY.size
        name, extra, _ = _split(directory[position : position + sum(lengths)], lengths)
        position += sum(lengths)
        if signature != b"PK\1\2" or position > len(directory):
            raise ValueError("it is corrupt: its directory makes no sense")
        text = _check_name(name)
        full_size, size, header = _widen(extra, [full_size, size, header])
        if flags & ENCRYPTED:
            raise ValueError(f"{text!r} in it is encrypted")
        if method == STORED and size != full_size:
            raise ValueError(f"it is corrupt: {text!r} has two sizes, {size} and {full_size}")
        entries.append(_Entry(text, header, size, method != STORED))
    return entries


def _split(data: bytes, lengths: tuple[int, ...]) -> list[bytes]:
    parts = []
    for length in lengths:
        parts.append(data[:length])
        data = data[length:]
    return parts


def _check_name(name: bytes) -> str:
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"it is corrupt: a file in it is named {name[:200]!r}") from None
    parts = text.removesuffix("/").split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in text or "\0" in text:
        raise ValueError(f"a file in it is named {text[:200]!r}, outside of the archive")
    return text


def _widen(extra: bytes, numbers: list[int]) -> list[int]:
    """Replaces those numbers that stand in the extra field, in the order of the format."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind == EXTRA_64:
            wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            return [next(wide, n) if n == IN_EXTRA_FIELD else n for n in numbers]
    return numbers


def _locate(stream: BinaryIO, entry: _Entry) -> Record:
    signature, *_, name_length, extra_length = HEADER.unpack(
        _read(stream, entry.header, HEADER.size)
    )
    name = _read(stream, entry.header + HEADER.size, name_length)
    if signature != b"PK\3\4" or name != entry.name.encode():
        raise ValueError(f"it is corrupt: {entry.name!r} is not where its directory says")
    start = entry.header + HEADER.size + name_length + extra_length
    return Record(start, entry.size, entry.compressed)


def _read(stream: BinaryIO, offset: int, size: int) -> bytes:
    """Reads so many bytes, which are few."""
    if offset + size > stream.seek(0, os.SEEK_END):
        raise ValueError("it is truncated: it ends before what its directory lists")
    stream.seek(offset)
    return stream.read(size)
