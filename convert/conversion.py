"""From a PyTorch checkpoint to an MLX folder, one tensor in memory at a time.

MLX's arrays are lazy: the converted model is built as a graph over tensors that
are still on disk, and evaluated piece by piece as it is written.
"""

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save_config

from hgrn2_mlx.models.hgrn2 import Model, ModelArgs
from hgrn2_mlx.registration import MODEL_FILE

from . import fla
from .report import ConversionReport, TensorRecord
from .safetensors_files import StoredTensor, read_headers
from .source import find_checkpoint, read_config
from .staging import staged_folder
from .tokenizer import convert_tokenizer
from .writer import TensorLayout, write_weights

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def convert(
    source: str | Path,
    destination: str | Path,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
    revision: str | None = None,
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> ConversionReport:
    """Converts a checkpoint of flash-linear-attention's HGRN2 to a folder for ``mlx_lm.load``.

    The folder appears complete or not at all. Peak memory is a few times the
    largest tensor, whatever the model's size.

    Args:
        source: A folder with ``config.json`` and safetensors, or the id of such a
            repository on the Hugging Face Hub.
        destination: The folder to make; it must not exist.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"`` for all weights but the
            lower bounds; ``None`` keeps each as it is.
        quantize: Whether to quantize embeddings and projections, as mlx-lm does.
        q_bits: Bits per weight, and ``q_group_size`` weights per scale; ``None`` for
            the defaults of ``q_mode`` (4 and 64 for ``"affine"``).
        revision: Branch, tag or commit of a Hub repository.
        track: Wraps the list of tensor names that is worked through, for a progress bar.

    Raises:
        ValueError: If the checkpoint is not one of HGRN2, is incomplete or corrupt, or
            contains NaN or infinity; or if ``destination`` exists.
        OSError: If a file cannot be read or written.
    """
    destination = Path(destination)
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    with staged_folder(destination) as folder:
        checkpoint = find_checkpoint(source, revision)
        started = time.perf_counter()
        config = read_config(checkpoint)
        args = ModelArgs.from_dict(config)
        stored = read_headers(checkpoint)
        fla.check_tensors(stored, Model(args))
        tokenizer = convert_tokenizer(checkpoint, folder, args.vocab_size)

        graph = _build(args, config, stored, dtype, quantize, q_bits, q_group_size, q_mode)
        records = [_record(name, tensor, graph.layouts) for name, tensor in stored.items()]
        parameters = sum(weight.size for weight in graph.weights.values())
        write_weights(folder, graph.layouts, graph.evaluate(track), parameters)

        config = graph.config | {"model_file": "hgrn2.py"}
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and key in config:
                config[key] = dtype
        save_config(config, folder / "config.json")
        shutil.copyfile(MODEL_FILE, folder / "hgrn2.py")
        generation_config = checkpoint / "generation_config.json"
        if generation_config.is_file():
            shutil.copyfile(generation_config, folder / generation_config.name)

    order = {name: position for position, name in enumerate(graph.layouts)}
    attention = len(args.attention_layers)
    return ConversionReport(
        source=checkpoint,
        destination=destination,
        dialect="flash-linear-attention",
        parameters=parameters,
        layers={"recurrent": args.num_hidden_layers - attention, "attention": attention},
        tensors=sorted(records, key=lambda record: order.get(record.name, len(order))),
        tokenizer=tokenizer,
        source_size=sum(tensor.nbytes for tensor in stored.values()),
        size=sum(layout.nbytes for layout in graph.layouts.values()),
        seconds=time.perf_counter() - started,
        warnings=[] if tokenizer else ["no tokenizer found: only the weights were converted"],
    )


@dataclass
class _Graph:
    """The conversion before anything is read.

    ``weights`` are the checkpoint's tensors, ``cast`` the same in the dtype asked
    for and ``outputs`` what is written: all lazy, and emptied by :meth:`evaluate`.
    """

    config: dict[str, Any]
    weights: dict[str, mx.array]
    cast: dict[str, mx.array]
    outputs: dict[str, mx.array]

    def __post_init__(self):
        self.layouts = {
            name: TensorLayout(array.dtype, array.shape) for name, array in self.outputs.items()
        }

    def evaluate(
        self, track: Callable[[list[str]], Iterable[str]]
    ) -> Iterator[tuple[str, mx.array]]:
        """Reads and converts the tensors one by one, and gives those to write.

        Raises:
            ValueError: After the last, naming all tensors with values that are not
                finite, or not any more in the dtype asked for.
        """
        outputs_of: dict[str, list[str]] = {}
        for name in self.layouts:
            outputs_of.setdefault(_origin(name, self.weights), []).append(name)

        not_finite, overflowing = [], []
        for origin in track(list(outputs_of)):
            weight, cast = self.weights.pop(origin), self.cast.pop(origin)
            if count := _count_not_finite(weight):
                not_finite.append((origin, f" ({count:,} of {weight.size:,})"))
            elif cast.dtype != weight.dtype and (count := _count_not_finite(cast)):
                overflowing.append((origin, f" ({count:,} of {weight.size:,})"))
            del weight, cast
            for name in outputs_of[origin]:
                yield name, self.outputs.pop(name)
            mx.clear_cache()
        if not_finite:
            raise ValueError(f"NaN or infinity in {fla.list_tensors(not_finite)}")
        if overflowing:
            raise ValueError(
                f"values beyond the range of the dtype asked for in {fla.list_tensors(overflowing)}"
            )


def _build(
    args: ModelArgs,
    config: dict[str, Any],
    stored: dict[str, StoredTensor],
    dtype: str | None,
    quantize: bool,
    q_bits: int | None,
    q_group_size: int | None,
    q_mode: str,
) -> _Graph:
    """The graph of the whole conversion; the model itself is dropped with its references."""
    model = Model(args)
    weights = fla.load_weights(stored, model)
    cast = weights.copy()
    if dtype is not None:
        for name, weight in weights.items():
            if model.cast_predicate(name):
                cast[name] = weight.astype(DTYPES[dtype])
    model.load_weights(list(cast.items()))
    if quantize:
        # mlx-lm prints a line on the way.
        with contextlib.redirect_stdout(io.StringIO()):
            model, config = quantize_model(model, config, q_group_size, q_bits, mode=q_mode)
    outputs = dict(tree_flatten(model.parameters()))
    if quantize and outputs.keys() == weights.keys():
        group_size = config["quantization"]["group_size"]
        raise ValueError(
            f"nothing can be quantized: no layer's input divides into groups of {group_size}"
        )
    return _Graph(config, weights, cast, outputs)


def _origin(name: str, weights: dict[str, Any]) -> str:
    """The tensor that an output was made of: its scales and biases come of a layer's weight."""
    return name if name in weights else name.rpartition(".")[0] + ".weight"


def _count_not_finite(array: mx.array) -> int:
    return mx.sum(mx.logical_not(mx.isfinite(array))).item()


def _record(name: str, tensor: StoredTensor, layouts: dict[str, TensorLayout]) -> TensorRecord:
    """What becomes of a tensor, judged by what is written for it."""
    source_dtype = tensor.dtype.lower()
    if name not in layouts:
        return TensorRecord(name, tensor.shape, source_dtype, "", "tied to the embedding")
    layout = layouts[name]
    if layout.dtype == mx.uint32:
        bits = 32 * layout.shape[-1] // tensor.shape[-1]
        return TensorRecord(name, tensor.shape, source_dtype, f"{bits}-bit", "quantized")
    dtype = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}[layout.dtype]
    transform = "" if layout.shape == tensor.shape else "transposed"
    return TensorRecord(name, tensor.shape, source_dtype, dtype, transform)
