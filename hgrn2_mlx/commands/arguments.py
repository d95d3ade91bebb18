"""What several commands' parsers have in common."""

import argparse
from typing import Any


class HelpFormatter(argparse.HelpFormatter):
    """Wraps a description, but leaves an example's lines as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def example(arguments: str) -> dict[str, Any]:
    """Settings of a parser whose help ends with an example: the command with these arguments."""
    return {"epilog": f"example:\n  %(prog)s {arguments}", "formatter_class": HelpFormatter}


def add_quantization(parser: argparse.ArgumentParser) -> None:
    """Whether to quantize, and how."""
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the weights")
    add_quantization_settings(parser)


def add_quantization_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--q-bits", type=int, metavar="BITS", help="bits per weight")
    parser.add_argument("--q-group-size", type=int, metavar="SIZE", help="weights per scale")
    parser.add_argument(
        "--q-mode",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        default="affine",
        help="quantization mode (default: affine, 4 bits in groups of 64)",
    )


def read_quantization(options: argparse.Namespace) -> dict[str, Any]:
    """The options of :func:`add_quantization` by name.

    Raises:
        ValueError: If it is said how, but not that.
    """
    if not options.quantize and (options.q_bits or options.q_group_size):
        raise ValueError("--q-bits and --q-group-size need --quantize")
    names = ("quantize", "q_bits", "q_group_size", "q_mode")
    return {name: getattr(options, name) for name in names}
