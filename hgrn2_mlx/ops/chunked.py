"""The recurrence a chunk at a time, in plain MLX operations.

Inside a chunk the output is a causal matrix of scores times the values, where
``scores[t, s] = q_t . (f_{s+1} ... f_t) k_s`` carries a decay of its own for
every channel. Writing that decay as a quotient of cumulative products divides
by numbers that underflow; writing it as a difference of cumulative logarithms
cancels. Here nothing is divided and no logarithm taken. Blocks of one token
are merged into blocks of 2, 4, ... up to the chunk, and a block carries

    q_in   = q_t  (f_start ... f_t)      queries, decayed from the block's start
    k_out  = k_s  (f_{s+1} ... f_end)    keys, decayed to the block's end
    decay  = f_start ... f_end           the whole block's decay

so that the scores of a right block's queries on a left block's keys are one
matrix product, ``q_in[right] k_out[left]^T``. Every factor is a product of
gates in [0, 1]: an underflow is the correct limit, and gradients, which reverse
the same multiplications, divide by nothing either. After log2(chunk) merges
``q_in`` reads the state that enters the chunk, ``k_out`` writes the one that
leaves it, and ``decay`` carries it across.
"""

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .gates import gates

CHUNK = 64
# Tokens, over the whole batch, whose intermediates are alive at once in the backward pass.
SEGMENT_TOKENS = 2048


def chunked(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
    query_act: Callable[[mx.array], mx.array] = nn.silu,
) -> tuple[mx.array, mx.array]:
    """The gated recurrence with memory for ``T / segment`` states under differentiation.

    Arguments and results as in :func:`gated_recurrence`. The sequence is cut
    into segments of whole chunks; the backward pass keeps the state at each
    segment's start and computes everything else again.
    """
    batch, length = q.shape[:2]
    segment = max(CHUNK, SEGMENT_TOKENS // batch // CHUNK * CHUNK)
    segments = zip(*(_pieces(x, segment, axis=1) for x in (q, f, v)))
    run = _recomputed(functools.partial(_segment, scale=scale, query_act=query_act))

    outputs = []
    for segment_inputs in segments:
        output, state = run(*segment_inputs, lower_bound, state)
        outputs.append(output)
    return mx.concatenate(outputs, axis=1), state


def _pieces(x: mx.array, size: int, axis: int) -> list[mx.array]:
    """Cuts ``x`` into pieces of ``size`` (the last may be shorter).

    The gradient of a split is one concatenation; that of n slices is n arrays
    of the full length. MLX turns a split into more than ten pieces into slices,
    hence the halving.
    """
    cuts = list(range(size, x.shape[axis], size))
    if len(cuts) < 10:
        return mx.split(x, cuts, axis=axis)
    left, right = mx.split(x, [cuts[len(cuts) // 2]], axis=axis)
    return _pieces(left, size, axis) + _pieces(right, size, axis)


def _recomputed(function):
    """``mx.checkpoint`` for one link of a chain of segments.

    ``mx.checkpoint`` alone does not bound the memory here: MLX would first walk
    the gradient of the state back through all segments, keeping what each of
    them recomputed until its other gradients are asked for. So the gradients of
    a segment are made to wait for each other.
    """
    wrapped = mx.custom_function(function)

    @wrapped.vjp
    def gradients(primals, cotangents, _):
        primals = mx.depends(primals, cotangents)
        _, grads = mx.vjp(function, primals, cotangents)
        return mx.depends(grads, grads)

    return wrapped


def _segment(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
    query_act: Callable[[mx.array], mx.array],
) -> tuple[mx.array, mx.array]:
    """All chunks of a segment at once, but for the states, which pass from one to the next."""
    query, forget_gate, key = gates(q, f, lower_bound, scale, query_act)
    value = v.astype(mx.float32).swapaxes(1, 2)
    length = query.shape[2]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    padding = -length % chunk

    def to_chunks(x: mx.array, fill: float) -> mx.array:
        x = mx.pad(x, [(0, 0), (0, 0), (0, padding), (0, 0)], constant_values=fill)
        return x.reshape(*x.shape[:2], -1, chunk, x.shape[-1])

    # A padded token neither decays the state (gate 1) nor writes to it (key 0).
    query, key, value = (to_chunks(x, 0.0) for x in (query, key, value))
    forget_gate = to_chunks(forget_gate, 1.0)

    scores, q_in, k_out, decay = _merge_blocks(query, key, forget_gate)
    writes = value.swapaxes(-1, -2) @ k_out

    entering = []
    for write, chunk_decay in zip(_pieces(writes, 1, axis=2), _pieces(decay, 1, axis=2)):
        entering.append(state)
        state = state * chunk_decay.squeeze(2) + write.squeeze(2)

    output = scores @ value + q_in @ mx.stack(entering, axis=2).swapaxes(-1, -2)
    output = output.reshape(*output.shape[:2], -1, output.shape[-1])[:, :, :length]
    return output.swapaxes(1, 2).astype(v.dtype), state


def _merge_blocks(
    query: mx.array, key: mx.array, forget_gate: mx.array
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Scores and decayed queries and keys of every chunk, by merging blocks pairwise.

    Args:
        query, key, forget_gate: ``[..., C, K]``, C a power of two.

    Returns:
        ``scores [..., C, C]``, ``q_in [..., C, K]``, ``k_out [..., C, K]`` and
        ``decay [..., 1, K]`` of the whole chunk.
    """
    # [..., blocks, tokens of a block, K], first with blocks of one token.
    q_in = (query * forget_gate)[..., None, :]
    k_out = key[..., None, :]
    decay = forget_gate[..., None, :]
    scores = (query * key).sum(-1)[..., None, None]

    while q_in.shape[-3] > 1:
        (q_left, q_right), (k_left, k_right), (decay_left, decay_right), (left, right) = (
            (x[..., 0::2, :, :], x[..., 1::2, :, :]) for x in (q_in, k_out, decay, scores)
        )
        across = q_right @ k_left.swapaxes(-1, -2)
        scores = mx.concatenate(
            [
                mx.concatenate([left, mx.zeros_like(left)], axis=-1),
                mx.concatenate([across, right], axis=-1),
            ],
            axis=-2,
        )
        q_in = mx.concatenate([q_left, q_right * decay_left], axis=-2)
        k_out = mx.concatenate([k_left * decay_right, k_right], axis=-2)
        decay = decay_left * decay_right

    return tuple(x.squeeze(-3) for x in (scores, q_in, k_out, decay))
