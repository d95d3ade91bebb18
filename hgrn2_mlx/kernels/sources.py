"""One kernel source for two kinds of GPU.

The files in ``metal/`` are function templates; the kernel itself is one line,
whose signature MLX generates. On an Apple GPU they are Metal; on an NVIDIA GPU
``cuda.h`` in front of them makes them CUDA. Matrix products are the GPU's own, so
``tile.h`` stands on ``tile_metal.h`` or on ``tile_cuda.h``.
"""

import zlib
from collections.abc import Callable, Sequence
from importlib.resources import files

import mlx.core as mx

METAL = files("hgrn2_mlx.metal")

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
    files: Sequence[str],
    inputs: list[str],
    outputs: list[str],
    call: str,
    threadgroup: Sequence[tuple[str, str, str]] = (),
) -> Callable[..., list[mx.array]]:
    """A kernel for the GPU at hand from files of ``metal/``.

    Args:
        name: Name of the kernel.
        files: Source files in ``metal/``, each after those it needs.
        inputs: Names of the inputs in ``call``.
        outputs: Names of the outputs in ``call``.
        call: The kernel's body: a call of a function template of the files. It may
            use ``group``, ``simdgroup`` (in its threadgroup) and ``lane``.
        threadgroup: Arrays in threadgroup memory that ``call`` may use: type, name
            and number of elements, as written in the source. Both languages know
            such declarations in the kernel's body only.
    """
    arguments = {"name": name, "input_names": inputs, "output_names": outputs}
    if mx.cuda.is_available():
        header = _read(["cuda.h", *files], "tile_cuda.h")
        body = CUDA_INDICES + _declare("__shared__", threadgroup) + call
        # MLX keeps compiled kernels on disk by their name alone: another source needs another.
        arguments["name"] += f"_{zlib.crc32((header + body).encode()):08x}"
        return mx.fast.cuda_kernel(**arguments, header=header, source=body)
    header = _read(files, "tile_metal.h")
    body = METAL_INDICES + _declare("threadgroup", threadgroup) + call
    return mx.fast.metal_kernel(**arguments, header=header, source=body)


def _read(names: Sequence[str], fragments: str) -> str:
    parts = [part for name in names for part in ([fragments] if name == "tile.h" else []) + [name]]
    return "".join(METAL.joinpath(part).read_text() + "\n" for part in parts)


def _declare(space: str, arrays: Sequence[tuple[str, str, str]]) -> str:
    return "".join(f"{space} {kind} {name}[{size}];\n" for kind, name, size in arrays)
