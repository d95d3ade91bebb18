"""Attention residuals (arXiv 2603.15031): a sublayer reads a softmax mix of earlier outputs.

The residual stream is replaced by a list of sources: the sums that whole blocks
of sublayers left behind, and the sum of the block under way. Reference:
``fla/ops/attnres/naive.py``.
"""

import mlx.core as mx
import mlx.nn as nn


class PseudoQuery(nn.Module):
    """The learned query ``[1, hidden_size]``; a vector, so never quantized or adapted."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = mx.zeros((1, hidden_size))


def mix_sources(
    sources: list[mx.array], query: PseudoQuery, key_norm: nn.RMSNorm, output_norm: nn.Module
) -> mx.array:
    """The normalised mix ``norm(sum_i softmax_i(query . norm(source_i)) source_i)``.

    All in float32 but for the result.

    Args:
        sources: Each ``[B, T, hidden_size]``; the embeddings first.

    Returns:
        ``[B, T, hidden_size]``, the input of the next sublayer.
    """
    stacked = mx.stack(sources).astype(mx.float32)
    if len(sources) == 1:
        mixed = stacked[0]
    else:
        keys = mx.fast.rms_norm(stacked, key_norm.weight.astype(mx.float32), key_norm.eps)
        weights = mx.softmax(keys @ query.weight[0].astype(mx.float32), axis=0)
        mixed = (weights[..., None] * stacked).sum(axis=0)
    return output_norm(mixed).astype(sources[-1].dtype)


def add_to_sources(
    sources: list[mx.array], output: mx.array, sublayer: int, block_size: int
) -> list[mx.array]:
    """The sources with a sublayer's output, which opens a new one where a block begins.

    Args:
        sublayer: Its index; there are two to a layer.
        block_size: Sublayers in a block.
    """
    if sublayer % block_size == 0:
        return [*sources, output]
    return [*sources[:-1], sources[-1] + output]
