"""Kernels earn their place: before its first use, a kernel is compared with MLX's operations."""

import warnings
from collections.abc import Callable, Sequence

import mlx.core as mx

# Of the largest element: MLX multiplies float32 as TF32 on NVIDIA GPUs.
TOLERANCES = {mx.float32: 1e-2}

Form = Callable[..., Sequence[mx.array]]


def is_right(kernel: str, form: Form, operations: Form, arguments: Sequence[mx.array]) -> bool:
    """Whether a kernel's results and gradients are those of operations; warns if not.

    Args:
        kernel: Name of the kernel, for the warning.
        form: The differentiable function that runs it.
        operations: The same function in MLX's operations.
        arguments: Arrays to call both with.
    """
    try:
        # Each result, weighted by itself, makes a loss that depends on every element.
        cotangents = list(operations(*arguments))
        got, want = (mx.vjp(f, list(arguments), cotangents) for f in (form, operations))
        right = all(
            mx.max(mx.abs(a - b)) < TOLERANCES.get(a.dtype, 3e-2) * mx.max(mx.abs(b))
            for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True)
        )
        problem = "its result differs from that of MLX's operations"
    except RuntimeError as error:
        right, problem = False, f"it does not run: {error}"
    if not right:
        warnings.warn(f"hgrn2-mlx: {kernel} kernel not used, {problem}", stacklevel=3)
    return right
