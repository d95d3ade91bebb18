"""HGRN2: gated linear RNNs with state expansion (Qin et al., arXiv 2404.07904).

Module and parameter names are those of flash-linear-attention
(``fla/models/hgrn2``, ``fla/layers/hgrn2.py``), so a checkpoint maps by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, create_ssm_mask
from mlx_lm.models.cache import ArraysCache

from ..ops import gated_recurrence
from .attention import Attention, AttentionArgs
from .attention_residuals import PseudoQuery, ResidualSources
from .config import CheckedModelArgs

# fla normalises the recurrence's output with rms_norm_linear's default epsilon,
# not with the config's norm_eps (fla/layers/hgrn2.py).
OUTPUT_NORM_EPS = 1e-5


@dataclass
class ModelArgs(CheckedModelArgs):
    """The keys of fla's ``HGRN2Config`` that change the computation, with its defaults.

    Args:
        num_heads: Heads of a recurrent layer; ``hidden_size // expand_ratio`` if
            ``expand_ratio`` is given.
        expand_ratio: Key dimension of a head, by which the state is expanded:
            it holds ``expand_ratio`` numbers per channel. ``None`` derives it
            from ``num_heads``.
        use_short_conv: Whether a causal depthwise convolution of ``conv_size``
            taps follows the three input projections.
        use_lower_bound: Whether the forget gates have learned lower bounds that
            rise with depth.
        hidden_ratio: MLP width over hidden size, before rounding; ignored if
            ``intermediate_size`` is given.
        hidden_act: ``"swish"`` (SwiGLU) or ``"powlu"``.
        elementwise_affine: Whether the norm of the recurrence's output has a weight.
        attn: Which layers are softmax attention: a specification or a list of
            them (:class:`AttentionArgs`).
        attnres_block_size: Sublayers per block of attention residuals; ``None``
            for plain residuals.

    Raises:
        ValueError: If the sizes do not fit together, naming the key.
    """

    model_type: str = "hgrn2"
    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    hidden_ratio: int | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    elementwise_affine: bool | None = True
    norm_eps: float = 1e-6
    attn: dict[str, Any] | list[dict[str, Any]] | None = None
    tie_word_embeddings: bool = False
    attnres_block_size: int | None = None

    def __post_init__(self):
        self.require_positive("num_hidden_layers", "num_heads", "expand_ratio", "conv_size")
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
        if self.use_lower_bound and self.num_heads * self.expand_ratio != self.hidden_size:
            raise ValueError(
                f"config.json: use_lower_bound needs hidden_size ({self.hidden_size}) to be "
                f"a multiple of expand_ratio ({self.expand_ratio})"
            )
        if self.intermediate_size is None:
            width = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
            self.intermediate_size = 256 * -(-width // 256)
        if self.hidden_act not in ("swish", "powlu"):
            raise ValueError(
                f"config.json: hidden_act {self.hidden_act!r} is not known; "
                "HGRN2 uses 'swish' or 'powlu'"
            )
        block = self.attnres_block_size
        if block is not None and block != 1 and (block < 2 or block % 2):
            raise ValueError(
                f"config.json: attnres_block_size must be null, 1 or even, got {block!r}"
            )
        specs = [self.attn] if isinstance(self.attn, dict) else self.attn or []
        self.attention_layers: dict[int, AttentionArgs] = {}
        for spec in specs:
            args = AttentionArgs.from_dict(spec)
            if self.hidden_size % args.num_heads:
                raise ValueError(
                    f"config.json: attn: hidden_size ({self.hidden_size}) is not a multiple "
                    f"of num_heads ({args.num_heads})"
                )
            for layer in args.layers:
                if layer in self.attention_layers or not 0 <= layer < self.num_hidden_layers:
                    raise ValueError(
                        f"config.json: attn: layer {layer!r} is listed twice or "
                        f"not one of {self.num_hidden_layers}"
                    )
                self.attention_layers[layer] = args


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


class HGRN2Attention(nn.Module):
    """The gated recurrence with its projections; state ``[B, heads, V, K]`` in float32."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.num_heads = args.num_heads
        forget_dim = args.num_heads * args.expand_ratio
        self.q_proj = nn.Linear(args.hidden_size, forget_dim, bias=False)
        self.f_proj = nn.Linear(args.hidden_size, forget_dim, bias=False)
        self.i_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)
        self.use_short_conv = args.use_short_conv
        if args.use_short_conv:
            self.q_conv1d = ShortConvolution(forget_dim, args.conv_size)
            self.f_conv1d = ShortConvolution(forget_dim, args.conv_size)
            self.i_conv1d = ShortConvolution(args.hidden_size, args.conv_size)
        self.g_norm = OutputNorm(args.hidden_size, affine=args.elementwise_affine)
        self.o_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=False)

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
            q, f, i = self._convolve((q, f, i), mask, cache)
        q, f, i = (y.reshape(*y.shape[:2], self.num_heads, -1) for y in (q, f, i))
        if lower_bound is not None:
            lower_bound = lower_bound.reshape(self.num_heads, -1)

        state = None if cache is None else cache[0]
        output, state = gated_recurrence(q, f, i, lower_bound, state, mask)
        if cache is not None:
            cache[0] = state
            cache.advance(x.shape[1])
        return self.o_proj(self.g_norm(output.flatten(-2)))

    def _convolve(
        self,
        inputs: tuple[mx.array, mx.array, mx.array],
        mask: mx.array | None,
        cache: ArraysCache | None,
    ) -> list[mx.array]:
        outputs = []
        convolutions = (self.q_conv1d, self.f_conv1d, self.i_conv1d)
        for slot, (convolution, x) in enumerate(zip(convolutions, inputs), start=1):
            if mask is not None:
                x = mx.where(mask[..., None], x, 0)
            if cache is None:
                x, _ = convolution(x, None, None)
            else:
                x, cache[slot] = convolution(x, cache[slot], cache.lengths)
            outputs.append(x)
        return outputs


class OutputNorm(nn.Module):
    """RMSNorm over all heads together, with or without a weight."""

    def __init__(self, dim: int, affine: bool):
        super().__init__()
        if affine:
            self.weight = mx.ones(dim)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.get("weight"), OUTPUT_NORM_EPS)


def powlu(gate: mx.array, x: mx.array) -> mx.array:
    """``sigmoid(g) g^(3 / (sqrt(g) + 1)) x`` for g > 0, SwiGLU below (fla's ``powglu``)."""
    g = gate.astype(mx.float32)
    positive = mx.where(g > 0, g, 1.0)
    power = mx.exp(3.0 / (mx.sqrt(positive) + 1) * mx.log(positive))
    return (mx.sigmoid(g) * mx.where(g > 0, power, g) * x).astype(x.dtype)


class GatedMLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.activation = swiglu if args.hidden_act == "swish" else powlu
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """A token mixer and an MLP, each behind a norm and added to the residual stream."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        attention = args.attention_layers.get(layer)
        self.is_attention = attention is not None
        self.attn_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.attn = Attention(args.hidden_size, attention) if attention else HGRN2Attention(args)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.mlp = GatedMLP(args)
        if args.attnres_block_size is not None:
            self.attn_res_proj = PseudoQuery(args.hidden_size)
            self.attn_res_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
            self.mlp_res_proj = PseudoQuery(args.hidden_size)
            self.mlp_res_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)

    def mix_tokens(
        self, x: mx.array, lower_bound: mx.array | None, mask: Any, cache: Any
    ) -> mx.array:
        if self.is_attention:
            return self.attn(x, mask, cache)
        return self.attn(x, lower_bound, mask, cache)

    def __call__(
        self, x: mx.array, lower_bound: mx.array | None, mask: Any, cache: Any = None
    ) -> mx.array:
        x = x + self.mix_tokens(self.attn_norm(x), lower_bound, mask, cache)
        return x + self.mlp(self.mlp_norm(x))

    def add_to(
        self, sources: ResidualSources, lower_bound: mx.array | None, mask: Any, cache: Any = None
    ) -> None:
        """The same two sublayers with attention residuals in place of the residual stream."""
        x = sources.mix(self.attn_res_proj, self.attn_res_norm, self.attn_norm)
        sources.add(self.mix_tokens(x, lower_bound, mask, cache))
        x = sources.mix(self.mlp_res_proj, self.mlp_res_norm, self.mlp_norm)
        sources.add(self.mlp(x))


class HGRN2Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.attnres_block_size = args.attnres_block_size
        self.embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        if args.use_lower_bound:
            self.lower_bounds = mx.zeros((args.num_hidden_layers, args.hidden_size))
        self.layers = [Block(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        if args.attnres_block_size is not None:
            self.res_proj = PseudoQuery(args.hidden_size)
            self.res_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)

    def layer_lower_bounds(self) -> list[mx.array | None]:
        """Lower bounds of the forget gates, rising from 0 in the first layer (section 3.1).

        A softmax over layers, accumulated, less the first layer's share; float32.
        """
        if "lower_bounds" not in self:
            return [None] * len(self.layers)
        shares = mx.softmax(self.lower_bounds.astype(mx.float32), axis=0)
        return list(mx.cumsum(shares, axis=0) - shares[0])

    def _masks(self, x: mx.array, cache: list[Any]) -> Iterator[Any]:
        """A mask for each layer: one for all recurrent layers, one for each attention window."""
        masks: dict[Any, Any] = {}
        for layer, layer_cache in zip(self.layers, cache):
            kind = layer.attn.window_size if layer.is_attention else "recurrent"
            if kind not in masks:
                masks[kind] = (
                    create_attention_mask(x, layer_cache, layer.attn.window_size)
                    if layer.is_attention
                    else create_ssm_mask(x, layer_cache)
                )
            yield masks[kind]

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        x = self.embeddings(inputs)
        cache = cache or [None] * len(self.layers)
        layers = list(zip(self.layers, self.layer_lower_bounds(), self._masks(x, cache), cache))
        if self.attnres_block_size is not None:
            sources = ResidualSources(x, self.attnres_block_size)
            for layer, lower_bound, mask, layer_cache in layers:
                layer.add_to(sources, lower_bound, mask, layer_cache)
            return sources.mix(self.res_proj, self.res_norm, self.norm)
        for layer, lower_bound, mask, layer_cache in layers:
            x = layer(x, lower_bound, mask, layer_cache)
        return self.norm(x)


class Model(nn.Module):
    """HGRN2 with its language-model head, as mlx-lm loads it.

    Calling it with token ids ``[B, T]`` and, to continue a sequence, the cache
    of :meth:`make_cache` gives logits ``[B, T, vocab_size]``.
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = HGRN2Model(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        x = self.model(inputs, cache)
        if self.args.tie_word_embeddings:
            return self.model.embeddings.as_linear(x)
        return self.lm_head(x)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        return [layer.attn.make_cache() for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """fla's tensors as this model's: convolutions turned, a tied head dropped.

        Torch keeps a depthwise convolution as ``[dim, 1, taps]``, MLX as
        ``[dim, taps, 1]``. Tensors already in MLX's form pass unchanged.
        """
        sanitized = {}
        for name, weight in weights.items():
            if name == "lm_head.weight" and self.args.tie_word_embeddings:
                continue
            if name.endswith("conv1d.weight") and weight.shape[1] == 1:
                weight = weight.swapaxes(1, 2)
            sanitized[name] = weight
        return sanitized

    @property
    def cast_predicate(self):
        """Which weights a change of dtype may touch: not the lower bounds (a softmax over layers)."""
        return lambda name: not name.endswith("lower_bounds")
