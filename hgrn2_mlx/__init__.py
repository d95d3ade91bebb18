"""HGRN2 (gated linear RNNs with state expansion, arXiv 2404.07904) on MLX.

Importing this package makes ``mlx_lm`` load, run, serve and fine-tune HGRN2. It
imports neither ``mlx`` nor ``mlx_lm`` by itself, so that it costs no time.
"""

from typing import TYPE_CHECKING

from .registration import register

if TYPE_CHECKING:
    from .ops.gated_recurrence import gated_recurrence

__all__ = ["gated_recurrence"]

register()


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import ops

    return getattr(ops, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
