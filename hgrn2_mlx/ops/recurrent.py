"""The recurrence one step at a time: the definition, and the way to decode."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .gates import gates


def recurrent(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
    query_act: Callable[[mx.array], mx.array] = nn.silu,
) -> tuple[mx.array, mx.array]:
    """``S_t = Diag(f_t) S_{t-1} + k_t (x) v_t``, ``o_t = q_t S_t``, step by step.

    Arguments and results as in :func:`gated_recurrence`, with every state of
    the sequence alive under differentiation: use it for a few tokens only.
    """
    query, forget_gate, key = gates(q, f, lower_bound, scale, query_act)
    value = v.astype(mx.float32).swapaxes(1, 2)
    outputs = []
    for t in range(q.shape[1]):
        # The state is kept transposed, [V, K], as fla keeps it: the gate scales its columns.
        state = state * forget_gate[:, :, t, None, :]
        state = state + value[:, :, t, :, None] * key[:, :, t, None, :]
        outputs.append((state @ query[:, :, t, :, None]).squeeze(-1))
    return mx.stack(outputs, axis=1).astype(v.dtype), state
