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


class ResidualSources:
    """What the sublayers so far have added, block by block.

    Args:
        embeddings: The first source, ``[B, T, hidden_size]``.
        block_size: Sublayers (two to a layer) in a block.
    """

    def __init__(self, embeddings: mx.array, block_size: int):
        self.finished: list[mx.array] = []
        self.current = embeddings
        self.block_size = block_size
        self.sublayers = 0

    def mix(self, query: PseudoQuery, key_norm: nn.RMSNorm, output_norm: nn.RMSNorm) -> mx.array:
        """The normalised mix ``norm(sum_i softmax_i(query . norm(source_i)) source_i)``.

        All in float32 but for the result. One epsilon serves both norms, as in fla.

        Returns:
            ``[B, T, hidden_size]``, the input of the next sublayer.
        """
        sources = mx.stack([*self.finished, self.current]).astype(mx.float32)
        if len(sources) == 1:
            mixed = sources[0]
        else:
            keys = mx.fast.rms_norm(sources, key_norm.weight.astype(mx.float32), key_norm.eps)
            weights = mx.softmax(keys @ query.weight[0].astype(mx.float32), axis=0)
            mixed = (weights[..., None] * sources).sum(axis=0)
        mixed = mx.fast.rms_norm(mixed, output_norm.weight.astype(mx.float32), key_norm.eps)
        return mixed.astype(self.current.dtype)

    def add(self, output: mx.array) -> None:
        """Adds a sublayer's output, opening a new block first where one begins."""
        if self.sublayers % self.block_size == 0:
            self.finished.append(self.current)
            self.current = output
        else:
            self.current = self.current + output
        self.sublayers += 1
