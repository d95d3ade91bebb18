"""What machine this is and what is installed on it, read without importing any of it."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from typing import Any

from .system_blas import is_in_process

PACKAGES = ("hgrn2-mlx", "mlx", "mlx-lm", "transformers", "numpy")


def describe_machine() -> dict[str, Any]:
    """The system, its processor and the versions of what computes; ``None`` for none."""
    system = f"{platform.system()} {platform.release()}"
    if sys.platform == "darwin":
        system = f"macOS {platform.mac_ver()[0]}"
    described = {
        "system": system,
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    if sys.platform == "darwin":
        described["Metal"] = _metal_version()
    if sys.platform == "linux":
        described["BLAS"] = "a system library in front of MLX's" if is_in_process() else "MLX's own"
    return described | {name: installed_version(name) for name in PACKAGES}


def installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _metal_version() -> str:
    """As macOS tells it, such as ``Metal Support: Metal 3``."""
    command = ["system_profiler", "SPDisplaysDataType"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    lines = (line.strip() for line in told.splitlines())
    return next((line for line in lines if line.startswith("Metal")), "no GPU that knows Metal")
