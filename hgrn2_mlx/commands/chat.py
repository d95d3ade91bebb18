"""``hgrn2 chat``: chat with a converted model in the terminal."""

import argparse

from .arguments import example
from .passed_on import PassingParser, require_model, run_mlx_lm


def build_parser() -> argparse.ArgumentParser:
    parser = PassingParser(**example("--model hgrn2-1.3b-mine --max-tokens 200"))
    parser.add_argument("--model", help="folder or Hub repository id")
    return parser


def run(options: argparse.Namespace) -> None:
    require_model(options)
    run_mlx_lm("chat", options)
