"""What MLX computes on, and whether it can compile and multiply there."""

import random
import shutil
import sys

from .. import system_blas
from .report import REPORT_IT, Finding, Measurement, Report

TRIALS = 5  # of a matrix product, of which the fastest counts
SLOW_BLAS = 1 / 3  # of the speed of numpy's matrix products


def check_backend(report: Report) -> None:
    """Where MLX computes."""
    import mlx.core as mx

    report.machine["MLX's device"] = ", ".join(f"{k} {v}" for k, v in mx.device_info().items())
    if mx.default_device() == mx.gpu:
        report.backend = "Metal" if mx.metal.is_available() else "CUDA"
        return
    report.backend = "CPU"
    if sys.platform == "darwin":
        what = "MLX computes on the CPU, as it finds no GPU"
        remedy = "run it on a Mac with Apple Silicon, not in a virtual machine or over Rosetta"
        report.problems.append(Finding(what, remedy))
    elif shutil.which("nvidia-smi"):
        what = "there seems to be an NVIDIA GPU, and MLX computes on the CPU"
        report.advice.append(Finding(what, "pip install 'hgrn2-mlx[cuda]'"))


def check_compiler(report: Report) -> None:
    """MLX can compile what it fuses, which on a Linux CPU it does with the system's g++."""
    import mlx.core as mx

    install = "apt install g++, dnf install gcc-c++, or the like"
    if report.backend == "CPU" and sys.platform == "linux" and not shutil.which("g++"):
        what = "there is no g++, so MLX runs one by one the operations that it would fuse"
        report.advice.append(Finding(what, install))
        return
    try:
        # A number of its own makes a source that MLX has not kept from before.
        number = random.random()
        fused = mx.compile(lambda x: mx.exp(x) * number)
        mx.eval(fused(mx.ones(8)))
    except RuntimeError as error:
        what = f"MLX cannot compile operations: {error}"
        remedy = REPORT_IT
        if report.backend == "CPU":
            remedy = "see whether g++ compiles any program, or install it anew: " + install
        report.problems.append(Finding(what, remedy))


def check_blas(report: Report) -> None:
    """On a Linux CPU, MLX multiplies matrices about as fast as numpy does."""
    if report.backend != "CPU" or sys.platform != "linux":
        return
    import mlx.core as mx
    import numpy as np

    from ..bench.model_timing import fastest

    a, b = mx.random.normal((2, 1024, 1024))
    numpy_a, numpy_b = np.array(a), np.array(b)
    floating_point_operations = 2 * 1024**3
    ours = floating_point_operations / fastest(lambda: mx.eval(a @ b), TRIALS) / 1e9
    numpys = floating_point_operations / fastest(lambda: numpy_a @ numpy_b, TRIALS) / 1e9
    what = "matrix product, 1024 x 1024, float32"
    measured = Measurement(what, ours, "GFLOP/s", ours / numpys, "numpy's")
    report.measurements.append(measured)
    if ours > SLOW_BLAS * numpys:
        return
    what = f"MLX multiplies matrices at {ours / numpys:.2f} of numpy's speed, with a reference BLAS"
    remedy = "apt install libopenblas0 or dnf install openblas; the hgrn2 command then uses it"
    if system_blas.is_switched_off():
        remedy = f"unset {system_blas.SWITCH}, which keeps hgrn2 from using {system_blas.LIBRARY}"
    elif system_blas.is_in_process():
        remedy = "another BLAS is loaded and not fast either; see what LD_PRELOAD names"
    own = f"; for your own programs, set LD_PRELOAD={system_blas.LIBRARY}"
    report.advice.append(Finding(what, remedy + own))
