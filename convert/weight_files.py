"""Which files hold a checkpoint's weights, and the tensors that these describe."""

from pathlib import Path
from typing import NamedTuple

from .safetensors_files import read_header
from .source import read_json
from .stored_tensor import StoredTensor
from .torch_files import read_torch_file

# In the order of preference; of each, shards come with an index (NAME.index.json).
NAMES = ("model.safetensors", "pytorch_model.bin")
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# What classes that wrap a module put into its parameters' names.
WRAPPERS = {
    "module",  # DataParallel, DistributedDataParallel, DeepSpeed
    "_orig_mod",  # torch.compile
    "_forward_module",  # Lightning Fabric
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}


class Weights(NamedTuple):
    """The tensors of a checkpoint by name, and notes on what was passed over."""

    tensors: dict[str, StoredTensor]
    notes: list[str]


def read_weights(checkpoint: Path) -> Weights:
    """Every tensor of a checkpoint; no more than headers is read.

    Args:
        checkpoint: A folder with safetensors or files of ``torch.save``, single or
            sharded with an index, or such a file itself.

    Raises:
        ValueError: If files are missing, truncated or corrupt, want to run code, or
            contradict the index.
        OSError: If a file cannot be read.
    """
    tensors, notes = _read_file(checkpoint) if checkpoint.is_file() else _read_folder(checkpoint)
    wrappers = WRAPPERS & {part for name in tensors for part in name.split(".")}
    unwrapped = {_without(wrappers, name): tensor for name, tensor in tensors.items()}
    if len(unwrapped) < len(tensors):
        raise ValueError(f"{checkpoint.name} holds several models: names differ in wrappers only")
    if wrappers:
        notes = [*notes, f"left out of the tensors' names: {_list(wrappers)}"]
    return Weights(unwrapped, notes)


def _without(wrappers: set[str], name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _read_folder(folder: Path) -> Weights:
    for name in NAMES:
        index = folder / f"{name}.index.json"
        if index.is_file():
            weights = _read_shards(index)
        elif (folder / name).is_file():
            weights = _read_file(folder / name)
        else:
            continue
        used = {tensor.file.name for tensor in weights.tensors.values()}
        if others := _torch_files(folder) - used:
            weights.notes.append(f"weights are those of {name}; not read: {_list(others)}")
        return weights
    hint = ""
    if others := _torch_files(folder):
        hint = f"; to convert one of {_list(others)}, give the file itself"
    raise ValueError(f"{folder} has no {' nor '.join(NAMES)}, nor an index of shards{hint}")


def _torch_files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.suffix in TORCH_SUFFIXES}


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))


def _read_file(file: Path) -> Weights:
    if file.suffix == ".safetensors":
        return Weights(read_header(file), [])
    tensors, left_out = read_torch_file(file)
    return Weights(tensors, [f"{file.name}: left out {', '.join(left_out)}"] if left_out else [])


def _read_shards(index: Path) -> Weights:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise ValueError(f"{index.name}: weight_map does not map tensors to files beside it")
    files = sorted(set(weight_map.values()))
    if missing := [file for file in files if not (index.parent / file).is_file()]:
        raise ValueError(f"{index.name}: missing shards: {', '.join(missing)}")

    tensors: dict[str, StoredTensor] = {}
    notes: list[str] = []
    for file in files:
        shard = _read_file(index.parent / file)
        listed = {name for name, home in weight_map.items() if home == file}
        if absent := sorted(listed - shard.tensors.keys()):
            raise ValueError(f"{file}: lacks what {index.name} lists in it: {', '.join(absent)}")
        if extra := sorted(shard.tensors.keys() - listed):
            raise ValueError(f"{file}: holds what {index.name} does not list: {', '.join(extra)}")
        tensors |= shard.tensors
        notes += shard.notes
    return Weights(tensors, notes)
