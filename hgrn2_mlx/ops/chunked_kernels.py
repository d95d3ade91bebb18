"""The chunked kernels with a gradient and a safety net."""

import functools

import mlx.core as mx

from .. import kernels
from . import first_use
from .chunked import chunked


def can_run(q: mx.array, f: mx.array, v: mx.array) -> bool:
    """Whether the kernels fit these inputs and are right on this machine."""
    *_, heads, key_dim = q.shape
    return kernels.chunked.fits(q, f, v) and _kernels_are_right(
        heads, key_dim, v.shape[-1], v.dtype
    )


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
def _kernels_are_right(heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype) -> bool:
    """Compared over three segments, the last not full."""
    arguments = first_use.random_arguments(150, heads, key_dim, value_dim, dtype)
    scale = key_dim**-0.5
    kernel, operations = (
        functools.partial(form, scale=scale) for form in (chunked_kernels, chunked)
    )
    return first_use.is_right("chunked", kernel, operations, arguments)
