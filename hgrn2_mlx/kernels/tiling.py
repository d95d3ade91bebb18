"""How the chunked kernels cut a sequence and its states for the GPU at hand."""

import struct
from dataclasses import dataclass

import mlx.core as mx

SEGMENT_TOKENS = 64  # between the states that the backward pass keeps
PART_TOKENS = 512  # fewer are not worth a part of their own


@dataclass(frozen=True)
class Tiling:
    """What suits one kind of GPU.

    Args:
        chunk: Tokens that pass the state at once.
        rows: Rows of the state to a simdgroup, which holds them in registers.
        group: The most simdgroups that share a chunk's operands.
        buffers: The most chunks whose operands are in threadgroup memory.
        threadgroup_bytes: Threadgroup memory at most.
        simdgroups: About as many keep the GPU busy.
    """

    chunk: int
    rows: int
    group: int
    buffers: int
    threadgroup_bytes: int
    simdgroups: int


# One fragment of a simdgroup matrix is 8x8; a product of tensor cores has 16 rows. An Apple GPU
# refuses large threadgroups of a kernel with many registers; MLX's own products keep to 256.
METAL = Tiling(chunk=8, rows=8, group=8, buffers=2, threadgroup_bytes=32 << 10, simdgroups=256)
CUDA = Tiling(chunk=16, rows=16, group=4, buffers=2, threadgroup_bytes=48 << 10, simdgroups=1024)


def tiling() -> Tiling:
    return CUDA if mx.cuda.is_available() else METAL


@dataclass(frozen=True)
class Shape:
    """Sizes of a call: ``[B, T, H, K]`` keys and ``[B, T, H, V]`` values of a type."""

    batch: int
    length: int
    heads: int
    keys: int
    values: int
    dtype: mx.Dtype

    @classmethod
    def of(cls, q: mx.array, v: mx.array) -> "Shape":
        return cls(*q.shape, v.shape[-1], v.dtype)

    @property
    def chunk(self) -> int:
        return tiling().chunk

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def segments(self) -> int:
        return -(-self.length // SEGMENT_TOKENS)

    @property
    def segment_chunks(self) -> int:
        return SEGMENT_TOKENS // self.chunk

    @property
    def parts(self) -> int:
        """Into how many a sequence is cut, of whole segments, when it alone is too little work."""
        simdgroups = self.batch * self.heads * self.values // tiling().rows
        return max(1, min(tiling().simdgroups // simdgroups, self.length // PART_TOKENS))

    @property
    def q(self) -> tuple[int, ...]:
        return (self.batch, self.length, self.heads, self.keys)

    @property
    def v(self) -> tuple[int, ...]:
        return (self.batch, self.length, self.heads, self.values)

    def per_head(self, *dims: int) -> tuple[int, ...]:
        return (self.batch, self.heads, *dims)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` that is at most ``most``."""
    return max(n for n in range(1, most + 1) if number % n == 0)


def bits(scale: float) -> int:
    """A positive number as a template argument; ``float_of_bits`` undoes it.

    As an array it would share a page of managed memory with others that the CPU
    writes, and an NVIDIA GPU would fetch the page anew for every kernel.
    """
    return struct.unpack("i", struct.pack("f", scale))[0]
