"""The documentation's commands and programs, run page by page in an empty folder.

Their model is the carried checkpoint, in the place of the public one.
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
PUBLIC_MODEL = "fla-hub/hgrn2-1.3B-100B"
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
    result = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_what_a_page_shows_works(page, folder):
    blocks = [
        block
        for block in BLOCK.finditer(page.read_text().replace(PUBLIC_MODEL, str(CHECKPOINT)))
        if not any(word in block["text"] for word in NOT_RUN)
    ]
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
