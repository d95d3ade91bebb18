"""HGRN: hierarchically gated recurrent neural network (Qin et al., arXiv 2311.04823)."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from ..ops import elementwise_recurrence
from .language_model import LanguageModel, LanguageModelArgs
from .norms import make_norm
from .sharding import ShardedNorm, require_divisible, shard_channels, shard_projections
from .short_convolution import ShortConvolution, convolve


@dataclass
class ModelArgs(LanguageModelArgs):
    """The keys of fla's ``HGRNConfig`` that change the computation, with its defaults.

    Args:
        expand_ratio: Width of the recurrence over hidden size. Unlike HGRN2's, it
            widens the projections too.

    Raises:
        ValueError: If the sizes do not fit together, naming the key.
    """

    model_type: str = "hgrn"
    expand_ratio: int = 1

    def __post_init__(self):
        if self.expand_ratio is None:
            raise ValueError("config.json: expand_ratio is null; HGRN has no other size to take")
        self.require_positive("expand_ratio")
        super().__post_init__()

    @property
    def forget_dim(self) -> int:
        return self.hidden_size * self.expand_ratio


class HGRNAttention(nn.Module):
    """The elementwise recurrence with its projections; state ``[B, forget_dim]`` in float32.

    The output is normalised and gated: ``o_proj(norm(h) * silu(g_proj(x)))``
    (``fla/layers/hgrn.py``).
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.forget_dim = dim = args.forget_dim
        self.i_proj = nn.Linear(args.hidden_size, dim, bias=args.bias)
        self.f_proj = nn.Linear(args.hidden_size, dim, bias=args.bias)
        self.g_proj = nn.Linear(args.hidden_size, dim, bias=args.bias)
        self.use_short_conv = args.use_short_conv
        if args.use_short_conv:
            self.i_conv1d = ShortConvolution(dim, args.conv_size)
            self.f_conv1d = ShortConvolution(dim, args.conv_size)
        self.g_norm = make_norm(args.norm_type, dim, args.norm_eps, args.elementwise_affine)
        self.o_proj = nn.Linear(dim, args.hidden_size, bias=args.bias)

    def make_cache(self) -> ArraysCache:
        return ArraysCache(size=3 if self.use_short_conv else 1)

    def __call__(
        self,
        x: mx.array,
        lower_bound: mx.array | None,
        mask: mx.array | None,
        cache: ArraysCache | None = None,
    ) -> mx.array:
        i, f = self.i_proj(x), self.f_proj(x)
        if self.use_short_conv:
            i, f = convolve(zip((self.i_conv1d, self.f_conv1d), (i, f)), mask, cache)

        state = None if cache is None else cache[0]
        output, state = elementwise_recurrence(i, f, lower_bound, state, mask)
        if cache is not None:
            cache[0] = state
            cache.advance(x.shape[1])
        return self.o_proj(self.g_norm(output) * nn.silu(self.g_proj(x)))

    def shard(self, group: mx.distributed.Group) -> None:
        """Keeps the process's share of the channels."""
        require_divisible("width of the recurrence", self.forget_dim, group)
        inputs = ("i_proj", "f_proj", "g_proj")
        shard_projections(self, by_output=inputs, by_input=("o_proj",), group=group)
        if self.use_short_conv:
            for convolution in (self.i_conv1d, self.f_conv1d):
                shard_channels(convolution, group)
        self.g_norm = ShardedNorm(self.g_norm, group)


class Model(LanguageModel):
    recurrent_mixer = HGRNAttention
