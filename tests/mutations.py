"""Does a test fail when a kernel loses one barrier or one bounds check?

    python tests/mutations.py               every mutant but the accepted survivors
    python tests/mutations.py --accepted    those survivors too: do they still survive?
    python tests/mutations.py --only state_scan
    python tests/mutations.py --list        what would be tried

Each mutant is the sources with one piece gone: a barrier, one part of a condition, or the
limit in a ``min`` or ``max``. The tests of the kernels it is in run on a copy, on the CPU,
until one fails. What no test notices is printed and the exit status is 1, unless
``ACCEPTED`` says why that is right.

Left alone: conditions the compiler decides (a role, a number of buffers), the ends of
loops, and headers for NVIDIA GPUs, which no CPU can run: compute-sanitizer is their check.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from metal_host.build import CACHE

ROOT = Path(__file__).parent.parent
# Of one run of a kernel, whose mutant may write over what would end it, and of all tests.
KERNEL_SECONDS, TESTS_SECONDS = 30, 900

# ThreadSanitizer sees a race most of the time.
TRIES = 2

# The tests of a module of hgrn2_mlx/kernels; of one that is not here, all of them.
TESTS = {
    "decode.py": ["tests/test_decode_kernel.py"],
    "elementwise_scan.py": ["tests/test_elementwise_kernel.py"],
    "chunk.py": ["tests/test_chunked_kernels.py"],
    "state_scan.py": ["tests/test_chunked_kernels.py"],
}
ALL_TESTS = sorted(set(sum(TESTS.values(), [])))
# These run other things than kernels.
LEFT_OUT = "not does_not_fit and not left_aside"

# Mutants that no test can tell from the kernel, and why that is right.
ACCEPTED = {
    "metal/chunk_gradients.h: if (s <= t) { | without s <= t": (
        "It saves reads within the chunk's scores: nothing uses what is above the diagonal."
    ),
    "metal/chunk_prepare.h: if (s < CHUNK && (part == 0 || 2 * round != CHUNK)) { | without"
    " (part == 0 || 2 * round != CHUNK)": (
        "It saves arithmetic: the middle column is in its round twice, and stored once."
    ),
    "metal/courier_metal.h: held[i] = row < ROWS && row < present ? words[row * stride +"
    " at % WIDTH] : uint4(0); | without row < ROWS": (
        "It saves reads: rows below `present` exist, and `put` leaves out those from ROWS on."
    ),
    "metal/elementwise_scan.h: const bool inside = start + i < length; | without"
    " start + i < length": "Nothing is stored of what a token after the last does to the state.",
    "metal/elementwise_scan.h: forget[i] = inside ? gate.forget : 1.0f; | without inside": (
        "As above."
    ),
    "metal/elementwise_scan.h: write[i] = inside ? gate.key * value : 0.0f; | without inside": (
        "As above."
    ),
    "metal/elementwise_scan_backward.h: gate[i].key = inside ? gate[i].key : 0.0f; | without"
    " inside": "A key after the last token makes states that no gradient is stored of.",
    "metal/state_scan.h: const uint first_chunk = min(batch_head_part % parts * part_chunks,"
    " chunks); | without min(batch_head_part % parts * part_chunks, chunks)": (
        "A part beyond the end then has fewer than no steps, which are none just as well."
    ),
    "metal/state_scan.h: if (step >= 0) { | without step >= 0": (
        "It saves a barrier before the first chunk is there."
    ),
    "metal/state_scan.h: if (ROLE == QUERY_GRADIENTS && ends_segment) { | without ends_segment": (
        "It saves writes: the last chunk of a segment is written last, to the same place."
    ),
    "metal/state_scan.h: if (next < steps) { | without next < steps | number 2": (
        "It saves writes to a buffer that nobody reads any more."
    ),
}

COMMENT = re.compile(r"//[^\n]*")
KERNEL_BODY = re.compile(r'call=f?"""(.*?)"""', re.DOTALL)
BARRIER = re.compile(r"\b(?:threadgroup|simdgroup)_barrier\([^;]*\);")
LIMIT = re.compile(r"\b(?:min|max)(?=\()")
IF = re.compile(r"\bif (?=\()")
RETURN = re.compile(r"\s*\{\s*return;")
BOOL = re.compile(r"\bbool \w+ = ([^;]+);")
FAILURE = re.compile(r"^(?:FAILED|ERROR) tests/(.*?)(?: - .*)?$", re.MULTILINE)
COMPILE_TIME = re.compile(r"[A-Z][A-Z0-9_]*|Layout|\d+")
OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Mutant:
    """A piece of a file, from ``start`` to ``end``, and what stands there instead."""

    file: Path  # from the root
    start: int
    end: int
    instead: str
    name: str

    @property
    def text(self) -> str:
        text = (ROOT / self.file).read_text()
        return text[: self.start] + self.instead + text[self.end :]


def mutants() -> list[Mutant]:
    files = [file for file in sorted(ROOT.glob("metal/*.h")) if "cuda" not in file.name]
    files += sorted(ROOT.glob("hgrn2_mlx/kernels/*.py"))
    return [mutant for file in files for mutant in mutants_of(file.relative_to(ROOT))]


def mutants_of(file: Path) -> Iterator[Mutant]:
    text = (ROOT / file).read_text()
    code = COMMENT.sub(lambda comment: " " * len(comment[0]), text)
    if file.suffix == ".py":  # nothing but the kernels' bodies
        bodies = [body.span(1) for body in KERNEL_BODY.finditer(text)]
        code = "".join(
            c if c == "\n" or any(start <= at < end for start, end in bodies) else " "
            for at, c in enumerate(code)
        )
    seen = Counter()
    for start, end, instead in sorted(set(pieces(code))):
        line = text[text.rfind("\n", 0, start) + 1 : text.find("\n", end)]
        piece = " ".join(text[start:end].split())
        name = f"{file.as_posix()}: {' '.join(line.split())} | without {piece}"
        seen[name] += 1
        if seen[name] > 1:
            name += f" | number {seen[name]}"
        yield Mutant(file, start, end, instead, name)


def pieces(code: str) -> Iterator[tuple[int, int, str]]:
    """Where something can be left out, and what to put there."""
    for barrier in BARRIER.finditer(code):
        yield barrier.start(), barrier.end(), ";"
    for limit in LIMIT.finditer(code):
        end = closing(code, limit.end())
        first, _ = split(code, limit.end() + 1, end, ",")
        yield limit.start(), end + 1, f"({code[first[0] : first[1]]})"
    conditions = [found.span(1) for found in BOOL.finditer(code) if "?" not in found[1]]
    conditions += [(before(code, at), at) for at, c in enumerate(code) if c == "?"]
    for found in IF.finditer(code):
        start, end = found.end() + 1, closing(code, found.end())
        if RETURN.match(code, end + 1):
            yield start, end, "false"
        else:
            conditions.append((start, end))
    for start, end in conditions:
        alternatives = split(code, start, end, "||")
        parts = alternatives if len(alternatives) > 1 else split(code, start, end, "&&")
        for part_start, part_end in parts:
            if not decided_by_the_compiler(code[part_start:part_end]):
                yield part_start, part_end, "false" if len(alternatives) > 1 else "true"


def closing(code: str, at: int) -> int:
    """Of the bracket that opens at a place."""
    depth = 0
    for place in range(at, len(code)):
        depth += (code[place] in OPENING) - (code[place] in CLOSING)
        if depth == 0:
            return place
    raise ValueError(f"no end of {code[at : at + 60]!r}")


def before(code: str, question: int) -> int:
    """Where the condition of ``condition ? a : b`` starts."""
    depth = 0
    for place in range(question - 1, -1, -1):
        depth += (code[place] in CLOSING) - (code[place] in OPENING)
        alone = code[place] == "=" and code[place - 1] not in "<>!=" and code[place + 1] != "="
        if depth < 0 or depth == 0 and (alone or code[place] in ",;:"):
            return place + 1
    return 0


def split(code: str, start: int, end: int, separator: str) -> list[tuple[int, int]]:
    """The parts, without blanks around them, between separators outside brackets."""
    depth, cuts = 0, [start]
    for place in range(start, end):
        depth += (code[place] in OPENING) - (code[place] in CLOSING)
        if depth == 0 and code.startswith(separator, place):
            cuts += [place, place + len(separator)]
    cuts.append(end)
    parts = []
    for first, last in zip(cuts[::2], cuts[1::2]):
        part = code[first:last]
        parts.append((last - len(part.lstrip()), first + len(part.rstrip())))
    return parts


def decided_by_the_compiler(condition: str) -> bool:
    return all(COMPILE_TIME.fullmatch(word) for word in re.findall(r"\w+", condition))


def tests_of(file: Path) -> list[str]:
    """Those of the kernels that the file is part of."""
    modules = [file] if file.suffix == ".py" else []
    names = {f'"{file.name}"', f'"{file.name.replace("_metal.", "_{gpu}.")}"'}
    for module in ROOT.glob("hgrn2_mlx/kernels/*.py"):
        if any(name in module.read_text() for name in names):
            modules.append(module)
    tests = set(sum((TESTS.get(module.name, ALL_TESTS) for module in modules), []))
    return sorted(tests or ALL_TESTS)


def copy_sources(folder: Path) -> Path:
    """The package with kernels of its own; the rest of it are links."""
    package = folder / "hgrn2_mlx"
    package.mkdir(parents=True)
    for entry in (ROOT / "hgrn2_mlx").iterdir():
        if entry.name not in ("kernels", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "convert").symlink_to(ROOT / "convert")
    for source, name in ((ROOT / "metal", "metal"), (ROOT / "hgrn2_mlx/kernels", "kernels")):
        shutil.copytree(source, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    return package


def failing_test(folder: Path, cache: Path, tests: list[str]) -> str | None:
    """The first test that fails on the sources in the folder."""
    # -P: not the package in the current folder, but the copy.
    command = [sys.executable, "-P", "-m", "pytest", "-x", "-q", "--tb=no", "-rfE", *tests]
    command += ["-k", LEFT_OUT, "-p", "no:cacheprovider"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_CACHE_HOME": str(cache),
        "METAL_HOST_TIMEOUT": str(KERNEL_SECONDS),
    }
    try:
        result = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TESTS_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return "no test ended"
    if result.returncode == 0:
        return None
    found = FAILURE.search(result.stdout)
    if not found or ": error: " in found[0] or "CompileError" in found[0]:
        raise SystemExit(f"This is no test of a kernel:\n{result.stdout}{result.stderr}")
    return found[1]


def fate(mutant: Mutant, folder: Path, cache: Path) -> str | None:
    """The test that notices, if one does."""
    package = copy_sources(folder)
    parent = package if mutant.file.parts[0] == "metal" else package.parent
    (parent / mutant.file).write_text(mutant.text)
    for _ in range(TRIES):
        if notices := failing_test(folder, cache, tests_of(mutant.file)):
            break
    shutil.rmtree(folder)
    return notices


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="mutants named like one of these")
    parser.add_argument("--accepted", action="store_true", help="survivors with a reason too")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once")
    options = parser.parse_args()

    every = mutants()
    unknown = set(ACCEPTED) - {mutant.name for mutant in every}
    if unknown:
        print("Accepted, but no longer in the sources:", *sorted(unknown), sep="\n  ")
        return 1
    chosen = [
        mutant
        for mutant in every
        if any(part in mutant.name for part in options.only)
        and (options.accepted or mutant.name not in ACCEPTED)
    ]
    if options.list:
        print(*(mutant.name for mutant in chosen), sep="\n")
        return 0

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(options.jobs) as pool:
        cache = Path(name) / "cache"
        if CACHE.exists():  # what is compiled stays so; mutants do not fill it
            shutil.copytree(CACHE, cache / CACHE.relative_to(CACHE.parent.parent))
        copy_sources(Path(name) / "whole")
        tests = sorted(set(sum((tests_of(mutant.file) for mutant in chosen), [])))
        if notices := failing_test(Path(name) / "whole", cache, tests):
            print(f"Without any mutation, {notices} fails.")
            return 1

        def attempt(numbered: tuple[int, Mutant]) -> tuple[Mutant, str | None]:
            number, mutant = numbered
            return mutant, fate(mutant, Path(name) / str(number), cache)

        survivors = []
        for mutant, notices in pool.map(attempt, enumerate(chosen)):
            print(f"{mutant.name}\n    {notices or 'SURVIVES'}", flush=True)
            if not notices:
                survivors.append(mutant.name)

    unexplained = [mutant for mutant in survivors if mutant not in ACCEPTED]
    print(
        f"\n{len(chosen)} mutants, {len(survivors)} survive, {len(unexplained)} of them without"
        f" a reason; {len(ACCEPTED)} are accepted."
    )
    print(*unexplained, sep="\n")
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
