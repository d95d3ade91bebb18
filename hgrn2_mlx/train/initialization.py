"""Initial weights, as flash-linear-attention draws them (``fla/models/modeling_utils.py``)."""

import mlx.core as mx
import mlx.nn as nn

from ..models.language_model import LanguageModel
from ..models.short_convolution import ShortConvolution

# fla's default of the config key initializer_range.
INITIALIZER_RANGE = 0.02


def initialize(model: LanguageModel, initializer_range: float = INITIALIZER_RANGE) -> None:
    """Draws matrices and convolutions from a normal distribution with zero mean; biases are zero.

    All else keeps what its module is made with: norms are one, lower bounds and
    the queries of attention residuals zero.

    Args:
        initializer_range: The standard deviation.
    """
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | ShortConvolution):
            module.weight = mx.random.normal(module.weight.shape, scale=initializer_range)
            if "bias" in module:
                module.bias = mx.zeros_like(module.bias)
