"""The dialect of flash-linear-attention: which tensors a checkpoint must hold, and as what.

Names are the MLX model's own (``fla/models/hgrn2``). Two things differ: torch
keeps a depthwise convolution as ``[dim, 1, taps]``, and a tied checkpoint may
repeat the embedding as ``lm_head.weight``.
"""

import re
from collections.abc import Iterable

import mlx.core as mx
from mlx.utils import tree_flatten

from hgrn2_mlx.models.hgrn2 import Model

from .safetensors_files import StoredTensor

EMBEDDING = "model.embeddings.weight"
HEAD = "lm_head.weight"
LAYER = re.compile(r"(?<=\.layers\.)\d+(?=\.)")
WEIGHT_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def check_tensors(stored: dict[str, StoredTensor], model: Model) -> None:
    """Accounts for every tensor: the checkpoint must hold the model's parameters and no more.

    The model's parameters are not evaluated, so its size costs no memory.

    Raises:
        ValueError: Naming all tensors that are missing, unexpected, of another
            shape, or not float16, bfloat16 or float32.
    """
    expected = {name: weight.shape for name, weight in tree_flatten(model.parameters())}
    if model.args.tie_word_embeddings and HEAD in stored:
        expected[HEAD] = expected[EMBEDDING]

    missing, unexpected, misshapen, mistyped = [], [], [], []
    for name, shape in expected.items():
        if name not in stored:
            missing.append((name, f" {[*torch_shape(name, shape)]}"))
        elif stored[name].shape not in (shape, torch_shape(name, shape)):
            found, wanted = [*stored[name].shape], [*torch_shape(name, shape)]
            misshapen.append((name, f" {found} instead of {wanted}"))
    for name, tensor in stored.items():
        if name not in expected:
            unexpected.append((name, f" {[*tensor.shape]}"))
        elif tensor.dtype not in WEIGHT_DTYPES:
            mistyped.append((name, f" {tensor.dtype}"))

    problems = [
        f"{problem} ({len(tensors)}): {list_tensors(tensors)}"
        for problem, tensors in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", misshapen),
            ("neither float16, bfloat16 nor float32", mistyped),
        )
        if tensors
    ]
    if problems:
        raise ValueError(
            "the checkpoint is not the model its config.json describes: " + "; ".join(problems)
        )


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in torch of a parameter that has ``shape`` in MLX."""
    if name.endswith("conv1d.weight"):
        dim, taps, channels = shape
        return dim, channels, taps
    return shape


def list_tensors(tensors: Iterable[tuple[str, str]]) -> str:
    """Names with a remark each, as one line; layers that agree are written together.

    >>> list_tensors([("model.layers.0.a", ""), ("model.layers.1.a", ""), ("b", " [3]")])
    'model.layers.{0,1}.a, b [3]'
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, remark in tensors:
        layer = LAYER.search(name)
        groups.setdefault((LAYER.sub("*", name), remark), []).append(layer[0] if layer else "")
    listed = []
    for (pattern, remark), layers in groups.items():
        layer = layers[0] if len(layers) == 1 else "{" + ",".join(layers) + "}"
        listed.append(pattern.replace("*", layer) + remark)
    return ", ".join(listed)


def load_weights(stored: dict[str, StoredTensor], model: Model) -> dict[str, mx.array]:
    """The checkpoint's tensors as the model's parameters, not yet read from disk.

    Raises:
        ValueError: If a tied checkpoint's head is not its embedding.
    """
    weights: dict[str, mx.array] = {}
    for file in sorted({tensor.file for tensor in stored.values()}):
        weights.update(mx.load(str(file)))
    if model.args.tie_word_embeddings and HEAD in weights:
        # NaNs are equal here because they are reported by themselves.
        if not mx.array_equal(weights[HEAD], weights[EMBEDDING], equal_nan=True):
            raise ValueError(
                f"config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}"
            )
    return model.sanitize(weights)
