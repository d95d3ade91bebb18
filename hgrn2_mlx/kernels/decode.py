"""The decode kernel: one or a few tokens, gates computed inside (``metal/decode.h``)."""

import functools

import mlx.core as mx

from .sources import make_kernel, on_gpu
from .tiling import bits

ROWS = 2  # rows of the state [V, K] per simdgroup
SIMDGROUPS = 8  # simdgroups per threadgroup
MAX_TOKENS = 4  # each number of tokens is a kernel of its own


def fits(q: mx.array, f: mx.array, v: mx.array) -> bool:
    """Whether the kernel can run these inputs here: the one rule of when it is used."""
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    return (
        on_gpu()
        and q.shape[1] <= MAX_TOKENS
        and q.dtype == f.dtype == v.dtype
        and key_dim % 32 == 0
        and key_dim <= 256
        and value_dim % (ROWS * SIMDGROUPS) == 0
    )


def decode(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """Runs the kernel on inputs that :func:`fits` accepts.

    Arguments and results as of :func:`.chunked.forward`.
    """
    batch, tokens, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    return _kernel()(
        inputs=[q, f, v, lower_bound, state],
        template=[
            ("T", v.dtype),
            ("K", key_dim),
            ("V", value_dim),
            ("H", heads),
            ("TOKENS", tokens),
            ("ROWS", ROWS),
            ("SIMDGROUPS", SIMDGROUPS),
            ("SCALE", bits(scale)),
        ],
        grid=(32, value_dim // ROWS, batch * heads),
        threadgroup=(32, SIMDGROUPS, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[v.dtype, mx.float32],
    )


@functools.cache
def _kernel():
    return make_kernel(
        name="hgrn2_decode",
        files=["gates.h", "channels.h", "decode.h"],
        inputs=["q", "f", "v", "lower_bound", "state_in"],
        outputs=["out", "state_out"],
        threadgroup=[("uint4", "pool", "3 * TOKENS * K / 4")],
        call="""
        decode<T, K, V, H, TOKENS, ROWS, SIMDGROUPS>(
            q, f, v, lower_bound, state_in, float_of_bits(SCALE), out, state_out, pool,
            lane, simdgroup, group.y, group.z);
        """,
    )
