"""Prints the least versions of mlx and mlx-lm that pyproject.toml allows, as pip's constraints."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

least = set()
for requirement in PROJECT["dependencies"]:
    if match := re.match(r"(mlx(?:-lm)?)(?:\[\w+\])?>=([\d.]+)", requirement):
        least.add("==".join(match.groups()))
        if "[cpu]" in requirement:
            least.add(f"mlx-cpu=={match[2]}")
print("\n".join(sorted(least)))
