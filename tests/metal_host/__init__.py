"""Runs MLX's Metal kernels on a CPU, from the very source that a Mac would compile.

    with metal_host.executing() as runs:
        outputs = a_function_that_calls_metal_kernels(arrays)
    print(runs[-1].counters.matrix_products)

or one kernel at a time::

    kernel = metal_host.metal_kernel(name=..., input_names=..., output_names=..., source=...)
    result = metal_host.run(kernel, inputs=[...], grid=..., threadgroup=..., ...)

How strictly, and in which order threads run, is an argument of both, or the environment's
``METAL_HOST_MODE`` (a value of :class:`Mode`) and ``METAL_HOST_ORDER`` (``forward``,
``reverse`` or the seed of a random order). ``METAL_HOST_TIMEOUT`` is how many seconds one
kernel may run.
"""

from .build import CompileError, Mode, Unavailable
from .execute import Counters, Result, RunError, executing, metal_kernel, run
from .trace import Buffer, TracedKernel, TraceError, trace

__all__ = [
    "Buffer",
    "CompileError",
    "Counters",
    "Mode",
    "Result",
    "RunError",
    "TraceError",
    "TracedKernel",
    "Unavailable",
    "executing",
    "metal_kernel",
    "run",
    "trace",
]
