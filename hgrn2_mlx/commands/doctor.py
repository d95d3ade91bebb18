"""``hgrn2 doctor``: what is wrong on this machine, and what to do."""

import argparse

from .arguments import example


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Check this machine: versions, where MLX computes, and each form of the "
        "recurrences in float32, bfloat16 and float16, its results and its gradients; run a real "
        "model, measure a little, and say what is wrong and what to do. Exits with 1 if anything "
        "is wrong.",
        **example("--json > doctor.json"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON, to paste into an issue")
    return parser


def run(options: argparse.Namespace) -> None:
    import json

    import rich

    from ..doctor import examine

    report = examine()
    if options.json:
        print(json.dumps(report.to_json(), indent=2))
    else:
        rich.print(report)
    if report.problems:
        count = len(report.problems)
        raise ValueError(f"{count} thing{'s' if count > 1 else ''} wrong, as listed above")
