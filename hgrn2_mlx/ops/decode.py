"""The decode kernel with a gradient and a safety net."""

import functools
import warnings

import mlx.core as mx

from .. import kernels
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

    @mx.custom_function
    def run(q, f, v, lower_bound, state):
        return kernels.decode.decode(q, f, v, lower_bound.astype(mx.float32), state, scale)

    @run.vjp
    def gradients(primals, cotangents, _):
        def step_by_step(*arguments):
            return recurrent(*arguments, scale)

        return mx.vjp(step_by_step, primals, cotangents)[1]

    return run(q, f, v, lower_bound, state)


@functools.cache
def _kernel_is_right() -> bool:
    """Compares the kernel with the operations, once per process; warns if it cannot be used."""
    q, f, v = mx.random.normal((3, 2, 2, 2, 64), key=mx.random.key(0))
    state = mx.random.normal((2, 2, 64, 64), key=mx.random.key(1))
    arguments = (q, f, v, mx.full((2, 64), 0.25), state, 0.125)
    try:
        right = all(
            mx.allclose(got, want, rtol=1e-3, atol=1e-3).item()
            for got, want in zip(decode(*arguments), recurrent(*arguments))
        )
        problem = "its result differs from that of MLX's operations"
    except RuntimeError as error:
        right, problem = False, f"it does not run: {error}"
    if not right:
        warnings.warn(f"hgrn2-mlx: decode kernel not used, {problem}", stacklevel=2)
    return right
