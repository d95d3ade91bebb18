"""What a conversion found and did."""

import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from .checksum import Checksums
from .plan import Piece, Plan
from .settings import Settings
from .writer import DTYPE_NAMES, TensorLayout

# What the written numbers and file formats depend on.
PACKAGES = ("hgrn2-mlx", "mlx", "mlx-lm", "tokenizers", "sentencepiece", "huggingface-hub")

# A line of the summary: name, shape, dtype in the checkpoint, dtype written, transform.
Row = tuple[str, tuple[int, ...], str, str, str]


@dataclass(frozen=True)
class OutputRecord:
    """One tensor that was written; ``checksum`` is of its bytes, if it was asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str | None


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the checkpoint and what became of it.

    Args:
        dtype: What it was written as (``"bf16"``, ``"4-bit"``); ``""`` if dropped.
        checksum: Of its bytes in the checkpoint, if it was asked for.
        outputs: What was written of it, perhaps together with others.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    transform: str = ""
    checksum: str | None = None
    outputs: tuple[OutputRecord, ...] = ()


@dataclass
class ConversionReport:
    """What was converted, from what to what.

    Args:
        repository: Where the source was downloaded from, and ``commit`` which state of
            it; ``None`` for a local folder.
        framework: What was written: ``"mlx"``, or ``"pt"`` for PyTorch.
        dialect: Whose names the checkpoint's tensors have, and ``reason`` how that was seen.
        parameters: Numbers in the model's parameters, before quantization.
        layers: Recurrent layers, and attention layers of a hybrid model.
        quantization: Group size, bits and mode of what was quantized; ``None`` if nothing was.
        tensors: All tensors of the checkpoint, in the order of writing.
        tokenizer: File that the tokenizer came from; ``None`` if there is none.
        rows_without_token: Rows of the embedding that no token uses; ``None`` if there
            is no tokenizer.
        source_size: Bytes of the checkpoint's tensors.
        size: Bytes of the converted tensors.
        seconds: Time taken, without the download.
        versions: Of Python and the packages that took part.
    """

    source: Path
    repository: str | None
    commit: str | None
    destination: Path
    framework: str
    dialect: str
    reason: str
    parameters: int
    layers: dict[str, int]
    quantization: dict[str, Any] | None
    tensors: list[TensorRecord]
    tokenizer: str | None
    rows_without_token: int | None
    source_size: int
    size: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(
        default_factory=lambda: (
            {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES}
        )
    )

    @classmethod
    def of(
        cls,
        plan: Plan,
        settings: Settings,
        repository: str | None,
        destination: Path,
        checksums: Checksums,
        seconds: float,
    ) -> "ConversionReport":
        """The report of a plan that was carried out."""
        tensors = [record for piece in plan.pieces for record in _records(plan, piece, checksums)]
        stored = [tensor for piece in plan.pieces for tensor in piece.sources.values()]
        quantization = next(iter(plan.quantizations.values()), None)
        rows = None
        if settings.tokens is not None:
            rows = plan.vocab_size - settings.tokens
        return cls(
            source=plan.source,
            repository=repository,
            commit=plan.source.name if repository else None,
            destination=destination,
            framework=plan.framework,
            dialect=plan.dialect,
            reason=plan.reason,
            parameters=plan.parameters,
            layers=plan.layers,
            quantization=quantization and quantization._asdict(),
            tensors=tensors,
            tokenizer=settings.tokenizer,
            rows_without_token=rows,
            source_size=sum(tensor.nbytes for tensor in stored),
            size=sum(layout.nbytes for layout in plan.layouts.values()),
            seconds=seconds,
            warnings=plan.notes + settings.warnings,
        )

    def to_json(self) -> str:
        """All of it, for a machine; checksums are SHA-256 of a tensor's elements in order."""
        content = asdict(self)
        return json.dumps(content, indent=2, default=str, ensure_ascii=False) + "\n"

    def __rich__(self) -> RenderableType:
        """A summary for a terminal: ``rich.print(report)``."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        columns: list[tuple[str, JustifyMethod]] = [
            ("tensor", "left"),
            ("", "right"),
            ("shape", "left"),
            ("dtype", "left"),
            ("", "left"),
        ]
        for heading, justify in columns:
            table.add_column(heading, justify=justify, overflow="fold")
        for (name, shape, source_dtype, dtype, transform), count in self._grouped().items():
            dtypes = f"{source_dtype} → {dtype}" if dtype else "dropped"
            table.add_row(name, f"×{count}", Text(str([*shape])), dtypes, transform)

        layers = ", ".join(f"{count} {kind}" for kind, count in self.layers.items() if count)
        tokenizer = self.tokenizer or "none"
        if self.rows_without_token:
            tokenizer += f" ({self.rows_without_token:,} rows of the embedding have no token)"
        lines = [
            f"{self.dialect} checkpoint {self.source}",
            f"({self.reason})",
            f"{self.parameters:,} parameters, {layers} layers, tokenizer: {tokenizer}",
        ]
        result = (
            f"{len(self.tensors)} tensors accounted for, "
            f"{readable_size(self.source_size)} → {readable_size(self.size)} "
            f"in {self.seconds:.1f} s"
        )
        return Group(*map(Text, lines), table, Text(result), Text(f"written to {self.destination}"))

    def _grouped(self) -> dict[Row, int]:
        """The table's rows: equal tensors of different layers as one, with their number."""
        counts: dict[Row, int] = {}
        for record in self.tensors:
            pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", record.name)
            row = (
                pattern,
                record.shape,
                record.source_dtype,
                record.dtype,
                record.transform,
            )
            counts[row] = counts.get(row, 0) + 1
        return counts


def _records(plan: Plan, piece: Piece, checksums: Checksums) -> Iterable[TensorRecord]:
    layouts = plan.outputs(piece)
    outputs = tuple(
        OutputRecord(name, _dtype_name(layout), layout.shape, checksums.outputs.get(name))
        for name, layout in layouts.items()
    )
    transforms = [piece.transform] if piece.transform else []
    dtype = outputs[0].dtype if outputs else ""
    for name in piece.weights:
        if quantization := plan.quantizations.get(name):
            transforms.append("quantized")
            dtype = f"{quantization.bits}-bit"
            break
    for name, tensor in piece.sources.items():
        yield TensorRecord(
            name=name,
            file=tensor.file.name,
            shape=tensor.shape,
            source_dtype=tensor.dtype.lower(),
            dtype=dtype,
            transform=", ".join(transforms),
            checksum=checksums.sources.get(name),
            outputs=outputs,
        )


def _dtype_name(layout: TensorLayout) -> str:
    return DTYPE_NAMES[layout.dtype].lower()


def readable_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
