"""Files in the safetensors format, checked by their headers before any tensor is read.

A file is the length of its header (8 bytes, little-endian), the header (JSON:
name to dtype, shape and span in the data) and the data
(https://huggingface.co/docs/safetensors).
"""

import json
import struct
from pathlib import Path
from typing import Any

from .stored_tensor import DTYPES, StoredTensor

# The reference implementation's own limit.
MAX_HEADER_SIZE = 100_000_000


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, whose spans fill its data exactly.

    Raises:
        ValueError: If the file is truncated or corrupt.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{file.name} is truncated: {size} bytes do not hold a header")
        (header_size,) = struct.unpack("<Q", prefix)
        if header_size > MAX_HEADER_SIZE:
            raise ValueError(f"{file.name} is corrupt: a header of {header_size} bytes")
        if 8 + header_size > size:
            raise ValueError(
                f"{file.name} is truncated: a header of {header_size} bytes in a file of {size}"
            )
        header = stream.read(header_size)
    try:
        entries = json.loads(header)
    except ValueError:
        entries = None
    if not isinstance(entries, dict):
        raise ValueError(f"{file.name} is corrupt: its header is not a JSON object")
    entries.pop("__metadata__", None)

    tensors = {}
    spans = []
    for name, entry in entries.items():
        tensors[name], span = _read_entry(file, 8 + header_size, name, entry)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"{file.name} is corrupt: {name} starts at byte {start}, not {end}")
        end = stop
    if 8 + header_size + end != size:
        problem = "truncated" if 8 + header_size + end > size else "corrupt"
        raise ValueError(
            f"{file.name} is {problem}: its header describes {8 + header_size + end} bytes, "
            f"the file has {size}"
        )
    return tensors


def _read_entry(
    file: Path, data: int, name: str, entry: Any
) -> tuple[StoredTensor, tuple[int, int]]:
    """One tensor and its span in the data, which begins at byte ``data`` of the file."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, stop)
        valid = isinstance(dtype, str) and all(isinstance(n, int) and n >= 0 for n in numbers)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{file.name} is corrupt: the header's entry of {name} makes no sense")
    if dtype not in DTYPES:
        raise ValueError(f"{file.name}: {name} has the unknown dtype {dtype!r}")
    tensor = StoredTensor(file, dtype, tuple(shape), data + start)
    if tensor.nbytes != stop - start:
        raise ValueError(
            f"{file.name} is corrupt: {name} ({dtype} {shape}) spans {stop - start} bytes, "
            f"not {tensor.nbytes}"
        )
    return tensor, (start, stop)
