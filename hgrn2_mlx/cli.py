"""The ``hgrn2`` command: finds the subcommand, and turns its errors into a line and a status."""

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from .system_blas import use_system_blas

# Each is a module of ``commands``, imported only to run.
COMMANDS = {
    "convert": "convert a PyTorch checkpoint to an MLX folder, or back",
    "generate": "write text with a converted model",
    "chat": "chat with a converted model in the terminal",
    "serve": "serve a converted model over an OpenAI-compatible API",
    "lora": "fine-tune a model: LoRA, DoRA or all weights",
    "fuse": "merge an adapter into its model",
    "train": "train a model from scratch",
    "eval": "measure perplexity on a text, or scores on the tasks of lm-eval",
    "quantize": "quantize a converted model, or undo it",
    "doctor": "check this machine: what will run, whether it is right, and what to do if not",
    "bench": "measure prefill, decoding, training and memory, beside other models",
    "info": "show a model's parameters and the memory that its state takes",
    "demo": "convert, run, measure and fine-tune the checkpoint that the package carries",
}

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asked the process to end; raised so that what is half done is undone."""

    def __init__(self, number: int):
        super().__init__("interrupted")
        self.number = number


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand.

    Returns:
        The exit status: 0, 1 after an error, 128 plus the number of a signal.
    """
    if "_ARGCOMPLETE" in os.environ:
        _complete(os.environ["COMP_LINE"])
    arguments = sys.argv[1:] if arguments is None else arguments
    name = _parser().parse_args(arguments[:1]).command
    use_system_blas()
    options = _command_parser(name).parse_args(arguments[1:])
    try:
        with _interrupts_raised():
            _command(name).run(options)
    except (Exception, Interrupted) as error:
        if options.debug:
            traceback.print_exc()
        print(f"hgrn2: error: {_in_one_line(error)}", file=sys.stderr)
        return 128 + error.number if isinstance(error, Interrupted) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    """Knows the names of the commands, and nothing of what they take."""
    parser = argparse.ArgumentParser(
        prog="hgrn2",
        description="HGRN2 on Apple Silicon with MLX.",
        epilog="hgrn2 COMMAND --help explains a command and gives an example.",
    )
    subcommands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, description in COMMANDS.items():
        subcommands.add_parser(name, help=description, add_help=False)
    return parser


def _command(name: str) -> ModuleType:
    return importlib.import_module(f".commands.{name}", __package__)


def _command_parser(name: str) -> argparse.ArgumentParser:
    parser = _command(name).build_parser()
    parser.prog = f"hgrn2 {name}"
    parser.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _complete(line: str) -> None:
    """Answers a shell that asks how ``line`` may go on (``hgrn2-mlx[completion]``), and ends."""
    import argcomplete

    parser = argparse.ArgumentParser(prog="hgrn2")
    subcommands = parser.add_subparsers()
    begun = line.split()[1:2]
    for name in COMMANDS:
        # Only the one that is asked about, as some are slow to import.
        parents = [_command_parser(name)] if begun == [name] else []
        subcommands.add_parser(name, parents=parents, add_help=False)
    argcomplete.autocomplete(parser)


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    # What the parent process ignores stays ignored, as nohup asks.
    handlers = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}

    def interrupt(number: int, frame: object) -> None:
        for other in handlers:  # A second Ctrl-C must not stop the cleaning up.
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    for number in handlers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"this needs a package that is not installed: pip install {error.name}"
    message = " ".join(str(error).split())
    if isinstance(error, RuntimeError) and "Unable to write" in message:
        return f"{message} Is the disk full?"  # MLX does not say why.
    if isinstance(error, (ValueError, OSError, Interrupted)):
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"
