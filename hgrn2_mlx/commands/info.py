"""``hgrn2 info``: a model's parameters, and the memory that a sequence takes in it."""

import argparse

from .arguments import example


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Show a model's parameters, the size of its state in each layer and in all, "
        "and the memory that each token of context adds: none in recurrent layers, keys and values "
        "in a hybrid's attention layers. Nothing is loaded.",
        **example("--model hgrn2-1.3b"),
    )
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="same as --model")
    parser.add_argument(
        "--model",
        metavar="PATH",
        help="a model's folder or its config.json, or the YAML file of hgrn2 train",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")
    return parser


def run(options: argparse.Namespace) -> None:
    path = options.model or options.model_argument
    if path is None:
        raise ValueError("info on what? give --model, a folder or a config.json")

    import json

    import rich

    from ..info import read_info

    info = read_info(path)
    if options.json:
        print(json.dumps(info.to_json(), indent=2))
    else:
        rich.print(info)
