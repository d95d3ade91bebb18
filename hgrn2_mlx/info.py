"""What a model takes: parameters, the state of a sequence, and memory that grows with its text.

All of it is read off the model itself, in which nothing is computed: MLX's arrays
have their shapes and types before their values.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from rich.console import Group, RenderableType
from rich.table import Table

from .convert.dialects import find_dialect
from .convert.source import read_config
from .convert.stored_tensor import DTYPES, StoredTensor
from .convert.weight_files import read_weights
from .models import ARCHITECTURES
from .models.language_model import Block
from .train import TrainConfig


@dataclass(frozen=True)
class LayerMemory:
    """What a layer keeps of a sequence.

    Args:
        kind: ``"recurrent"`` or ``"attention"``.
        arrays: Shape and type of each array of the state, for a single sequence; for
            attention, of keys and values of a single token.
        state_bytes: Bytes of a sequence however long; 0 for attention.
        bytes_per_token: Bytes that each token of context adds; 0 for a recurrence.
        window: Tokens after which an attention layer's memory grows no more; ``None``
            for never.
    """

    kind: str
    arrays: tuple[str, ...]
    state_bytes: int
    bytes_per_token: int
    window: int | None = None


@dataclass(frozen=True)
class ModelInfo:
    """A model's sizes.

    Args:
        model_type: ``"hgrn2"`` or ``"hgrn"``.
        parameters: Numbers in the model's parameters, before quantization.
        dtype: Type that the model computes in.
        weight_bytes: Bytes of the weights in their files, or without any, in ``dtype``.
        layers: What each layer keeps.
    """

    model_type: str
    parameters: int
    dtype: str
    weight_bytes: int
    layers: tuple[LayerMemory, ...]

    @property
    def state_bytes(self) -> int:
        """Of all layers, for a sequence."""
        return sum(layer.state_bytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, for each token of context within the shortest window."""
        return sum(layer.bytes_per_token for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        """All of it, with the totals."""
        return asdict(self) | {
            "state_bytes": self.state_bytes,
            "bytes_per_token": self.bytes_per_token,
        }

    def __rich__(self) -> RenderableType:
        """For a terminal: ``rich.print(info)``."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("layers")
        table.add_column("each keeps")
        table.add_column("per sequence", justify="right")
        table.add_column("per token of context", justify="right")
        for layer, count in Counter(self.layers).items():
            kept = list(layer.arrays)
            if layer.kind == "attention":
                kept.append(
                    f"of the last {layer.window} tokens" if layer.window else "of each token"
                )
            table.add_row(
                f"{count} {layer.kind}",
                "\n".join(kept),
                format_bytes(layer.state_bytes),
                format_bytes(layer.bytes_per_token),
            )
        table.add_row(
            f"all {len(self.layers)}",
            "",
            format_bytes(self.state_bytes),
            format_bytes(self.bytes_per_token),
            style="bold",
        )
        heading = (
            f"{self.model_type}: {self.parameters:,} parameters, "
            f"{format_bytes(self.weight_bytes)}, computes in {self.dtype}"
        )
        return Group(heading, table)


def read_info(path: str | Path) -> ModelInfo:
    """The sizes of the model that a configuration describes.

    Args:
        path: A ``config.json``, a folder with one (converted, or a checkpoint of either
            dialect), or a training run's YAML file. Of weights, only headers are read.

    Raises:
        ValueError: If there is none, or it is not of HGRN2 or HGRN.
        OSError: If a file cannot be read.
    """
    path = Path(path)
    stored: dict[str, StoredTensor] = {}
    if path.is_dir():
        config = read_config(path, quantized=True)
        if any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
            stored = read_weights(path).tensors
    elif path.suffix in (".yaml", ".yml"):
        run = TrainConfig.load(path)
        config = run.model | {"model_type": run.model_args.model_type, "dtype": run.precision}
    elif path.exists():
        config = read_config(path.parent, quantized=True, name=path.name)
    else:
        raise ValueError(f"{path} does not exist: give a config.json or the folder of a model")
    config = find_dialect(config, stored)[0].mlx_config(config)
    architecture = ARCHITECTURES[config["model_type"]]
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    sizes = [array.size for _, array in tree_flatten(model.parameters())]

    dtype = _compute_dtype(config, stored)
    model.set_dtype(dtype)
    cache = model.make_cache()
    model(mx.zeros((1, 1), mx.int32), cache)
    return ModelInfo(
        model_type=config["model_type"],
        parameters=sum(sizes),
        dtype=_name(dtype),
        weight_bytes=sum(tensor.nbytes for tensor in stored.values()) or dtype.size * sum(sizes),
        layers=tuple(map(_layer_memory, model.layers, cache)),
    )


def _compute_dtype(config: dict[str, Any], stored: dict[str, StoredTensor]) -> mx.Dtype:
    """The type of most weights that are not quantized; without weights, the one in the config."""
    dtypes = Counter(DTYPES[tensor.dtype] for tensor in stored.values())
    for dtype, _ in dtypes.most_common():
        if mx.issubdtype(dtype, mx.floating):
            return dtype
    name = config.get("dtype") or config.get("torch_dtype")
    return {"float16": mx.float16, "bfloat16": mx.bfloat16}.get(name, mx.float32)


def _layer_memory(layer: Block, cache: Any) -> LayerMemory:
    """What a cache holds after one token."""
    if not layer.is_attention:
        arrays = tuple(f"{[*array.shape[1:]]} {_name(array.dtype)}" for array in cache.cache)
        return LayerMemory("recurrent", arrays, cache.nbytes, 0)
    # Memory is set aside for many tokens at a time.
    heads, tokens, width = cache.keys.shape[1:]
    arrays = tuple(f"{name} {[heads, width]}" for name in ("keys", "values"))
    return LayerMemory("attention", arrays, 0, cache.nbytes // tokens, layer.attn.window_size)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def format_bytes(count: int) -> str:
    """In units of a thousand, as disks and mlx-lm have them."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.2f} {unit}"
