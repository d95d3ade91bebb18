"""``hgrn2 serve``: a converted model over an OpenAI-compatible API."""

import argparse

from .arguments import example
from .passed_on import PassingParser, run_mlx_lm


def build_parser() -> argparse.ArgumentParser:
    parser = PassingParser(**example("--model hgrn2-1.3b --port 8080"))
    parser.add_argument("--model", help="folder or Hub repository id (default: what requests name)")
    return parser


def run(options: argparse.Namespace) -> None:
    from ..serving import guard_server

    guard_server()
    run_mlx_lm("server", options)
