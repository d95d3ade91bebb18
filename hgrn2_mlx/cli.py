"""The ``hgrn2`` command.

A subcommand is a function that adds its parser and one that runs it; what is
slow to import is imported in the latter.
"""

import argparse
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

# Commands that are mlx-lm's own, run with HGRN2 registered.
MLX_LM_COMMANDS = {
    "generate": ("generate", "write text with a converted model"),
    "chat": ("chat", "chat with a converted model in the terminal"),
    "serve": ("server", "serve a converted model over an OpenAI-compatible API"),
    "eval": ("perplexity", "measure the perplexity of a converted model"),
}

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal asked the process to end; raised so that what is half done is undone."""

    def __init__(self, number: int):
        super().__init__("interrupted")
        self.number = number


def main(arguments: list[str] | None = None) -> int:
    """Runs a subcommand.

    Returns:
        The exit status: 0, 1 after an error, 128 plus the number of a signal.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    # mlx-lm's commands parse what follows their name themselves, --help too.
    ours = 1 if arguments and arguments[0] in MLX_LM_COMMANDS else len(arguments)
    options = _parser().parse_args(arguments[:ours])
    options.arguments = arguments[ours:]
    try:
        with _interrupts_raised():
            options.run(options)
    except (Exception, Interrupted) as error:
        if options.debug:
            traceback.print_exc()
        print(f"hgrn2: error: {_in_one_line(error)}", file=sys.stderr)
        return 128 + error.number if isinstance(error, Interrupted) else 1
    return 0


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
    message = " ".join(str(error).split())
    if isinstance(error, (ValueError, OSError, Interrupted)):
        return message
    return f"{type(error).__name__}: {message} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hgrn2", description="HGRN2 on Apple Silicon with MLX.")
    subcommands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_demo(subcommands)
    _add_convert(subcommands)
    for command in MLX_LM_COMMANDS:
        _add_mlx_lm(subcommands, command)
    _add_lora(subcommands)
    _add_fuse(subcommands)
    _add_train(subcommands)
    for subcommand in subcommands.choices.values():
        subcommand.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    return parser


def _add_demo(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "demo",
        help="convert, run and measure the checkpoint that the package carries",
        description="Convert, run and measure the checkpoint that the package carries.",
    )
    parser.add_argument("--prompt", default="ROMEO:\n", help="what the text starts with")
    parser.add_argument("--max-tokens", type=int, default=120, metavar="N", help="tokens to write")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="time for the validation loss; fine-tuning takes up to twice that (default: 20)",
    )
    parser.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    from .demo import run

    run(options.prompt, options.max_tokens, options.seconds)


def _add_mlx_lm(subcommands: argparse._SubParsersAction, command: str) -> None:
    module, description = MLX_LM_COMMANDS[command]
    parser = subcommands.add_parser(
        command,
        help=description,
        description=f"mlx_lm.{module} with HGRN2 registered: {description}.",
        add_help=False,
    )
    parser.set_defaults(run=_run_mlx_lm, command=command, module=module)


def _run_mlx_lm(options: argparse.Namespace) -> None:
    import importlib

    sys.argv = [f"hgrn2 {options.command}", *options.arguments]
    importlib.import_module(f"mlx_lm.{options.module}").main()


def _add_convert(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "convert",
        help="convert a PyTorch checkpoint to an MLX folder, or back",
        description="Convert a PyTorch checkpoint of HGRN2 or HGRN to an MLX folder, "
        "an MLX folder to one of flash-linear-attention, or check one against the other.",
    )
    # Both spellings fill one value, and an absent positional must not reset it.
    parser.add_argument("source", nargs="?", default=argparse.SUPPRESS, help="same as --hf-path")
    parser.add_argument("destination", nargs="?", default=argparse.SUPPRESS, help="as --mlx-path")
    parser.add_argument(
        "--hf-path",
        "--model",
        dest="source",
        metavar="SOURCE",
        help="folder, file of weights with config.json beside it, or Hub repository id",
    )
    parser.add_argument(
        "--mlx-path",
        "--save-path",
        dest="destination",
        metavar="FOLDER",
        help="folder to write; it must not exist (default: mlx_model, or pytorch_model)",
    )
    parser.add_argument(
        "--to-pytorch",
        action="store_true",
        help="convert an MLX folder to a checkpoint of flash-linear-attention; "
        "quantized weights are dequantized",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing: compare the folder with its source, tensor by tensor",
    )
    parser.add_argument(
        "--dtype",
        choices=("float16", "bfloat16", "float32"),
        help="type of the weights that are not quantized (default: as in the checkpoint)",
    )
    _add_quantization(parser)
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument(
        "--shard-size",
        type=float,
        metavar="GB",
        help="how large a file of weights may become, in 2^30 bytes (default: 5)",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write what became of each tensor as JSON, with checksums"
    )
    parser.add_argument(
        "--upload-repo", metavar="ID", help="Hub repository to upload the folder to, with a card"
    )
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    if options.source is None:
        raise ValueError("convert what? give --hf-path")
    if options.destination is None:
        options.destination = "pytorch_model" if options.to_pytorch else "mlx_model"
    changes = options.dtype, options.quantize, options.q_bits, options.q_group_size
    if any(changes) and (options.to_pytorch or options.check):
        raise ValueError("--dtype and --quantize go with neither --to-pytorch nor --check")
    if options.check:
        _check_conversion(options)
    else:
        _write_conversion(options)


def _check_conversion(options: argparse.Namespace) -> None:
    from .convert import check

    if options.shard_size is not None or options.report or options.upload_repo:
        raise ValueError("--check goes with neither --shard-size, --report nor --upload-repo")
    report = check(options.source, options.destination, options.revision, options.to_pytorch)
    for difference in report.differences:
        print(difference)
    if report.differences:
        raise ValueError(f"{options.destination} is not what {options.source} becomes")
    print(f"{report.tensors} tensors, configuration and tokenizer are what the source becomes")
    if report.logit_difference is None:
        print(f"logits not compared: {report.not_run}")
    else:
        print(f"largest difference of logits: {report.logit_difference:.1e}")


def _write_conversion(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import track

    from .convert import convert, export, hub
    from .convert.model_card import model_card
    from .convert.staging import staged_file
    from .convert.writer import SHARD_SIZE

    if options.upload_repo and not hub.is_repository_id(options.upload_repo):
        raise ValueError(f"--upload-repo {options.upload_repo} is not of the form owner/name")
    console = Console(stderr=True)
    settings: dict[str, Any] = {
        "revision": options.revision,
        "shard_size": SHARD_SIZE if options.shard_size is None else options.shard_size,
        "checksums": options.report is not None,
        "track": lambda pieces: track(
            pieces, "converting", console=console, transient=True, disable=not console.is_terminal
        ),
    }
    quantization = _quantization(options)
    with staged_file(Path(options.report)) if options.report else nullcontext() as report_file:
        if options.to_pytorch:
            report = export(options.source, options.destination, **settings)
        else:
            report = convert(
                options.source,
                options.destination,
                dtype=options.dtype,
                **quantization,
                **settings,
            )
        if report_file:
            report_file.write_text(report.to_json(), encoding="utf-8")
    for warning in report.warnings:
        print(f"hgrn2: warning: {warning}", file=sys.stderr)
    Console().print(report)
    if options.upload_repo:
        card = model_card(report, options.upload_repo)
        (report.destination / "README.md").write_text(card, encoding="utf-8")
        print(f"uploaded to {hub.upload(report.destination, options.upload_repo)}")


def _add_lora(subcommands: argparse._SubParsersAction) -> None:
    from .lora import build_parser

    parser = subcommands.add_parser(
        "lora",
        parents=[build_parser()],
        add_help=False,
        help="fine-tune a model: LoRA, DoRA or all weights",
        description="Fine-tune with mlx-lm's trainer and flags. --data may also be a .txt file "
        "or a folder of train.txt, valid.txt and test.txt; --num-layers is -1 by default.",
    )
    parser.set_defaults(run=_lora)


def _lora(options: argparse.Namespace) -> None:
    from .lora import read_settings, run

    run(read_settings(vars(options)))


def _add_fuse(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "fuse",
        help="merge an adapter into its model",
        description="Merge what hgrn2 lora trained into the model, in a new folder.",
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository id")
    parser.add_argument(
        "--adapter-path",
        default="adapters",
        metavar="FOLDER",
        help="what hgrn2 lora wrote (default: adapters)",
    )
    parser.add_argument(
        "--save-path",
        default="fused_model",
        metavar="FOLDER",
        help="folder to write; it must not exist (default: fused_model)",
    )
    parser.add_argument("--dequantize", action="store_true", help="undo the model's quantization")
    _add_quantization(parser)
    parser.set_defaults(run=_fuse)


def _fuse(options: argparse.Namespace) -> None:
    from .fuse import fuse

    fuse(
        options.model,
        options.adapter_path,
        options.save_path,
        dequantize=options.dequantize,
        **_quantization(options),
    )
    print(f"written to {options.save_path}")


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the weights")
    parser.add_argument("--q-bits", type=int, metavar="BITS", help="bits per weight")
    parser.add_argument("--q-group-size", type=int, metavar="SIZE", help="weights per scale")
    parser.add_argument(
        "--q-mode",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        default="affine",
        help="quantization mode (default: affine, 4 bits in groups of 64)",
    )


def _quantization(options: argparse.Namespace) -> dict[str, Any]:
    if not options.quantize and (options.q_bits or options.q_group_size):
        raise ValueError("--q-bits and --q-group-size need --quantize")
    names = ("quantize", "q_bits", "q_group_size", "q_mode")
    return {name: getattr(options, name) for name in names}


def _add_train(subcommands: argparse._SubParsersAction) -> None:
    parser = subcommands.add_parser(
        "train",
        help="train a model from scratch",
        description="Train a model from scratch, or go on from the newest checkpoint of its run.",
    )
    parser.add_argument(
        "-c", "--config", required=True, metavar="FILE", help="YAML file that describes the run"
    )
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from mlx_lm.cli_ui import rprint

    from .train import TrainConfig, how_to_resume, train

    config = TrainConfig.load(options.config)
    try:
        folder = train(config)
    except (Interrupted, ConnectionError) as error:
        error.args = (f"{error}; {how_to_resume(config)}",)
        raise
    rprint(folder)
