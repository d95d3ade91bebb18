"""A conversion before anything is read: what comes in, what becomes of it, what goes out.

Both directions are such plans. A plan knows the header of every file to write,
so its tensors can be read, converted, written and dropped one after the other.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from .checksum import Checksums, checksum
from .settings import Settings
from .stored_tensor import StoredTensor
from .tensor_names import list_tensors
from .writer import TensorLayout

Arrays = dict[str, mx.array]


class Quantization(NamedTuple):
    """How ``mx.quantize`` packs a weight."""

    group_size: int
    bits: int
    mode: str


@dataclass(frozen=True)
class Piece:
    """Tensors that are read together, and the weights that are made of them.

    Args:
        sources: The tensors, by their names in the source.
        weights: The weights with dtype and shape, by their names in the destination;
            empty for tensors that are left out.
        convert: From the tensors' values to the weights', both by name; neither
            changes a value nor a dtype unless it says so in ``transform``.
        transform: What ``convert`` does, in a word or two.
    """

    sources: dict[str, StoredTensor]
    weights: dict[str, TensorLayout]
    convert: Callable[[Arrays], Arrays]
    transform: str = ""


@dataclass
class Plan:
    """A conversion of the folder or file ``source``.

    Args:
        dialect: Whose names the source's tensors have, and ``reason`` how that was seen.
        layers: Recurrent layers, and attention layers of a hybrid model.
        vocab_size: Rows of the embedding.
        pieces: Every tensor of the source, in the order in which they are written.
        write_settings: Writes the other files of the destination into a folder.
        framework: What the destination is for: ``"mlx"``, or ``"pt"`` for PyTorch.
        dtypes: What weights are cast to, by name; others keep theirs.
        quantizations: How weights are quantized after that, by name; others are not.
        notes: What was passed over in the source.
    """

    source: Path
    dialect: str
    reason: str
    layers: dict[str, int]
    vocab_size: int
    pieces: list[Piece]
    write_settings: Callable[[Path], Settings]
    framework: str = "mlx"
    dtypes: dict[str, mx.Dtype] = field(default_factory=dict)
    quantizations: dict[str, Quantization] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.layouts = {
            name: layout for piece in self.pieces for name, layout in self.outputs(piece).items()
        }

    @property
    def parameters(self) -> int:
        """Numbers in the model's parameters, before quantization."""
        return sum(layout.size for piece in self.pieces for layout in piece.weights.values())

    def outputs(self, piece: Piece) -> dict[str, TensorLayout]:
        """What is written of a piece."""
        # Arrays are lazy: these take no memory, and MLX says itself what quantizing gives.
        weights = {
            name: mx.zeros(layout.shape, layout.dtype) for name, layout in piece.weights.items()
        }
        outputs = self._quantize(self._cast(weights))
        return {name: TensorLayout(array.dtype, array.shape) for name, array in outputs.items()}

    def _cast(self, weights: Arrays) -> Arrays:
        return {
            name: weight.astype(self.dtypes.get(name, weight.dtype))
            for name, weight in weights.items()
        }

    def _quantize(self, weights: Arrays) -> Arrays:
        outputs: Arrays = {}
        for name, weight in weights.items():
            if name not in self.quantizations:
                outputs[name] = weight
                continue
            packed = mx.quantize(weight, **self.quantizations[name]._asdict())
            layer = name.removesuffix(".weight")
            parts = zip(("weight", "scales", "biases"), packed, strict=False)
            outputs.update((f"{layer}.{part}", array) for part, array in parts)
        return outputs

    def evaluate(
        self,
        track: Callable[[list[Piece]], Iterable[Piece]] = iter,
        checksums: Checksums | None = None,
    ) -> Iterator[tuple[str, mx.array]]:
        """Reads and converts piece by piece, and gives what to write, in the order of ``layouts``.

        Args:
            track: Wraps the pieces that are worked through, for a progress bar.
            checksums: Filled on the way; ``None`` computes none.

        Raises:
            ValueError: After the last, naming all tensors with values that are not
                finite, or not any more in the dtype asked for.
            OSError: If a file cannot be read.
        """
        not_finite: list[tuple[str, str]] = []
        overflowing: list[tuple[str, str]] = []
        for piece in track(self.pieces):
            arrays = {name: tensor.load() for name, tensor in piece.sources.items()}
            if checksums is not None:
                checksums.sources |= {name: checksum(array) for name, array in arrays.items()}
            not_finite += (broken := _not_finite(arrays))
            weights = self._cast(piece.convert(arrays))
            if not broken:
                dtypes = {array.dtype for array in arrays.values()}
                changed = {
                    name: weight for name, weight in weights.items() if {weight.dtype} != dtypes
                }
                overflowing += _not_finite(changed)
                del changed
            del arrays
            outputs = self._quantize(weights)
            del weights
            for name in list(outputs):
                output = outputs.pop(name)
                if checksums is not None:
                    checksums.outputs[name] = checksum(output)
                yield name, output
                del output
            mx.clear_cache()
        if not_finite:
            raise ValueError(f"NaN or infinity in {list_tensors(not_finite)}")
        if overflowing:
            raise ValueError(
                f"values beyond the range of the dtype asked for in {list_tensors(overflowing)}"
            )


def _not_finite(arrays: Arrays) -> list[tuple[str, str]]:
    """Names of the arrays with such values, and a remark on how many those are."""
    counts = {
        name: mx.sum(mx.logical_not(mx.isfinite(array))).item()
        for name, array in arrays.items()
        if mx.issubdtype(array.dtype, mx.floating)
    }
    return [
        (name, f" ({count:,} of {arrays[name].size:,})") for name, count in counts.items() if count
    ]
