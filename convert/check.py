"""Whether a converted folder is what its source becomes, tensor by tensor."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model

from . import fla, fla_on_cpu
from .checksum import tensor_bytes
from .conversion import DTYPES, plan_conversion
from .export import MLX, plan_export
from .plan import Plan
from .source import find_checkpoint, read_json
from .stored_tensor import DTYPES as STORED_DTYPES
from .stored_tensor import StoredTensor
from .tensor_names import list_tensors
from .weight_files import read_weights

# Enough to fill a short convolution and to pass through every layer's state.
TOKENS = 24


@dataclass
class CheckReport:
    """What a comparison found.

    Args:
        tensors: Tensors that were compared.
        differences: A line for each kind of difference; none if all is equal.
        logit_difference: The largest, over a fixed sequence of tokens; ``None`` if the
            models did not run, for the reason in ``not_run``.
    """

    tensors: int
    differences: list[str]
    logit_difference: float | None = None
    not_run: str = ""


def check(
    source: str | Path,
    destination: str | Path,
    revision: str | None = None,
    to_pytorch: bool = False,
) -> CheckReport:
    """Converts again in memory and compares with the folder, one tensor at a time.

    Equal means to the bit: to the source's value where nothing was cast, to the cast
    or quantized source elsewhere. How the folder was converted is read off its config
    and dtypes. Where flash-linear-attention is installed, both models run, too.

    Args:
        source: What was converted: a folder or the id of a Hub repository.
        destination: The folder that was made of it.
        revision: Branch, tag or commit of a Hub repository.
        to_pytorch: Whether ``destination`` is the PyTorch checkpoint of an MLX folder.

    Raises:
        ValueError: If either is incomplete or corrupt.
        OSError: If a file cannot be read.
    """
    source, destination = find_checkpoint(source, revision), Path(destination)
    config = read_json(destination / "config.json")
    written = read_weights(destination).tensors
    plan = plan_export(source) if to_pytorch else _plan_again(source, config, written)
    differences = _compare_tensors(plan, written) + _compare_settings(plan, destination)
    report = CheckReport(len(plan.layouts), differences)
    if plan.dialect not in (fla.NAME, MLX):
        report.not_run = f"flash-linear-attention cannot run a checkpoint of {plan.dialect}"
    elif source.is_file():
        report.not_run = "flash-linear-attention loads folders, not a single file"
    elif not fla_on_cpu.is_installed():
        report.not_run = "flash-linear-attention is not installed (hgrn2-mlx[parity], on Linux)"
    elif not differences:
        torch_folder, mlx_folder = (destination, source) if to_pytorch else (source, destination)
        report.logit_difference = _run_both(torch_folder, mlx_folder, plan.vocab_size)
    return report


def _plan_again(source: Path, config: dict[str, Any], written: dict[str, StoredTensor]) -> Plan:
    """The plan by which ``source`` becomes a folder with this config and these dtypes."""
    kept = plan_conversion(source).layouts
    floats = {dtype: name for name, dtype in DTYPES.items()}
    cast = {
        floats[STORED_DTYPES[tensor.dtype]]
        for name, tensor in written.items()
        if name in kept
        and STORED_DTYPES[tensor.dtype] in floats
        and STORED_DTYPES[tensor.dtype] != kept[name].dtype
    }
    # Weights of several new dtypes come of no conversion: they are reported one by one.
    dtype = cast.pop() if len(cast) == 1 else None
    if not isinstance(quantization := config.get("quantization"), dict):
        return plan_conversion(source, dtype)
    return plan_conversion(
        source,
        dtype,
        quantize=True,
        q_bits=quantization.get("bits"),
        q_group_size=quantization.get("group_size"),
        q_mode=quantization.get("mode", "affine"),
    )


def _compare_tensors(plan: Plan, written: dict[str, StoredTensor]) -> list[str]:
    missing, shapes, dtypes, values = [], [], [], []
    for name, expected in plan.evaluate():
        if name not in written:
            missing.append((name, f" {[*expected.shape]}"))
            continue
        tensor = written[name]
        if tensor.shape != expected.shape:
            shapes.append((name, f" {[*tensor.shape]} instead of {[*expected.shape]}"))
        elif STORED_DTYPES[tensor.dtype] != expected.dtype:
            wanted = str(expected.dtype).removeprefix("mlx.core.")
            dtypes.append((name, f" {tensor.dtype} instead of {wanted}"))
        elif count := _count_different(tensor.load(), expected):
            values.append((name, f" ({count:,} of {expected.size:,})"))
    unexpected = [
        (name, f" {[*tensor.shape]}")
        for name, tensor in written.items()
        if name not in plan.layouts
    ]
    return [
        f"{difference} ({len(tensors)}): {list_tensors(tensors)}"
        for difference, tensors in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", shapes),
            ("wrong dtype", dtypes),
            ("other values", values),
        )
        if tensors
    ]


def _count_different(array: mx.array, expected: mx.array) -> int:
    """Elements that differ in any bit."""
    if tensor_bytes(array) == tensor_bytes(expected):
        return 0
    size = expected.dtype.size
    different = mx.contiguous(array).view(mx.uint8) != mx.contiguous(expected).view(mx.uint8)
    return int(mx.sum(mx.any(different.reshape(-1, size), axis=1)))


def _compare_settings(plan: Plan, destination: Path) -> list[str]:
    """Writes the files beside the weights once more, and compares: JSON by its keys."""
    differences = []
    with tempfile.TemporaryDirectory() as temporary:
        plan.write_settings(Path(temporary))
        for expected in sorted(Path(temporary).iterdir()):
            file = destination / expected.name
            if not file.is_file():
                differences.append(f"{file.name}: missing")
            elif file.read_bytes() != expected.read_bytes():
                differences += _compare_files(file, expected)
    return differences


def _compare_files(file: Path, expected: Path) -> list[str]:
    if file.suffix != ".json":
        return [f"{file.name}: other content"]
    found, wanted = read_json(file), read_json(expected)
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return [
        f"{file.name}: {key} is {_shortened(found.get(key))} "
        f"instead of {_shortened(wanted.get(key))}"
        for key in keys
    ]


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _run_both(torch_folder: Path, mlx_folder: Path, vocab_size: int) -> float:
    """The largest difference of their logits, in float32."""
    # Spread over the vocabulary, and the same whatever the model.
    tokens = (mx.arange(TOKENS) * 7919 % vocab_size)[None]
    model, _ = load_model(mlx_folder)
    model.set_dtype(mx.float32)
    return float(mx.abs(model(tokens) - fla_on_cpu.logits(torch_folder, tokens)).max())
