"""Reading PyTorch checkpoints of HGRN2, writing MLX folders, and the way back."""

from .check import CheckReport, check
from .conversion import convert
from .export import export
from .report import ConversionReport

__all__ = ["CheckReport", "ConversionReport", "check", "convert", "export"]
