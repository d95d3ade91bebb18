"""``hgrn2 demo``: the whole way, on the checkpoint that the package carries."""

import argparse

from .arguments import example


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert, run, measure and fine-tune the checkpoint that the package carries.",
        **example('--prompt "JULIET:" --max-tokens 200'),
    )
    parser.add_argument("--prompt", default="ROMEO:\n", help="what the text starts with")
    parser.add_argument("--max-tokens", type=int, default=120, metavar="N", help="tokens to write")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="about how long to fine-tune; the validation loss takes a fifth of it (default: 60)",
    )
    return parser


def run(options: argparse.Namespace) -> None:
    from ..demo import run

    run(options.prompt, options.max_tokens, options.seconds)
