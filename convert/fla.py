"""The dialect of flash-linear-attention (``fla/models/hgrn2``, ``fla/models/hgrn``).

Names are the MLX model's own. Two things differ: torch keeps a depthwise
convolution as ``[dim, 1, taps]``, and a tied checkpoint may repeat the embedding
as ``lm_head.weight``.
"""

from dataclasses import fields
from typing import Any

from mlx.utils import tree_flatten

from hgrn2_mlx.models.language_model import LanguageModel, LanguageModelArgs

from .expected_tensors import ExpectedTensor

NAME = "flash-linear-attention"
EMBEDDING = "model.embeddings.weight"
HEAD = "lm_head.weight"

# What the MLX models can be told beyond fla's config.
NOT_IN_FLA = {
    "bias",
    "norm_type",
    "output_norm_eps",
    "query_act",
    "recurrence_scale",
    "scale_embeddings",
    "value_act",
}


def mlx_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config of the MLX model, whose keys are fla's."""
    return config


def expected_tensors(model: LanguageModel) -> list[ExpectedTensor]:
    """The tensors of a checkpoint, in the model's order.

    The model's parameters are not evaluated, so its size costs no memory.
    """
    shapes = {name: weight.shape for name, weight in tree_flatten(model.parameters())}
    tensors = []
    for name, shape in shapes.items():
        transform = "" if torch_shape(name, shape) == shape else "transposed"
        tensors.append(ExpectedTensor(name, torch_shape(name, shape), {name: shape}, transform))
    if model.args.tie_word_embeddings:
        tied = "tied to the embedding"
        tensors.append(ExpectedTensor(HEAD, shapes[EMBEDDING], {}, tied, copy_of=EMBEDDING))
    return tensors


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in torch of a parameter that has ``shape`` in MLX."""
    if name.endswith("conv1d.weight"):
        dim, taps, channels = shape
        return dim, channels, taps
    return shape


def check_expressible(args: LanguageModelArgs) -> None:
    """Refuses a model that fla cannot compute.

    Raises:
        ValueError: Naming the keys of ``config.json`` that fla does not know.
    """
    beyond = [
        field.name
        for field in fields(args)
        if field.name in NOT_IN_FLA and getattr(args, field.name) != field.default
    ]
    if args.hidden_act not in ("swish", "powlu"):
        beyond.append("hidden_act")
    if beyond:
        raise ValueError(f"flash-linear-attention cannot compute this model: {', '.join(beyond)}")
