"""``hgrn2 bench``: speed and memory, beside other models of the same size."""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from .arguments import example

PICTURES = (".pdf", ".png", ".svg")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Measure prefill, decoding, a training step (of all weights, where they are "
        "not quantized and fit in memory, and of LoRA) and memory at growing lengths and batch "
        "sizes, beside peers of the same width, depth and type, with random weights: mlx-lm's "
        "mamba2 and llama; mlx-recurrence, of which a layer's recurrence is compared by itself; "
        "and fla, the same model in flash-linear-attention on an NVIDIA GPU. Without --model, a "
        "small HGRN2 with random weights is measured.",
        **example(
            "--model hgrn2-1.3b --prompt-tokens 512 4096 16384 --json bench.json\n"
            "  %(prog)s --peers mlx-recurrence fla --plot bench.png"
        ),
    )
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="same as --model")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a converted folder or Hub repository id, or a config.json for random weights",
    )
    size = parser.add_argument_group("size of the model with random weights")
    size.add_argument(
        "--hidden-size", type=int, default=256, metavar="N", help="width (default: 256)"
    )
    size.add_argument("--layers", type=int, default=2, metavar="N", help="depth (default: 2)")
    size.add_argument(
        "--vocab-size", type=int, default=2048, metavar="N", help="tokens (default: 2048)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type to compute in (default: the model's; for random weights float32 on a CPU, "
        "bfloat16 on a GPU)",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=("mamba2", "llama", "mlx-recurrence", "fla"),
        help="what to compare with (default: all that are installed and can run here; none after "
        "the bare flag)",
    )
    # As in mlx_lm.benchmark, but several of each.
    for flag, count, values, text in (
        ("-p --prompt-tokens", "+", (512, 2048, 4096), "lengths of prompts"),
        ("-b --batch-size", "+", (1, 4), "batch sizes; those after the first at the first length"),
        ("-t --train-tokens", "*", (512, 1024), "lengths to train on; the bare flag for none"),
    ):
        default = " ".join(map(str, values))
        parser.add_argument(
            *flag.split(), nargs=count, type=int, default=values, metavar="N",
            help=f"{text} (default: {default})",
        )  # fmt: skip
    parser.add_argument(
        "-g",
        "--generation-tokens",
        type=int,
        default=16,
        metavar="N",
        help="tokens to decode (default: 16)",
    )
    parser.add_argument(
        "-n",
        "--num-trials",
        type=int,
        default=3,
        metavar="N",
        help="the fastest counts (default: 3)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    parser.add_argument("--plot", metavar="FILE", help="draw them: .png, .svg or .pdf")
    return parser


def run(options: argparse.Namespace) -> None:
    if options.plot and Path(options.plot).suffix not in PICTURES:
        raise ValueError(f"--plot {options.plot}: the name must end in {', '.join(PICTURES)}")

    import json

    import mlx.core as mx
    import rich
    from rich.console import Console

    from .. import system_blas
    from ..bench import Settings, Size, bench, draw, random_subject, read_subject
    from ..convert.staging import staged_file

    settings = Settings(
        prompt_tokens=options.prompt_tokens,
        generation_tokens=options.generation_tokens,
        batch_sizes=options.batch_size,
        train_tokens=options.train_tokens,
        trials=options.num_trials,
    )
    dtype = getattr(mx, options.dtype) if options.dtype else None
    path = options.model or options.model_argument
    if path is None:
        size = Size(options.hidden_size, options.layers, options.vocab_size)
        subject = random_subject(size, dtype)
    else:
        subject = read_subject(path, dtype)

    on_cpu = mx.default_device() == mx.cpu
    if sys.platform == "linux" and on_cpu and not system_blas.is_in_process():
        note = "note: MLX multiplies with its own, slow BLAS; hgrn2 doctor says what to do"
        print(note, file=sys.stderr)
    with ExitStack() as files:
        # Made before the work, in case that they cannot be.
        figures, picture = (
            files.enter_context(staged_file(Path(name))) if name else None
            for name in (options.json, options.plot)
        )
        with Console(stderr=True).status("") as status:
            results = bench(subject, options.peers, settings, status.update)
        rich.print(results)
        if figures:
            figures.write_text(json.dumps(results.to_json(), indent=2) + "\n")
        if picture:
            draw(results, picture, Path(options.plot).suffix[1:])
