"""The figures as a picture."""

from pathlib import Path

from .results import Results
from .settings import QUANTITIES

COLUMNS = 4  # Generation has as many quantities, and so has training.


def draw(results: Results, picture: Path, format: str) -> None:
    """Every quantity against the number of tokens, at its first batch size.

    Args:
        results: What to draw.
        picture: The file to write.
        format: Such as ``"png"`` or ``"svg"``.
    """
    from matplotlib.figure import Figure  # Slow to import.

    measured = list(dict.fromkeys(row.quantity for row in results.rows))
    grid = (-(-len(measured) // COLUMNS), COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3.2 * grid[0]), layout="constrained")
    all_axes = figure.subplots(*grid, squeeze=False).flatten()
    lines = {}
    for axes, quantity in zip(all_axes, measured):
        rows = [row for row in results.rows if row.quantity == quantity]
        rows = [row for row in rows if row.batch == rows[0].batch]
        unit = QUANTITIES[quantity][0]
        scale, unit = (1e6, "MB") if unit == "bytes" else (1, unit)
        for number, name in enumerate(results.parameters):
            points = [(row.tokens, row.values[name] / scale) for row in rows if name in row.values]
            if points:
                (lines[name],) = axes.plot(*zip(*points), marker="o", color=f"C{number}")
        axes.set_title(f"{quantity}, batch {rows[0].batch}", fontsize="medium")
        axes.set(xlabel="tokens", ylabel=unit)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    for axes in all_axes[len(measured) :]:
        axes.set_axis_off()
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=len(lines))
    figure.savefig(picture, dpi=150, format=format)
