"""``hgrn2 train``: train a model from scratch."""

import argparse

from .arguments import example


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a model from scratch, or go on from the newest checkpoint of its run.",
        **example("--config examples/train_shakespeare.yaml"),
    )
    parser.add_argument(
        "-c", "--config", required=True, metavar="FILE", help="YAML file that describes the run"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    from mlx_lm.cli_ui import rprint

    from ..train import TrainConfig, how_to_resume, train

    config = TrainConfig.load(options.config)
    try:
        folder = train(config)
    except (KeyboardInterrupt, ConnectionError) as error:
        error.args = (f"{error}; {how_to_resume(config)}",)
        raise
    rprint(folder)
