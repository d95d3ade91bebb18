"""MLX glue of the kernels in ``metal/``: one module per kernel."""

from . import decode, elementwise_scan

__all__ = ["decode", "elementwise_scan"]
