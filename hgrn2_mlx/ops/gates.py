"""From the projections' logits to what the recurrence multiplies, in float32."""

import mlx.core as mx
import mlx.nn as nn


def gates(
    q: mx.array,
    f: mx.array,
    lower_bound: mx.array | None,
    mask: mx.array | None,
    scale: float,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, forget gates and keys (HGRN2, arXiv 2404.07904, section 3.2).

        query        = scale * silu(q)
        forget gate  = lb + (1 - lb) * sigmoid(f)
        key          = 1 - forget gate = (1 - lb) * sigmoid(-f)

    The key is computed from ``sigmoid(-f)`` because ``1 - forget gate`` loses
    every digit once the gate is close to one. Where ``mask`` is false the gate
    is 1 and the key 0: the state passes through untouched.

    Args:
        q: Query logits ``[B, T, H, K]``.
        f: Forget-gate logits ``[B, T, H, K]``.
        lower_bound: ``[H, K]`` in [0, 1), or ``None`` for 0.
        mask: Booleans ``[B, T]``, or ``None``.
        scale: Factor on the queries.

    Returns:
        Queries, forget gates and keys, each float32 ``[B, H, T, K]``.
    """
    q, f = (x.astype(mx.float32).swapaxes(1, 2) for x in (q, f))
    query = scale * nn.silu(q)
    forget_gate, key = _sigmoids(f)
    if lower_bound is not None:
        lower_bound = lower_bound.astype(mx.float32)[:, None]
        # The same as lb + (1 - lb) * gate, whose derivative in lb would cancel for open gates.
        forget_gate = forget_gate + lower_bound * key
        key = (1 - lower_bound) * key
    if mask is not None:
        mask = mask[:, None, :, None]
        forget_gate = mx.where(mask, forget_gate, 1.0)
        key = mx.where(mask, key, 0.0)
    return query, forget_gate, key


def _sigmoids(x: mx.array) -> tuple[mx.array, mx.array]:
    """``sigmoid(x)`` and ``sigmoid(-x)``, with derivatives as precise as themselves.

    MLX derives a sigmoid as ``s (1 - s)``, which loses every digit once s is
    close to one, that is for every gate that remembers for long.
    """
    positive = x >= 0
    z = mx.exp(mx.where(positive, -x, x))
    large, small = 1 / (1 + z), z / (1 + z)
    return mx.where(positive, large, small), mx.where(positive, small, large)
