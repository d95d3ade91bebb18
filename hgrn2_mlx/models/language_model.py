"""What HGRN and HGRN2 share: all of a language model but the recurrent token mixer.

Module and parameter names are those of flash-linear-attention
(``fla/models/hgrn``, ``fla/models/hgrn2``), so a checkpoint maps by name.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask, create_ssm_mask

from .activations import ACTIVATIONS, gated_linear_unit
from .attention import Attention, AttentionArgs
from .attention_residuals import PseudoQuery, add_to_sources, mix_sources
from .compiled_step import can_step, compile_step
from .config import CheckedModelArgs
from .norms import NORM_TYPES, make_norm
from .sharding import require_divisible, shard_projections


@dataclass
class LanguageModelArgs(CheckedModelArgs):
    """The keys of ``config.json`` that both architectures have, with fla's defaults.

    Those that fla does not have (``bias``, ``norm_type``, ``scale_embeddings``)
    are for checkpoints of the authors' code; their defaults mean what fla computes.

    Args:
        use_short_conv: Whether a causal depthwise convolution of ``conv_size``
            taps follows the projections that feed the recurrence.
        use_lower_bound: Whether the forget gates have learned lower bounds that
            rise with depth.
        hidden_ratio: MLP width over hidden size, before rounding; ignored if
            ``intermediate_size`` is given.
        hidden_act: Activation of the MLP's gate: ``"swish"`` (SwiGLU), ``"powlu"``
            or another of :data:`ACTIVATIONS`.
        elementwise_affine: Whether the norm of the recurrence's output has a weight.
        norm_eps: Epsilon of the norms.
        norm_type: ``"rmsnorm"``, ``"simplermsnorm"`` (without a weight) or ``"layernorm"``.
        bias: Whether the projections of the recurrent layers and of the MLP have biases.
        attn: Which layers are softmax attention: a specification or a list of
            them (:class:`AttentionArgs`).
        scale_embeddings: Whether embeddings are multiplied by ``sqrt(hidden_size)``.
        attnres_block_size: Sublayers per block of attention residuals; ``None``
            for plain residuals.

    Raises:
        ValueError: If the sizes do not fit together, naming the key.
    """

    model_type: str
    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    elementwise_affine: bool | None = True
    norm_eps: float = 1e-6
    norm_type: str = "rmsnorm"
    bias: bool = False
    attn: dict[str, Any] | list[dict[str, Any]] | None = None
    scale_embeddings: bool = False
    tie_word_embeddings: bool = False
    attnres_block_size: int | None = None

    def __post_init__(self):
        self.require_positive("vocab_size", "hidden_size", "num_hidden_layers", "conv_size")
        if self.intermediate_size is None:
            width = int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3)
            self.intermediate_size = 256 * -(-width // 256)
        self.require_positive("intermediate_size")
        self.require_one_of("hidden_act", (*ACTIVATIONS, "powlu"))
        self.require_one_of("norm_type", NORM_TYPES)
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

    @property
    def forget_dim(self) -> int:
        """Forget gates of a recurrent layer."""
        raise NotImplementedError


class GatedMLP(nn.Module):
    def __init__(self, args: LanguageModelArgs):
        super().__init__()
        self.intermediate_size = args.intermediate_size
        self.activation = gated_linear_unit(args.hidden_act)
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.bias)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.bias)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(self.activation(self.gate_proj(x), self.up_proj(x)))

    def shard(self, group: mx.distributed.Group) -> None:
        """Keeps the process's share of the channels between the projections."""
        require_divisible("intermediate_size", self.intermediate_size, group)
        inputs = ("gate_proj", "up_proj")
        shard_projections(self, by_output=inputs, by_input=("down_proj",), group=group)


class Block(nn.Module):
    """A token mixer and an MLP, each behind a norm and added to the residual stream.

    Args:
        recurrent_mixer: Class of the token mixer where the layer is not attention;
            called with ``(x, lower_bound, mask, cache)``.
    """

    def __init__(self, args: LanguageModelArgs, layer: int, recurrent_mixer: type[nn.Module]):
        super().__init__()
        attention = args.attention_layers.get(layer)
        self.is_attention = attention is not None
        self.attn_norm = make_norm(args.norm_type, args.hidden_size, args.norm_eps)
        self.attn = Attention(args.hidden_size, attention) if attention else recurrent_mixer(args)
        self.mlp_norm = make_norm(args.norm_type, args.hidden_size, args.norm_eps)
        self.mlp = GatedMLP(args)

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


class AttentionResidualBlock(Block):
    """The same two sublayers, with attention residuals in place of the residual stream.

    It takes the list of sources and gives a new one: a function of arrays, as
    gradient checkpointing needs.
    """

    def __init__(self, args: LanguageModelArgs, layer: int, recurrent_mixer: type[nn.Module]):
        super().__init__(args, layer, recurrent_mixer)
        self.layer = layer
        self.block_size = args.attnres_block_size
        self.attn_res_proj = PseudoQuery(args.hidden_size)
        self.attn_res_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)
        self.mlp_res_proj = PseudoQuery(args.hidden_size)
        self.mlp_res_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)

    def __call__(
        self,
        sources: list[mx.array],
        lower_bound: mx.array | None,
        mask: Any,
        cache: Any = None,
    ) -> list[mx.array]:
        x = mix_sources(sources, self.attn_res_proj, self.attn_res_norm, self.attn_norm)
        output = self.mix_tokens(x, lower_bound, mask, cache)
        sources = add_to_sources(sources, output, 2 * self.layer, self.block_size)
        x = mix_sources(sources, self.mlp_res_proj, self.mlp_res_norm, self.mlp_norm)
        return add_to_sources(sources, self.mlp(x), 2 * self.layer + 1, self.block_size)


class Backbone(nn.Module):
    """Embeddings, blocks and the last norm: token ids ``[B, T]`` to ``[B, T, hidden_size]``."""

    def __init__(self, args: LanguageModelArgs, recurrent_mixer: type[nn.Module]):
        super().__init__()
        self.embedding_scale = args.hidden_size**0.5 if args.scale_embeddings else 1.0
        self.attnres_block_size = args.attnres_block_size
        self.embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        if args.use_lower_bound:
            self.lower_bounds = mx.zeros((args.num_hidden_layers, args.forget_dim))
        block = Block if args.attnres_block_size is None else AttentionResidualBlock
        self.layers = [block(args, n, recurrent_mixer) for n in range(args.num_hidden_layers)]
        self.norm = make_norm(args.norm_type, args.hidden_size, args.norm_eps)
        if args.attnres_block_size is not None:
            self.res_proj = PseudoQuery(args.hidden_size)
            self.res_norm = nn.RMSNorm(args.hidden_size, eps=args.norm_eps)

    def shard(self, group: mx.distributed.Group) -> None:
        """Keeps the process's share of every layer, and its lower bounds."""
        for layer in self.layers:
            layer.attn.shard(group)
            layer.mlp.shard(group)
        if "lower_bounds" in self:
            require_divisible("forget gates", self.lower_bounds.shape[-1], group)
            self.lower_bounds = mx.split(self.lower_bounds, group.size(), -1)[group.rank()]

    def layer_lower_bounds(self) -> list[mx.array | None]:
        """Lower bounds of the forget gates, rising from 0 in the first layer.

        A softmax over layers, accumulated, less the first layer's share, in float32
        (HGRN, arXiv 2311.04823, section 3.2).
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
        x = self.embedding_scale * self.embeddings(inputs)
        cache = cache or [None] * len(self.layers)
        layers = list(zip(self.layers, self.layer_lower_bounds(), self._masks(x, cache), cache))
        if self.attnres_block_size is not None:
            sources = [x]
            for layer, lower_bound, mask, layer_cache in layers:
                sources = layer(sources, lower_bound, mask, layer_cache)
            return mix_sources(sources, self.res_proj, self.res_norm, self.norm)
        for layer, lower_bound, mask, layer_cache in layers:
            x = layer(x, lower_bound, mask, layer_cache)
        return self.norm(x)


class LanguageModel(nn.Module):
    """A backbone with its language-model head, as mlx-lm loads it.

    Calling it with token ids ``[B, T]`` and, to continue a sequence, the cache
    of :meth:`make_cache` gives logits ``[B, T, vocab_size]``.
    """

    recurrent_mixer: type[nn.Module]

    def __init__(self, args: LanguageModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Backbone(args, self.recurrent_mixer)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)
        self._step = None

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        if not can_step(inputs, cache):
            return self._logits(inputs, cache)
        if self._step is None:
            self._step = compile_step(self, self._logits)
        logits, states = self._step(inputs, [layer_cache.cache for layer_cache in cache])
        for layer_cache, arrays in zip(cache, states):
            layer_cache.cache = arrays
        return logits

    def _logits(self, inputs: mx.array, cache: list[Any] | None) -> mx.array:
        x = self.model(inputs, cache)
        if self.args.tie_word_embeddings:
            return self.model.embeddings.as_linear(x)
        return self.lm_head(x)

    @property
    def layers(self) -> list[Block]:
        return self.model.layers

    def shard(self, group: mx.distributed.Group | None = None) -> None:
        """Splits heads and MLPs over processes, for inference (tensor parallelism).

        Every process calls the model with the same tokens and gets the same, whole
        logits. ``mlx_lm.utils.sharded_load`` calls this after loading.

        Args:
            group: The processes; all by default.

        Raises:
            ValueError: If the heads or another size do not divide among them.
        """
        self.model.shard(group or mx.distributed.init())

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
        """Which weights a change of dtype may touch: not the lower bounds, a softmax of layers."""
        return lambda name: not name.endswith("lower_bounds")
