"""Commands that are mlx-lm's own programs, run with HGRN2 registered.

They parse what they are given themselves; a few flags are ours.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any


class PassingParser(argparse.ArgumentParser):
    """Knows our flags. What it does not know is in ``options.passed_on``, for mlx-lm.

    The help is mlx-lm's, to which this parser's is added.
    """

    def __init__(self, **settings: Any):
        settings = {"usage": argparse.SUPPRESS} | settings
        super().__init__(add_help=False, allow_abbrev=False, **settings)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        options, passed_on = super().parse_known_args(args, namespace)
        options.passed_on = passed_on
        options.parser = self
        return options


def run_mlx_lm(module: str, options: argparse.Namespace, *arguments: str) -> None:
    """Runs ``mlx_lm.<module>`` with what was passed on, and ``arguments``.

    Args:
        module: Of mlx-lm, with a ``main``.
        options: From a :class:`PassingParser`. A ``model`` among them is passed on too.
        arguments: More for mlx-lm.

    Raises:
        ValueError: If the model is a folder that cannot be loaded, or nothing at all.
    """
    model = getattr(options, "model", None)
    if model is not None:
        from ..model_to_load import check_model

        check_model(model)
        arguments = ("--model", model, *arguments)
    program = importlib.import_module(f"mlx_lm.{module}")
    command_line = sys.argv
    sys.argv = [options.parser.prog, *options.passed_on, *arguments]
    try:
        program.main()
    except SystemExit:
        if asks_for_help(options):
            print(f"\n{options.parser.format_help()}", end="")
        raise
    finally:
        sys.argv = command_line


def asks_for_help(options: argparse.Namespace) -> bool:
    return not {"-h", "--help"}.isdisjoint(options.passed_on)


def require_model(options: argparse.Namespace) -> None:
    """Refuses to run without a model, for which mlx-lm would download one of its own.

    Raises:
        ValueError: If there is no ``options.model``.
    """
    if options.model is None and not asks_for_help(options):
        command = options.parser.prog.split()[-1]
        raise ValueError(f"{command} with what? give --model, a converted folder")
