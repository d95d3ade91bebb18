"""What a conversion found and did."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the checkpoint and what became of it; ``dtype`` is ``""`` if dropped."""

    name: str
    shape: tuple[int, ...]
    source_dtype: str
    dtype: str
    transform: str = ""


@dataclass
class ConversionReport:
    """What was converted, from what to what.

    Args:
        dialect: Whose names the checkpoint's tensors have.
        parameters: Numbers in the model's parameters, before quantization.
        layers: Recurrent layers, and attention layers of a hybrid model.
        tensors: All tensors of the checkpoint, in the model's order.
        tokenizer: File that the tokenizer came from; ``None`` if there is none.
        source_size: Bytes of the checkpoint's tensors.
        size: Bytes of the converted tensors.
        seconds: Time taken, without the download.
    """

    source: Path
    destination: Path
    dialect: str
    parameters: int
    layers: dict[str, int]
    tensors: list[TensorRecord]
    tokenizer: str | None
    source_size: int
    size: int
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)

    def __rich__(self) -> RenderableType:
        """A summary for a terminal: ``rich.print(report)``."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading, justify in (
            ("tensor", "left"),
            ("", "right"),
            ("shape", "left"),
            ("dtype", "left"),
            ("", "left"),
        ):
            table.add_column(heading, justify=justify, overflow="fold")
        for record, count in self._grouped():
            dtype = f"{record.source_dtype} → {record.dtype}" if record.dtype else "dropped"
            shape = Text(str([*record.shape]))
            table.add_row(record.name, f"×{count}", shape, dtype, record.transform)

        layers = ", ".join(f"{count} {kind}" for kind, count in self.layers.items() if count)
        lines = [
            f"{self.dialect} checkpoint {self.source}",
            f"{self.parameters:,} parameters, {layers} layers, "
            f"tokenizer: {self.tokenizer or 'none'}",
        ]
        result = (
            f"{len(self.tensors)} tensors accounted for, "
            f"{_readable(self.source_size)} → {_readable(self.size)} in {self.seconds:.1f} s"
        )
        return Group(*map(Text, lines), table, Text(result), Text(f"written to {self.destination}"))

    def _grouped(self) -> list[tuple[TensorRecord, int]]:
        """Equal records of different layers as one, with their number."""
        counts: dict[TensorRecord, int] = {}
        for record in self.tensors:
            pattern = re.sub(r"\.layers\.\d+\.", ".layers.*.", record.name)
            group = TensorRecord(
                pattern, record.shape, record.source_dtype, record.dtype, record.transform
            )
            counts[group] = counts.get(group, 0) + 1
        return list(counts.items())


def _readable(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
