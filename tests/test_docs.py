"""The documentation's commands and programs, run page by page in an empty folder.

Their model is the carried checkpoint, in the place of the public one, and fine-tuning is short.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hgrn2_mlx.demo import CHECKPOINT

PAGES = Path(__file__).resolve().parent.parent / "docs"
BLOCK = re.compile(r"^```(sh|python|yaml title=\"(?P<file>.+)\")\n(?P<text>.*?)^```$", re.M | re.S)
SUBSTITUTES = {
    "fla-hub/hgrn2-1.3B-100B": str(CHECKPOINT),
    "hgrn2 bench": "hgrn2 bench --prompt-tokens 64 --train-tokens 64 --num-trials 1",
    "--iters 200": "--iters 2 --batch-size 1 --val-batches 1 --max-seq-length 64",
}
# Those need a network, or do not end; tests/test_serving.py has the server and its client.
NOT_RUN = ("pip install", "hgrn2 serve", "hgrn2 demo", "import openai")

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """Where a page's reader is: with a text, and a model converted on the page before."""
    (tmp_path / "my_text.txt").write_bytes((CHECKPOINT / "validation.txt").read_bytes()[:20_000])
    return tmp_path


def run(command, folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Compiling a training step takes a CPU's C++ compiler minutes.
    settings = {"PATH": path, "HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"}
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_shows_works(page, folder):
    text = page.read_text()
    for shown, substitute in SUBSTITUTES.items():
        text = text.replace(shown, substitute)
    blocks = BLOCK.finditer(text)
    blocks = [block for block in blocks if not any(word in block["text"] for word in NOT_RUN)]
    if not blocks:
        pytest.skip("nothing to run")
    if "--mlx-path hgrn2-1.3b\n" not in blocks[0]["text"]:
        convert = ["hgrn2", "convert", "--hf-path", CHECKPOINT, "--mlx-path", "hgrn2-1.3b"]
        run([*convert, "--dtype", "float32"], folder)
    for block in blocks:
        if block["file"]:
            (folder / block["file"]).write_text(block["text"])
        elif block[1] == "python":
            run([sys.executable, "-c", block["text"]], folder)
        else:
            run(["bash", "-euc", block["text"]], folder)
