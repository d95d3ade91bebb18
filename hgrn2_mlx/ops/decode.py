"""The decode kernel with a gradient and a safety net."""

import functools

import mlx.core as mx

from .. import kernels
from . import first_use
from .recurrent import recurrent


def can_decode(q: mx.array, f: mx.array, v: mx.array) -> bool:
    """Whether the kernel fits these inputs and is right on this machine."""
    return kernels.decode.fits(q, f, v) and _kernel_is_right(*q.shape[1:], v.shape[-1], v.dtype)


def decode(
    q: mx.array,
    f: mx.array,
    v: mx.array,
    lower_bound: mx.array,
    state: mx.array,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """The gated recurrence over a few tokens, the state read and written once.

    Arguments and results as in :func:`gated_recurrence`. The gradient is that of
    the step by step form.
    """

    return _differentiable(scale)(q, f, v, lower_bound.astype(mx.float32), state)


@functools.cache
def _differentiable(scale: float):
    @mx.custom_function
    def run(q, f, v, lower_bound, state):
        return kernels.decode.decode(q, f, v, lower_bound, state, scale)

    @run.vjp
    def gradients(primals, cotangents, _):
        def step_by_step(*arguments):
            return recurrent(*arguments, scale)

        return mx.vjp(step_by_step, primals, cotangents)[1]

    return run


@functools.cache
def _kernel_is_right(
    tokens: int, heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
) -> bool:
    arguments = first_use.random_arguments(tokens, heads, key_dim, value_dim, dtype)
    scale = key_dim**-0.5
    kernel, operations = (functools.partial(form, scale=scale) for form in (decode, recurrent))
    return first_use.is_right("decode", kernel, operations, arguments)
