"""Activations by their names in a config, fla's and those of the authors' code."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "none": lambda x: x,
    "swish": nn.silu,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "relu": nn.relu,
    "leak": nn.leaky_relu,
    "sigmoid": mx.sigmoid,
    "exp": mx.exp,
    "elu": nn.elu,
    "1+elu": lambda x: 1 + nn.elu(x),
    "2+elu": lambda x: 2 + nn.elu(x),
}


def gated_linear_unit(name: str) -> Callable[[mx.array, mx.array], mx.array]:
    """The function ``activation(gate) * x`` of a gated MLP, for ``"powlu"`` too."""
    if name == "powlu":
        return powlu
    if ACTIVATIONS[name] is nn.silu:
        return swiglu
    return lambda gate, x: ACTIVATIONS[name](gate) * x


def powlu(gate: mx.array, x: mx.array) -> mx.array:
    """``sigmoid(g) g^(3 / (sqrt(g) + 1)) x`` for g > 0, SwiGLU below (fla's ``powglu``)."""
    g = gate.astype(mx.float32)
    positive = mx.where(g > 0, g, 1.0)
    power = mx.exp(3.0 / (mx.sqrt(positive) + 1) * mx.log(positive))
    return (mx.sigmoid(g) * mx.where(g > 0, power, g) * x).astype(x.dtype)
