"""Tokens per second and memory of generation, at the size of the public 1.3B model.

    python benchmarks/generation.py [--batch 1 16 64] [--prompt 512] [--tokens 256]

Random bfloat16 weights in the shape of fla-hub/hgrn2-1.3B-100B (1,364,396,032
parameters): speed does not depend on their values. Tokens come from mlx-lm's own
`generate_step` at batch 1 and from plain cached decoding beyond. Beside each figure
stands the ratio to the most that memory bandwidth allows: every weight and every
state read once per step (and the state written), at the bandwidth of a large copy
measured in the same run.
"""

import argparse
import json
import time

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.generate import generate_step

from hgrn2_mlx.models.hgrn2 import Model, ModelArgs


def random_model() -> Model:
    mx.random.seed(0)
    model = Model(ModelArgs())
    model.update(tree_map(lambda weight: weight.astype(mx.bfloat16), model.parameters()))
    mx.eval(model.parameters())
    return model


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, counting bytes read and written."""
    source = mx.random.normal((1 << 28,))
    mx.eval(source + 1)
    start = time.perf_counter()
    for _ in range(10):
        mx.eval(source + 1)
    return 10 * 2 * source.nbytes / (time.perf_counter() - start)


def decode_batch(model: Model, prompt: mx.array, tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and seconds per decoded step of the whole batch."""
    cache = model.make_cache()
    start = time.perf_counter()
    token = mx.argmax(model(prompt, cache)[:, -1:], axis=-1)
    mx.eval(token)
    prefill = time.perf_counter() - start

    start = time.perf_counter()
    for _ in range(tokens):
        token = mx.argmax(model(token, cache), axis=-1)
        mx.async_eval(token)
    mx.eval(token)
    return prefill, (time.perf_counter() - start) / tokens


def decode_single(model: Model, prompt: mx.array, tokens: int) -> float:
    """Seconds per token of mlx-lm's own loop."""
    steps = generate_step(prompt[0], model, max_tokens=tokens)
    next(steps)
    start = time.perf_counter()
    count = sum(1 for _ in steps)
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=256, help="tokens to decode")
    parser.add_argument("--json", help="write the figures to this file")
    arguments = parser.parse_args()

    model = random_model()
    weights = sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
    bandwidth = copy_bandwidth()
    print(f"{mx.default_device()}, copy {bandwidth / 1e9:.0f} GB/s, weights {weights / 1e9:.2f} GB")

    results = []
    for batch in arguments.batch:
        prompt = mx.random.randint(0, model.args.vocab_size, (batch, arguments.prompt))
        decode_batch(model, prompt, 8)
        mx.reset_peak_memory()
        prefill, step = decode_batch(model, prompt, arguments.tokens)
        if batch == 1:
            step = decode_single(model, prompt, arguments.tokens)
        cache = model.make_cache()
        mx.eval(model(prompt[:, :1], cache))
        states = sum(layer.nbytes for layer in cache)
        most = batch * bandwidth / (weights + 2 * states)
        results.append(
            {
                "batch": batch,
                "prefill_tokens_per_second": batch * arguments.prompt / prefill,
                "decode_tokens_per_second": batch / step,
                "ratio_to_bandwidth_limit": batch / step / most,
                "peak_memory_gb": mx.get_peak_memory() / 1e9,
            }
        )
        print(" ".join(f"{key} {value:.4g}" for key, value in results[-1].items()))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"bandwidth": bandwidth, "results": results}, file, indent=2)


if __name__ == "__main__":
    main()
