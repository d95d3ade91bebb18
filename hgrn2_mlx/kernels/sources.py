"""One kernel source for two kinds of GPU.

The files in ``metal/`` are function templates; the kernel itself is one line,
whose signature MLX generates. On an Apple GPU they are Metal, on an NVIDIA GPU
``cuda.h`` makes them CUDA. What each kind of GPU does in its own way, such as matrix
products, is in a header for each, ``metal`` or ``cuda`` in its name.
"""

import zlib
from collections.abc import Callable, Sequence
from importlib.resources import files

import mlx.core as mx

METAL = files("hgrn2_mlx.metal")

CUDA_BLOCK_THREADS = 128

# Thread indices under the names the one-line kernels use.
CUDA_INDICES = """
const uint3 group = blockIdx;
const dim3 groups = gridDim;
const uint simdgroup = threadIdx.y;
const uint lane = threadIdx.x;
const uint thread_in_grid = blockIdx.x * blockDim.x + threadIdx.x;
"""
METAL_INDICES = """
const uint3 group = threadgroup_position_in_grid;
const uint3 groups = threadgroups_per_grid;
const uint simdgroup = thread_position_in_threadgroup.y;
const uint lane = thread_index_in_simdgroup;
const uint thread_in_grid = thread_position_in_grid.x;
"""


def on_gpu() -> bool:
    """Whether operations run on a GPU that can run the kernels by default."""
    return mx.default_device() == mx.gpu and (mx.metal.is_available() or mx.cuda.is_available())


def make_kernel(
    name: str,
    files: Sequence[str],
    inputs: list[str],
    outputs: list[str],
    call: str,
    threadgroup: Sequence[tuple[str, str, str]] = (),
    cuda_blocks: int | None = None,
) -> Callable[..., list[mx.array]]:
    """A kernel for the GPU at hand from files of ``metal/``.

    Args:
        name: Name of the kernel.
        files: Source files in ``metal/``, each after those it needs; ``{gpu}`` in a
            name stands for the kind of GPU.
        inputs: Names of the inputs in ``call``.
        outputs: Names of the outputs in ``call``.
        call: The kernel's body: a call of a function template of the files. It may
            use ``group`` of ``groups``, ``simdgroup`` (in its threadgroup), ``lane`` and
            ``thread_in_grid`` (along x).
        threadgroup: Arrays in threadgroup memory that ``call`` may use: type, name
            and number of elements, as written in the source. Both languages know
            such declarations in the kernel's body only.
        cuda_blocks: How many threadgroups, then of at most ``CUDA_BLOCK_THREADS``,
            a multiprocessor should have registers for.
    """
    arguments = {"name": name, "input_names": inputs, "output_names": outputs}
    if mx.cuda.is_available():
        header = _read(files, "cuda")
        if cuda_blocks:
            # MLX writes "__global__ void" and the kernel's name next: the bounds fit between.
            header += f"#define void __launch_bounds__({CUDA_BLOCK_THREADS}, {cuda_blocks}) void\n"
        body = CUDA_INDICES + _declare("__shared__", threadgroup) + call
        # MLX keeps compiled kernels on disk by their name alone: another source needs another.
        arguments["name"] += f"_{zlib.crc32((header + body).encode()):08x}"
        return mx.fast.cuda_kernel(**arguments, header=header, source=body)
    header = _read(files, "metal")
    body = METAL_INDICES + _declare("threadgroup", threadgroup) + call
    return mx.fast.metal_kernel(**arguments, header=header, source=body)


def _read(files: Sequence[str], gpu: str) -> str:
    names = ["{gpu}.h", *files]
    return "".join(METAL.joinpath(name.format(gpu=gpu)).read_text() + "\n" for name in names)


def _declare(space: str, arrays: Sequence[tuple[str, str, str]]) -> str:
    return "".join(f"{space} {kind} {name}[{size}];\n" for kind, name, size in arrays)
