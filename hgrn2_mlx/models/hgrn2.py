"""HGRN2: gated linear RNNs with state expansion (Qin et al., arXiv 2404.07904)."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache

from ..ops import gated_recurrence
from .activations import ACTIVATIONS
from .language_model import LanguageModel, LanguageModelArgs
from .norms import make_norm
from .sharding import ShardedNorm, require_divisible, shard_channels, shard_projections
from .short_convolution import ShortConvolution, convolve


@dataclass
class ModelArgs(LanguageModelArgs):
    """The keys of fla's ``HGRN2Config`` that change the computation, with its defaults.

    The last four are for checkpoints of the authors' code, hgru2-pytorch; their
    defaults mean what fla computes.

    Args:
        num_heads: Heads of a recurrent layer; ``hidden_size // expand_ratio`` if
            ``expand_ratio`` is given.
        expand_ratio: Key dimension of a head, by which the state is expanded:
            it holds ``expand_ratio`` numbers per channel. ``None`` derives it
            from ``num_heads``.
        query_act: Activation of the queries, one of :data:`ACTIVATIONS`.
        value_act: Activation of the values.
        recurrence_scale: Factor on the queries; ``None`` for ``expand_ratio ** -0.5``.
        output_norm_eps: Epsilon of the norm of the recurrence's output. fla does not
            use ``norm_eps`` there, but the default of its ``rms_norm_linear``.

    Raises:
        ValueError: If the sizes do not fit together, naming the key.
    """

    model_type: str = "hgrn2"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    query_act: str = "silu"
    value_act: str = "none"
    recurrence_scale: float | None = None
    output_norm_eps: float = 1e-5

    def __post_init__(self):
        self.require_positive("hidden_size", "num_heads", "expand_ratio")
        if self.expand_ratio is None and self.num_heads is None:
            raise ValueError("config.json: expand_ratio and num_heads are both null; give one")
        if self.expand_ratio is None:
            if self.num_heads > self.hidden_size:
                raise ValueError(
                    f"config.json: num_heads ({self.num_heads}) is more than "
                    f"hidden_size ({self.hidden_size})"
                )
            self.expand_ratio = self.hidden_size // self.num_heads
        self.num_heads = self.hidden_size // self.expand_ratio
        if self.num_heads == 0 or self.hidden_size % self.num_heads:
            raise ValueError(
                f"config.json: hidden_size ({self.hidden_size}) does not divide into "
                f"heads of expand_ratio {self.expand_ratio}"
            )
        if self.use_lower_bound and self.forget_dim != self.hidden_size:
            raise ValueError(
                f"config.json: use_lower_bound needs hidden_size ({self.hidden_size}) to be "
                f"a multiple of expand_ratio ({self.expand_ratio})"
            )
        self.require_one_of("query_act", ACTIVATIONS)
        self.require_one_of("value_act", ACTIVATIONS)
        super().__post_init__()

    @property
    def forget_dim(self) -> int:
        return self.num_heads * self.expand_ratio


class HGRN2Attention(nn.Module):
    """The gated recurrence with its projections; state ``[B, heads, V, K]`` in float32."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.num_heads = args.num_heads
        self.scale = args.recurrence_scale
        self.query_act = ACTIVATIONS[args.query_act]
        self.value_act = ACTIVATIONS[args.value_act]
        self.q_proj = nn.Linear(args.hidden_size, args.forget_dim, bias=args.bias)
        self.f_proj = nn.Linear(args.hidden_size, args.forget_dim, bias=args.bias)
        self.i_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=args.bias)
        self.use_short_conv = args.use_short_conv
        if args.use_short_conv:
            self.q_conv1d = ShortConvolution(args.forget_dim, args.conv_size)
            self.f_conv1d = ShortConvolution(args.forget_dim, args.conv_size)
            self.i_conv1d = ShortConvolution(args.hidden_size, args.conv_size)
        self.g_norm = make_norm(
            args.norm_type, args.hidden_size, args.output_norm_eps, args.elementwise_affine
        )
        self.o_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=args.bias)

    def make_cache(self) -> ArraysCache:
        return ArraysCache(size=4 if self.use_short_conv else 1)

    def __call__(
        self,
        x: mx.array,
        lower_bound: mx.array | None,
        mask: mx.array | None,
        cache: ArraysCache | None = None,
    ) -> mx.array:
        q, f, i = self.q_proj(x), self.f_proj(x), self.i_proj(x)
        if self.use_short_conv:
            convolutions = (self.q_conv1d, self.f_conv1d, self.i_conv1d)
            q, f, i = convolve(zip(convolutions, (q, f, i)), mask, cache)
        i = self.value_act(i)
        q, f, i = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, f, i))
        if lower_bound is not None:
            lower_bound = lower_bound.reshape(self.num_heads, -1)

        state = None if cache is None else cache[0]
        output, state = gated_recurrence(
            q, f, i, lower_bound, state, mask, scale=self.scale, query_act=self.query_act
        )
        if cache is not None:
            cache[0] = state
            cache.advance(x.shape[1])
        return self.o_proj(self.g_norm(output.flatten(-2)))

    def shard(self, group: mx.distributed.Group) -> None:
        """Keeps the process's share of the heads."""
        require_divisible("num_heads", self.num_heads, group)
        inputs = ("q_proj", "f_proj", "i_proj")
        shard_projections(self, by_output=inputs, by_input=("o_proj",), group=group)
        if self.use_short_conv:
            for convolution in (self.q_conv1d, self.f_conv1d, self.i_conv1d):
                shard_channels(convolution, group)
        self.g_norm = ShardedNorm(self.g_norm, group)
        self.num_heads //= group.size()


class Model(LanguageModel):
    recurrent_mixer = HGRN2Attention
