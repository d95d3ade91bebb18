"""The notebook runs from top to bottom; its last cell asserts that all forms agree."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "linear_attention_view.ipynb"


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive")
def test_its_cells_run(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict = {}
    for source in sources:
        exec(compile(source, NOTEBOOK.name, "exec"), names)
    assert capsys.readouterr().out.count("differs from the recurrence") == 6
