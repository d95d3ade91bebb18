"""The chunked recurrence and its gradient, in five kernels.

``metal/chunk_prepare.h`` and ``metal/chunk_gradients.h`` work within chunks, all at
once; ``metal/state_scan.h`` carries the state from chunk to chunk, once for the
outputs and three times for the gradients.
"""

import functools
from dataclasses import dataclass

import mlx.core as mx

from .sources import make_kernel, on_gpu

SEGMENT_TOKENS = 128  # between the states that the backward pass keeps
CHANNELS = 64  # per simdgroup of the kernels within a chunk: two to a lane
CHUNKS_PER_GROUP = 4  # that the kernels within a chunk take in one threadgroup
THREADGROUP_BYTES = 32 * 1024
WORD = 16  # bytes


@dataclass(frozen=True)
class Tiling:
    """How the state scan is cut for one GPU.

    Args:
        chunk: Tokens that pass the state at once.
        rows: Rows of the state to a simdgroup, which holds them in registers.
        simdgroups: The most simdgroups that share a chunk's operands.
    """

    chunk: int
    rows: int
    simdgroups: int


# One fragment of a simdgroup matrix is 8x8; a product of tensor cores has 16 rows.
METAL = Tiling(chunk=8, rows=8, simdgroups=16)
CUDA = Tiling(chunk=16, rows=16, simdgroups=8)


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
        return _tiling().chunk

    @property
    def chunks(self) -> int:
        return -(-self.length // self.chunk)

    @property
    def segments(self) -> int:
        return -(-self.chunks * self.chunk // SEGMENT_TOKENS)

    @property
    def q(self) -> tuple[int, ...]:
        return (self.batch, self.length, self.heads, self.keys)

    @property
    def v(self) -> tuple[int, ...]:
        return (self.batch, self.length, self.heads, self.values)

    @property
    def state(self) -> tuple[int, ...]:
        return (self.batch, self.heads, self.values, self.keys)

    def per_chunk(self, *dims: int) -> tuple[int, ...]:
        return (self.batch, self.heads, self.chunks, *dims)

    def per_segment(self, *dims: int) -> tuple[int, ...]:
        return (self.batch, self.heads, self.segments, *dims)


def fits(q: mx.array, f: mx.array, v: mx.array) -> bool:
    """Whether the kernels can run these inputs here: the one rule of when they are used."""
    keys, values = q.shape[-1], v.shape[-1]
    return (
        on_gpu()
        and q.dtype == f.dtype == v.dtype
        and keys % 16 == 0
        and values % 16 == 0
        and max(keys, values) <= (128 if v.dtype == mx.float32 else 256)
    )


def forward(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """Outputs and final state on inputs that :func:`fits` accepts.

    Args:
        q: Query logits ``[B, T, H, K]``, float32, bfloat16 or float16.
        f: Forget-gate logits ``[B, T, H, K]``; ``inf`` leaves the state as it is.
        v: Values ``[B, T, H, V]``.
        lower_bound: ``[H, K]`` float32.
        state: ``[B, H, V, K]`` float32.
        scale: Factor on the queries.

    Returns:
        Outputs ``[B, T, H, V]`` in the type of ``v`` and the new state.
    """
    shape = Shape.of(q, v)
    queries, keys, decay, scores = _prepare(shape, q, f, lower_bound, scale)
    return _scan_values(shape, "OUTPUTS", v, queries, keys, decay, scores, state)


def backward(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
    output_gradient: mx.array,
    state_gradient: mx.array,
) -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Gradients in ``q``, ``f``, ``v``, ``lower_bound`` and ``state``.

    Nothing is kept from the forward pass but its inputs. The same bits in every
    run: no sum is taken in an order that may change.

    Args:
        q, f, v, lower_bound, state, scale: As in :func:`forward`.
        output_gradient: ``[B, T, H, V]`` in the type of ``v``.
        state_gradient: Gradient of the new state, ``[B, H, V, K]`` float32.
    """
    shape = Shape.of(q, v)
    queries, keys, decay, scores = _prepare(shape, q, f, lower_bound, scale)
    v_gradient, state_in_gradient = _scan_values(
        shape,
        "VALUE_GRADIENTS",
        output_gradient,
        keys,
        queries,
        decay,
        scores,
        state_gradient,
    )
    state_queries, segment_states = _scan_queries(shape, keys, output_gradient, v, decay, state)
    state_keys, segment_products = _scan_keys(
        shape, queries, v, output_gradient, decay, state_gradient, segment_states
    )
    pairs = _value_scores(shape, output_gradient, v)
    q_gradient, f_gradient, bound_gradients = _gradients(
        shape, q, f, lower_bound, scale, pairs, state_queries, state_keys, segment_products
    )
    return q_gradient, f_gradient, v_gradient, bound_gradients.sum((0, 1)), state_in_gradient


def _tiling() -> Tiling:
    return CUDA if mx.cuda.is_available() else METAL


def _prepare(shape, q, f, lower_bound, scale):
    return _prepare_kernel()(
        inputs=[q, f, lower_bound, mx.array([scale])],
        template=[("T", q.dtype), ("K", shape.keys), ("H", shape.heads), ("CHUNK", shape.chunk)],
        grid=(32, _padded(shape.chunks, CHUNKS_PER_GROUP), shape.batch * shape.heads),
        threadgroup=(32, CHUNKS_PER_GROUP, 1),
        output_shapes=[
            shape.q,
            shape.q,
            shape.per_chunk(shape.keys),
            shape.per_chunk(shape.chunk, shape.chunk),
        ],
        output_dtypes=[q.dtype, q.dtype, mx.float32, q.dtype],
    )


def _scan_values(shape, role, left, read_by, written_by, decay, scores, state):
    return _scan_values_kernel(role)(
        inputs=[left, read_by, written_by, decay, scores, state],
        output_shapes=[shape.v, shape.state],
        output_dtypes=[shape.dtype, mx.float32],
        **_scan_launch(shape, shape.values, shape.keys, of_values=True),
    )


def _scan_queries(shape, keys, output_gradient, v, decay, state):
    return _scan_queries_kernel()(
        inputs=[keys, output_gradient, v, decay, state],
        output_shapes=[shape.q, shape.per_segment(shape.keys, shape.values)],
        output_dtypes=[mx.float32, mx.float32],
        **_scan_launch(shape, shape.keys, shape.values, of_values=False),
    )


def _scan_keys(shape, queries, v, output_gradient, decay, state_gradient, segment_states):
    return _scan_keys_kernel()(
        inputs=[queries, v, output_gradient, decay, state_gradient, segment_states],
        output_shapes=[shape.q, shape.per_segment(shape.keys)],
        output_dtypes=[mx.float32, mx.float32],
        **_scan_launch(shape, shape.keys, shape.values, of_values=False),
    )


def _value_scores(shape, output_gradient, v):
    (scores,) = _value_scores_kernel()(
        inputs=[output_gradient, v],
        template=[
            ("T", v.dtype),
            ("V", shape.values),
            ("H", shape.heads),
            ("CHUNK", shape.chunk),
        ],
        grid=(32, shape.chunks, shape.batch * shape.heads),
        threadgroup=(32, 1, 1),
        output_shapes=[shape.per_chunk(shape.chunk, shape.chunk)],
        output_dtypes=[mx.float32],
    )
    return scores


def _gradients(shape, q, f, lower_bound, scale, pairs, state_queries, state_keys, segment_products):
    slices = -(-shape.keys // CHANNELS)
    return _gradients_kernel()(
        inputs=[
            q,
            f,
            lower_bound,
            mx.array([scale]),
            pairs,
            state_queries,
            state_keys,
            segment_products,
        ],
        template=[
            ("T", q.dtype),
            ("K", shape.keys),
            ("H", shape.heads),
            ("CHUNK", shape.chunk),
            ("SEGMENT", SEGMENT_TOKENS // shape.chunk),
        ],
        grid=(32, slices * shape.segments, shape.batch * shape.heads),
        threadgroup=(32, slices, 1),
        output_shapes=[shape.q, shape.q, (shape.batch, shape.segments, shape.heads, shape.keys)],
        output_dtypes=[q.dtype, q.dtype, mx.float32],
    )


def _scan_launch(shape: Shape, rows: int, columns: int, of_values: bool) -> dict:
    """Template and grid of a scan over a state of ``rows`` cut among simdgroups."""
    tiling = _tiling()
    groups = rows // tiling.rows
    simdgroups = max(n for n in range(1, tiling.simdgroups + 1) if groups % n == 0)

    word = WORD // shape.dtype.size
    of_rows = tiling.rows * simdgroups
    words = shape.chunk * (of_rows // word + 1 + 2 * (columns // word + 1))
    words += (columns if of_values else of_rows) // 4
    if of_values:
        words += shape.chunk * (shape.chunk // word + 1)
    return {
        "template": [
            ("T", shape.dtype),
            ("R", rows),
            ("N", columns),
            ("H", shape.heads),
            ("CHUNK", shape.chunk),
            ("ROWS", tiling.rows),
            ("SIMDGROUPS", simdgroups),
            ("BUFFERS", 2 if 2 * words * WORD <= THREADGROUP_BYTES else 1),
            ("SEGMENT", SEGMENT_TOKENS // shape.chunk),
        ],
        "grid": (32, groups, shape.batch * shape.heads),
        "threadgroup": (32, simdgroups, 1),
    }


def _padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@functools.cache
def _prepare_kernel():
    return make_kernel(
        name="hgrn2_prepare_chunk",
        files=["gates.h", "tile.h", "channels.h", "chunk_prepare.h"],
        inputs=["q", "f", "lower_bound", "scale"],
        outputs=["entering_queries", "leaving_keys", "decay", "scores"],
        call=f"""
        const uint chunk = group.y * {CHUNKS_PER_GROUP} + simdgroup;
        if (chunk < (q_shape[1] + CHUNK - 1) / CHUNK) {{
          prepare_chunk<T, K, H, CHUNK>(
              q, f, lower_bound, scale[0], q_shape[1],
              entering_queries, leaving_keys, decay, scores, lane, chunk, group.z);
        }}
        """,
    )


SCAN_FILES = ["gates.h", "tile.h", "courier.h", "state_scan.h"]


def _scan_kernel(role: str, inputs: list[str], outputs: list[str], arguments: str):
    """The state scan in one of its roles."""
    parameters = f"T, {{}}{role}, R, N, {{}}CHUNK, ROWS, SIMDGROUPS"
    layout = f"ScanLayout<{parameters.format('', '')}>"
    result = "T" if role in ("OUTPUTS", "VALUE_GRADIENTS") else "float"
    return make_kernel(
        name=f"hgrn2_scan_{role.lower()}",
        files=SCAN_FILES,
        inputs=["left", "read_by", "written_by", "decay", *inputs],
        outputs=["results", *outputs],
        threadgroup=[("uint4", "pool", f"BUFFERS * {layout}::WORDS")],
        call=f"""
        scan_state<{parameters.format(result + ", ", "H, ")}, BUFFERS, SEGMENT>(
            left, read_by, written_by, decay, {arguments},
            pool, lane, simdgroup, group.y, group.z);
        """,
    )


@functools.cache
def _scan_values_kernel(role: str):
    return _scan_kernel(
        role,
        inputs=["scores", "state_in"],
        outputs=["state_out"],
        arguments="scores, state_in, left_shape[1], results, state_out, nullptr, nullptr",
    )


@functools.cache
def _scan_queries_kernel():
    return _scan_kernel(
        "QUERY_GRADIENTS",
        inputs=["state_in"],
        outputs=["segment_states"],
        arguments="nullptr, state_in, left_shape[1], results, nullptr, nullptr, segment_states",
    )


@functools.cache
def _scan_keys_kernel():
    return _scan_kernel(
        "KEY_GRADIENTS",
        inputs=["state_in", "segment_states"],
        outputs=["segment_products"],
        arguments="nullptr, state_in, left_shape[1], results, nullptr, segment_states, "
        "segment_products",
    )


@functools.cache
def _value_scores_kernel():
    return make_kernel(
        name="hgrn2_value_scores",
        files=["gates.h", "tile.h", "channels.h", "courier.h", "chunk_gradients.h"],
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
    return make_kernel(
        name="hgrn2_chunk_gradients",
        files=["gates.h", "tile.h", "channels.h", "courier.h", "chunk_gradients.h"],
        inputs=[
            "q",
            "f",
            "lower_bound",
            "scale",
            "pairs",
            "state_queries",
            "state_keys",
            "segment_products",
        ],
        outputs=["q_gradient", "f_gradient", "bound_gradients"],
        call="""
        chunk_gradients<T, K, H, CHUNK, SEGMENT>(
            q, f, lower_bound, scale[0], q_shape[1], pairs, state_queries, state_keys,
            segment_products, q_gradient, f_gradient, bound_gradients,
            lane, simdgroup, group.y, group.z);
        """,
    )
