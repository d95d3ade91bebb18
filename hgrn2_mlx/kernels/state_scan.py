"""Glue of ``metal/state_scan.h``, which carries the state from chunk to chunk."""

import functools

import mlx.core as mx

from .sources import make_kernel
from .tiling import Shape, largest_divisor, tiling

WORD = 16  # bytes
ARGUMENTS = (
    "left",
    "read_by",
    "written_by",
    "decay",
    "scores",
    "state_in",
    "length",
    "parts",
    "results",
    "state_out",
    "part_decay",
    "segment_states",
    "segment_ends",
)


def scan(
    role: str,
    shape: Shape,
    *,
    left: mx.array,
    written_by: mx.array,
    decay: mx.array,
    **others: mx.array,
) -> list[mx.array]:
    """Runs the scan in one of the roles of ``metal/state_scan.h``.

    Args:
        role: A name of its ``Role``.
        shape: Sizes of the call.
        left, written_by, decay, others: The arguments that the role has, by their
            names there.

    Returns:
        The role's results, in the order of the arguments there.
    """
    of_keys = role in ("QUERY_GRADIENTS", "KEY_GRADIENTS")
    of_parts = role in ("STATES", "STATE_GRADIENTS")
    keys, values, parts = shape.keys, shape.values, shape.parts
    outputs = {}
    if not of_parts:
        outputs["results"] = (shape.q, mx.float32) if of_keys else (shape.v, shape.dtype)
    if not of_keys:
        outputs["state_out"] = (shape.per_head(parts, values, keys), mx.float32)
    if of_parts:
        outputs["part_decay"] = (shape.per_head(parts, keys), mx.float32)
    if of_keys:
        ends = (keys, values) if role == "QUERY_GRADIENTS" else (keys,)
        ends_dtype = shape.dtype if role == "QUERY_GRADIENTS" else mx.float32
        outputs["segment_ends"] = (shape.per_head(shape.segments, *ends), ends_dtype)

    rows, columns = (keys, values) if of_keys else (values, keys)
    groups = rows // tiling().rows
    group = largest_divisor(groups, tiling().group)
    inputs = {"left": left, "written_by": written_by, "decay": decay, **others}
    kernel = _kernel(role, tuple(inputs), tuple(outputs))
    return kernel(
        inputs=list(inputs.values()),
        template=[
            ("T", shape.dtype),
            ("R", rows),
            ("N", columns),
            ("H", shape.heads),
            ("CHUNK", shape.chunk),
            ("ROWS", tiling().rows),
            ("SIMDGROUPS", group),
            ("BUFFERS", _buffers(shape, group, columns)),
            ("SEGMENT", shape.segment_chunks),
        ],
        grid=(32, groups, shape.batch * shape.heads * parts),
        threadgroup=(32, group, 1),
        output_shapes=[size for size, _ in outputs.values()],
        output_dtypes=[dtype for _, dtype in outputs.values()],
    )


def join_parts(
    shape: Shape, part_states: mx.array, part_decay: mx.array, state: mx.array, reverse: bool
) -> mx.array:
    """The state that each part of the sequence starts from, ``[B, H, parts, V, K]``."""
    (starts,) = _join_kernel()(
        inputs=[part_states, part_decay, state],
        template=[("K", shape.keys), ("V", shape.values), ("REVERSED", reverse)],
        grid=(shape.keys * shape.values, 1, shape.batch * shape.heads),
        threadgroup=(128, 1, 1),
        output_shapes=[part_states.shape],
        output_dtypes=[mx.float32],
    )
    return starts


def _buffers(shape: Shape, group: int, columns: int) -> int:
    """For the role that needs most: words are counted as in ``ScanLayout``."""
    word = WORD // shape.dtype.size
    of_rows = tiling().rows * group
    words = of_rows // word + 1 + 2 * (columns // word + 1) + shape.chunk // word + 1
    words = words * shape.chunk + max(columns, of_rows) // 4
    return min(tiling().buffers, tiling().threadgroup_bytes // (words * WORD))


@functools.cache
def _kernel(role: str, inputs: tuple[str, ...], outputs: tuple[str, ...]):
    """Arguments that the role has not are null."""
    written = {"length": "left_shape[1]", "parts": "groups.z / (left_shape[0] * H)"}
    arguments = ", ".join(
        written.get(name, name if name in inputs + outputs else "nullptr") for name in ARGUMENTS
    )
    result = "T" if role in ("OUTPUTS", "VALUE_GRADIENTS") else "float"
    end = "T" if role == "QUERY_GRADIENTS" else "float"
    return make_kernel(
        name=f"hgrn2_scan_{role.lower()}",
        files=["tile_{gpu}.h", "tile.h", "courier_{gpu}.h", "state_scan.h"],
        inputs=list(inputs),
        outputs=list(outputs),
        cuda_blocks=2,
        threadgroup=[
            (
                "uint4",
                "pool",
                f"BUFFERS * ScanLayout<T, {role}, R, N, CHUNK, ROWS, SIMDGROUPS>::WORDS",
            )
        ],
        call=f"""
        scan_state<T, {result}, {end}, {role}, R, N, H, CHUNK, ROWS, SIMDGROUPS, BUFFERS, SEGMENT>(
            {arguments}, pool, lane, simdgroup, group.y, group.z);
        """,
    )


@functools.cache
def _join_kernel():
    return make_kernel(
        name="hgrn2_join_parts",
        files=["tile_{gpu}.h", "tile.h", "courier_{gpu}.h", "state_scan.h"],
        inputs=["part_states", "part_decay", "state_in"],
        outputs=["starts"],
        call="""
        join_parts<V, K, REVERSED>(
            part_states, part_decay, state_in, part_decay_shape[2], starts,
            thread_in_grid, group.z);
        """,
    )
