"""A tensor in a checkpoint's file, whatever the format: where it lies, and how it is read."""

import math
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

# By the names of the safetensors format. MLX has no 8-bit floats and gives their bytes.
DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "F8_E4M3": mx.uint8,
    "F8_E5M2": mx.uint8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F64": mx.float64,
    "C64": mx.complex64,
}


class StoredTensor(NamedTuple):
    """One tensor as its file describes it, checked to lie within the file.

    Args:
        file: The file that holds it, uncompressed and little-endian.
        dtype: A name of the safetensors format (``"BF16"``).
        shape: Its shape.
        offset: Byte of the file at which its first element starts.
        strides: Elements from one index to the next, for each dimension; ``None`` if
            the elements follow each other in order.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return DTYPES[self.dtype].size * math.prod(self.shape)

    def load(self) -> mx.array:
        """The tensor, read now, bit for bit.

        Raises:
            ValueError: If the file has shrunk.
            OSError: If it cannot be read.
        """
        dtype = DTYPES[self.dtype]
        if 0 in self.shape:
            return mx.zeros(self.shape, dtype)
        # As integers, because NumPy has no bfloat16 and a float's bits must not change.
        items = np.dtype(f"<u{dtype.size}")
        span = math.prod(self.shape)
        if self.strides is not None:
            steps = zip(self.shape, self.strides, strict=True)
            span = 1 + sum((size - 1) * stride for size, stride in steps)
        # A mapping that lives only here: pages that are read count as resident until it goes.
        try:
            view = np.memmap(self.file, items, mode="r", offset=self.offset, shape=(span,))
        except ValueError:
            raise ValueError(f"{self.file.name} has become shorter while it was read") from None
        if self.strides is None:
            view = view.reshape(self.shape)
        else:
            strides = [stride * dtype.size for stride in self.strides]
            view = np.lib.stride_tricks.as_strided(view, self.shape, strides, writeable=False)
        return mx.array(view).view(dtype)
