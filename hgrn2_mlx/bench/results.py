"""What was measured, as JSON and as a table."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..info import format_bytes
from .models import Size
from .settings import QUANTITIES, Settings


@dataclass(frozen=True)
class Row:
    """One quantity at one size, in everything that has it."""

    quantity: str
    batch: int
    tokens: int
    values: dict[str, float]

    def ratios(self) -> dict[str, float]:
        """How many times better the first is: faster, or with less memory."""
        (_, first), *others = self.values.items()
        more_is_better = QUANTITIES[self.quantity][1]
        return {name: first / x if more_is_better else x / first for name, x in others}


@dataclass(frozen=True)
class Results:
    """What :func:`bench` measured.

    Args:
        machine: As :func:`describe_machine` has it, with MLX's device.
        dtype: Type that all of the models compute in.
        quantization: Bits and group size of all of them, if they are quantized.
        size: Of all of the models.
        parameters: Of each model, before quantization; ``None`` for what is none.
        notes: By name, what a peer is, where the name does not say it; by quantity, why it
            was left out.
        settings: What was asked for.
        rows: The figures.
    """

    machine: dict[str, Any]
    dtype: str
    quantization: dict[str, Any] | None
    size: Size
    parameters: dict[str, int | None]
    notes: dict[str, str]
    settings: Settings
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        rows = [
            asdict(row) | {"unit": QUANTITIES[row.quantity][0], "ratios": row.ratios()}
            for row in self.rows
        ]
        return asdict(self) | {"rows": rows}

    def __rich__(self) -> Table:
        """For a terminal: ``rich.print(results)``."""
        bits = f", {self.quantization['bits']} bits" if self.quantization else ""
        first = next(iter(self.parameters))
        caption = (
            f"fastest of {self.settings.trials} trials; in brackets, "
            f"how many times faster, or with how many times less memory, {first} is"
        )
        table = Table(
            title=f"width {self.size.hidden_size}, depth {self.size.layers}, "
            f"{self.dtype}{bits}, on {self.machine['device']}",
            caption="\n".join([caption, *(f"{k}: {note}" for k, note in self.notes.items())]),
            box=None,
            header_style="bold",
        )
        for heading in ("", "batch", "tokens"):
            table.add_column(heading, justify="left" if not heading else "right")
        for name, count in self.parameters.items():
            size = "recurrence only" if count is None else f"{count / 1e6:.1f}M parameters"
            table.add_column(f"{name}\n{size}", justify="right")
        previous = None
        for row in self.rows:
            unit, _ = QUANTITIES[row.quantity]
            quantity = row.quantity if unit == "bytes" else f"{row.quantity}, {unit}"
            quantity = "" if row.quantity == previous else quantity
            cells = (self._cell(row, name) for name in self.parameters)
            table.add_row(quantity, str(row.batch), f"{row.tokens:,}", *cells)
            previous = row.quantity
        return table

    def _cell(self, row: Row, name: str) -> str:
        if name not in row.values:
            return "-"
        value, (unit, _) = row.values[name], QUANTITIES[row.quantity]
        figure = format_bytes(int(value)) if unit == "bytes" else f"{value:,.0f}"
        ratio = row.ratios().get(name)
        return figure if ratio is None else f"{figure} ({ratio:.2f}x)"
