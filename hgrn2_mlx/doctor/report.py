"""What an examination found, as JSON and for a terminal."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

REPORT_IT = "open an issue of hgrn2-mlx with the output of: hgrn2 doctor --json"


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or that could be better, and what to do about it."""

    what: str
    remedy: str


@dataclass(frozen=True)
class FormCheck:
    """One way to compute a recurrence, compared with another.

    Args:
        form: Its name, such as ``"decode kernel"``.
        dtype: Of the inputs.
        compared_with: Another form of the same.
        used: Whether models use it here.
        why_not: If they do not; ``None`` if they do.
        error: The largest difference in results and gradients, relative to the largest
            element of the same array; ``None`` if it was not run.
        seconds: For the comparison, in which it is compiled.
        problem: What is wrong; ``None`` if nothing is.
    """

    form: str
    dtype: str
    compared_with: str
    used: bool
    why_not: str | None = None
    error: float | None = None
    seconds: float | None = None
    problem: str | None = None

    @property
    def use(self) -> str:
        return "yes" if self.used else f"no: {self.why_not}"

    @property
    def outcome(self) -> str:
        if self.problem:
            return "[bold]wrong[/bold]"
        return "-" if self.error is None else f"{self.error:.1e}"


@dataclass(frozen=True)
class Measurement:
    """A figure, with what it was measured on; ``ratio`` compares with ``ratio_to``."""

    what: str
    value: float
    unit: str
    ratio: float | None = None
    ratio_to: str | None = None


@dataclass
class Report:
    """What was found. Problems make ``hgrn2 doctor`` fail, advice does not."""

    machine: dict[str, Any] = field(default_factory=dict)
    backend: str = "unknown"
    forms: list[FormCheck] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    advice: list[Finding] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> RenderableType:
        """For a terminal: ``rich.print(report)``."""
        parts: list[RenderableType] = []
        facts = Table.grid(padding=(0, 2))
        for name, value in self.machine.items():
            facts.add_row(name, "not installed" if value is None else escape(str(value)))
        facts.add_row("backend", f"[bold]{escape(self.backend)}[/bold]")
        parts.append(facts)
        if self.forms:
            parts += ["", self._forms_table()]
        if self.measurements:
            parts += ["", self._measurements_table()]
        for title, findings in (("Wrong", self.problems), ("Could be better", self.advice)):
            for finding in findings:
                parts += ["", f"[bold]{title}:[/bold] {escape(finding.what)}"]
                parts.append(f"  What to do: {escape(finding.remedy)}")
        if not self.problems:
            parts += ["", "[bold]Nothing is wrong.[/bold]"]
        return Group(*parts)

    def _forms_table(self) -> Table:
        """A row for each form; under each type the largest relative error."""
        by_form: dict[str, list[FormCheck]] = {}
        for check in self.forms:
            by_form.setdefault(check.form, []).append(check)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("form", *(check.dtype for check in next(iter(by_form.values()))), "used"):
            table.add_column(heading)
        for form, checks in by_form.items():
            uses = dict.fromkeys(check.use for check in checks)
            table.add_row(form, *(check.outcome for check in checks), escape("; ".join(uses)))
        return table

    def _measurements_table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("measured", "", "ratio"):
            table.add_column(heading, justify="left" if heading == "measured" else "right")
        for measured in self.measurements:
            ratio = "" if measured.ratio is None else f"{measured.ratio:.2f} x {measured.ratio_to}"
            table.add_row(escape(measured.what), f"{measured.value:,.4g} {measured.unit}", ratio)
        return table
