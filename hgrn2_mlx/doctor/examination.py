"""The examination: one check after the other."""

from ..machine import describe_machine
from .backend import check_backend, check_blas, check_compiler
from .carried_model import check_model
from .forms import check_forms, time_kernels
from .installation import can_import, check_versions
from .report import REPORT_IT, Finding, Report


def examine() -> Report:
    """Runs every check that the ones before leave possible."""
    report = Report(describe_machine())
    check_versions(report)
    if not can_import(report):
        return report
    for check in (
        check_backend,
        check_compiler,
        check_blas,
        check_forms,
        time_kernels,
        check_model,
    ):
        try:
            check(report)
        except Exception as error:  # Whatever happens, the report is worth having.
            what = f"{check.__name__.replace('_', ' ')}: {type(error).__name__}: {error}"
            report.problems.append(Finding(what, REPORT_IT))
    return report
