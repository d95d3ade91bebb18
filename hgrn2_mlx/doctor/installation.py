"""Whether all that this package needs is there and can be imported."""

import importlib
import importlib.metadata
import platform
import sys

from ..machine import installed_version
from .report import REPORT_IT, Finding, Report


def check_versions(report: Report) -> None:
    """Every package that this one requires is there, in a version that it can use."""
    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires("hgrn2-mlx") or []
    except importlib.metadata.PackageNotFoundError:
        what = "hgrn2-mlx itself is not installed, so what it requires is not known"
        report.problems.append(Finding(what, "in its folder: pip install -e ."))
        return
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            have = "it is not installed" if version is None else f"{version} is installed"
            what = f"hgrn2-mlx needs {requirement}, and {have}"
            report.problems.append(Finding(what, f"pip install -U '{requirement}'"))


def can_import(report: Report) -> bool:
    """MLX, mlx-lm and the models on top of it can be imported."""
    for name in ("mlx.core", "mlx_lm", "hgrn2_mlx.models.hgrn2"):
        try:
            importlib.import_module(name)
        except Exception as error:  # Also what a broken installation raises while it loads.
            what = f"{name} cannot be imported: {type(error).__name__}: {error}"
            if name != "mlx.core":
                remedy = "pip install -U mlx-lm, and if that does not help, " + REPORT_IT
            elif sys.platform == "linux":
                remedy = "pip install -U 'mlx[cpu]' (mlx alone has no backend on Linux)"
            elif platform.machine() != "arm64":
                remedy = "install a Python for Apple Silicon: this one is for Intel (Rosetta)"
            else:
                remedy = "pip install -U --force-reinstall mlx"
            report.problems.append(Finding(what, remedy))
            return False
    return True
