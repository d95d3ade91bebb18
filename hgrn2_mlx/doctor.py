"""What this machine will run, whether it is right, how fast it is, and what to do if not.

MLX and all that builds on it are imported within the checks: whether they can be is the
first of them. A check that fails in a way nobody thought of is a problem in the report,
and the next one goes on.
"""

import functools
import importlib
import importlib.metadata
import platform
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from . import system_blas
from .machine import describe_machine, installed_version

HEADS, HEAD_DIM = 2, 128  # the public models' heads, but few
TIMED_HEADS, TIMED_TOKENS = 16, 1024  # a layer of the public 1.3B model
PROMPT_TOKENS, GENERATED_TOKENS = 512, 32  # of the measurement with the carried checkpoint
LOSS_TOLERANCE = 0.01  # nats per token
TRIALS = 5  # of a measurement, of which the fastest counts
SLOW_BLAS = 1 / 3  # of the speed of numpy's matrix products

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


def check_backend(report: Report) -> None:
    """Where MLX computes."""
    import mlx.core as mx

    report.machine["MLX's device"] = ", ".join(f"{k} {v}" for k, v in mx.device_info().items())
    if mx.default_device() == mx.gpu:
        report.backend = "Metal" if mx.metal.is_available() else "CUDA"
        return
    report.backend = "CPU"
    if sys.platform == "darwin":
        what = "MLX computes on the CPU, as it finds no GPU"
        remedy = "run it on a Mac with Apple Silicon, not in a virtual machine or over Rosetta"
        report.problems.append(Finding(what, remedy))
    elif shutil.which("nvidia-smi"):
        what = "there seems to be an NVIDIA GPU, and MLX computes on the CPU"
        report.advice.append(Finding(what, "pip install 'hgrn2-mlx[cuda]'"))


def check_compiler(report: Report) -> None:
    """MLX can compile what it fuses, which on a Linux CPU it does with the system's g++."""
    import mlx.core as mx

    install = "apt install g++, dnf install gcc-c++, or the like"
    if report.backend == "CPU" and sys.platform == "linux" and not shutil.which("g++"):
        what = "there is no g++, so MLX runs one by one the operations that it would fuse"
        report.advice.append(Finding(what, install))
        return
    try:
        # A number of its own makes a source that MLX has not kept from before.
        number = random.random()
        fused = mx.compile(lambda x: mx.exp(x) * number)
        mx.eval(fused(mx.ones(8)))
    except RuntimeError as error:
        what = f"MLX cannot compile operations: {error}"
        remedy = REPORT_IT
        if report.backend == "CPU":
            remedy = "see whether g++ compiles any program, or install it anew: " + install
        report.problems.append(Finding(what, remedy))


def check_blas(report: Report) -> None:
    """On a Linux CPU, MLX multiplies matrices about as fast as numpy does."""
    if report.backend != "CPU" or sys.platform != "linux":
        return
    import mlx.core as mx
    import numpy as np

    from .bench.model_timing import fastest

    a, b = mx.random.normal((2, 1024, 1024))
    numpy_a, numpy_b = np.array(a), np.array(b)
    floating_point_operations = 2 * 1024**3
    ours = floating_point_operations / fastest(lambda: mx.eval(a @ b), TRIALS) / 1e9
    numpys = floating_point_operations / fastest(lambda: numpy_a @ numpy_b, TRIALS) / 1e9
    what = "matrix product, 1024 x 1024, float32"
    measured = Measurement(what, ours, "GFLOP/s", ours / numpys, "numpy's")
    report.measurements.append(measured)
    if ours > SLOW_BLAS * numpys:
        return
    what = f"MLX multiplies matrices at {ours / numpys:.2f} of numpy's speed, with a reference BLAS"
    remedy = "apt install libopenblas0 or dnf install openblas; the hgrn2 command then uses it"
    if system_blas.is_switched_off():
        remedy = f"unset {system_blas.SWITCH}, which keeps hgrn2 from using {system_blas.LIBRARY}"
    elif system_blas.is_in_process():
        remedy = "another BLAS is loaded and not fast either; see what LD_PRELOAD names"
    own = f"; for your own programs, set LD_PRELOAD={system_blas.LIBRARY}"
    report.advice.append(Finding(what, remedy + own))


@dataclass(frozen=True)
class Form:
    """A form of a recurrence and what it is judged by.

    Args:
        name: For the report.
        run: The form, differentiable.
        judge: Another form of the same, to compare with.
        judge_name: How that one is called.
        arguments: Makes ``run``'s arguments, given tokens, heads and a type.
        tokens: How many to compare over.
        fits: Whether the inputs fit; ``None`` if any do, as no kernel is needed.
        accepted: Whether models use the form for the inputs, after their own check.
    """

    name: str
    run: Callable[..., Any]
    judge: Callable[..., Any]
    judge_name: str
    arguments: Callable[..., list[Any]]
    tokens: int
    fits: Callable[..., bool] | None = None
    accepted: Callable[..., bool] | None = None


def forms() -> Iterator[Form]:
    from . import kernels
    from .ops import chunked_kernels, decode, elementwise_scan
    from .ops.chunked import chunked
    from .ops.merged_pairs import merged_pairs
    from .ops.recurrent import recurrent

    def scaled(form):
        return functools.partial(form, scale=HEAD_DIM**-0.5)

    yield Form(
        "chunked operations",
        scaled(chunked),
        scaled(recurrent),
        "the definition, step by step",
        gated_arguments,
        tokens=40,
    )
    yield Form(
        "decode kernel",
        scaled(decode.decode),
        scaled(recurrent),
        "MLX's operations, step by step",
        gated_arguments,
        tokens=1,
        fits=kernels.decode.fits,
        accepted=decode.can_decode,
    )
    yield Form(
        "chunked kernels",
        scaled(chunked_kernels.chunked_kernels),
        scaled(chunked),
        "MLX's operations, in chunks",
        gated_arguments,
        tokens=150,
        fits=kernels.chunked.fits,
        accepted=chunked_kernels.can_run,
    )
    yield Form(
        "elementwise scan kernels",
        elementwise_scan.elementwise_scan,
        merged_pairs,
        "MLX's operations, by pairs",
        elementwise_arguments,
        tokens=150,
        fits=kernels.elementwise_scan.fits,
        accepted=elementwise_scan.can_scan,
    )


def gated_arguments(tokens: int, heads: int, dtype: Any) -> list[Any]:
    """Of HGRN2's recurrence: q, f, v, lower bound and state."""
    import mlx.core as mx

    q, f, v = mx.random.normal((3, 1, tokens, heads, HEAD_DIM), key=mx.random.key(0)).astype(dtype)
    state = mx.random.normal((1, heads, HEAD_DIM, HEAD_DIM), key=mx.random.key(1))
    return [q, f, v, mx.full((heads, HEAD_DIM), 0.25), state]


def elementwise_arguments(tokens: int, heads: int, dtype: Any) -> list[Any]:
    """Of HGRN's: x, f, lower bound and state, of as many channels as HGRN2's heads have."""
    import mlx.core as mx

    channels = heads * HEAD_DIM
    x, f = mx.random.normal((2, 1, tokens, channels), key=mx.random.key(0)).astype(dtype)
    state = mx.random.normal((1, channels), key=mx.random.key(1))
    return [x, f, mx.full((channels,), 0.25), state]


def check_forms(report: Report) -> None:
    """Every form of the recurrences, its results and its gradients, in every type."""
    import mlx.core as mx

    for form in forms():
        for dtype in (mx.float32, mx.bfloat16, mx.float16):
            report.forms.append(check := check_form(form, dtype, report.backend))
            if check.problem is None:
                continue
            what = f"{form.name} in {check.dtype}: {check.problem}"
            if form.fits is None or check.used:
                remedy = f"do not trust what this machine computes with HGRN2, and {REPORT_IT}"
            else:
                remedy = f"results stay right, as MLX's operations run instead, slower; {REPORT_IT}"
            report.problems.append(Finding(what, remedy))


def check_form(form: Form, dtype: Any, backend: str) -> FormCheck:
    from .ops import first_use

    check = functools.partial(
        FormCheck, form.name, str(dtype).removeprefix("mlx.core."), form.judge_name
    )
    arguments = form.arguments(form.tokens, HEADS, dtype)
    inputs = arguments[:-2]  # All but the lower bound and the state.
    if form.fits is not None and not form.fits(*inputs):
        no_gpu = "MLX's operations run, as there is no GPU"
        return check(False, no_gpu if backend == "CPU" else "it is not made for this size")
    started = time.perf_counter()
    comparison = first_use.compare(form.run, form.judge, arguments)
    measured = {"error": comparison.error, "seconds": time.perf_counter() - started}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The report says it in its own way.
        used = form.accepted is None or form.accepted(*inputs)
    if used:
        return check(True, problem=comparison.problem, **measured)
    problem = comparison.problem or "it was wrong or did not run in the check before its first use"
    return check(False, "MLX's operations run in its place", problem=problem, **measured)


def time_kernels(report: Report) -> None:
    """The forward pass of every kernel in use beside the operations it replaces, in bfloat16."""
    import mlx.core as mx

    from .bench.model_timing import fastest

    used = {check.form for check in report.forms if check.used and check.dtype == "bfloat16"}
    for form in forms():
        if form.fits is None or form.name not in used:
            continue
        tokens = 1 if form.tokens == 1 else TIMED_TOKENS
        arguments = form.arguments(tokens, TIMED_HEADS, mx.bfloat16)
        mx.eval(arguments)
        kernel, operations = (
            fastest(
                functools.partial(lambda run, given: mx.eval(run(*given)), run, arguments), TRIALS
            )
            for run in (form.run, form.judge)
        )
        what = f"{form.name}: {tokens} tokens, {TIMED_HEADS} heads of {HEAD_DIM}, bfloat16"
        ratio = operations / kernel
        report.measurements.append(Measurement(what, kernel * 1e3, "ms", ratio, "MLX's operations"))


def check_model(report: Report) -> None:
    """A real model end to end: its loss is the one flash-linear-attention measured."""
    import mlx.core as mx
    import mlx_lm

    from .bench.model_timing import time_generation
    from .convert import convert
    from .demo import CHECKPOINT, validation_loss

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        convert(CHECKPOINT, folder, dtype="float32")
        model, tokenizer = mlx_lm.load(str(folder))
    loss = validation_loss(model, tokenizer, CHECKPOINT, windows=1)
    which = "carried checkpoint (6.2M parameters, float32)"
    what = f"{which}: loss of {loss.tokens} tokens (flash-linear-attention {loss.reference:.4f})"
    report.measurements.append(Measurement(what, loss.mlx, "nats"))
    if not abs(loss.mlx - loss.reference) < LOSS_TOLERANCE:
        what = (
            f"{which}: its loss is {loss.mlx:.4f} here and {loss.reference:.4f} where it was made"
        )
        remedy = f"do not trust what this machine computes with HGRN2, and {REPORT_IT}"
        report.problems.append(Finding(what, remedy))
    speed = time_generation(model, PROMPT_TOKENS, GENERATED_TOKENS, batch=1, trials=2)
    for what, seconds, tokens in (
        (f"prefill, {PROMPT_TOKENS} tokens", speed.prefill_seconds, PROMPT_TOKENS),
        (f"a decode step after them, mean of {GENERATED_TOKENS}", speed.step_seconds, 1),
    ):
        figure = Measurement(f"{which}: {what}", tokens / seconds, "tokens/s")
        report.measurements.append(figure)
    mx.clear_cache()
