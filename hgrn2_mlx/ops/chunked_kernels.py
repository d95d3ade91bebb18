"""The chunked kernels with a gradient and a safety net."""

import functools

import mlx.core as mx

from .. import kernels
from . import first_use
from .chunked import chunked


def can_run(q: mx.array, f: mx.array, v: mx.array) -> bool:
    """Whether the kernels fit these inputs and are right on this machine."""
    return kernels.chunked.fits(q, f, v) and _kernels_are_right(v.dtype)


def chunked_kernels(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """The gated recurrence over any number of tokens, and its gradient, in kernels.

    Arguments and results as in :func:`gated_recurrence`. The backward pass keeps
    nothing but the arguments.
    """

    return _differentiable(scale)(q, f, v, lower_bound.astype(mx.float32), state)


@functools.cache
def _differentiable(scale: float):
    @mx.custom_function
    def run(q, f, v, lower_bound, state):
        return kernels.chunked.forward(q, f, v, lower_bound, state, scale)

    @run.vjp
    def gradients(primals, cotangents, _):
        return kernels.chunked.backward(*primals, scale, *cotangents)

    return run


@functools.cache
def _kernels_are_right(dtype: mx.Dtype) -> bool:
    """Compared over two segments, the second not full, once per type and process."""
    q, f, v = mx.random.normal((3, 1, 150, 2, 32), key=mx.random.key(0)).astype(dtype)
    state = mx.random.normal((1, 2, 32, 32), key=mx.random.key(1))
    kernel, operations = (functools.partial(form, scale=0.2) for form in (chunked_kernels, chunked))
    arguments = (q, f, v, mx.full((2, 32), 0.25), state)
    return first_use.is_right("chunked", kernel, operations, arguments)
