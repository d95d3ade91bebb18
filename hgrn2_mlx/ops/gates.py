"""From the projections' logits to what the recurrence multiplies, in float32."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


def gates(
    q: mx.array,
    f: mx.array,
    lower_bound: mx.array,
    scale: float,
    query_act: Callable[[mx.array], mx.array] = nn.silu,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, forget gates and keys (HGRN2, arXiv 2404.07904, section 3.2).

        query        = scale * query_act(q)
        forget gate  = lb + (1 - lb) * sigmoid(f)
        key          = 1 - forget gate = (1 - lb) * sigmoid(-f)

    The key is computed from ``sigmoid(-f)`` because ``1 - forget gate`` loses
    every digit once the gate is close to one. A logit of infinity gives a gate of
    exactly 1 and a key of exactly 0, so such a token leaves the state untouched.

    Args:
        q: Query logits ``[B, T, H, K]``.
        f: Forget-gate logits ``[B, T, H, K]``.
        lower_bound: ``[H, K]`` in [0, 1).
        scale: Factor on the queries.
        query_act: Activation of the queries.

    Returns:
        Queries, forget gates and keys, each float32 ``[B, H, T, K]``.
    """
    q, f = (x.swapaxes(1, 2) for x in (q, f))
    query = scale * query_act(q.astype(mx.float32))
    return query, *forget_gates(f, lower_bound[:, None])


def forget_gates(f: mx.array, lower_bound: mx.array) -> tuple[mx.array, mx.array]:
    """Forget gates and what they leave to the input, ``1 - forget gate``, in float32.

    Args:
        f: Forget-gate logits.
        lower_bound: In [0, 1), of a shape that broadcasts to that of ``f``.
    """
    opened, closed = _sigmoids(f.astype(mx.float32))
    lower_bound = lower_bound.astype(mx.float32)
    # The same as lb + (1 - lb) * opened, whose derivative in lb would cancel for open gates.
    return opened + lower_bound * closed, (1 - lower_bound) * closed


def _sigmoids(x: mx.array) -> tuple[mx.array, mx.array]:
    """``sigmoid(x)`` and ``sigmoid(-x)``, with derivatives as precise as themselves.

    MLX derives a sigmoid as ``s (1 - s)``, which loses every digit once s is
    close to one, that is for every gate that remembers for long.
    """
    positive = x >= 0
    z = mx.exp(mx.where(positive, -x, x))
    large, small = 1 / (1 + z), z / (1 + z)
    return mx.where(positive, large, small), mx.where(positive, small, large)
