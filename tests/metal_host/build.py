"""Compiles a traced kernel together with the scheduler that runs it."""

import enum
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from .trace import TracedKernel

FOLDER = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hgrn2-mlx" / "metal_host"

FLAGS = ["-std=c++14", "-O1", "-g1", f"-I{FOLDER / 'include'}"]
# Metal is C++14 without exceptions, and has no double: 0.1 must be written 0.1f.
NO_DOUBLES = "-Werror=double-promotion"
KERNEL_FLAGS = [
    "-fno-exceptions",
    "-pedantic-errors",
    "-Wno-keyword-macro",
    "-Wno-attributes",
    "-Wno-unknown-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-unknown-warning-option",
]

ATTRIBUTE_LIST = re.compile(r"\[\[\w+(?:\([^()]*\))?\]\]")
# Words of Metal's that C++ does not keep for itself, so that a kernel must not name things so:
# what a function is, types, address spaces (Metal Shading Language Specification, 2, 4 and 5.1).
METAL_WORDS = set(
    "kernel vertex fragment object_data ray_data threadgroup_imageblock matrix vec packed_vec "
    "atomic quad llong ullong complex imaginary restrict assert main".split()
)
VECTOR = re.compile(r"\b(float|half|bfloat|int|uint|ushort|uchar|ulong)([234])\(")

UNUSED_SECONDS = 7 * 24 * 3600  # before a program leaves the cache


class Mode(enum.Enum):
    """What a run looks for, beside wrong results."""

    PLAIN = "plain"
    ADDRESS = "address"  # out of bounds, undefined behaviour
    THREAD = "thread"  # races between barriers
    SPACES = "spaces"  # a compile-time check of address spaces, then a plain run
    TRAFFIC = "traffic"  # counts the bytes of device memory


# For the kernel, and for the scheduler, which is not instrumented.
MODE_FLAGS = {
    Mode.PLAIN: ([], []),
    Mode.ADDRESS: (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-DHOST_ASAN"],
    ),
    Mode.THREAD: (["-fsanitize=thread"], ["-DHOST_TSAN"]),
    # Loops that copy must not become calls of memcpy: it would read and write uncounted.
    Mode.TRAFFIC: (["-fsanitize-coverage=func,trace-loads,trace-stores", "-fno-builtin"], []),
}
CLANG_ONLY = {Mode.SPACES, Mode.TRAFFIC}


class CompileError(RuntimeError):
    """A Metal compiler would refuse the source, or this one knows less than it does."""


class Unavailable(pytest.skip.Exception):
    """This machine lacks the compiler or the sanitizer: a test that needs it is skipped."""


def build(kernel: TracedKernel, mode: Mode) -> Path:
    """A program that runs the kernel; compiled once per source, flags and compiler."""
    check_available(mode)
    if mode is Mode.SPACES:
        check_address_spaces(kernel)
        mode = Mode.PLAIN
    kernel_flags, runner_flags = MODE_FLAGS[mode]
    source = kernel_source(kernel)
    flags = [*FLAGS, *KERNEL_FLAGS, NO_DOUBLES, *kernel_flags]
    program = cached(flags, source)
    if in_cache(program):
        return program

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "kernel.cpp").write_text(source)
        compile_([*flags, "-c", folder / "kernel.cpp"], output=folder / "kernel.o")
        runner = build_runner(runner_flags)
        compile_([*kernel_flags, folder / "kernel.o", runner], output=folder / "program")
        store(folder / "program", program)
    return program


def kernel_source(kernel: TracedKernel) -> str:
    """The traced text as C++, and a function that calls the kernel for one thread."""
    # Storage comes from the scheduler, which shares it, poisons it and counts it.
    text = kernel.declare_threadgroup_variables(
        "auto& {name} = host::threadgroup_variable<{index}, {type}{dimensions}>();"
    )
    check_words(kernel, text)
    arguments = []
    for index, buffer in enumerate(kernel.buffers):
        const = "const " if buffer.constant else ""
        pointer = f"static_cast<{const}{buffer.type}*>(buffers[{index}])"
        arguments.append(f"*{pointer}" if buffer.reference else pointer)
    for kind, attribute in kernel.attributes:
        at = f"at.{attribute}"
        arguments.append(f"uint3({at}.x, {at}.y, {at}.z)" if kind == "uint3" else at)
    return "\n".join(
        [
            '#include "mlx_prelude.h"',
            f'#line 1 "{kernel.name}"',
            without_attributes_of_instantiation(kernel, text),
            "void host::launch(void* const* buffers, const host::Thread& at) {",
            f"  {kernel.entry}({', '.join(arguments)});",
            "}\n",
        ]
    )


def check_words(kernel: TracedKernel, text: str) -> None:
    """What C++ would take and Metal would not."""
    # MLX hands the source, with its comments, to Metal as ASCII.
    if not kernel.text.isascii():
        raise CompileError(f"{kernel.name}: characters that are not ASCII")
    for word in re.findall(r"\b[A-Za-z_]\w*", ATTRIBUTE_LIST.sub("", text)):
        if word in METAL_WORDS:
            raise CompileError(f"{kernel.name}: {word} is a word of Metal's")


def check_address_spaces(kernel: TracedKernel) -> None:
    """Compiles, for its errors, with address spaces as types of their own."""
    text = kernel.declare_threadgroup_variables("threadgroup static {type} {name}{dimensions};")
    text = without_attributes_of_instantiation(kernel, text)
    text = VECTOR.sub(r"host::make_vector<\1, \2>(", text)
    source = f'#include "mlx_prelude.h"\n#line 1 "{kernel.name}"\n{text}'
    flags = [*FLAGS, *KERNEL_FLAGS, "-DMETAL_HOST_ADDRESS_SPACES", "-fsyntax-only"]
    checked = cached(flags, source)
    if in_cache(checked):
        return
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "kernel.cpp").write_text(source)
        compile_([*flags, Path(name) / "kernel.cpp"])
        passed = Path(name) / "passed"
        passed.touch()
        store(passed, checked)


def without_attributes_of_instantiation(kernel: TracedKernel, text: str) -> str:
    """C++ has no attributes where Metal puts them in ``template [[...]] decltype(f) f;``."""
    line = kernel.instantiation
    return text.replace(line, ATTRIBUTE_LIST.sub("", line)) if line else text


def build_runner(flags: list[str]) -> Path:
    runner = cached([*FLAGS, *flags], "runner.cpp").with_suffix(".o")
    if not in_cache(runner):
        with tempfile.TemporaryDirectory() as folder:
            built = Path(folder) / "runner.o"
            compile_([*FLAGS, *flags, "-c", FOLDER / "runner.cpp"], output=built)
            store(built, runner)
    return runner


def compile_(arguments: list[str | Path], output: Path | None = None) -> None:
    command = [compiler(), *arguments, *(["-o", output] if output else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise CompileError(result.stderr)


def cached(flags: list[str], source: str) -> Path:
    """Where the result of compiling the source, by this compiler, is or will be."""
    parts = [compiler_version(), *flags, support_files(), source]
    return CACHE / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def in_cache(place: Path) -> bool:
    try:
        os.utime(place)  # in use
    except FileNotFoundError:
        return False
    return True


def store(file: Path, place: Path) -> None:
    """Into the cache at once, so that another process sees all of it or nothing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.iterdir():
        if old.stat().st_mtime < time.time() - UNUSED_SECONDS:
            old.unlink(missing_ok=True)
    partial = place.with_suffix(f"{place.suffix}.{os.getpid()}")
    shutil.move(file, partial)
    partial.replace(place)


@functools.cache
def support_files() -> str:
    files = [FOLDER / "runner.cpp", *sorted((FOLDER / "include").iterdir())]
    return "".join(file.read_text() for file in files)


@functools.cache
def compiler() -> str:
    """``$CXX``, else clang, which can do more here, else any."""
    for name in (os.environ.get("CXX"), "clang++", "g++", "c++"):
        if name and shutil.which(name):
            return name
    raise Unavailable("no C++ compiler: clang++ or g++")


@functools.cache
def compiler_version() -> str:
    result = subprocess.run([compiler(), "--version"], capture_output=True, text=True)
    return result.stdout.splitlines()[0]


@functools.cache
def check_available(mode: Mode) -> None:
    """Whether an empty program compiles and runs in this mode; else :class:`Unavailable`."""
    if mode in CLANG_ONLY and "clang" not in compiler_version():
        raise Unavailable(f"mode {mode.value} needs clang++, not {compiler()}")
    flags = MODE_FLAGS.get(mode, ([], []))[0]
    with tempfile.TemporaryDirectory() as name:
        source, program = Path(name) / "empty.cpp", Path(name) / "empty"
        runtime = 'extern "C" void __sanitizer_cov_load4(void*) {}\n'
        source.write_text(runtime + "int main() {}\n")
        try:
            compile_([*flags, source], output=program)
        except CompileError as error:
            raise Unavailable(f"{compiler()} lacks what mode {mode.value} needs: {error}") from None
        if subprocess.run([program], capture_output=True).returncode:
            raise Unavailable(f"programs built for mode {mode.value} do not start here")
