"""HGRN's recurrence and its gradient, gates computed inside (``metal/elementwise_scan*.h``)."""

import functools

import mlx.core as mx

from .sources import make_kernel, on_gpu

RUN = 8  # tokens that a simdgroup goes through in one tile
SIMDGROUPS = 8  # simdgroups per threadgroup, each with a run of its own
CHANNELS = 32  # per simdgroup: a lane each


def fits(x: mx.array, f: mx.array) -> bool:
    """Whether the kernels can run these inputs here: the one rule of when they are used."""
    # MLX hands over arrays of fewer than 8 elements in another address space.
    return on_gpu() and x.dtype == f.dtype and x.shape[-1] >= 8


def forward(
    x: mx.array, f: mx.array, lower_bound: mx.array, state: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Runs the kernel on inputs that :func:`fits` accepts.

    Args:
        x: Inputs ``[B, T, D]`` before silu, float32, bfloat16 or float16.
        f: Forget-gate logits ``[B, T, D]``; ``inf`` leaves the state as it is.
        lower_bound: ``[D]`` float32.
        state: ``[B, D]`` float32.

    Returns:
        The states after every token in the type of ``x``, the last of them in
        float32, and those that tiles of tokens start from, which
        :func:`backward` wants, ``[B, tiles, D]`` float32.
    """
    batch, length, dim = x.shape
    simdgroups = _simdgroups(length)
    tiles = -(-length // (RUN * simdgroups))
    return _forward()(
        inputs=[x, f, lower_bound, state],
        output_shapes=[x.shape, state.shape, (batch, tiles, dim)],
        output_dtypes=[x.dtype, mx.float32, mx.float32],
        **_launch(x),
    )


def backward(
    x: mx.array,
    f: mx.array,
    lower_bound: mx.array,
    tile_states: mx.array,
    out_grad: mx.array,
    state_grad: mx.array,
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Gradients in ``x``, ``f``, the lower bound and the initial state.

    The same bits in every run: nothing is added up in an order that may change.

    Args:
        x, f, lower_bound: As in :func:`forward`.
        tile_states: The third result of :func:`forward`.
        out_grad: Gradient of the first one, in its type.
        state_grad: Gradient of the second one, ``[B, D]`` float32.
    """
    batch, length, dim = x.shape
    parts = (batch, _simdgroups(length), dim)
    x_grad, f_grad, bound_grads, state_in_grad = _backward()(
        inputs=[x, f, lower_bound, tile_states, out_grad, state_grad],
        output_shapes=[x.shape, f.shape, parts, state_grad.shape],
        output_dtypes=[x.dtype, f.dtype, mx.float32, mx.float32],
        **_launch(x),
    )
    return x_grad, f_grad, bound_grads.sum((0, 1)), state_in_grad


def _simdgroups(length: int) -> int:
    """One for what it does in a single run, such as decoding."""
    return 1 if length <= RUN else SIMDGROUPS


def _launch(x: mx.array) -> dict:
    batch, length, dim = x.shape
    simdgroups = _simdgroups(length)
    channel_groups = -(-dim // CHANNELS)
    return {
        "template": [("T", x.dtype), ("RUN", RUN), ("SIMDGROUPS", simdgroups)],
        "grid": (CHANNELS * channel_groups, simdgroups, batch),
        "threadgroup": (CHANNELS, simdgroups, 1),
    }


@functools.cache
def _forward():
    return make_kernel(
        name="hgrn_scan",
        files=["gates.h", "elementwise_scan.h"],
        inputs=["x", "f", "lower_bound", "state_in"],
        outputs=["out", "state_out", "tile_states"],
        threadgroup=[("float", name, "2 * SIMDGROUPS * 32") for name in ("decays", "writes")],
        call="""
        elementwise_scan<T, RUN, SIMDGROUPS>(
            x, f, lower_bound, state_in, x_shape[1], x_shape[2], out, state_out, tile_states,
            decays, writes, lane, simdgroup, group.x, group.z);
        """,
    )


@functools.cache
def _backward():
    shared = ("decays", "writes", "grads")
    return make_kernel(
        name="hgrn_scan_backward",
        files=["gates.h", "elementwise_scan_backward.h"],
        inputs=["x", "f", "lower_bound", "tile_states", "out_grad", "state_out_grad"],
        outputs=["x_grad", "f_grad", "lower_bound_grad", "state_in_grad"],
        threadgroup=[("float", name, "2 * SIMDGROUPS * 32") for name in shared],
        call="""
        elementwise_scan_backward<T, RUN, SIMDGROUPS>(
            x, f, lower_bound, tile_states, out_grad, state_out_grad, x_shape[1], x_shape[2],
            x_grad, f_grad, lower_bound_grad, state_in_grad, decays, writes, grads,
            lane, simdgroup, group.x, group.z);
        """,
    )
