"""The decode kernel with a gradient and a safety net."""

import functools

import mlx.core as mx

from .. import kernels
from . import first_use
from .recurrent import recurrent


def can_decode(q: mx.array, f: mx.array, v: mx.array) -> bool:
    """Whether the kernel fits these inputs and is right on this machine."""
    return kernels.decode.fits(q, f, v) and _kernel_is_right()


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
def _kernel_is_right() -> bool:
    q, f, v = mx.random.normal((3, 2, 2, 2, 64), key=mx.random.key(0))
    state = mx.random.normal((2, 2, 64, 64), key=mx.random.key(1))
    kernel, operations = (functools.partial(form, scale=0.125) for form in (decode, recurrent))
    return first_use.is_right(
        "decode", kernel, operations, (q, f, v, mx.full((2, 64), 0.25), state)
    )
