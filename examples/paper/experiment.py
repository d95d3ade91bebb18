"""What the experiments share around their training: options, runs side by side, the record.

    python examples/paper/recall.py --size small --out results

writes results/recall-small.json after every run, so that nothing is lost when it ends
early, and draws results/recall-small.png from it. ``--draw`` only draws again.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, is_dataclass
from datetime import date
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from training import Architecture

from hgrn2_mlx.convert.staging import staged_file
from hgrn2_mlx.ops import chunked

# Beyond this, MLX gives back the memory that it keeps for reuse: the runs share one device.
CACHE_BYTES = 2 << 30
# Tokens recomputed at a time in the backward pass. The models are small: more tokens than the
# package takes still fit, and are fewer and larger operations.
SEGMENT_TOKENS = 1 << 15


@dataclass
class Options:
    """The command line of an experiment.

    Args:
        name: Of the experiment and its files.
        size: Key of its table of settings.
        out: Folder of its files.
        minutes: When all training shall have ended; ``inf`` for when it is done.
        jobs: Runs side by side, each in a process of its own.
        parts: Of the experiment, if it has some.
    """

    name: str
    size: str
    out: Path
    minutes: float
    jobs: int
    parts: list[str]

    def path(self, suffix: str) -> Path:
        return self.out / f"{self.name}-{self.size}.{suffix}"


def main(
    name: str,
    description: str,
    settings: dict[str, Any],
    experiment: Callable[[Any, Options], Iterable[dict]],
    draw: Callable[[dict, Path], None],
    parts: tuple[str, ...] = (),
) -> None:
    """The command of an experiment.

    Args:
        settings: By size.
        experiment: Yields results as they come, from the settings of a size.
        draw: Draws the record to a PNG file.
        parts: Names of its parts, of which a user may choose.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--size", choices=list(settings), default="small")
    parser.add_argument("--out", type=Path, default=Path("paper_results"), metavar="FOLDER")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end training in time (default: no limit)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    else:
        parser.set_defaults(parts=())
    parser.add_argument("--draw", action="store_true", help="only draw what the folder holds")
    arguments = vars(parser.parse_args())
    only_draw = arguments.pop("draw")
    options = Options(name, **arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if not only_draw:
        record = new_record(options, settings[options.size])
        for result in experiment(settings[options.size], options):
            record["runs"].append(result)
            with staged_file(options.path("json")) as path:
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(options.path("json").read_text(encoding="utf-8"))
    with staged_file(options.path("png")) as path:
        draw(record, path)
    print(f"written: {options.path('json')} and {options.path('png')}")


def new_record(options: Options, settings: Any) -> dict[str, Any]:
    """All that a reader needs besides the results, which are yet to come."""
    device = mx.default_device()
    return {
        "experiment": options.name,
        "size": options.size,
        "date": date.today().isoformat(),
        "machine": {
            "device": str(device),
            "description": mx.device_info(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "compiled": "MLX_DISABLE_COMPILE" not in os.environ,
        },
        "versions": {
            "python": platform.python_version(),
            "mlx": mx.__version__,
            "mlx-lm": mlx_lm.__version__,
            "numpy": np.__version__,
        },
        "minutes": None if math.isinf(options.minutes) else options.minutes,
        "jobs": options.jobs,
        "settings": asdict(settings) if is_dataclass(settings) else settings,
        "runs": [],
    }


def carry_out(function: Callable[..., dict], runs: list[tuple], options: Options) -> Iterable[dict]:
    """``function(*run, deadline=...)`` for every run, in the order in which they end.

    A run gets an equal share of the time that is left when it starts, and does not start
    once the time is up. Where one fails, that is its result, and the others go on.

    Args:
        function: Of a module's own, as it runs in other processes.
        runs: Its arguments: an architecture, a seed and what else it takes.

    Yields:
        The architecture, the seed and what ``function`` returned, or ``failed``: why.
    """
    end = time.time() + 60 * options.minutes
    if options.jobs == 1:
        for index, run in enumerate(runs):
            yield _carry_out_one(function, run, index, len(runs), 1, end)
        return
    # A forked child would share the parent's device; a spawned one opens its own.
    processes = ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"))
    with processes:
        futures = [
            processes.submit(_carry_out_one, function, run, index, len(runs), options.jobs, end)
            for index, run in enumerate(runs)
        ]
        for future in as_completed(futures):
            yield future.result()


def _carry_out_one(
    function: Callable[..., dict], run: tuple, index: int, count: int, jobs: int, end: float
) -> dict:
    mx.set_cache_limit(CACHE_BYTES)
    chunked.SEGMENT_TOKENS = SEGMENT_TOKENS
    now = time.time()
    if now >= end:
        result = {"failed": "no time left"}
    else:
        waves = math.ceil((count - index) / jobs)
        try:
            result = function(*run, deadline=now + (end - now) / waves)
        except (RuntimeError, ValueError) as error:
            result = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    architecture, seed, *_ = run
    print(architecture.name, f"seed {seed}:", result.get("failed") or "done", flush=True)
    return {"architecture": asdict(architecture), "seed": seed, **result}


def name(run: dict) -> str:
    """Of a result's model."""
    return Architecture(**run["architecture"]).name


def finished(record: dict) -> list[dict]:
    """The results of the runs that ended well."""
    return [run for run in record["runs"] if "failed" not in run]


def over_seeds(runs: Iterable[dict], key: Callable[[dict], Any], value: Callable[[dict], Any]):
    """``{key: (mean, standard deviation, number)}`` of a value over the runs of equal key."""
    groups: dict[Any, list] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(value(run))
    return {
        key: (np.mean(values, axis=0), np.std(values, axis=0), len(values))
        for key, values in groups.items()
    }


def curves(runs: Iterable[dict]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """By model: steps, means and standard deviations of the evaluations that all seeds reached."""
    groups: dict[str, list] = {}
    for run in runs:
        groups.setdefault(name(run), []).append(run["evaluations"])
    result = {}
    for model, evaluations in groups.items():
        shared = min(map(len, evaluations))
        steps, losses = np.moveaxis([one[:shared] for one in evaluations], -1, 0)
        result[model] = (steps.mean(axis=0), losses.mean(axis=0), losses.std(axis=0))
    return result
