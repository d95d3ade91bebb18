"""Reading PyTorch checkpoints of HGRN2 and writing MLX folders."""

from .conversion import convert
from .report import ConversionReport

__all__ = ["ConversionReport", "convert"]
