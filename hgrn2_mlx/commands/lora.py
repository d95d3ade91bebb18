"""``hgrn2 lora``: fine-tune a model."""

import argparse

from .arguments import example


def build_parser() -> argparse.ArgumentParser:
    from ..lora import build_parser

    return argparse.ArgumentParser(
        parents=[build_parser()],
        add_help=False,
        description="Fine-tune with mlx-lm's trainer and flags. --data may also be a .txt file "
        "or a folder of train.txt, valid.txt and test.txt; --num-layers is -1 by default.",
        **example("--model hgrn2-1.3b --train --data my_text.txt --iters 200"),
    )


def run(options: argparse.Namespace) -> None:
    from ..lora import read_settings, run

    run(read_settings(vars(options)))
