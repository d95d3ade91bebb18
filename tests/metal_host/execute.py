"""Calls of ``mx.fast.metal_kernel`` that run on the CPU."""

import io
import math
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from .build import Mode, Unavailable, build
from .trace import TracedKernel, trace

# ThreadSanitizer has 256 slots for threads, two of them the scheduler's; were there more, it
# would forget who wrote what and report nothing.
MAX_THREADS_TOLD_APART = 254
FLOPS_OF_A_MATRIX_PRODUCT = 2 * 8 * 8 * 8
TIMEOUT_SECONDS = float(os.environ.get("METAL_HOST_TIMEOUT", 600))
ORDERS = {"forward": -1, "reverse": -2}

# Reports belong to the run that caused them; fibers would look like leaks, and there are no
# threads whose end ThreadSanitizer could wait for.
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

Order = str | int  # forward, reverse or the seed of a random order

real_metal_kernel = mx.fast.metal_kernel


class RunError(RuntimeError):
    """The run stopped: the message is the scheduler's or the sanitizer's."""


@dataclass(frozen=True)
class Counters:
    """What one run did, over all threadgroups.

    Bytes of device memory are counted in ``Mode.TRAFFIC`` only and are None
    elsewhere. ``device_bytes_read`` is what threads load;
    ``device_bytes_read_once`` counts a byte once per threadgroup, which is
    what a cache per threadgroup leaves of it.
    """

    threadgroups: int
    matrix_products: int  # 8x8x8, one per simdgroup
    threadgroup_barriers: int
    simdgroup_barriers: int
    simdgroup_functions: int  # sums, shuffles and matrix products, one per simdgroup
    threadgroup_bytes: int  # the most that a threadgroup holds
    device_bytes_read: int | None
    device_bytes_read_once: int | None
    device_bytes_written: int | None

    @property
    def matrix_flops(self) -> int:
        return self.matrix_products * FLOPS_OF_A_MATRIX_PRODUCT


@dataclass(frozen=True)
class Result:
    outputs: list[mx.array]
    counters: Counters
    kernel: TracedKernel


class Kernel:
    """Stands for what ``mx.fast.metal_kernel`` returns; runs on the host where asked to."""

    def __init__(self, **definition: Any):
        self.definition = definition
        self.real = real_metal_kernel(**definition)
        self.traced: dict[str, TracedKernel] = {}

    def __call__(self, **call: Any) -> list[mx.array]:
        execution = current_execution.get()
        if execution is None:
            return self.real(**call)
        call.pop("verbose", None)
        call.pop("stream", None)
        result = run(self, **call, mode=execution.mode, order=execution.order)
        execution.runs.append(result)
        return result.outputs

    def trace(self, inputs: Sequence[mx.array], **call: Any) -> TracedKernel:
        """The instantiation for inputs of these shapes and types."""
        key = repr(([(array.shape, array.dtype) for array in inputs], call))
        if key not in self.traced:
            # Zeros, because the inputs may belong to a transformation under way.
            zeros = [mx.zeros(array.shape, array.dtype) for array in inputs]

            def function(*arrays: mx.array) -> list[mx.array]:
                return self.real(inputs=list(arrays), **call, verbose=True)

            (self.traced[key],) = trace(function, *zeros)
        return self.traced[key]


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    **options: Any,
) -> Kernel:
    """``mx.fast.metal_kernel``, which :func:`run` can run."""
    if not ensure_row_contiguous:
        raise NotImplementedError("kernels of arrays that are not row-contiguous")
    return Kernel(
        name=name,
        input_names=input_names,
        output_names=output_names,
        source=source,
        header=header,
        **options,
    )


def run(
    kernel: Kernel,
    *,
    inputs: Sequence[mx.array | bool | int | float],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, bool | int | mx.Dtype]] = (),
    init_value: float | None = None,
    mode: Mode | None = None,
    order: Order | None = None,
) -> Result:
    """Runs the kernel on the CPU; arguments as those of a call of the kernel.

    Outputs are NaN (all bits set) until the kernel writes them, unless
    ``init_value`` says otherwise.

    Raises:
        CompileError: A Metal compiler would refuse the source.
        RunError: The kernel did what Metal leaves undefined, or a sanitizer found something.
        Unavailable: The mode needs what this machine lacks, or cannot see so many threads.
    """
    mode = Mode(os.environ.get("METAL_HOST_MODE", "plain")) if mode is None else mode
    order = os.environ.get("METAL_HOST_ORDER", "forward") if order is None else order

    inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
    call = {
        "template": list(template),
        "grid": grid,
        "threadgroup": threadgroup,
        "output_shapes": output_shapes,
        "output_dtypes": output_dtypes,
    }
    clipped = [min(sizes) for sizes in zip(grid, threadgroup, strict=True)]  # as MLX does
    if mode is Mode.THREAD and math.prod(clipped) > MAX_THREADS_TOLD_APART:
        raise Unavailable(f"ThreadSanitizer is blind in a threadgroup of {math.prod(clipped)}")
    traced = kernel.trace(inputs, **call)
    program = build(traced, mode)

    outputs = list(zip(output_shapes, output_dtypes, strict=True))
    contents = buffer_contents(kernel.definition["input_names"], inputs)
    job = [integers(*grid, *clipped, ORDERS.get(order) or int(order), len(traced.buffers))]
    pending = iter(outputs)
    for buffer in traced.buffers:
        if buffer.constant:
            job += [integers(len(contents[buffer.name]), False, True), contents[buffer.name]]
        else:
            shape, dtype = next(pending)
            job.append(integers(nbytes(shape, dtype), True, init_value is not None))
            if init_value is not None:
                job.append(array_bytes(mx.full(shape, init_value, dtype)))

    results = io.BytesIO(execute(traced.name, program, b"".join(job)))
    arrays = [
        array_from_bytes(results.read(nbytes(shape, dtype)), shape, dtype)
        for shape, dtype in outputs
    ]
    counters = Counters(*np.frombuffer(results.read(), np.int64).tolist())
    if mode is not Mode.TRAFFIC:
        counters = replace(
            counters,
            device_bytes_read=None,
            device_bytes_read_once=None,
            device_bytes_written=None,
        )
    return Result(arrays, counters, traced)


def execute(name: str, program: Path, job: bytes) -> bytes:
    process = subprocess.run(
        [program],
        input=job,
        capture_output=True,
        env={**os.environ, **SANITIZER_OPTIONS},
        timeout=TIMEOUT_SECONDS,
    )
    if process.returncode:
        message = process.stderr.decode(errors="replace") or f"exit status {process.returncode}"
        raise RunError(f"{name}: {message}")
    return process.stdout


def buffer_contents(names: Sequence[str], inputs: Sequence[mx.array]) -> dict[str, bytes]:
    """The inputs and the shape, strides and rank that MLX passes beside them, by name."""
    contents = {}
    for name, array in zip(names, inputs, strict=True):
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        contents[name] = array_bytes(array)
        contents[f"{name}_shape"] = np.int32(array.shape).tobytes()
        contents[f"{name}_strides"] = np.int64(strides).tobytes()
        contents[f"{name}_ndim"] = np.int32(array.ndim).tobytes()
    return contents


def integers(*values: int) -> bytes:
    return np.int64(values).tobytes()


def nbytes(shape: Sequence[int], dtype: mx.Dtype) -> int:
    return math.prod(shape) * dtype.size


def array_bytes(array: mx.array) -> bytes:
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8)).tobytes()


def array_from_bytes(data: bytes, shape: Sequence[int], dtype: mx.Dtype) -> mx.array:
    return mx.array(np.frombuffer(data, np.uint8)).view(dtype).reshape(shape)


@dataclass
class Execution:
    mode: Mode | None
    order: Order | None
    runs: list[Result]


current_execution: ContextVar[Execution | None] = ContextVar("current_execution", default=None)


@contextmanager
def executing(mode: Mode | None = None, order: Order | None = None) -> Iterator[list[Result]]:
    """As if this machine had a Metal GPU: kernels called inside run on the CPU at once.

    Yields the list of their results, in the order of the calls. Kernels must
    be created inside too, or by :func:`metal_kernel`; they stay usable
    in later contexts. Calls need arrays with values, so ``mx.compile`` compiles
    nothing inside and ``mx.vmap`` is out; gradients of ``mx.custom_function`` work.
    """
    execution = Execution(mode, order, [])
    token = current_execution.set(execution)
    gpu = mx.Device(mx.gpu)
    mx.disable_compile()
    try:
        with (
            mock.patch.object(mx.fast, "metal_kernel", metal_kernel),
            mock.patch.object(mx.metal, "is_available", lambda: True),
            mock.patch.object(mx, "default_device", lambda: gpu),
        ):
            yield execution.runs
    finally:
        mx.enable_compile()
        current_execution.reset(token)
