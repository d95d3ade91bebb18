"""Accounting for a checkpoint's tensors: each is expected under its name, and becomes weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import mlx.core as mx

from .plan import Arrays, Piece
from .stored_tensor import StoredTensor
from .tensor_names import list_tensors
from .writer import TensorLayout

WEIGHT_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor of a checkpoint and the MLX model's weights in it.

    Args:
        name: Its name in the checkpoint.
        shape: Its shape in torch.
        weights: Shapes in MLX of the weights whose rows it holds, one after the
            other, by their names in the model; empty if it is left out.
        transform: What is done to it, in a word or two.
        copy_of: The tensor that it repeats, if any. It may be absent then.
    """

    name: str
    shape: tuple[int, ...]
    weights: dict[str, tuple[int, ...]]
    transform: str = ""
    copy_of: str | None = None

    def fits(self, tensor: StoredTensor) -> bool:
        return tensor.shape == self.shape or self.is_in_mlx_form(tensor)

    def is_in_mlx_form(self, tensor: StoredTensor) -> bool:
        """Whether it is one weight, in its shape already."""
        return [tensor.shape] == [*self.weights.values()]

    def convert(self, arrays: Arrays) -> Arrays:
        """The weights: rows of the tensor, in their shapes."""
        ends = list(accumulate(shape[0] for shape in self.weights.values()))
        blocks = mx.split(arrays[self.name], ends[:-1])
        return {
            name: block.reshape(shape) for (name, shape), block in zip(self.weights.items(), blocks)
        }


def check_tensors(stored: dict[str, StoredTensor], expected: Iterable[ExpectedTensor]) -> None:
    """Accounts for every tensor: the checkpoint must hold those expected and no more.

    Raises:
        ValueError: Naming all tensors that are missing, unexpected, of another
            shape, or not float16, bfloat16 or float32.
    """
    by_name = {tensor.name: tensor for tensor in expected}
    missing, unexpected, misshapen, mistyped = [], [], [], []
    for name, tensor in by_name.items():
        if name not in stored:
            if tensor.copy_of is None:
                missing.append((name, f" {[*tensor.shape]}"))
        elif not tensor.fits(stored[name]):
            found, wanted = [*stored[name].shape], [*tensor.shape]
            misshapen.append((name, f" {found} instead of {wanted}"))
    for name, tensor in stored.items():
        if name not in by_name:
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


def make_pieces(stored: dict[str, StoredTensor], expected: Iterable[ExpectedTensor]) -> list[Piece]:
    """What becomes of each tensor, for a checkpoint that :func:`check_tensors` accepts.

    Raises:
        ValueError: If a tensor is not the copy that it should be.
    """
    pieces = []
    for tensor in expected:
        if tensor.name not in stored:
            continue
        source = stored[tensor.name]
        # NaNs are equal here because they are reported by themselves.
        if tensor.copy_of is not None and not mx.array_equal(
            source.load(), stored[tensor.copy_of].load(), equal_nan=True
        ):
            raise ValueError(
                f"config.json ties the embeddings, but {tensor.name} differs from {tensor.copy_of}"
            )
        dtype = WEIGHT_DTYPES[source.dtype]
        weights = {name: TensorLayout(dtype, shape) for name, shape in tensor.weights.items()}
        transform = "" if tensor.is_in_mlx_form(source) else tensor.transform
        pieces.append(Piece({tensor.name: source}, weights, tensor.convert, transform))
    return pieces
