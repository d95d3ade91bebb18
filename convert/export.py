"""From an MLX folder back to a checkpoint that flash-linear-attention loads."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from hgrn2_mlx.models import ARCHITECTURES
from hgrn2_mlx.models.config import MLX_LM

from . import fla
from .conversion import carry_out, count_layers
from .expected_tensors import WEIGHT_DTYPES, check_tensors
from .plan import Arrays, Piece, Plan, Quantization
from .report import ConversionReport
from .settings import write_settings
from .source import read_config
from .stored_tensor import DTYPES, StoredTensor
from .weight_files import read_weights
from .writer import SHARD_SIZE, TensorLayout

# The dialect of MLX folders, in reports.
MLX = "MLX"

# What transformers looks the model's class up by, beside the model type.
FLA_CLASSES = {"hgrn2": "HGRN2ForCausalLM", "hgrn": "HGRNForCausalLM"}


def export(
    source: str | Path,
    destination: str | Path,
    revision: str | None = None,
    shard_size: float = SHARD_SIZE,
    checksums: bool = False,
    track: Callable[[list[Piece]], Iterable[Piece]] = iter,
) -> ConversionReport:
    """Writes an MLX folder as a PyTorch checkpoint of flash-linear-attention.

    Weights that are not quantized keep every bit; quantized ones are dequantized.
    The folder appears complete or not at all, one tensor in memory at a time.

    Args:
        source: A folder that :func:`convert`, ``hgrn2 fuse`` or ``hgrn2 train`` wrote,
            or the id of such a repository on the Hugging Face Hub.
        destination: The folder to make; it must not exist.
        revision: Branch, tag or commit of a Hub repository.
        shard_size: Gigabytes (2^30 bytes) that a file of weights is filled up to.
        checksums: Whether the report has those of all tensors.
        track: Wraps the pieces that are worked through, for a progress bar.

    Raises:
        ValueError: If the folder is not one of HGRN2, is incomplete or corrupt, or
            contains NaN or infinity; or if ``destination`` exists.
        OSError: If a file cannot be read or written.
    """
    return carry_out(plan_export, source, revision, destination, shard_size, checksums, track)


def plan_export(folder: Path) -> Plan:
    """What :func:`export` does with ``folder``; reads no more than headers.

    Raises:
        ValueError: If the folder is not one of HGRN2, is incomplete or corrupt.
        OSError: If a file cannot be read.
    """
    config = read_config(folder, quantized=True)
    architecture = ARCHITECTURES[config["model_type"]]
    args = architecture.ModelArgs.from_dict(config)
    fla.check_expressible(args)
    expected = fla.expected_tensors(architecture.Model(args))
    stored, notes = read_weights(folder)
    quantizations = _quantizations(config, stored)
    check_tensors(_dequantized(stored, quantizations), expected)

    config = {key: value for key, value in config.items() if key not in MLX_LM}
    config.setdefault("architectures", [FLA_CLASSES[args.model_type]])
    pieces = [
        _piece(tensor.name, tensor.shape, stored, quantizations.get(tensor.name))
        for tensor in expected
        if tensor.weights
    ]
    return Plan(
        source=folder,
        dialect=MLX,
        reason="flash-linear-attention's names, shapes of MLX",
        layers=count_layers(args),
        vocab_size=args.vocab_size,
        pieces=pieces,
        write_settings=partial(write_settings, folder, config, args.vocab_size),
        framework="pt",
        notes=notes,
    )


def _quantizations(
    config: dict[str, Any], stored: dict[str, StoredTensor]
) -> dict[str, Quantization]:
    """How the quantized weights are packed: what the config says of all layers, or of one.

    Raises:
        ValueError: If it says nothing that makes sense.
    """
    settings = config.get("quantization", {})
    quantizations = {}
    for name in stored:
        if not name.endswith(".scales"):
            continue
        layer = name.removesuffix(".scales")
        try:
            own = settings.get(layer, settings)
            quantization = Quantization(
                own["group_size"], own["bits"], own.get("mode", settings.get("mode", "affine"))
            )
            valid = quantization.group_size > 0 and quantization.bits > 0
        except (AttributeError, KeyError, TypeError):
            valid = False
        if not valid:
            raise ValueError(f"config.json: quantization does not say how {layer} is quantized")
        quantizations[f"{layer}.weight"] = quantization
    return quantizations


def _dequantized(
    stored: dict[str, StoredTensor], quantizations: dict[str, Quantization]
) -> dict[str, StoredTensor]:
    """The tensors with the shapes and dtypes that they have once dequantized.

    Raises:
        ValueError: If the parts of a quantized weight do not fit together.
    """
    dense = stored.copy()
    for name, (group_size, bits, _) in quantizations.items():
        parts = _parts(name, stored)
        for part in parts:
            dense.pop(part)
        packed, scales = parts.get(name), parts[_part(name, "scales")]
        shape = (*scales.shape[:-1], scales.shape[-1] * group_size)
        if packed is None or packed.shape != (*shape[:-1], shape[-1] * bits // 32):
            raise ValueError(
                f"{name} is quantized with {bits} bits in groups of {group_size}, "
                f"but its parts do not fit together: "
                + ", ".join(f"{part} {[*tensor.shape]}" for part, tensor in parts.items())
            )
        dense[name] = packed._replace(dtype=_float_dtype(name, stored), shape=shape)
    return dense


def _float_dtype(name: str, stored: dict[str, StoredTensor]) -> str:
    """What to dequantize a weight to: its scales' dtype, or the final norm's if those are bytes."""
    scales = stored[_part(name, "scales")].dtype
    return scales if scales in WEIGHT_DTYPES else stored["model.norm.weight"].dtype


def _piece(
    name: str,
    shape: tuple[int, ...],
    stored: dict[str, StoredTensor],
    quantization: Quantization | None,
) -> Piece:
    if quantization is None:
        layout = TensorLayout(DTYPES[stored[name].dtype], shape)
        transform = "" if shape == stored[name].shape else "transposed"

        def convert(arrays: Arrays) -> Arrays:
            # Of a convolution's two last dimensions, one is 1: the elements stay in order.
            return {name: arrays[name].reshape(shape)}

        return Piece({name: stored[name]}, {name: layout}, convert, transform)

    layout = TensorLayout(DTYPES[_float_dtype(name, stored)], shape)

    def dequantize(arrays: Arrays) -> Arrays:
        weight = mx.dequantize(
            arrays[name],
            arrays[_part(name, "scales")],
            arrays.get(_part(name, "biases")),
            **quantization._asdict(),
            dtype=layout.dtype,
        )
        return {name: weight}

    return Piece(_parts(name, stored), {name: layout}, dequantize, "dequantized")


def _parts(name: str, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    names = (name, _part(name, "scales"), _part(name, "biases"))
    return {part: stored[part] for part in names if part in stored}


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"
