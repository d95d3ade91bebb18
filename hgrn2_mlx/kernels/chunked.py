"""The chunked recurrence and its gradient, put together from kernels.

Those of :mod:`.chunk` work within chunks, all at once; :mod:`.state_scan` carries the
state from chunk to chunk, once for the outputs and three times for the gradients.
"""

import mlx.core as mx

from . import chunk
from .sources import on_gpu
from .state_scan import join_parts, scan
from .tiling import Shape


def fits(q: mx.array, f: mx.array, v: mx.array) -> bool:
    """Whether the kernels can run these inputs here: the one rule of when they are used."""
    keys, values = q.shape[-1], v.shape[-1]
    return (
        on_gpu()
        and q.dtype == f.dtype == v.dtype
        and keys % 16 == 0
        and values % 16 == 0
        and max(keys, values) <= 256
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
    queries, keys, decay, scores = chunk.prepare(shape, q, f, lower_bound, scale)
    starts = _part_starts(shape, v, keys, decay, state)
    outputs, states = scan(
        "OUTPUTS",
        shape,
        left=v,
        read_by=queries,
        written_by=keys,
        decay=decay,
        scores=scores,
        state_in=starts,
    )
    return outputs, states[:, :, -1]


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
    queries, keys, decay, scores = chunk.prepare(shape, q, f, lower_bound, scale)
    starts = _part_starts(shape, v, keys, decay, state)
    ends = _part_starts(shape, output_gradient, queries, decay, state_gradient, reverse=True)
    v_gradient, state_in_gradients = scan(
        "VALUE_GRADIENTS",
        shape,
        left=output_gradient,
        read_by=keys,
        written_by=queries,
        decay=decay,
        scores=scores,
        state_in=ends,
    )
    state_queries, segment_states = scan(
        "QUERY_GRADIENTS",
        shape,
        left=keys,
        read_by=output_gradient,
        written_by=v,
        decay=decay,
        state_in=starts,
    )
    state_keys, segment_products = scan(
        "KEY_GRADIENTS",
        shape,
        left=queries,
        read_by=v,
        written_by=output_gradient,
        decay=decay,
        state_in=ends,
        segment_states=segment_states,
    )
    pairs = chunk.value_scores(shape, output_gradient, v)
    q_gradient, f_gradient, bound_gradient = chunk.gradients(
        shape, q, f, lower_bound, scale, pairs, state_queries, state_keys, segment_products
    )
    return q_gradient, f_gradient, v_gradient, bound_gradient, state_in_gradients[:, :, 0]


def _part_starts(
    shape: Shape,
    left: mx.array,
    written_by: mx.array,
    decay: mx.array,
    state: mx.array,
    reverse: bool = False,
) -> mx.array:
    """What the scan of each part of the sequence starts from, ``[B, H, parts, V, K]``."""
    if shape.parts == 1:
        return state[:, :, None]
    role = "STATE_GRADIENTS" if reverse else "STATES"
    states, decays = scan(role, shape, left=left, written_by=written_by, decay=decay)
    return join_parts(shape, states, decays, state, reverse)
