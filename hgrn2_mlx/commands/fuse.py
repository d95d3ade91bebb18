"""``hgrn2 fuse``: merge an adapter into its model."""

import argparse

from .arguments import add_quantization, example, read_quantization


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Merge what hgrn2 lora trained into the model, in a new folder.",
        **example("--model hgrn2-1.3b --adapter-path adapters --save-path hgrn2-1.3b-mine"),
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
    add_quantization(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    from ..fuse import fuse

    fuse(
        options.model,
        options.adapter_path,
        options.save_path,
        dequantize=options.dequantize,
        **read_quantization(options),
    )
    print(f"written to {options.save_path}")
