"""hgrn2 doctor: on this machine, as if on a Mac (the kernels on the host), and on broken ones."""

import importlib.metadata
import json
import os
import subprocess
import sys
import warnings

import mlx.core as mx
import pytest
from conftest import ON_GPU, executing

from hgrn2_mlx import kernels, system_blas
from hgrn2_mlx.cli import main
from hgrn2_mlx.doctor import Report, backend, carried_model, examination, forms
from hgrn2_mlx.doctor.installation import check_versions
from hgrn2_mlx.kernels import sources

KERNELS = ("decode kernel", "chunked kernels", "elementwise scan kernels")
TYPES = ("float32", "bfloat16", "float16")
OPENBLAS = "libopenblas.so.0"


@pytest.fixture(autouse=True)
def small_measurements(fresh_kernels, monkeypatch):
    for module, sizes in {
        forms: {"HEADS": 1, "TIMED_HEADS": 1, "TIMED_TOKENS": 16, "TRIALS": 1},
        carried_model: {"PROMPT_TOKENS": 16, "GENERATED_TOKENS": 2},
        backend: {"TRIALS": 1},
    }.items():
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


def examine(capsys):
    """The exit status and what ``hgrn2 doctor --json`` prints, which must be strict JSON."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # The report has it all.
        status = main(["doctor", "--json"])
    printed = capsys.readouterr()
    return status, json.loads(printed.out, parse_constant=pytest.fail), printed.err


def only_forms(monkeypatch):
    """Leaves the model out, which says nothing more about a kernel that is broken."""
    for name in ("time_kernels", "check_model", "check_compiler"):
        monkeypatch.setattr(examination, name, lambda report: None)


def test_on_a_mac_every_kernel_is_compiled_and_right(capsys):
    with executing() as runs:
        status, report, errors = examine(capsys)
    assert (status, report["problems"], errors) == (0, [], "")
    assert report["backend"] == ("CUDA" if mx.cuda.is_available() else "Metal")
    checked = {(form["form"], form["dtype"]): form for form in report["forms"]}
    assert set(checked) == {
        (form, dtype) for form in (*KERNELS, "chunked operations") for dtype in TYPES
    }
    for (_, dtype), form in checked.items():
        assert form["used"] and form["why_not"] is None
        assert form["error"] < (1e-4 if dtype == "float32" else 3e-2)
    measured = {figure["what"]: figure for figure in report["measurements"]}
    for kernel in KERNELS:
        (timed,) = [figure for what, figure in measured.items() if what.startswith(kernel)]
        assert timed["ratio_to"] == "MLX's operations"
    loss, prefill, step = (f for what, f in measured.items() if what.startswith("carried"))
    assert (loss["unit"], prefill["unit"], step["unit"]) == ("nats", "tokens/s", "tokens/s")
    if runs is not None:
        names = {run.kernel.name for run in runs}
        assert any("decode" in name for name in names) and any("scan" in name for name in names)


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_on_a_cpu_operations_run_and_it_says_why(capsys):
    assert main(["doctor"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "backend CPU" in text
    assert text.count("no: MLX's operations run, as there is no GPU") == len(KERNELS)
    assert "matrix product, 1024 x 1024, float32" in text
    assert "flash-linear-attention 2.5409" in text
    assert text.endswith("Nothing is wrong.")


def edit_sources(monkeypatch, edit):
    """Changes what is read from ``metal/`` for a kernel: ``edit(text, files)``."""
    read = sources._read
    monkeypatch.setattr(sources, "_read", lambda files, gpu: edit(read(files, gpu), files))


def test_a_kernel_whose_gradients_are_wrong_is_reported_and_left_aside(monkeypatch, capsys):
    only_forms(monkeypatch)
    right, wrong = "gate_gradient - key_gradient", "gate_gradient + key_gradient"
    edit_sources(monkeypatch, lambda text, _: text.replace(right, wrong))
    with executing():
        status, report, errors = examine(capsys)
    assert status == 1
    assert errors == "hgrn2: error: 3 things wrong, as listed above\n"
    assert [problem["what"] for problem in report["problems"]] == [
        f"chunked kernels in {dtype}: its result differs from that of MLX's operations"
        for dtype in TYPES
    ]
    for check in report["forms"]:
        assert check["used"] == (check["form"] != "chunked kernels")
        assert bool(check["problem"]) != check["used"]
    assert all("results stay right" in problem["remedy"] for problem in report["problems"])


def test_a_kernel_that_is_wrong_after_its_first_use_is_not_to_be_trusted(monkeypatch, capsys):
    only_forms(monkeypatch)
    run = kernels.decode.decode
    calls = 0

    def wrong(*arguments):
        nonlocal calls
        calls += 1
        output, state = run(*arguments)
        return (output + calls % 2, state)  # The doctor's own call is the first of two.

    monkeypatch.setattr(kernels.decode, "decode", wrong)
    with executing():
        status, report, _ = examine(capsys)
    assert status == 1
    assert [problem["what"].partition(":")[0] for problem in report["problems"]] == [
        f"decode kernel in {dtype}" for dtype in TYPES
    ]
    assert all("do not trust" in problem["remedy"] for problem in report["problems"])


def test_a_kernel_that_does_not_compile_is_wrong_and_left_aside(monkeypatch, capsys):
    only_forms(monkeypatch)
    edit_sources(monkeypatch, lambda text, files: text + "nonsense;\n" * ("decode.h" in files))
    with executing():
        status, report, _ = examine(capsys)
        assert main(["doctor"]) == 1
    assert status == 1
    decodes = [check for check in report["forms"] if check["form"] == "decode kernel"]
    for check in decodes:
        assert not check["used"] and check["error"] is None
        assert "it does not run" in check["problem"] and "nonsense" in check["problem"]
    others = [check for check in report["forms"] if check not in decodes]
    assert all(check["used"] and check["problem"] is None for check in others)
    assert len(report["problems"]) == len(TYPES)
    assert all("results stay right" in problem["remedy"] for problem in report["problems"])
    assert "wrong" in capsys.readouterr().out


def test_what_nobody_thought_of_does_not_hide_the_rest(monkeypatch, capsys):
    def broken(report):
        raise KeyError("surprise")

    broken.__name__ = "check_forms"
    only_forms(monkeypatch)
    monkeypatch.setattr(examination, "check_forms", broken)
    status, report, _ = examine(capsys)
    assert status == 1
    assert report["problems"][0]["what"] == "check forms: KeyError: 'surprise'"
    assert report["backend"] != "unknown"


def test_an_mlx_that_cannot_be_imported_is_reported(tmp_path):
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "core.py").write_text("raise ImportError('libmlx.so: cannot open')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "hgrn2_mlx", "doctor", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1
    (problem,) = json.loads(ended.stdout)["problems"]
    assert problem["what"] == "mlx.core cannot be imported: ImportError: libmlx.so: cannot open"
    assert "pip install" in problem["remedy"]


def test_versions_that_are_too_old_or_not_there_are_named(monkeypatch):
    version = importlib.metadata.version

    def old(name):
        if name == "sentencepiece":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "mlx-lm" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", old)
    report = Report()
    check_versions(report)
    assert [problem.what for problem in report.problems] == [
        "hgrn2-mlx needs mlx-lm>=0.32.1, and 0.1 is installed",
        "hgrn2-mlx needs sentencepiece, and it is not installed",
    ]


@pytest.mark.skipif(sys.platform != "linux" or ON_GPU, reason="Linux on a CPU only")
@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_without_a_compiler_it_says_what_to_install(tmp_path, compiler):
    if compiler == "broken":  # It tells its version, as MLX asks, and compiles nothing.
        (tmp_path / "g++").write_text('#!/bin/sh\n[ "$1" = --version ]\n')
        (tmp_path / "g++").chmod(0o755)
    script = """
from hgrn2_mlx.doctor import Report, backend
report = Report(backend="CPU")
backend.check_compiler(report)
for kind, findings in (("problem", report.problems), ("advice", report.advice)):
    for finding in findings:
        print(kind, finding.what, finding.remedy)
"""
    printed = " ".join(python_prints(script, PATH=str(tmp_path)))
    expected = {"missing": "advice there is no g++", "broken": "problem MLX cannot compile"}
    assert printed.startswith(expected[compiler]) and "apt install g++" in printed


# The system's BLAS


def python_prints(script, **environment):
    command = [sys.executable, "-c", script]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, check=True
    )
    return ended.stdout.split()


def has_openblas():
    return (
        sys.platform == "linux"
        and not subprocess.run(
            [sys.executable, "-c", f"import ctypes; ctypes.CDLL({OPENBLAS!r})"],
            stderr=subprocess.DEVNULL,
        ).returncode
    )


@pytest.mark.skipif(not has_openblas(), reason=f"no {OPENBLAS}")
def test_the_command_line_multiplies_with_openblas_and_as_exactly():
    script = """
import sys
from hgrn2_mlx.cli import main
assert main(["info", "nothing"]) == 1
import mlx.core as mx, numpy as np
from hgrn2_mlx import system_blas
a, b = np.random.default_rng(0).standard_normal((2, 200, 200)).astype(np.float32)
exact = a.astype(np.float64) @ b
product = np.array(mx.matmul(mx.array(a), mx.array(b), stream=mx.cpu))
print(system_blas.is_in_process(), *(abs(c - exact).max() < 1e-4 for c in (product, a @ b)))
"""
    assert python_prints(script) == ["True", "True", "True"]
    assert python_prints(script, HGRN2_SYSTEM_BLAS="0") == ["False", "True", "True"]


def test_the_library_by_itself_leaves_the_process_alone():
    script = """
import hgrn2_mlx, hgrn2_mlx.ops
from hgrn2_mlx.system_blas import is_in_process, use_system_blas
print(is_in_process(), use_system_blas(), is_in_process())
"""
    assert python_prints(script, LD_PRELOAD="") == ["False"] * 3


@pytest.mark.parametrize(
    "switch, in_process, remedy",
    [
        ("1", False, "apt install libopenblas0"),
        ("0", False, "unset HGRN2_SYSTEM_BLAS"),
        ("1", True, "see what LD_PRELOAD names"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_slow_blas_is_advice_not_a_problem(monkeypatch, switch, in_process, remedy):
    monkeypatch.setenv("HGRN2_SYSTEM_BLAS", switch)
    monkeypatch.setattr(system_blas, "is_in_process", lambda: in_process)
    monkeypatch.setattr(backend, "SLOW_BLAS", float("inf"))
    report = Report(backend="CPU")
    backend.check_blas(report)
    (advice,) = report.advice
    assert not report.problems
    assert "of numpy's speed" in advice.what
    assert remedy in advice.remedy and f"LD_PRELOAD={OPENBLAS}" in advice.remedy
