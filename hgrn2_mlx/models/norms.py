"""The three kinds of norm that checkpoints are trained with."""

import mlx.core as mx
import mlx.nn as nn


class SimpleRMSNorm(nn.Module):
    """RMSNorm without a weight (the authors' ``simplermsnorm``)."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, self.eps)


NORM_TYPES = ("rmsnorm", "simplermsnorm", "layernorm")


def make_norm(norm_type: str, dims: int, eps: float, affine: bool = True) -> nn.Module:
    """A norm over the last ``dims`` numbers, of one of :data:`NORM_TYPES`.

    Args:
        affine: Whether it has a weight (``"layernorm"``: and a bias); a
            ``"simplermsnorm"`` never has.
    """
    if norm_type == "layernorm":
        return nn.LayerNorm(dims, eps, affine=affine)
    if norm_type == "simplermsnorm" or not affine:
        return SimpleRMSNorm(eps)
    return nn.RMSNorm(dims, eps)
