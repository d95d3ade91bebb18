"""Softmax attention, for the layers of a hybrid model (``fla/layers/attn.py``)."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache

from .config import CheckedModelArgs
from .sharding import require_divisible, shard_projections


@dataclass
class AttentionArgs(CheckedModelArgs):
    """One specification of the key ``attn`` in fla's config.

    Args:
        layers: Indices of the layers that attend.
        num_heads: Query heads.
        num_kv_heads: Key and value heads (grouped-query attention), ``num_heads`` by default.
        qkv_bias: Whether the three input projections have a bias.
        window_size: Tokens a query sees, itself included; ``None`` for all.
        rope_theta: Base of the rotary embedding.
    """

    layers: list[int]
    num_heads: int
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0

    def __post_init__(self):
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        self.require_positive("num_heads", "num_kv_heads", "window_size")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: attn: num_heads ({self.num_heads}) is not a multiple "
                f"of num_kv_heads ({self.num_kv_heads})"
            )


class Attention(nn.Module):
    def __init__(self, hidden_size: int, args: AttentionArgs):
        super().__init__()
        self.num_heads = args.num_heads
        self.num_kv_heads = args.num_kv_heads
        self.window_size = args.window_size
        head_dim = hidden_size // args.num_heads
        self.scale = head_dim**-0.5
        kv_dim = head_dim * args.num_kv_heads

        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=args.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_dim, bias=args.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_dim, bias=args.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.rope = nn.RoPE(head_dim, base=args.rope_theta)

    def make_cache(self) -> KVCache | RotatingKVCache:
        return KVCache() if self.window_size is None else RotatingKVCache(self.window_size)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None, cache: KVCache | None = None
    ) -> mx.array:
        def split_heads(y: mx.array, heads: int) -> mx.array:
            return y.reshape(*y.shape[:2], heads, -1).swapaxes(1, 2)

        queries = split_heads(self.q_proj(x), self.num_heads)
        keys = split_heads(self.k_proj(x), self.num_kv_heads)
        values = split_heads(self.v_proj(x), self.num_kv_heads)

        offset = 0 if cache is None else cache.offset
        queries = self.rope(queries, offset=offset)
        keys = self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)

        output = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.scale, mask=mask
        )
        return self.o_proj(output.swapaxes(1, 2).flatten(-2))

    def shard(self, group: mx.distributed.Group) -> None:
        """Keeps the process's share of the heads."""
        require_divisible("attn: num_heads", self.num_heads, group)
        require_divisible("attn: num_kv_heads", self.num_kv_heads, group)
        inputs = ("q_proj", "k_proj", "v_proj")
        shard_projections(self, by_output=inputs, by_input=("o_proj",), group=group)
        self.num_heads //= group.size()
        self.num_kv_heads //= group.size()
