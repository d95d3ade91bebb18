"""The Metal source that MLX generates for a kernel, read from what it prints."""

import ctypes
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

PRINTED = re.compile(r"Generated source code for `(.+?)`:\n```\n(.*?)\n```\n", re.DOTALL)
ENTRY = re.compile(r"\[\[kernel\]\] void (\w+)\((.*?)\) \{\n", re.DOTALL)
INSTANTIATION = re.compile(r"^template \[\[host_name.*decltype\((.+?>)\) .*;\n", re.MULTILINE)
BUFFER = re.compile(r"(const )?(device|constant) (\S+?)([*&]) (\w+) \[\[buffer\(\d+\)\]\]")
ATTRIBUTE = re.compile(r"(\w+) (\w+) \[\[(\w+)\]\]")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
# A variable in threadgroup memory; a pointer or a reference to it has a * or an &.
THREADGROUP_VARIABLE = re.compile(
    r"\bthreadgroup\s+(?P<type>\w[\w:<>, ]*?)\s+(?P<name>\w+)\s*"
    r"(?P<dimensions>(?:\[[^\]]+\]\s*)*)(?P<end>[;,=])"
)


class TraceError(Exception):
    """The printed source is not what this reader knows."""


@dataclass(frozen=True)
class Buffer:
    """A buffer argument of a kernel."""

    name: str
    type: str
    space: str  # device or constant
    constant: bool
    reference: bool  # a 0-d array is passed by reference

    @property
    def declaration(self) -> str:
        const = "const " if self.constant else ""
        return f"{const}{self.space} {self.type}{'&' if self.reference else '*'} {self.name}"


@dataclass(frozen=True)
class TracedKernel:
    """One instantiation of a kernel as a Metal compiler would get it.

    ``entry`` is the function with its template arguments; ``attributes`` are
    pairs of a type and a name, such as ``uint3 thread_position_in_grid``.
    """

    name: str
    text: str
    entry: str
    buffers: tuple[Buffer, ...]
    attributes: tuple[tuple[str, str], ...]

    @property
    def instantiation(self) -> str | None:
        """The line that instantiates the template; none if the kernel is not one."""
        found = INSTANTIATION.search(self.text)
        return found and found[0]

    def declare_threadgroup_variables(self, template: str) -> str:
        """The text, without comments, with each ``threadgroup T name[N];`` as ``template``.

        The template may use ``{type}``, ``{name}``, ``{dimensions}`` and, counting
        from 0, ``{index}``. Metal knows these declarations in the kernel's body only.
        """
        index = itertools.count()

        def declare(variable: re.Match) -> str:
            if variable["end"] != ";":
                raise TraceError(f"{variable['name']}: not declared alone, uninitialized")
            return template.format(index=next(index), **variable.groupdict())

        text = COMMENT.sub(lambda comment: re.sub(r"[^\n]", " ", comment[0]), self.text)
        start = ENTRY.search(text).end()
        header, body = text[:start], text[start:]
        if outside := THREADGROUP_VARIABLE.search(header):
            if outside["end"] == ";":
                raise TraceError(f"{outside['name']}: threadgroup memory outside the kernel's body")
        return header + THREADGROUP_VARIABLE.sub(declare, body)


def trace(function: Callable, *arrays: mx.array) -> list[TracedKernel]:
    """The kernels that ``function(*arrays)`` calls with ``verbose=True``, in order.

    Nothing runs, so no Metal is needed: MLX generates the source while it
    exports the function.
    """
    with tempfile.TemporaryDirectory() as folder:
        with captured_stdout(Path(folder) / "printed") as printed:
            mx.export_function(os.path.join(folder, "function.mlxfn"), function, *arrays)
        return [parse(name, text) for name, text in PRINTED.findall(printed.read_text())]


def parse(name: str, text: str) -> TracedKernel:
    """Reads the generated signature."""
    entry = ENTRY.search(text)
    if not entry:
        raise TraceError(f"{name}: no kernel function")
    buffers, attributes = [], []
    for parameter in entry[2].split(",\n"):
        if buffer := BUFFER.fullmatch(parameter.strip()):
            const, space, kind, pointer, parameter_name = buffer.groups()
            buffers.append(Buffer(parameter_name, kind, space, bool(const), pointer == "&"))
        elif attribute := ATTRIBUTE.fullmatch(parameter.strip()):
            attributes.append((attribute[1], attribute[3]))
        else:
            raise TraceError(f"{name}: parameter {parameter.strip()!r}")
    instantiation = INSTANTIATION.search(text)
    return TracedKernel(
        name=name,
        text=text,
        entry=instantiation[1] if instantiation else entry[1],
        buffers=tuple(buffers),
        attributes=tuple(attributes),
    )


@contextmanager
def captured_stdout(path: Path) -> Iterator[Path]:
    """Sends the process's standard output, C++'s too, to a file."""
    flush_stdout()
    saved = os.dup(1)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 1)
    try:
        yield path
    finally:
        flush_stdout()
        os.dup2(saved, 1)
        os.close(saved)


def flush_stdout() -> None:
    sys.stdout.flush()
    ctypes.CDLL(None).fflush(None)
