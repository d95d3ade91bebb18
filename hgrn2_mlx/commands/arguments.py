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
        ValueError: If it is said how, but not that, or a number makes no sense.
    """
    if not options.quantize and says_how_to_quantize(options):
        raise ValueError("--q-bits, --q-group-size and --q-mode need --quantize")
    check_quantization_settings(options)
    names = ("quantize", "q_bits", "q_group_size", "q_mode")
    return {name: getattr(options, name) for name in names}


def says_how_to_quantize(options: argparse.Namespace) -> bool:
    """Whether any of the options of :func:`add_quantization_settings` differs from its default."""
    settings = (options.q_bits, options.q_group_size, options.q_mode)
    return settings != (None, None, "affine")


def check_quantization_settings(options: argparse.Namespace) -> None:
    """Refuses what mlx-lm would take for a number that was not given.

    Raises:
        ValueError: If a number is below 1.
    """
    for flag, value in (("--q-bits", options.q_bits), ("--q-group-size", options.q_group_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
