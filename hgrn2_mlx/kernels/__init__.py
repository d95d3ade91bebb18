"""MLX glue of the kernels in ``metal/``."""

from . import chunk, chunked, decode, elementwise_scan, state_scan, tiling

__all__ = ["chunk", "chunked", "decode", "elementwise_scan", "state_scan", "tiling"]
