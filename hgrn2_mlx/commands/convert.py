"""``hgrn2 convert``: a PyTorch checkpoint to an MLX folder, or back."""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .arguments import add_quantization, example, read_quantization, says_how_to_quantize


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Convert a PyTorch checkpoint of HGRN2 or HGRN to an MLX folder, "
        "an MLX folder to one of flash-linear-attention, or check one against the other.",
        **example("--hf-path fla-hub/hgrn2-1.3B-100B --mlx-path hgrn2-1.3b -q"),
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
    add_quantization(parser)
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
    return parser


def run(options: argparse.Namespace) -> None:
    if options.source is None:
        raise ValueError("convert what? give --hf-path")
    if options.destination is None:
        options.destination = "pytorch_model" if options.to_pytorch else "mlx_model"
    changes = options.dtype or options.quantize or says_how_to_quantize(options)
    if changes and (options.to_pytorch or options.check):
        raise ValueError("--dtype and --quantize go with neither --to-pytorch nor --check")
    if options.check:
        _check_conversion(options)
    else:
        _write_conversion(options)


def _check_conversion(options: argparse.Namespace) -> None:
    from ..convert import check

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

    from ..convert import convert, export, hub
    from ..convert.model_card import model_card
    from ..convert.staging import staged_file
    from ..convert.writer import SHARD_SIZE

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
    quantization = read_quantization(options)
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
