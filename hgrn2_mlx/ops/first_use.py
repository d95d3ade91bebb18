"""Kernels earn their place: before its first use, a kernel is compared with MLX's operations.

Once in a process for every type and size of a head, as each is compiled by itself: a GPU may
refuse one, for want of registers or of memory, and take another.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

# Of the largest element, by the arguments' coarsest type: what is rounded on the way shows in
# float32 results too, most in the gradient of a lower bound, by up to 2.5 percent. MLX
# multiplies float32 as TF32 on NVIDIA GPUs.
TOLERANCES = {mx.float32: 1e-2, mx.bfloat16: 6e-2, mx.float16: 3e-2}

Form = Callable[..., Sequence[mx.array]]


@dataclass(frozen=True)
class Comparison:
    """A kernel's results and gradients beside those of operations.

    Args:
        error: The largest difference in any of them, relative to the largest element of
            the same array; ``None`` if it is not a number, or there is nothing to compare.
        problem: What is wrong, to follow the kernel's name; ``None`` if nothing is.
    """

    error: float | None
    problem: str | None


def random_arguments(
    tokens: int, heads: int, key_dim: int, value_dim: int, dtype: mx.Dtype
) -> list[mx.array]:
    """Of HGRN2's recurrence: q, f, v, lower bound and state, of one sequence.

    The gates of one key are open, as those of a masked token are.
    """
    q, f = mx.random.normal((2, 1, tokens, heads, key_dim), key=mx.random.key(0))
    f = mx.where(mx.arange(key_dim) == 0, mx.inf, f)
    q, f = q.astype(dtype), f.astype(dtype)
    v = mx.random.normal((1, tokens, heads, value_dim), key=mx.random.key(1)).astype(dtype)
    state = mx.random.normal((1, heads, value_dim, key_dim), key=mx.random.key(2))
    return [q, f, v, mx.full((heads, key_dim), 0.25), state]


def is_right(kernel: str, form: Form, operations: Form, arguments: Sequence[mx.array]) -> bool:
    """Whether a kernel's results and gradients are those of operations; warns if not.

    Args:
        kernel: Name of the kernel, for the warning.
        form, operations, arguments: As in :func:`compare`.
    """
    problem = compare(form, operations, arguments).problem
    if problem:
        warnings.warn(f"hgrn2-mlx: {kernel} kernel not used, {problem}", stacklevel=3)
    return problem is None


def compare(form: Form, operations: Form, arguments: Sequence[mx.array]) -> Comparison:
    """Runs both, forwards and backwards.

    Args:
        form: The differentiable function that runs the kernel.
        operations: The same function in MLX's operations.
        arguments: Arrays to call both with.
    """
    try:
        # Each result, weighted by itself, makes a loss that depends on every element.
        cotangents = list(operations(*arguments))
        got, want = (mx.vjp(f, list(arguments), cotangents) for f in (form, operations))
        pairs = list(zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True))
        errors = [(mx.max(mx.abs(a - b)) / mx.max(mx.abs(b))).item() for a, b in pairs]
    except (RuntimeError, ValueError, OSError) as error:
        return Comparison(None, f"it does not run: {error}")
    tolerance = max(TOLERANCES[argument.dtype] for argument in arguments)
    right = all(error < tolerance for error in errors)  # Not so if one is not a number.
    return Comparison(
        max(errors) if all(map(math.isfinite, errors)) else None,
        None if right else "its result differs from that of MLX's operations",
    )
