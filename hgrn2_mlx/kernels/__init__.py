"""MLX glue of the kernels in ``metal/``: one module per kernel."""

from . import chunked, decode, elementwise_scan

__all__ = ["chunked", "decode", "elementwise_scan"]
