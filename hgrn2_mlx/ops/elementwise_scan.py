"""The kernels of HGRN's recurrence with a gradient and a safety net."""

import functools

import mlx.core as mx

from .. import kernels
from . import first_use
from .merged_pairs import merged_pairs


def can_scan(x: mx.array, f: mx.array) -> bool:
    """Whether the kernels fit these inputs and are right on this machine."""
    return kernels.elementwise_scan.fits(x, f) and _kernel_is_right(x.dtype)


def elementwise_scan(
    x: mx.array, f: mx.array, lower_bound: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """HGRN's recurrence over any number of tokens in one kernel, its gradient in another.

    Arguments and results as in :func:`elementwise_recurrence`. For the gradient,
    one state in 64 is kept.
    """
    output, last, _ = _scan(x, f, lower_bound.astype(mx.float32), state)
    return output, last


@mx.custom_function
def _scan(x, f, lower_bound, state):
    return kernels.elementwise_scan.forward(x, f, lower_bound, state)


@_scan.vjp
def _scan_gradients(primals, cotangents, outputs):
    *inputs, _ = primals
    output_grad, last_grad, _ = cotangents
    *_, tile_states = outputs
    return kernels.elementwise_scan.backward(*inputs, tile_states, output_grad, last_grad)


@functools.cache
def _kernel_is_right(dtype: mx.Dtype) -> bool:
    x, f = mx.random.normal((2, 2, 150, 40), key=mx.random.key(0)).astype(dtype)
    state = mx.random.normal((2, 40), key=mx.random.key(1))
    return first_use.is_right(
        "elementwise scan", elementwise_scan, merged_pairs, (x, f, mx.full((40,), 0.25), state)
    )
