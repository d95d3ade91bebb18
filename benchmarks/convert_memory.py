"""Peak memory and time of converting a checkpoint with the shape of hgrn2-1.3B-100B.

    python benchmarks/convert_memory.py [--layers 24] [-- any options of hgrn2 convert]

The checkpoint (bfloat16, random) is made in a temporary folder: 2.7 GB, and as
much again for what it is converted to. Each step runs in a process of its own,
because a process's peak includes what its parent held when it was started.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "model_type": "hgrn2",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "expand_ratio": 128,
    "intermediate_size": 5632,
}


def make_checkpoint(folder: Path, layers: int) -> None:
    import mlx.core as mx
    from hgrn2_mlx.convert.writer import TensorLayout, write_weights
    from mlx.utils import tree_flatten

    from hgrn2_mlx.models.hgrn2 import Model, ModelArgs

    config = CONFIG | {"num_hidden_layers": layers}
    shapes = {
        name: weight.shape
        for name, weight in tree_flatten(Model(ModelArgs.from_dict(config)).parameters())
    }
    layouts = {name: TensorLayout(mx.bfloat16, shape) for name, shape in shapes.items()}
    weights = (
        (name, (0.02 * mx.random.normal(shape)).astype(mx.bfloat16))
        for name, shape in shapes.items()
    )
    write_weights(folder, layouts, weights, sum(layout.nbytes // 2 for layout in layouts.values()))
    (folder / "config.json").write_text(json.dumps(config))


def check(source: Path, converted: Path) -> None:
    """Loads the folder as users do; weights that were only copied must be equal."""
    import mlx.core as mx
    import mlx_lm.utils
    from mlx.utils import tree_flatten

    import hgrn2_mlx  # noqa: F401

    model, _ = mlx_lm.utils.load_model(converted)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all(), "logits are not finite"
    expected = mx.load(str(source / "model.safetensors"))
    same = [
        mx.array_equal(weight, expected[name]).item()
        for name, weight in tree_flatten(model.parameters())
        if name in expected and weight.dtype == expected[name].dtype
    ]
    assert all(same), "weights differ"
    print(f"loads with mlx-lm; {len(same)} tensors equal to the checkpoint's, logits finite")


def measure(command: list[str]) -> tuple[float, int]:
    """Runs a command; its seconds and its peak resident bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - started, usage.ru_maxrss * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("options", nargs="*", help="options of hgrn2 convert, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, converted = Path(temporary, "source"), Path(temporary, "converted")
        source.mkdir()
        steps = [sys.executable, __file__]
        measure([*steps, "make_checkpoint", str(source), str(arguments.layers)])
        index = json.loads((source / "model.safetensors.index.json").read_text())["metadata"]
        size = index["total_size"]
        print(f"{index['total_parameters']:,} parameters, {size / 1e9:.2f} GB", flush=True)
        seconds, peak = measure(
            [sys.executable, "-m", "hgrn2_mlx", "convert"]
            + ["--hf-path", str(source), "--mlx-path", str(converted), *arguments.options]
        )
        print(f"{seconds:.1f} s, peak {peak / 1e9:.2f} GB, {peak / size:.2f} of the checkpoint")
        measure([*steps, "check", str(source), str(converted)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["make_checkpoint"]:
        make_checkpoint(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["check"]:
        check(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
