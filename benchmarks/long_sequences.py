"""Peak memory and time of one LoRA training step, for longer and longer sequences.

HGRN2 beside two recurrent models of mlx-lm of the same width and number of layers, through
mlx-lm's own loss and LoRA layers: mamba2, which works in chunks, and qwen3_next with all of its
layers gated delta rules, which mlx-lm trains one token at a time.

    python benchmarks/long_sequences.py

Every step runs in a process of its own, so that a peak is the model's and that a model which needs
more memory or time than allowed costs only its own line. The step is not compiled: MLX would
otherwise compile the token loops for longer than they run.

What to expect. HGRN2 and mamba2 grow linearly in T. For the backward pass of its recurrence HGRN2
keeps the inputs and a state every few thousand tokens, and computes the rest again segment by
segment; mamba2 keeps, for each token and head, rows of its 256 x 256 matrices. A token loop keeps a
state (heads x 128 x 128 numbers) for each token and layer, and the gradient of every token's slice
of the inputs is an array as long as the sequence: it grows with the square of T. What HGRN2's
memory then consists of is what any network keeps, the inputs of projections and activations.
Gradient checkpointing reduces those to one vector per token and layer, and the peak to the backward
pass of one layer, which for two layers is not much less.
"""

import argparse
import functools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.models import qwen3_next
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.utils import get_total_parameters
from rich.console import Console
from rich.table import Table

from hgrn2_mlx.bench.model_timing import add_lora
from hgrn2_mlx.bench.models import Size, build_hgrn2, build_mamba2

RESULTS = Path(__file__).parent / "results" / "long_sequences.json"
LENGTHS = (512, 1024, 2048, 4096, 8192)

HIDDEN_SIZE = 128
LAYERS = 2
VOCABULARY = 512
HEAD_DIM = 128
HEADS = HIDDEN_SIZE // HEAD_DIM
SIZE = Size(HIDDEN_SIZE, LAYERS, VOCABULARY)


def build_gated_delta() -> nn.Module:
    """No experts and no attention layer; heads, and so the state, as HGRN2's."""
    model = qwen3_next.Model(
        qwen3_next.ModelArgs(
            model_type="qwen3_next",
            hidden_size=HIDDEN_SIZE,
            num_hidden_layers=LAYERS,
            intermediate_size=3 * HIDDEN_SIZE,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            head_dim=HEAD_DIM,
            linear_num_value_heads=HEADS,
            linear_num_key_heads=HEADS,
            linear_key_head_dim=HEAD_DIM,
            linear_value_head_dim=HEAD_DIM,
            linear_conv_kernel_dim=4,
            num_experts=0,
            num_experts_per_tok=0,
            decoder_sparse_step=1,
            shared_expert_intermediate_size=0,
            mlp_only_layers=[],
            moe_intermediate_size=0,
            rms_norm_eps=1e-6,
            vocab_size=VOCABULARY,
            rope_theta=10000.0,
            partial_rotary_factor=1.0,
            max_position_embeddings=max(LENGTHS),
            full_attention_interval=LAYERS + 1,
        )
    )
    model.model.fa_idx = None  # The first attention layer, which a mask would be made for.
    return model


MODELS = {
    "hgrn2": functools.partial(build_hgrn2, SIZE),
    "mamba2": functools.partial(build_mamba2, SIZE),
    "gated delta": build_gated_delta,
}


def measure(name: str, length: int, checkpointed: bool, memory_limit: float) -> dict:
    """One training step on one random sequence.

    Args:
        name: A key of ``MODELS``.
        length: Tokens that are predicted.
        checkpointed: Whether to use mlx-lm's gradient checkpointing.
        memory_limit: Address space in GB beyond which the step fails (Linux only).

    Returns:
        ``peak_gb``, the most memory MLX held at once, the weights included;
        ``seconds``, of processor time if there is no GPU; ``parameters``.
    """
    if sys.platform == "linux":
        limit = int(memory_limit * 1e9)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    mx.random.seed(0)
    model = MODELS[name]()
    parameters = get_total_parameters(model)
    add_lora(model)
    if checkpointed:
        grad_checkpoint(model.layers[0])
    optimizer = optim.Adam(learning_rate=1e-4)
    loss_and_gradients = nn.value_and_grad(model, default_loss)

    def step(length: int) -> None:
        tokens = mx.random.randint(0, VOCABULARY, (1, length + 1))
        (loss, _), gradients = loss_and_gradients(model, tokens, mx.array([[0, length + 1]]))
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)

    step(16)
    mx.clear_cache()
    mx.reset_peak_memory()
    # On a CPU other work stretches the time that passes, but not the processor's time.
    clock = time.perf_counter if mx.default_device() == mx.gpu else time.process_time
    started = clock()
    step(length)
    return {
        "peak_gb": mx.get_peak_memory() / 1e9,
        "seconds": clock() - started,
        "parameters": parameters,
    }


def measure_in_process(
    name: str, length: int, checkpointed: bool, seconds: float, memory: float
) -> dict:
    """:func:`measure` in a new process; ``{"failed": why}`` if it hits a limit."""
    command = [sys.executable, __file__, "--measure", name, str(length), str(int(checkpointed))]
    command += ["--memory", str(memory)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"> {seconds:.0f} s"}
    if result.returncode == 0:
        return json.loads(result.stdout)
    if "alloc" in result.stderr or "Memory" in result.stderr or result.returncode < 0:
        return {"failed": f"> {memory:.0f} GB"}
    raise RuntimeError(result.stderr)


def machine() -> dict:
    return {
        "device": "GPU" if mx.default_device() == mx.gpu else "CPU",
        "name": mx.device_info()["device_name"],
        "cores": os.cpu_count(),
        "system": platform.system(),
        "mlx": mx.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def growth(measurements: list[dict]) -> float | None:
    """Kilobytes of peak memory that a token more costs, between the longest two that ran."""
    ran = [(m["length"], m["peak_gb"]) for m in measurements if "peak_gb" in m]
    if len(ran) < 2:
        return None
    (shorter, less), (longer, more) = ran[-2:]
    return (more - less) * 1e6 / (longer - shorter)


def report(results: dict) -> Table:
    """Peak memory, its ratio to HGRN2's at the same length, and time."""
    table = Table(
        title="One LoRA training step: peak memory (ratio to HGRN2), time (a CPU's: processor time)"
    )
    for heading in ("model", "checkpointing", *(f"T = {n:,}" for n in LENGTHS), "a token more"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for checkpointed in (False, True):
        own = results["measurements"][f"hgrn2, {'checkpointed' if checkpointed else 'plain'}"]
        for name in MODELS:
            kind = "checkpointed" if checkpointed else "plain"
            rows = results["measurements"][f"{name}, {kind}"]
            cells = [
                row.get("failed")
                or f"{row['peak_gb']:.3f} GB ({row['peak_gb'] / ours['peak_gb']:.1f}x)\n"
                f"{row['seconds']:.1f} s"
                for row, ours in zip(rows, own, strict=True)
            ]
            slope = growth(rows)
            cells.append("" if slope is None else f"{slope:.0f} kB")
            table.add_row(name, "yes" if checkpointed else "no", *cells, end_section=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600, help="limit for one step")
    parser.add_argument("--memory", type=float, default=14, help="limit for one step, GB (Linux)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, length, checkpointed = options.measure
        print(json.dumps(measure(name, int(length), checkpointed == "1", options.memory)))
        return

    results = {
        "machine": machine(),
        "model": {"hidden_size": HIDDEN_SIZE, "layers": LAYERS, "vocabulary": VOCABULARY},
        "batch_size": 1,
        "limits": {"seconds": options.seconds, "memory_gb": options.memory},
        "measurements": {},
    }
    for name in MODELS:
        for kind in ("plain", "checkpointed"):
            rows = results["measurements"][f"{name}, {kind}"] = []
            for length in LENGTHS:
                row = measure_in_process(
                    name, length, kind == "checkpointed", options.seconds, options.memory
                )
                rows.append({"length": length, **row})
                print(f"{name}, {kind}, T = {length}: {row}", file=sys.stderr)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    Console(width=150).print(report(results))


if __name__ == "__main__":
    main()
