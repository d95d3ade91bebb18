"""Writing safetensors one tensor at a time.

``mx.save_safetensors`` evaluates all tensors of a file before it writes the
first, which holds a whole checkpoint in memory. Shapes and dtypes of lazy
arrays are known without evaluating them, so here the header goes first and
each tensor is evaluated, written and dropped.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from .checksum import tensor_bytes

# What mlx-lm fills a file up to, in its gigabytes of 2^30 bytes.
SHARD_SIZE = 5

DTYPE_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.uint8: "U8",
}


class TensorLayout(NamedTuple):
    """What a header says of a tensor."""

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.dtype.size * self.size


def write_weights(
    folder: Path,
    layouts: dict[str, TensorLayout],
    arrays: Iterable[tuple[str, mx.array]],
    parameters: int,
    shard_size: float = SHARD_SIZE,
    framework: str = "mlx",
) -> None:
    """Writes ``model.safetensors``, or shards as mlx-lm makes them, and their index.

    Args:
        layouts: All tensors, in the order in which ``arrays`` gives them.
        arrays: Name and array, evaluated or not; each is dropped once written.
        parameters: The model's parameters, for the index.
        shard_size: Gigabytes (2^30 bytes) of a file; a larger tensor gets one of its own.
        framework: Whose layout the tensors have: ``"mlx"``, or ``"pt"`` for PyTorch.

    Raises:
        ValueError: If the disk has no room for them.
        OSError: If a file cannot be written.
    """
    size = sum(layout.nbytes for layout in layouts.values())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(f"no room: {size:,} bytes to write, {free:,} free in {folder.parent}")

    shards = _shards(layouts, int(shard_size * 2**30))
    weight_map = {}
    with ExitStack() as stack:
        files = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            file = stack.enter_context(open(folder / name, "wb"))
            file.write(_header(shard, framework))
            files.update(dict.fromkeys(shard, file))
            weight_map.update(dict.fromkeys(shard, name))
        for name, array in arrays:
            files[name].write(tensor_bytes(array))

    index = {
        "metadata": {"total_size": size, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4))


def _shards(layouts: dict[str, TensorLayout], limit: int) -> list[dict[str, TensorLayout]]:
    shards: list[dict[str, TensorLayout]] = []
    room = 0
    for name, layout in layouts.items():
        if not shards or layout.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = layout
        room -= layout.nbytes
    return shards


def _header(layouts: dict[str, TensorLayout], framework: str) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": framework}}
    offset = 0
    for name, layout in layouts.items():
        header[name] = {
            "dtype": DTYPE_NAMES[layout.dtype],
            "shape": layout.shape,
            "data_offsets": [offset, offset + layout.nbytes],
        }
        offset += layout.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # The data starts at a multiple of 8 bytes.
    return struct.pack("<Q", len(text)) + text
