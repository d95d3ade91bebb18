"""MLX glue of the kernels in ``metal/``: one module per kernel."""

from . import decode

__all__ = ["decode"]
