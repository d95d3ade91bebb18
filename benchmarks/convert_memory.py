"""Peak memory and time of converting a checkpoint with the shape of hgrn2-1.3B-100B.

    python benchmarks/convert_memory.py [--layers 24] [--format bin] [-- options of hgrn2 convert]

The checkpoint (bfloat16, random) is made in a temporary folder: 2.7 GB, and as
much again for what it is converted to. It is one file of safetensors, or shards
as torch.save writes them. Each step runs in a process of its own, because a
process's peak includes what its parent held when it was started.
"""

import argparse
import json
import os
import pickle
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

CONFIG = {
    "model_type": "hgrn2",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "expand_ratio": 128,
    "intermediate_size": 5632,
}

TORCH_SHARD_SIZE = 1_000_000_000


def make_checkpoint(folder: Path, layers: int, file_format: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from hgrn2_mlx.convert.writer import TensorLayout, write_weights
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
    parameters = sum(layout.size for layout in layouts.values())
    if file_format == "bin":
        write_torch_shards(folder, layouts, weights)
    else:
        write_weights(folder, layouts, weights, parameters)
    (folder / "config.json").write_text(json.dumps(config))


def write_torch_shards(folder: Path, layouts: dict, weights) -> None:
    """What transformers' save_pretrained wrote with torch, tensor by tensor."""
    import mlx.core as mx

    shards = [{}]
    for name, layout in layouts.items():
        size = layout.nbytes + sum(other.nbytes for other in shards[-1].values())
        if size > TORCH_SHARD_SIZE and shards[-1]:
            shards.append({})
        shards[-1][name] = layout
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        weight_map |= dict.fromkeys(shard, file)
        with zipfile.ZipFile(folder / file, "w") as archive:
            archive.writestr("archive/data.pkl", pickle_state_dict(shard))
            for key, (_, array) in zip(range(len(shard)), weights, strict=False):
                with archive.open(f"archive/data/{key}", "w", force_zip64=True) as storage:
                    storage.write(memoryview(array.view(mx.uint8)))
            archive.writestr("archive/version", "3\n")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pickle_state_dict(layouts: dict) -> bytes:
    """The pickle in protocol 2 of a state dict whose tensors have a storage each."""

    def text(value: str) -> bytes:
        return pickle.BINUNICODE + struct.pack("<I", len(value)) + value.encode()

    def numbers(*values: int) -> bytes:
        items = b"".join(pickle.BININT + struct.pack("<i", value) for value in values)
        return pickle.MARK + items + pickle.TUPLE

    entries = b""
    for key, (name, layout) in enumerate(layouts.items()):
        strides = [layout.size // layout.shape[0]] if len(layout.shape) == 2 else []
        entries += text(name) + pickle.GLOBAL + b"torch._utils\n_rebuild_tensor_v2\n" + pickle.MARK
        entries += pickle.MARK + text("storage") + pickle.GLOBAL + b"torch\nBFloat16Storage\n"
        entries += text(str(key)) + text("cpu") + pickle.BININT + struct.pack("<i", layout.size)
        entries += pickle.TUPLE + pickle.BINPERSID + pickle.BININT1 + b"\0"
        entries += numbers(*layout.shape) + numbers(*strides, 1) + pickle.NEWFALSE
        entries += pickle.GLOBAL + b"collections\nOrderedDict\n" + pickle.EMPTY_TUPLE
        entries += pickle.REDUCE + pickle.TUPLE + pickle.REDUCE
    state_dict = pickle.EMPTY_DICT + pickle.MARK + entries + pickle.SETITEMS
    return pickle.PROTO + b"\2" + state_dict + pickle.STOP


def check(source: Path, converted: Path) -> None:
    """Loads the folder as users do; weights that were only copied must be equal."""
    import mlx.core as mx
    import mlx_lm.utils
    from mlx.utils import tree_flatten

    import hgrn2_mlx  # noqa: F401
    from hgrn2_mlx.convert.weight_files import read_weights

    model, _ = mlx_lm.utils.load_model(converted)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.isfinite(logits).all(), "logits are not finite"
    expected = read_weights(source).tensors
    same = [
        mx.array_equal(weight, expected[name].load()).item()
        for name, weight in tree_flatten(model.parameters())
        if name in expected and weight.dtype == mx.bfloat16
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
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("options", nargs="*", help="options of hgrn2 convert, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source, converted = Path(temporary, "source"), Path(temporary, "converted")
        source.mkdir()
        steps = [sys.executable, __file__]
        measure([*steps, "make_checkpoint", str(source), str(arguments.layers), arguments.format])
        sizes = [file.stat().st_size for file in source.iterdir()]
        size = sum(sizes)
        print(f"{size / 1e9:.2f} GB, the largest file {max(sizes) / 1e9:.2f} GB", flush=True)
        seconds, peak = measure(
            [sys.executable, "-m", "hgrn2_mlx", "convert"]
            + ["--hf-path", str(source), "--mlx-path", str(converted), *arguments.options]
        )
        print(f"{seconds:.1f} s, peak {peak / 1e9:.2f} GB, {peak / size:.2f} of the checkpoint")
        measure([*steps, "check", str(source), str(converted)])


if __name__ == "__main__":
    if sys.argv[1:2] == ["make_checkpoint"]:
        make_checkpoint(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    elif sys.argv[1:2] == ["check"]:
        check(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
