"""Decoding as one compiled function of the token and the states.

A step of a small or quantized model takes a fast GPU less time than Python needs
to walk through the layers. MLX records the walk once and replays it. The states
have the same size at every step, so one recording serves any length.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from ..kernels.sources import on_gpu

Step = Callable[[mx.array, list[list[mx.array]]], tuple[mx.array, list[list[mx.array]]]]


def can_step(inputs: mx.array, cache: list[Any] | None) -> bool:
    """Whether the call decodes a token of sequences whose layers have states and no padding.

    On a CPU MLX would compile with the system's C++ compiler, longer than it saves.
    """
    return (
        cache is not None
        and inputs.shape[1] == 1
        and on_gpu()
        and all(
            type(layer) is ArraysCache
            and layer.lengths is None
            and layer.left_padding is None
            and all(array is not None for array in layer.cache)
            for layer in cache
        )
    )


def compile_step(model: nn.Module, logits: Callable[[mx.array, list[Any]], mx.array]) -> Step:
    """``(token ids [B, 1], states of the layers) -> (logits [B, 1, vocab_size], states)``.

    The weights are inputs of the compiled function, so they may change, and so may
    the layers: MLX then records again.

    Args:
        model: What has the weights.
        logits: The model's function of token ids and caches, which it updates.
    """

    def step(inputs, states):
        caches = []
        for arrays in states:
            cache = ArraysCache(size=len(arrays))
            cache.cache = list(arrays)
            caches.append(cache)
        return logits(inputs, caches), [cache.cache for cache in caches]

    return mx.compile(step, inputs=[model])
