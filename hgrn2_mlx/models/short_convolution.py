"""Short convolutions over time, which may follow a token mixer's input projections."""

from collections.abc import Iterable

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache


class ShortConvolution(nn.Module):
    """Causal depthwise convolution over time, without bias or activation."""

    def __init__(self, dim: int, conv_size: int):
        super().__init__()
        self.weight = mx.random.uniform(-1, 1, (dim, conv_size, 1)) * conv_size**-0.5

    def __call__(
        self, x: mx.array, tail: mx.array | None, lengths: mx.array | None
    ) -> tuple[mx.array, mx.array]:
        """Convolves ``x [B, T, dim]``, continuing from the inputs in ``tail``.

        Args:
            tail: The last ``conv_size - 1`` inputs before ``x``; ``None`` for zeros.
            lengths: Tokens of each row of ``x`` that are not right padding, ``[B]``.

        Returns:
            ``[B, T, dim]``, and the tail for the tokens that follow.
        """
        dim, conv_size, _ = self.weight.shape
        kept = conv_size - 1
        if tail is None:
            tail = mx.zeros((x.shape[0], kept, dim), x.dtype)
        x = mx.concatenate([tail, x], axis=1)
        if lengths is None:
            tail = x[:, x.shape[1] - kept :]
        else:
            ends = mx.clip(lengths, 0, x.shape[1] - kept)[:, None, None]
            tail = mx.take_along_axis(x, ends + mx.arange(kept)[None, :, None], axis=1)
        return mx.conv1d(x, self.weight, groups=dim), tail


def convolve(
    inputs: Iterable[tuple[ShortConvolution, mx.array]],
    mask: mx.array | None,
    cache: ArraysCache | None,
) -> list[mx.array]:
    """Sends each input through its convolution.

    The tails are the cache's entries from 1 on; entry 0 is the recurrence's state.
    """
    outputs = []
    for entry, (convolution, x) in enumerate(inputs, start=1):
        if mask is not None:
            x = mx.where(mask[..., None], x, 0)
        if cache is None:
            x, _ = convolution(x, None, None)
        else:
            x, cache[entry] = convolution(x, cache[entry], cache.lengths)
        outputs.append(x)
    return outputs
