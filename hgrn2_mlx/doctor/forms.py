"""Every form of the recurrences: whether it is right here, and how fast."""

import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .report import REPORT_IT, Finding, FormCheck, Measurement, Report

HEADS, HEAD_DIM = 2, 128  # the public models' heads, but few
TIMED_HEADS, TIMED_TOKENS = 16, 1024  # a layer of the public 1.3B model
TRIALS = 5  # of a measurement, of which the fastest counts


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
    from .. import kernels
    from ..ops import chunked_kernels, decode, elementwise_scan
    from ..ops.chunked import chunked
    from ..ops.merged_pairs import merged_pairs
    from ..ops.recurrent import recurrent

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
    from ..ops import first_use

    return first_use.random_arguments(tokens, heads, HEAD_DIM, HEAD_DIM, dtype)


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
    from ..ops import first_use

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

    from ..bench.model_timing import fastest

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
