"""On a Linux CPU, the system's OpenBLAS in place of the reference BLAS that MLX brings.

MLX's wheel for Linux calls ``cblas_sgemm`` of a library beside it, which multiplies matrices
without a thought for caches or vector units. A function of that name that is in the process
before MLX is, is the one that MLX calls.
"""

import ctypes
import os
import sys

LIBRARY = "libopenblas.so.0"
SWITCH = "HGRN2_SYSTEM_BLAS"  # In the environment; 0 leaves MLX its own.


def use_system_blas() -> bool:
    """Loads the system's OpenBLAS for MLX, where that can be of use.

    For programs only, not for a library: it changes the whole process. Numpy keeps its
    own OpenBLAS, whose functions have other names.

    Returns:
        Whether it did. It does not elsewhere than on Linux, once MLX is loaded, if the
        environment's ``HGRN2_SYSTEM_BLAS`` is 0, or if there is none.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules or is_switched_off():
        return False
    try:
        ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def is_switched_off() -> bool:
    return os.environ.get(SWITCH) == "0"


def is_in_process() -> bool:
    """Whether some BLAS is where MLX looks before it looks beside itself."""
    return hasattr(ctypes.CDLL(None), "cblas_sgemm")
