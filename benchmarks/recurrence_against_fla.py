"""The recurrence here and in flash-linear-attention, on one NVIDIA GPU in one run.

    python benchmarks/recurrence_against_fla.py [--json FILE] [--plot FILE] [--tune WORKERS]

Needs MLX's CUDA build, torch and flash-linear-attention. For each shape: seconds of the
forward pass and of forward and backward, and the peak memory of the latter, arguments
and gradients included. Two peers:

- ``layer``: what ``fla/layers/hgrn2.py`` does with the projections, from logits to outputs,
  which is what the kernels here do too;
- ``chunk_gla``: its Triton kernels alone, with queries, keys and log gates given.

For one decoded token the kernels' own time on the GPU is taken, here with the gates, of
``fused_recurrent_gla`` with queries, keys and log gates given. Triton tunes every kernel by
trying all its configurations, which takes minutes, since each is compiled: --tune compiles
them in that many processes first.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
import torch.nn.functional as F
from fla.modules.activations import swish
from fla.ops.gla import chunk_gla, fused_recurrent_gla
from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

from hgrn2_mlx import gated_recurrence

SHAPES = [  # batch, tokens, heads, head size
    (8, 2048, 16, 128),
    (1, 8192, 16, 128),
    (1, 512, 16, 128),
    (32, 512, 8, 128),
    (8, 2048, 32, 64),
]
DECODING = [(batch, 1, 16, 128) for batch in (1, 16, 64)]
ROUNDS, CALLS = 15, 10
DECODED_TOKENS = 100


def make_inputs(shape: tuple[int, ...]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    batch, tokens, heads, dim = shape
    rng = np.random.default_rng(0)
    names = ("q", "f", "v", "gradient")
    arrays = {name: rng.standard_normal((batch, tokens, heads, dim), np.float32) for name in names}
    arrays["f"] += 2  # gates of about 0.9
    return arrays, rng.uniform(0.1, 0.5, (heads, dim)).astype(np.float32)


# ---------------------------------------------------------------- here


def mlx_arrays(shape):
    arrays, lower_bound = make_inputs(shape)
    q, f, v, gradient = (mx.array(x).astype(mx.bfloat16) for x in arrays.values())
    lower_bound = mx.array(lower_bound)
    mx.eval(q, f, v, gradient, lower_bound)
    return [q, f, v, lower_bound], gradient


def mlx_gradients(arguments, gradient):
    outputs, gradients = mx.vjp(lambda *x: gated_recurrence(*x)[0], arguments, [gradient])
    return outputs + gradients


def mlx_seconds(call) -> float:
    mx.eval(call())
    mx.eval(call())
    times = []
    for _ in range(ROUNDS):
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            mx.async_eval(call())
        mx.synchronize()
        times.append((time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def measure_mlx(shape) -> dict[str, float]:
    arguments, gradient = mlx_arrays(shape)
    forward = mlx_seconds(lambda: gated_recurrence(*arguments)[0])
    both = mlx_seconds(lambda: mlx_gradients(arguments, gradient))
    mx.clear_cache()
    mx.reset_peak_memory()
    mx.eval(mlx_gradients(arguments, gradient))
    return {
        "forward_ms": 1e3 * forward,
        "forward_backward_ms": 1e3 * both,
        "peak_gb": mx.get_peak_memory() / 1e9,
    }


def decode_mlx(shape) -> float:
    arguments, _ = mlx_arrays(shape)
    batch, _, heads, dim = shape
    state = mx.zeros((batch, heads, dim, dim))

    def steps():
        carried = state
        for _ in range(DECODED_TOKENS):
            output, carried = gated_recurrence(*arguments, carried)
            mx.eval(output, carried)
        mx.synchronize()

    return kernel_milliseconds(steps, "hgrn2_decode")


# ---------------------------------------------------------------- flash-linear-attention


def torch_arrays(shape):
    arrays, lower_bound = make_inputs(shape)
    q, f, v, gradient = (torch.from_numpy(x).cuda().bfloat16() for x in arrays.values())
    return [q, f, v, torch.from_numpy(lower_bound).cuda()], gradient


def gla_arguments(q, f, v, lower_bound):
    """Queries, keys, values and log gates as HGRN2Attention.forward makes them."""
    g = torch.logaddexp(lower_bound.log(), torch.log1p(-lower_bound) + F.logsigmoid(f))
    return swish(q), (1 - g.exp()).to(v), v, g


def layer(*arguments):
    return chunk_gla(*gla_arguments(*arguments), state_v_first=True)[0]


def kernels_alone(*arguments):
    return chunk_gla(*arguments, state_v_first=True)[0]


def torch_gradients(function, arguments, gradient):
    leaves = [x.detach().requires_grad_() for x in arguments]
    return torch.autograd.grad(function(*leaves), leaves, gradient)


def measure_torch(function, arguments, gradient) -> dict[str, float]:
    def both():
        return torch_gradients(function, arguments, gradient)

    with torch.no_grad():
        forward = do_bench(lambda: function(*arguments), return_mode="median")
    forward_backward = do_bench(both, return_mode="median")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    return {
        "forward_ms": forward,
        "forward_backward_ms": forward_backward,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
    }


def measure_fla(shape) -> dict[str, dict[str, float]]:
    arguments, gradient = torch_arrays(shape)
    with_gates = measure_torch(layer, arguments, gradient)
    given = [x.detach() for x in gla_arguments(*arguments)]
    del arguments
    return {"layer": with_gates, "chunk_gla": measure_torch(kernels_alone, given, gradient)}


@torch.no_grad()
def decode_fla(shape) -> float:
    arguments, _ = torch_arrays(shape)
    batch, _, heads, dim = shape
    state = torch.zeros(batch, heads, dim, dim, device="cuda")
    options = {"output_final_state": True, "state_v_first": True}
    q, k, v, g = gla_arguments(*arguments)

    def steps():
        carried = state
        for _ in range(DECODED_TOKENS):
            _, carried = fused_recurrent_gla(q=q, k=k, v=v, gk=g, initial_state=carried, **options)
        torch.cuda.synchronize()

    return kernel_milliseconds(steps, "fused_recurrent")


def kernel_milliseconds(steps, name: str) -> float:
    """Of a token's kernels of that name on the GPU: what surrounds them differs too much."""
    steps()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps()
    kernels = [event for event in profile.events() if name in event.name]
    return sum(event.device_time for event in kernels) / 1e3 / DECODED_TOKENS


# ---------------------------------------------------------------- tuning and agreement


def compile_share(worker: int, workers: int) -> None:
    """Compiles this worker's share of the configurations of all kernels into Triton's cache."""
    measure = Autotuner._bench

    def bench_share(self, *arguments, config, **options):
        own = self.configs.index(config) % workers == worker if config in self.configs else True
        return measure(self, *arguments, config=config, **options) if own else [float("inf")] * 3

    Autotuner._bench = bench_share
    run_all_kernels()


def run_all_kernels() -> None:
    for shape in [(1, 512, 16, 128), (1, 512, 32, 64)]:
        torch_gradients(layer, *torch_arrays(shape))
    decode_fla(DECODING[0])


def tune(workers: int) -> float:
    start = time.perf_counter()
    # The outcome of a share is no tuning: only what it compiled is kept.
    environment = {**os.environ, "FLA_CACHE_RESULTS": "0"}
    shares = [
        subprocess.Popen(
            [sys.executable, __file__, "--share", str(i), str(workers)], env=environment
        )
        for i in range(workers)
    ]
    for share in shares:
        share.wait()
    run_all_kernels()
    return time.perf_counter() - start


def disagreement(shape) -> dict[str, float]:
    """Relative differences (in the 2-norm) between outputs and gradients here and there."""
    ours = mlx_gradients(*mlx_arrays(shape))
    arguments, gradient = torch_arrays(shape)
    theirs = [layer(*arguments), *torch_gradients(layer, arguments, gradient)]
    differences = {}
    for name, a, b in zip(("output", "q", "f", "v", "lower_bound"), ours, theirs, strict=True):
        a = np.array(a.astype(mx.float32), np.float64)
        b = b.detach().double().cpu().numpy()
        differences[name] = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return differences


def plot(results: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = [" ".join(map(str, row["shape"])) for row in results["recurrence"]]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, key, title in zip(
        axes,
        ("forward_ms", "forward_backward_ms", "peak_gb"),
        ("forward, ms", "forward and backward, ms", "peak memory, GB"),
        strict=True,
    ):
        for i, (name, label) in enumerate(
            (("mlx", "hgrn2-mlx"), ("chunk_gla", "fla, kernels alone"), ("layer", "fla, layer"))
        ):
            values = [row[name][key] for row in results["recurrence"]]
            axis.barh(np.arange(len(shapes)) + 0.27 * i, values, 0.27, label=label)
        axis.set_yticks(np.arange(len(shapes)) + 0.27, shapes)
        axis.invert_yaxis()
        axis.set_title(title)
    axes[0].legend(fontsize="small")
    axes[0].set_ylabel("batch, tokens, heads, head size")
    figure.suptitle(f"{results['gpu']}, bfloat16, {results['date']}")
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--tune", type=int, default=0, metavar="WORKERS")
    parser.add_argument("--decode-only", action="store_true")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        compile_share(*options.share)
        return

    import fla

    results = {
        "gpu": torch.cuda.get_device_name(),
        "date": date.today().isoformat(),
        "versions": {"mlx": mx.__version__, "fla": fla.__version__, "torch": torch.__version__},
        "dtype": "bfloat16",
        "tuning_seconds": tune(options.tune) if options.tune else None,
        "disagreement": disagreement((1, 512, 16, 128)),
        "recurrence": [],
        "decode": [],
    }
    for shape in [] if options.decode_only else SHAPES:
        row = {"shape": shape, "mlx": measure_mlx(shape), **measure_fla(shape)}
        mx.clear_cache()
        torch.cuda.empty_cache()
        for peer in ("chunk_gla", "layer"):
            row[f"ratio_to_{peer}"] = {key: row[peer][key] / row["mlx"][key] for key in row["mlx"]}
        results["recurrence"].append(row)
        print(json.dumps(row), flush=True)
    for shape in DECODING:
        row = {"batch": shape[0], "mlx_ms": decode_mlx(shape), "gla_ms": decode_fla(shape)}
        row["ratio_to_gla"] = row["gla_ms"] / row["mlx_ms"]
        results["decode"].append(row)
        print(json.dumps(row), flush=True)
    print(json.dumps(results["disagreement"]))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
