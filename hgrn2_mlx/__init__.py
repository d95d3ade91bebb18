"""HGRN2 (gated linear RNNs with state expansion, arXiv 2404.07904) on MLX.

Importing this package makes ``mlx_lm`` load, run, serve and fine-tune HGRN2.
"""

from .ops import gated_recurrence
from .registration import register

__all__ = ["gated_recurrence"]

register()
