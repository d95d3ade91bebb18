"""A checkpoint's safetensors files, checked by their headers before any tensor is read.

A file is the length of its header (8 bytes, little-endian), the header (JSON:
name to dtype, shape and span in the data) and the data
(https://huggingface.co/docs/safetensors).
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from .source import read_json

ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}

# The reference implementation's own limit.
MAX_HEADER_SIZE = 100_000_000


class StoredTensor(NamedTuple):
    """One tensor as a header describes it; ``dtype`` in the format's names (``"BF16"``)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return ITEM_SIZES[self.dtype] * math.prod(self.shape)


def read_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in ``folder``: of one file, or of the shards of an index.

    Raises:
        ValueError: If files are missing, truncated or corrupt, or contradict the index.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_shards(index)
    file = folder / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{folder} has no model.safetensors, nor an index of shards")
    return read_header(file)


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise ValueError(f"{index.name}: weight_map does not map tensors to files beside it")
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise ValueError(f"{index.name}: missing shards: {', '.join(missing)}")

    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard = read_header(index.parent / file)
        listed = {name for name, home in weight_map.items() if home == file}
        if absent := sorted(listed - shard.keys()):
            raise ValueError(f"{file}: lacks what {index.name} lists in it: {', '.join(absent)}")
        if extra := sorted(shard.keys() - listed):
            raise ValueError(f"{file}: holds what {index.name} does not list: {', '.join(extra)}")
        tensors.update(shard)
    return tensors


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
        tensors[name], span = _read_entry(file, name, entry)
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


def _read_entry(file: Path, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = (*shape, start, stop)
        valid = isinstance(dtype, str) and all(isinstance(n, int) and n >= 0 for n in numbers)
    except (KeyError, TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"{file.name} is corrupt: the header's entry of {name} makes no sense")
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{file.name}: {name} has the unknown dtype {dtype!r}")
    tensor = StoredTensor(file, dtype, tuple(shape))
    if tensor.nbytes != stop - start:
        raise ValueError(
            f"{file.name} is corrupt: {name} ({dtype} {shape}) spans {stop - start} bytes, "
            f"not {tensor.nbytes}"
        )
    return tensor, (start, stop)
