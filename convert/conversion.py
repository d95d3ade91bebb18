"""From a PyTorch checkpoint to an MLX folder, one tensor in memory at a time."""

import contextlib
import io
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import quantize_model

from hgrn2_mlx.models import ARCHITECTURES
from hgrn2_mlx.models.language_model import LanguageModel, LanguageModelArgs
from hgrn2_mlx.registration import MODEL_FILES

from .checksum import Checksums
from .dialects import find_dialect
from .expected_tensors import check_tensors, make_pieces
from .plan import Piece, Plan, Quantization
from .report import ConversionReport
from .settings import write_settings
from .source import find_checkpoint, read_config
from .staging import staged_folder
from .weight_files import read_weights
from .writer import SHARD_SIZE, write_weights

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
    shard_size: float = SHARD_SIZE,
    checksums: bool = False,
    track: Callable[[list[Piece]], Iterable[Piece]] = iter,
) -> ConversionReport:
    """Converts a PyTorch checkpoint of HGRN2 or HGRN to a folder for ``mlx_lm.load``.

    HGRN2 may be flash-linear-attention's or the authors' (hgru2-pytorch), HGRN is the former's.

    The folder appears complete or not at all. Peak memory is a few times the
    largest tensor, whatever the model's size.

    Args:
        source: A folder with ``config.json`` and weights (safetensors or files of
            ``torch.save``), the weights' file in such a folder, or the id of such a
            repository on the Hugging Face Hub.
        destination: The folder to make; it must not exist.
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float32"`` for all weights but the
            lower bounds; ``None`` keeps each as it is.
        quantize: Whether to quantize embeddings and projections, as mlx-lm does.
        q_bits: Bits per weight, and ``q_group_size`` weights per scale; ``None`` for
            the defaults of ``q_mode`` (4 and 64 for ``"affine"``).
        revision: Branch, tag or commit of a Hub repository.
        shard_size: Gigabytes (2^30 bytes) that a file of weights is filled up to.
        checksums: Whether the report has those of all tensors.
        track: Wraps the pieces that are worked through, for a progress bar.

    Raises:
        ValueError: If the checkpoint is not one of HGRN2, is incomplete or corrupt, or
            contains NaN or infinity; or if ``destination`` exists.
        OSError: If a file cannot be read or written.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")

    def plan(checkpoint: Path) -> Plan:
        return plan_conversion(checkpoint, dtype, quantize, q_bits, q_group_size, q_mode)

    return carry_out(plan, source, revision, destination, shard_size, checksums, track)


def plan_conversion(
    checkpoint: Path,
    dtype: str | None = None,
    quantize: bool = False,
    q_bits: int | None = None,
    q_group_size: int | None = None,
    q_mode: str = "affine",
) -> Plan:
    """What :func:`convert` does with ``checkpoint``; reads no more than headers.

    Args:
        checkpoint: A folder, or a file of weights with ``config.json`` beside it.

    The others are :func:`convert`'s.

    Raises:
        ValueError: If the checkpoint is not one of HGRN2, is incomplete or corrupt.
        OSError: If a file cannot be read.
    """
    folder = checkpoint.parent if checkpoint.is_file() else checkpoint
    config = read_config(folder)
    stored, notes = read_weights(checkpoint)
    dialect, reason = find_dialect(config, stored)
    config = dialect.mlx_config(config)
    architecture = ARCHITECTURES[config["model_type"]]
    args = architecture.ModelArgs.from_dict(config)
    model = architecture.Model(args)
    expected = dialect.expected_tensors(model)
    check_tensors(stored, expected)
    pieces = make_pieces(stored, expected)

    dtypes = {}
    if dtype is not None:
        names = [name for piece in pieces for name in piece.weights]
        dtypes = {name: DTYPES[dtype] for name in names if model.cast_predicate(name)}
        config |= {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    quantizations: dict[str, Quantization] = {}
    if quantize:
        quantizations, config = _plan_quantization(model, config, q_bits, q_group_size, q_mode)
    config |= {"model_file": MODEL_FILES[args.model_type].name}
    return Plan(
        source=checkpoint,
        dialect=dialect.NAME,
        reason=reason,
        layers=count_layers(args),
        vocab_size=args.vocab_size,
        pieces=pieces,
        write_settings=partial(write_settings, folder, config, args.vocab_size),
        dtypes=dtypes,
        quantizations=quantizations,
        notes=notes,
    )


def count_layers(args: LanguageModelArgs) -> dict[str, int]:
    """How many layers of each kind a model has."""
    attention = len(args.attention_layers)
    return {"recurrent": args.num_hidden_layers - attention, "attention": attention}


def _plan_quantization(
    model: LanguageModel,
    config: dict[str, Any],
    bits: int | None,
    group_size: int | None,
    mode: str,
) -> tuple[dict[str, Quantization], dict[str, Any]]:
    """Which weights mlx-lm quantizes and how, and the config that says so."""
    # mlx-lm prints a line on the way.
    with contextlib.redirect_stdout(io.StringIO()):
        quantized, config = quantize_model(model, config, group_size, bits, mode=mode)
    quantizations = {
        f"{path}.weight": Quantization(layer.group_size, layer.bits, layer.mode)
        for path, layer in quantized.named_modules()
        if "scales" in layer
    }
    if not quantizations:
        group_size = config["quantization"]["group_size"]
        raise ValueError(
            f"nothing can be quantized: no layer's input divides into groups of {group_size}"
        )
    return quantizations, config


def carry_out(
    make_plan: Callable[[Path], Plan],
    source: str | Path,
    revision: str | None,
    destination: str | Path,
    shard_size: float,
    checksums: bool,
    track: Callable[[list[Piece]], Iterable[Piece]],
) -> ConversionReport:
    """Finds the source, makes the plan for it, and writes the folder that the plan describes.

    Raises:
        ValueError: If ``destination`` exists, or the plan cannot be made or carried out.
        OSError: If a file cannot be read or written.
    """
    if shard_size < 0:
        raise ValueError(f"a shard size of {shard_size} GB makes no sense")
    destination = Path(destination)
    with staged_folder(destination) as folder:
        checkpoint = find_checkpoint(source, revision)
        started = time.perf_counter()
        plan = make_plan(checkpoint)
        settings = plan.write_settings(folder)
        computed = Checksums()
        arrays = plan.evaluate(track, computed if checksums else None)
        write_weights(folder, plan.layouts, arrays, plan.parameters, shard_size, plan.framework)
    seconds = time.perf_counter() - started
    repository = None if Path(source).exists() else str(source)
    return ConversionReport.of(plan, settings, repository, destination, computed, seconds)
