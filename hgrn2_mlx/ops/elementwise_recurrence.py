"""The one entry point to the recurrence of HGRN: checks the shapes and picks the form."""

import mlx.core as mx

from .elementwise_scan import can_scan, elementwise_scan
from .merged_pairs import merged_pairs


def elementwise_recurrence(
    x: mx.array,
    f: mx.array,
    lower_bound: mx.array | None = None,
    state: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The gated linear recurrence of HGRN (arXiv 2311.04823) as in ``fla/layers/hgrn.py``.

        f_t = lb + (1 - lb) * sigmoid(f_t)
        h_t = f_t * h_{t-1} + (1 - f_t) * silu(x_t)

    All arithmetic and the state are float32 whatever the inputs' type. One kernel
    on a GPU, operations elsewhere, give the same numbers up to rounding, however
    a sequence is split into calls that hand on the state. Differentiable in ``x``,
    ``f``, ``lower_bound`` and ``state``, with memory for a few arrays of the size
    of ``x``.

    Args:
        x: Inputs ``[B, T, D]`` (before silu), float32, bfloat16 or float16.
        f: Forget-gate logits ``[B, T, D]`` (before the sigmoid).
        lower_bound: Lower bound of the forget gate ``[D]`` in [0, 1); ``None`` means 0.
        state: State before the first token, ``[B, D]``; ``None`` means zeros.
        mask: Booleans ``[B, T]``; a token where it is false leaves the state as
            it was, and its output is of no use.

    Returns:
        The states after every token, ``[B, T, D]`` in the type of ``x``, and the
        last of them, ``[B, D]`` float32.

    Raises:
        ValueError: If the shapes do not fit together or there are no tokens.
    """
    if x.ndim != 3 or x.shape != f.shape:
        raise ValueError(
            f"elementwise_recurrence: expected x and f [B, T, D], got x {x.shape}, f {f.shape}"
        )
    batch, length, dim = x.shape
    if batch == 0 or length == 0:
        raise ValueError(f"elementwise_recurrence: there are no tokens (B = {batch}, T = {length})")
    for name, array, shape in (
        ("lower_bound", lower_bound, (dim,)),
        ("state", state, (batch, dim)),
        ("mask", mask, (batch, length)),
    ):
        if array is not None and array.shape != shape:
            raise ValueError(f"elementwise_recurrence: expected {name} {shape}, got {array.shape}")

    lower_bound = mx.zeros(dim) if lower_bound is None else lower_bound
    state = mx.zeros((batch, dim)) if state is None else state.astype(mx.float32)
    if mask is not None:
        # There the gate is exactly 1 and nothing is written: the state stays.
        f = mx.where(mask[..., None], f, mx.array(mx.inf, f.dtype))
    form = elementwise_scan if can_scan(x, f) else merged_pairs
    return form(x, f, lower_bound, state)
