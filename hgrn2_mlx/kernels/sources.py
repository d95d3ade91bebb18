"""One kernel source for two kinds of GPU.

The files in ``metal/`` are function templates; the kernel itself is one line,
whose signature MLX generates. On an Apple GPU they are Metal; on an NVIDIA GPU
``cuda.h`` in front of them makes them CUDA.
"""

from collections.abc import Callable, Sequence
from importlib.resources import files

import mlx.core as mx

METAL = files("hgrn2_mlx.metal")
HEADERS = ("gates.h",)

# Thread indices under the names the one-line kernels use.
CUDA_INDICES = """
const uint3 group = blockIdx;
const uint simdgroup = threadIdx.y;
const uint lane = threadIdx.x;
"""
METAL_INDICES = """
const uint3 group = threadgroup_position_in_grid;
const uint simdgroup = thread_position_in_threadgroup.y;
const uint lane = thread_index_in_simdgroup;
"""


def on_gpu() -> bool:
    """Whether operations run on a GPU that can run the kernels by default."""
    return mx.default_device() == mx.gpu and (mx.metal.is_available() or mx.cuda.is_available())


def make_kernel(
    name: str,
    file: str,
    inputs: list[str],
    outputs: list[str],
    call: str,
    threadgroup: Sequence[tuple[str, str, str]] = (),
) -> Callable[..., list[mx.array]]:
    """A kernel for the GPU at hand from one file of ``metal/``.

    Args:
        name: Name of the kernel.
        file: Source file in ``metal/``.
        inputs: Names of the inputs in ``call``.
        outputs: Names of the outputs in ``call``.
        call: The kernel's body: a call of the file's function template. It may
            use ``group``, ``simdgroup`` (in its threadgroup) and ``lane``.
        threadgroup: Arrays in threadgroup memory that ``call`` may use: type, name
            and number of elements, as written in the source. Both languages know
            such declarations in the kernel's body only.
    """
    header = "".join(METAL.joinpath(part).read_text() + "\n" for part in (*HEADERS, file))
    arguments = {"name": name, "input_names": inputs, "output_names": outputs}
    if mx.cuda.is_available():
        cuda = METAL.joinpath("cuda.h").read_text()
        body = CUDA_INDICES + _declare("__shared__", threadgroup) + call
        return mx.fast.cuda_kernel(**arguments, header=cuda + header, source=body)
    body = METAL_INDICES + _declare("threadgroup", threadgroup) + call
    return mx.fast.metal_kernel(**arguments, header=header, source=body)


def _declare(space: str, arrays: Sequence[tuple[str, str, str]]) -> str:
    return "".join(f"{space} {kind} {name}[{size}];\n" for kind, name, size in arrays)
