"""The one entry point to the recurrence: checks the shapes and picks the form."""

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from .chunked import chunked
from .chunked_kernels import can_run, chunked_kernels
from .decode import can_decode, decode
from .recurrent import recurrent


def gated_recurrence(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array | None = None,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    scale: float | None = None,
    query_act: Callable[[mx.array], mx.array] = nn.silu,
) -> tuple[mx.array, mx.array]:
    """The gated linear recurrence of HGRN2 (arXiv 2404.07904, equations 6 to 8).

        q_t = scale * query_act(q_t)
        f_t = lb + (1 - lb) * sigmoid(f_t)
        S_t = Diag(f_t) S_{t-1} + (1 - f_t) (x) v_t
        o_t = q_t S_t

    The state and all sums are float32 whatever the inputs' type. A few tokens
    (decoding) run in one kernel on a GPU, one token in one step elsewhere, more
    run chunk by chunk, in kernels on a GPU; all give the same numbers up to
    rounding, for any length, gates from 0 to 1 and any split of a sequence into
    calls that hand on the state. Differentiable in ``q``, ``f``, ``v``,
    ``lower_bound`` and ``state``. On a GPU, put an axis for ``mx.vmap`` into the
    batch instead: MLX does not map kernels, and says so. Kernels read 16 bytes at a
    time, so arrays must begin at such a place there, as all results of operations do:
    of a slice of a flat array that begins elsewhere, pass a copy (``x + 0``).

    Args:
        q: Query logits ``[B, T, H, K]`` (before ``query_act``), float32, bfloat16 or float16.
        f: Forget-gate logits ``[B, T, H, K]`` (before the sigmoid).
        v: Values ``[B, T, H, V]``.
        lower_bound: Lower bound of the forget gate ``[H, K]`` in [0, 1);
            ``None`` means 0.
        state: State before the first token, ``[B, H, V, K]`` float32 (fla's
            ``state_v_first`` layout); ``None`` means zeros.
        mask: Booleans ``[B, T]``; a token where it is false leaves the state as
            it was, and its output is of no use.
        scale: Positive factor on the queries, ``K ** -0.5`` by default as in fla's GLA
            operations (``fla/ops/gla``).
        query_act: Activation of the queries, applied in float32. The kernel knows
            silu only; with another, MLX's operations run everywhere.

    Returns:
        The outputs ``[B, T, H, V]`` in the type of ``v``, and the state after
        the last token, ``[B, H, V, K]`` float32.

    Raises:
        ValueError: If the shapes do not fit together, there are no tokens or the scale
            is not positive.
    """
    if q.ndim != 4 or q.shape != f.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            "gated_recurrence: expected q and f [B, T, H, K] and v [B, T, H, V], "
            f"got q {q.shape}, f {f.shape}, v {v.shape}"
        )
    batch, length, heads, key_dim = q.shape
    if batch == 0 or length == 0:
        raise ValueError(f"gated_recurrence: there are no tokens (B = {batch}, T = {length})")
    state_shape = (batch, heads, v.shape[-1], key_dim)
    for name, array, shape in (
        ("lower_bound", lower_bound, (heads, key_dim)),
        ("state", state, state_shape),
        ("mask", mask, (batch, length)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"gated_recurrence: expected {name} {shape}, got {array.shape}")

    if scale is None:
        scale = key_dim**-0.5
    if scale <= 0:
        raise ValueError(f"gated_recurrence: expected a positive scale, got {scale}")
    lower_bound = mx.zeros((heads, key_dim)) if lower_bound is None else lower_bound
    state = mx.zeros(state_shape) if state is None else state.astype(mx.float32)
    if mask is not None:
        # There the gate is exactly 1 and the key exactly 0: the state stays.
        f = mx.where(mask[..., None, None], f, mx.array(mx.inf, f.dtype))
    if query_act is nn.silu and can_decode(q, f, v):
        form = decode
    elif query_act is nn.silu and can_run(q, f, v):
        form = chunked_kernels
    else:
        form = functools.partial(recurrent if length == 1 else chunked, query_act=query_act)
    return form(q, f, v, lower_bound, state, scale)
