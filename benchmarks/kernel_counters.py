"""What each kernel moves and multiplies, counted; what an Apple GPU could make of it, estimated.

    python benchmarks/kernel_counters.py             count, a few minutes, and print both tables
    python benchmarks/kernel_counters.py --roofline  the tables again, from the counts kept

The Metal source that MLX generates runs on the CPU (tests/metal_host, which wants clang++) in
bfloat16 with 128 keys and 128 values a head, and every load and store of device memory is counted.
The numbers are exact and the same on every machine; they say nothing about time.

For each kernel, per token and head: bytes read by all threads; bytes read when each threadgroup
reads a byte once, which is what a perfect cache per threadgroup leaves of it; bytes written; flops
of 8x8 matrix products; barriers, of threadgroups or simdgroups, and simdgroup functions (sums,
shuffles, matrix products), one for all threads that meet. Then the most threadgroup memory.
Compulsory traffic reads every input of a pass once and writes every output once. What passes from
kernel to kernel is beyond that, and so is a state that is read again. Sequences have 256 tokens, or
1024 where two parts of them are scanned at once: the longer they are, the less states count.
Arithmetic of single lanes, such as the gates, is not counted, nor are the few operations of MLX
between the kernels.

The roofline is an ESTIMATE, no measurement: no kernel of this project has been timed on an Apple
GPU. It takes the layer of the public 1.3B model (16 such heads) and divides the bytes, read once
per threadgroup and written, by the published peak bandwidth and the flops of matrix products by
the published peak in float32. The larger of the two is about what a layer and token take at best,
if nothing but registers and threadgroup memory keeps anything; a cache that keeps what one kernel
leaves for the next can do better, but not better than the compulsory bytes.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from hgrn2_mlx import kernels

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results" / "kernel_counters.json"
sys.path.insert(0, str(FOLDER.parent / "tests"))

import metal_host  # noqa: E402
from metal_host import Mode  # noqa: E402

HEAD = 128  # keys and values
HEADS = 2
TOKENS = 256
PARTS = 2
IN_PARTS = f", {PARTS} parts"
LAYER_HEADS = 16  # of fla-hub/hgrn2-1.3B-100B
DTYPE = mx.bfloat16


@dataclass(frozen=True)
class Gpu:
    """Peaks as published: GB/s, and TFLOP/s in float32."""

    name: str
    bandwidth: float
    teraflops: float


# Bandwidth is what Apple announced: M1 as two thirds of the M2's 100 GB/s, "50 percent more than
# M1" (macrumors.com/2022/06/06/apple-announces-m2-chip-with-support-for-up-to-24gb-memory); M1 Max
# mybroadband.co.za/news/hardware/418862; M3 Max and M4 Max macmegasite.com/2024/10/30; M3 and M4
# goodnewsapodcast.com/apples-m4-m4-pro-and-m4-max-compared-to-past-generations-and-to-each-other;
# M5 fonearena.com/blog/466700; M5 Max lowyat.net/2026/385170.
#
# Flops are Hugging Face's list, by its own words approximate (packages/tasks/src/hardware.ts in
# huggingface.js, its pull request 1044, huggingface.co/hardware/apple-m5 and -m5-max): Apple
# announces none for most of them. Others say less: for the M4 3.8 (hmc-tech.com), and measured 2.9
# (arxiv.org/abs/2502.05317). Of the M5's matrix accelerators no float32 peak was found.
GPUS = [
    Gpu("M1", 67, 2.6),
    Gpu("M1 Max", 400, 10.4),
    Gpu("M2", 100, 3.6),
    Gpu("M3", 100, 4.1),
    Gpu("M3 Max", 400, 14.2),
    Gpu("M4", 120, 4.6),
    Gpu("M4 Max", 546, 18.4),
    Gpu("M5", 153, 5.7),
    Gpu("M5 Max", 614, 22.8),
]


@dataclass
class Counts:
    """Of one kernel or of a pass, per token and head; threadgroup bytes per threadgroup."""

    bytes_read: float = 0
    bytes_read_once: float = 0
    bytes_written: float = 0
    matrix_flops: float = 0
    barriers: float = 0
    simdgroup_functions: float = 0
    threadgroup_bytes: int = 0

    @property
    def traffic(self) -> float:
        return self.bytes_read_once + self.bytes_written

    def __add__(self, other: "Counts") -> "Counts":
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        sums["threadgroup_bytes"] = max(self.threadgroup_bytes, other.threadgroup_bytes)
        return Counts(**sums)


def counts(counters: metal_host.Counters, tokens_and_heads: int) -> Counts:
    barriers = counters.threadgroup_barriers + counters.simdgroup_barriers
    return Counts(
        bytes_read=counters.device_bytes_read / tokens_and_heads,
        bytes_read_once=counters.device_bytes_read_once / tokens_and_heads,
        bytes_written=counters.device_bytes_written / tokens_and_heads,
        matrix_flops=counters.matrix_flops / tokens_and_heads,
        barriers=barriers / tokens_and_heads,
        simdgroup_functions=counters.simdgroup_functions / tokens_and_heads,
        threadgroup_bytes=counters.threadgroup_bytes,
    )


def count_pass(
    function: Callable, inputs: Sequence[mx.array], tokens_and_heads: int
) -> tuple[dict, Sequence[mx.array]]:
    """Runs the kernels that a function calls; what they did, by kernel and in all."""
    with metal_host.executing(mode=Mode.TRAFFIC) as runs:
        outputs = function(*inputs)
        mx.eval(outputs)
    by_kernel: dict[str, Counts] = {}
    for run in runs:
        # MLX's name is custom_kernel_ ours _ the template's arguments.
        name = run.kernel.name.removeprefix("custom_kernel_")
        name = next(ours for ours in KERNELS if name.startswith(ours))
        done = counts(run.counters, tokens_and_heads)
        by_kernel[name] = by_kernel[name] + done if name in by_kernel else done
    compulsory = sum(array.nbytes for array in [*inputs, *outputs]) / tokens_and_heads
    return {
        "kernels": {name: asdict(done) for name, done in by_kernel.items()},
        "total": asdict(sum(by_kernel.values(), Counts())),
        "compulsory_bytes": compulsory,
    }, outputs


# Longer names first where one begins another.
KERNELS = {
    "hgrn2_decode": "decode",
    "hgrn2_prepare_chunk": "chunk prepare",
    "hgrn2_scan_outputs": "state scan: outputs",
    "hgrn2_scan_value_gradients": "state scan: value gradients",
    "hgrn2_scan_query_gradients": "state scan: query gradients",
    "hgrn2_scan_key_gradients": "state scan: key gradients",
    "hgrn2_scan_state_gradients": "state scan: gradients of parts",
    "hgrn2_scan_states": "state scan: states of parts",
    "hgrn2_join_parts": "join parts",
    "hgrn2_value_scores": "value scores",
    "hgrn2_chunk_gradients": "chunk gradients",
    "hgrn_scan_backward": "elementwise scan, backward",
    "hgrn_scan": "elementwise scan",
}


def count() -> dict:
    passes = {"decode": count_decode(), **count_chunked(), **count_elementwise()}
    return {
        "date": date.today().isoformat(),
        "mlx": mx.__version__,
        "dtype": "bfloat16",
        "head": HEAD,
        "tokens": TOKENS,
        "tokens_in_parts": PARTS * kernels.tiling.PART_TOKENS,
        "heads": HEADS,
        "tiling": asdict(kernels.tiling.METAL),
        "passes": passes,
    }


def random(*shape: int, dtype: mx.Dtype = DTYPE) -> mx.array:
    return mx.random.normal(shape).astype(dtype)


def recurrence_inputs(tokens: int) -> list[mx.array]:
    q, f, v = (random(1, tokens, HEADS, HEAD) for _ in range(3))
    lower_bound = mx.full((HEADS, HEAD), 0.25)
    return [q, f, v, lower_bound, random(1, HEADS, HEAD, HEAD, dtype=mx.float32)]


def count_decode() -> dict:
    def decode(*inputs):
        return kernels.decode.decode(*inputs, HEAD**-0.5)

    return count_pass(decode, recurrence_inputs(1), HEADS)[0]


def count_chunked() -> dict:
    """As a whole, and long enough to be cut into parts as a sequence of few heads is."""
    passes = {}
    for tokens, suffix in ((TOKENS, ""), (PARTS * kernels.tiling.PART_TOKENS, IN_PARTS)):
        inputs = recurrence_inputs(tokens)
        gradients = [random(1, tokens, HEADS, HEAD), random(1, HEADS, HEAD, HEAD, dtype=mx.float32)]
        passes["forward" + suffix], _ = count_pass(forward, inputs, tokens * HEADS)
        passes["backward" + suffix], _ = count_pass(backward, inputs + gradients, tokens * HEADS)
    return passes


def forward(*inputs: mx.array) -> Sequence[mx.array]:
    return kernels.chunked.forward(*inputs, HEAD**-0.5)


def backward(*inputs: mx.array) -> Sequence[mx.array]:
    return kernels.chunked.backward(*inputs[:5], HEAD**-0.5, *inputs[5:])


def count_elementwise() -> dict:
    """HGRN's scan; as many channels as a head has count as one."""
    dim = HEADS * HEAD
    x, f = random(1, TOKENS, dim), random(1, TOKENS, dim)
    bound, state = mx.full((dim,), 0.25), random(1, dim, dtype=mx.float32)
    forward, outputs = count_pass(
        kernels.elementwise_scan.forward, [x, f, bound, state], TOKENS * HEADS
    )
    gradients = [random(1, TOKENS, dim), random(1, dim, dtype=mx.float32)]
    backward, _ = count_pass(
        kernels.elementwise_scan.backward, [x, f, bound, outputs[2], *gradients], TOKENS * HEADS
    )
    return {"elementwise forward": forward, "elementwise backward": backward}


def both(passes: dict, forward: str, backward: str) -> tuple[Counts, float]:
    """Counts and compulsory bytes of two passes, one after the other."""
    parts = [passes[forward], passes[backward]]
    total = sum((Counts(**part["total"]) for part in parts), Counts())
    return total, sum(part["compulsory_bytes"] for part in parts)


def table_of_counts(results: dict) -> list[list[str]]:
    rows = []
    for name, part in results["passes"].items():
        for kernel, done in part["kernels"].items():
            rows.append(row_of(f"{name}: {KERNELS[kernel]}", Counts(**done)))
        if len(part["kernels"]) > 1:
            rows.append(row_of(f"**{name}**", Counts(**part["total"]), part["compulsory_bytes"]))
        else:
            rows[-1][-1] = compared(Counts(**part["total"]), part["compulsory_bytes"])
    for name, *pair in (
        ("forward+backward", "forward", "backward"),
        (f"forward+backward{IN_PARTS}", f"forward{IN_PARTS}", f"backward{IN_PARTS}"),
        ("elementwise forward+backward", "elementwise forward", "elementwise backward"),
    ):
        rows.append(row_of(f"**{name}**", *both(results["passes"], *pair)))
    return rows


def row_of(name: str, done: Counts, compulsory: float | None = None) -> list[str]:
    return [
        name,
        f"{done.bytes_read:,.0f}",
        f"{done.bytes_read_once:,.0f}",
        f"{done.bytes_written:,.0f}",
        f"{done.matrix_flops:,.0f}",
        f"{done.barriers:.3g}",
        f"{done.simdgroup_functions:.3g}",
        f"{done.threadgroup_bytes:,}",
        "" if compulsory is None else compared(done, compulsory),
    ]


def compared(done: Counts, compulsory: float) -> str:
    return f"{compulsory:,.0f} (x {done.traffic / compulsory:.2f})"


COUNT_COLUMNS = [
    "kernel, per token and head",
    "bytes read",
    "once per threadgroup",
    "written",
    "matrix flops",
    "barriers",
    "simdgroup functions",
    "threadgroup bytes",
    "compulsory bytes",
]
ROOFLINE_COLUMNS = [
    "ESTIMATE, microseconds per layer and token",
    "GB/s",
    "TFLOP/s",
    "decode",
    "forward: bytes",
    "flops",
    "forward+backward: bytes",
    "flops",
    "compulsory bytes alone",
]


def table_of_roofline(results: dict) -> list[list[str]]:
    passes = results["passes"]
    decode = Counts(**passes["decode"]["total"])
    forward = Counts(**passes["forward"]["total"])
    training, compulsory = both(passes, "forward", "backward")

    rows = []
    for gpu in GPUS:

        def of_bytes(count: float, gpu: Gpu = gpu) -> str:
            return f"{LAYER_HEADS * count / gpu.bandwidth / 1e3:.2f}"

        def of_flops(count: float, gpu: Gpu = gpu) -> str:
            return f"{LAYER_HEADS * count / gpu.teraflops / 1e6:.2f}"

        rows.append(
            [
                gpu.name,
                f"{gpu.bandwidth:g}",
                f"{gpu.teraflops:g}",
                of_bytes(decode.traffic),
                of_bytes(forward.traffic),
                of_flops(forward.matrix_flops),
                of_bytes(training.traffic),
                of_flops(training.matrix_flops),
                of_bytes(compulsory),
            ]
        )
    return rows


def show(console: Console, columns: list[str], rows: list[list[str]]) -> None:
    """A table as README.md has it, too."""
    if console.is_terminal:
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        for row in [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]:
            print("|", " | ".join(row), "|")
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--roofline", action="store_true", help="from the counts kept")
    if not parser.parse_args().roofline:
        results = count()
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=2) + "\n")
        partial.replace(RESULTS)
    results = json.loads(RESULTS.read_text())
    console = Console()
    show(console, COUNT_COLUMNS, table_of_counts(results))
    show(console, ROOFLINE_COLUMNS, table_of_roofline(results))


if __name__ == "__main__":
    main()
