"""``hgrn2 eval``: perplexity on a text, or scores on the tasks of lm-eval."""

import argparse
from pathlib import Path

from .arguments import example
from .passed_on import PassingParser, require_model, run_mlx_lm


def build_parser() -> argparse.ArgumentParser:
    parser = PassingParser(
        usage=None,
        description="Measure a model's perplexity on a text file, in windows that each begin "
        "with an empty state, or on a data set on the Hub, which mlx_lm.perplexity then reads. "
        "With --tasks, mlx_lm.evaluate runs tasks of lm-eval and takes the flags that it has.",
        **example(
            "--model hgrn2-1.3b --data-path held_out.txt --sequence-length 2048\n"
            "  %(prog)s --model hgrn2-1.3b --tasks lambada_openai"
        ),
    )
    parser.add_argument("-h", "--help", action="help", help="show this help message and exit")
    parser.add_argument("--model", metavar="FOLDER", help="folder or Hub repository id")
    parser.add_argument("--data-path", metavar="FILE", help="text file, or data set on the Hub")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=8, help="windows at a time")
    parser.add_argument(
        "--num-samples", type=int, default=-1, help="windows to measure (default: -1, all)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks of lm-eval")
    return parser


def run(options: argparse.Namespace) -> None:
    require_model(options)
    if options.tasks:
        shared = ("--batch-size", str(options.batch_size))
        run_mlx_lm("evaluate", options, "--tasks", *options.tasks, *shared)
    elif options.data_path is None:
        raise ValueError("measure on what? give --data-path or --tasks")
    elif Path(options.data_path).is_file():
        if options.passed_on:
            options.parser.error(f"unrecognized arguments: {' '.join(options.passed_on)}")
        _measure_perplexity(options)
    else:
        from ..convert.hub import is_repository_id

        if not Path(options.data_path).exists() and not is_repository_id(options.data_path):
            raise ValueError(
                f"{options.data_path} does not exist, nor is it a Hub data set id (owner/name)"
            )
        names = ("data_path", "sequence_length", "batch_size", "num_samples")
        flags = (f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names)
        run_mlx_lm("perplexity", options, *flags)


def _measure_perplexity(options: argparse.Namespace) -> None:
    for name, smallest in (("sequence_length", 2), ("batch_size", 1)):
        if (value := getattr(options, name)) < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
    if options.num_samples == 0:
        raise ValueError("num_samples must be at least 1, or -1 for all, got 0")

    import math

    import mlx.core as mx
    from mlx_lm.perplexity import eval_ppl
    from mlx_lm.utils import load

    from ..lora_data import cut_windows, read_text
    from ..model_to_load import check_model

    check_model(options.model)
    text = read_text(Path(options.data_path))
    model, tokenizer = load(options.model)
    windows = [tokens for tokens, _ in cut_windows(tokenizer.encode(text), options.sequence_length)]
    if options.num_samples >= 0:
        windows = windows[: options.num_samples]
    if not windows:
        raise ValueError(
            f"{options.data_path} does not fill a window of {options.sequence_length} tokens; "
            "lower --sequence-length"
        )
    perplexity, error = eval_ppl(model, mx.array(windows), options.batch_size)
    print(
        f"perplexity {perplexity:.4f} ± {error:.4f} ({math.log(perplexity):.4f} nats per token) "
        f"on {len(windows) * (options.sequence_length - 1):,} tokens "
        f"in {len(windows)} windows of {options.sequence_length}"
    )
