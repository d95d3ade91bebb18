"""Glue of the kernels within a chunk, ``metal/chunk_*.h``, which take all chunks at once."""

import functools

import mlx.core as mx

from .sources import make_kernel
from .tiling import Shape, bits, largest_divisor

CHUNKS_PER_GROUP = 4  # that are prepared in one threadgroup, by a simdgroup each
CHANNELS = 32  # per simdgroup of the gradients: one to a lane
SLICES_PER_GROUP = 4  # of so many channels, at most, in one threadgroup


def prepare(
    shape: Shape, q: mx.array, f: mx.array, lower_bound: mx.array, scale: float
) -> list[mx.array]:
    """What each chunk is to the state that passes it.

    Returns:
        Entering queries and leaving keys ``[B, T, H, K]``, decays
        ``[B, H, chunks, K]`` and scores ``[B, H, chunks, chunk, chunk]``.
    """
    return _prepare_kernel()(
        inputs=[q, f, lower_bound],
        template=[
            ("T", q.dtype),
            ("K", shape.keys),
            ("H", shape.heads),
            ("CHUNK", shape.chunk),
            ("SCALE", bits(scale)),
        ],
        grid=(
            32,
            -(-shape.chunks // CHUNKS_PER_GROUP) * CHUNKS_PER_GROUP,
            shape.batch * shape.heads,
        ),
        threadgroup=(32, CHUNKS_PER_GROUP, 1),
        output_shapes=[
            shape.q,
            shape.q,
            shape.per_head(shape.chunks, shape.keys),
            shape.per_head(shape.chunks, shape.chunk, shape.chunk),
        ],
        output_dtypes=[q.dtype, q.dtype, mx.float32, q.dtype],
    )


def value_scores(shape: Shape, output_gradient: mx.array, v: mx.array) -> mx.array:
    """Products of every output gradient of a chunk with every value of it."""
    (scores,) = _value_scores_kernel()(
        inputs=[output_gradient, v],
        template=[("T", v.dtype), ("V", shape.values), ("H", shape.heads), ("CHUNK", shape.chunk)],
        grid=(32, shape.chunks, shape.batch * shape.heads),
        threadgroup=(32, 1, 1),
        output_shapes=[shape.per_head(shape.chunks, shape.chunk, shape.chunk)],
        output_dtypes=[mx.float32],
    )
    return scores


def gradients(
    shape: Shape,
    q: mx.array,
    f: mx.array,
    lower_bound: mx.array,
    scale: float,
    *from_scans: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients in ``q``, ``f`` and the lower bound.

    Args:
        from_scans: Value scores, what the scans for the gradients of queries and of
            keys give, and segment products, as ``metal/chunk_gradients.h`` has them.
    """
    slices = -(-shape.keys // CHANNELS)
    simdgroups = largest_divisor(slices, SLICES_PER_GROUP)
    q_gradient, f_gradient, bound_gradients = _gradients_kernel()(
        inputs=[q, f, lower_bound, *from_scans],
        template=[
            ("T", q.dtype),
            ("K", shape.keys),
            ("H", shape.heads),
            ("CHUNK", shape.chunk),
            ("SEGMENT", shape.segment_chunks),
            ("SLICES", slices),
            ("SCALE", bits(scale)),
            ("SIMDGROUPS", simdgroups),
        ],
        grid=(32, slices * shape.segments, shape.batch * shape.heads),
        threadgroup=(32, simdgroups, 1),
        output_shapes=[shape.q, shape.q, (shape.batch, shape.segments, shape.heads, shape.keys)],
        output_dtypes=[q.dtype, q.dtype, mx.float32],
    )
    return q_gradient, f_gradient, bound_gradients.sum((0, 1))


@functools.cache
def _prepare_kernel():
    return make_kernel(
        name="hgrn2_prepare_chunk",
        files=["gates.h", "tile_{gpu}.h", "channels.h", "chunk_prepare.h"],
        inputs=["q", "f", "lower_bound"],
        outputs=["entering_queries", "leaving_keys", "decay", "scores"],
        cuda_blocks=3,
        call=f"""
        const uint chunk = group.y * {CHUNKS_PER_GROUP} + simdgroup;
        if (chunk < (q_shape[1] + CHUNK - 1) / CHUNK) {{
          prepare_chunk<T, K, H, CHUNK>(
              q, f, lower_bound, float_of_bits(SCALE), q_shape[1],
              entering_queries, leaving_keys, decay, scores, lane, chunk, group.z);
        }}
        """,
    )


@functools.cache
def _value_scores_kernel():
    return make_kernel(
        name="hgrn2_value_scores",
        files=["tile_{gpu}.h", "tile.h", "courier_{gpu}.h", "chunk_value_scores.h"],
        inputs=["output_gradient", "v"],
        outputs=["scores"],
        threadgroup=[("uint4", "pool", "2 * CHUNK * (V * sizeof(T) / 16 + 1)")],
        call="""
        value_scores<T, V, H, CHUNK>(
            output_gradient, v, v_shape[1], scores, pool, lane, group.y, group.z);
        """,
    )


@functools.cache
def _gradients_kernel():
    from_scans = ["value_scores", "state_queries", "state_keys", "segment_products"]
    return make_kernel(
        name="hgrn2_chunk_gradients",
        files=["gates.h", "channels.h", "chunk_gradients.h"],
        inputs=["q", "f", "lower_bound", *from_scans],
        outputs=["q_gradients", "f_gradients", "bound_gradients"],
        cuda_blocks=3,
        call=f"""
        const uint index = group.y * SIMDGROUPS + simdgroup;
        chunk_gradients<T, K, H, CHUNK, SEGMENT>(
            q, f, lower_bound, float_of_bits(SCALE), q_shape[1], {", ".join(from_scans)},
            q_gradients, f_gradients, bound_gradients,
            lane, index % SLICES, index / SLICES, group.z);
        """,
    )
