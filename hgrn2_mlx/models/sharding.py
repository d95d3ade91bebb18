"""Tensor parallelism: splitting a model's layers over the processes of a group.

Heads and MLP channels are split, with the linear layers of ``mlx.nn.layers.distributed``.
Embeddings, head, norms of the residual stream and pseudo-queries stay whole, so every
process has the same activations between sublayers and the same logits.
"""

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear


def require_divisible(name: str, size: int, group: mx.distributed.Group) -> None:
    """Refuses a size that does not divide among the processes."""
    if size % group.size():
        raise ValueError(f"{name} ({size}) does not divide among {group.size()} processes")


def shard_projections(
    module: nn.Module,
    *,
    by_output: Iterable[str],
    by_input: Iterable[str],
    group: mx.distributed.Group,
) -> None:
    """Splits linear layers of a module, quantized ones too.

    Args:
        by_output: Names of those that get the whole input and give a share of the output.
        by_input: Names of those that get such a share and give the whole output, by
            summing over the processes.
    """
    for name in by_output:
        setattr(module, name, shard_linear(module[name], "all-to-sharded", group=group))
    for name in by_input:
        layer = module[name]
        if isinstance(layer, nn.QuantizedLinear):
            # A group of weights shares a scale, so it stays together.
            groups = layer.scales.shape[-1]
            require_divisible(f"groups of {layer.group_size} weights of {name}", groups, group)
        setattr(module, name, shard_linear(layer, "sharded-to-all", group=group))


def shard_channels(module: nn.Module, group: mx.distributed.Group) -> None:
    """Splits parameters whose first axis is that of the channels."""
    shard_inplace(module, lambda name, weight: 0, group=group)


class ShardedNorm(nn.Module):
    """One of :mod:`norms`, of channels that are split over a group.

    The mean runs over the channels of all processes: an exchange of one number per
    token (two for LayerNorm) that a norm over each head would not need.

    Args:
        norm: The norm of all channels; its parameters are split in place.
    """

    def __init__(self, norm: nn.Module, group: mx.distributed.Group):
        super().__init__()
        self.group = group
        self.eps = norm.eps
        self.centred = isinstance(norm, nn.LayerNorm)
        shard_channels(norm, group)
        for name, parameter in norm.parameters().items():
            self[name] = parameter

    def __call__(self, x: mx.array) -> mx.array:
        normalized = x.astype(mx.float32)
        if self.centred:
            normalized = normalized - self._mean(normalized)
        normalized = normalized * mx.rsqrt(self._mean(normalized.square()) + self.eps)
        normalized = normalized.astype(x.dtype)
        if "weight" in self:
            normalized = normalized * self.weight
        return normalized + self.bias if "bias" in self else normalized

    def _mean(self, x: mx.array) -> mx.array:
        total = mx.distributed.all_sum(x.sum(-1, keepdims=True), group=self.group)
        return total / (self.group.size() * x.shape[-1])
