"""The models to compare, each with random weights of the same width, depth and vocabulary.

And the one that they are built after, which may have weights of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama, mamba2
from mlx_lm.utils import load_model

from ..convert.dialects import find_dialect
from ..convert.source import find_checkpoint, read_config
from ..info import read_info
from ..models import ARCHITECTURES, hgrn2
from ..models.language_model import LanguageModelArgs


@dataclass(frozen=True)
class Size:
    """What models to compare have in common."""

    hidden_size: int
    layers: int
    vocabulary: int


def hgrn2_args(size: Size) -> hgrn2.ModelArgs:
    return hgrn2.ModelArgs(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.layers,
        expand_ratio=min(128, size.hidden_size),
    )


def build_hgrn2(size: Size) -> nn.Module:
    return hgrn2.Model(hgrn2_args(size))


def build_mamba2(size: Size) -> nn.Module:
    """Inner width twice the hidden size in heads of 64 and a state of 128, as published.

    Raises:
        ValueError: If 32 does not divide the hidden size.
    """
    if size.hidden_size % 32:
        raise ValueError(f"mamba2 needs a hidden size that 32 divides, not {size.hidden_size}")
    return mamba2.Model(
        mamba2.ModelArgs(
            model_type="mamba2",
            num_heads=2 * size.hidden_size // 64,
            head_dim=64,
            vocab_size=size.vocabulary,
            hidden_size=size.hidden_size,
            intermediate_size=2 * size.hidden_size,
            state_size=128,
            num_hidden_layers=size.layers,
            layer_norm_epsilon=1e-5,
            conv_kernel=4,
            n_groups=1,
            use_bias=False,
            use_conv_bias=True,
            tie_word_embeddings=False,
            time_step_limit=(0.0, float("inf")),
            time_step_rank="auto",
        )
    )


def build_llama(size: Size) -> nn.Module:
    """Attention with as many heads for keys and values as for queries, and HGRN2's MLP."""
    heads = max(1, size.hidden_size // 128)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=size.hidden_size,
            num_hidden_layers=size.layers,
            intermediate_size=256 * -(-size.hidden_size * 8 // (3 * 256)),
            num_attention_heads=heads,
            rms_norm_eps=1e-6,
            vocab_size=size.vocabulary,
            tie_word_embeddings=False,
        )
    )


@dataclass(frozen=True)
class Subject:
    """The model that is measured, and that peers are built after.

    Args:
        name: For the report.
        build: Makes it, in its type and quantized if it is.
        args: What its configuration says.
        parameters: How many it has, before quantization.
        dtype: The type that it computes in.
        quantization: ``bits``, ``group_size`` and ``mode``; ``None`` for none.
    """

    name: str
    build: Callable[[], nn.Module]
    args: LanguageModelArgs
    parameters: int
    dtype: mx.Dtype
    quantization: dict[str, Any] | None = None

    @property
    def size(self) -> Size:
        return Size(self.args.hidden_size, self.args.num_hidden_layers, self.args.vocab_size)


def random_subject(size: Size, dtype: mx.Dtype | None = None) -> Subject:
    """HGRN2 with random weights, on a CPU in float32, which it multiplies fastest."""
    if dtype is None:
        dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    args = hgrn2_args(size)
    parameters = count_parameters(hgrn2.Model(args))
    return Subject("hgrn2", lambda: in_type(hgrn2.Model(args), dtype), args, parameters, dtype)


def read_subject(source: str | Path, dtype: mx.Dtype | None = None) -> Subject:
    """A folder's model, or that of a ``config.json``, with random weights.

    Args:
        source: The folder or the file, or the id of a repository on the Hugging Face
            Hub, which is downloaded.
        dtype: Type to compute in; ``None`` for the model's own.

    Raises:
        ValueError: If it is none of them.
    """
    path = find_checkpoint(source)
    info = read_info(path)
    folder, file = (path, "config.json") if path.is_dir() else (path.parent, path.name)
    config = read_config(folder, quantized=True, name=file)
    quantization = config.get("quantization")
    if quantization is not None:
        names = ("bits", "group_size", "mode")
        quantization = {name: quantization[name] for name in names if name in quantization}
    config = find_dialect(config, ())[0].mlx_config(config)
    architecture = ARCHITECTURES[info.model_type]
    args = architecture.ModelArgs.from_dict(config)
    dtype = dtype or getattr(mx, info.dtype)

    def build() -> nn.Module:
        if path.is_dir():
            # Of this package's architectures, whatever file for them the folder names.
            return in_type(load_model(path, model_config={"model_file": None})[0], dtype)
        return in_type(architecture.Model(args), dtype, quantization)

    return Subject(info.model_type, build, args, info.parameters, dtype, quantization)


def count_parameters(model: nn.Module) -> int:
    """Of a model that is not quantized."""
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def in_type(
    model: nn.Module, dtype: mx.Dtype, quantization: dict[str, Any] | None = None
) -> nn.Module:
    """The model, computing in ``dtype``, its layers quantized as mlx-lm does by default."""
    model.set_dtype(dtype)
    if quantization is not None:
        group_size = quantization["group_size"]

        def fits(_: str, layer: nn.Module) -> bool:
            return hasattr(layer, "to_quantized") and not layer.weight.shape[-1] % group_size

        nn.quantize(model, **quantization, class_predicate=fits)
    return model
