"""A checkpoint's files as ``torch.save`` writes them, read without torch and without running them.

Such a file is a zip archive with one folder: ``data.pkl`` is a pickle of the saved
value, in which tensors are views of storages, and ``data/KEY`` are the storages'
bytes. The pickle is read as data (pickle_data.py), so a file can do no more than
describe tensors; only their descriptions are read here.
"""

import itertools
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .pickle_data import read_pickle
from .stored_tensor import DTYPES, StoredTensor
from .zip_records import Record, read_records

# What follows "torch." in the names of dtypes, and in those of storages (torch.FloatStorage).
TORCH_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}
STORAGES = {
    "Float": "F32",
    "Double": "F64",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
}

# Where training loops put a model's state dict in a larger checkpoint.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "module")
MAX_NESTING = 3
MAX_DESCRIBED = 20  # Of the values beside a state dict.

# Far more than the descriptions of a checkpoint's tensors take.
MAX_PICKLE_SIZE = 4_000_000
MAX_DIMENSIONS = 32  # NumPy's limit.
MAX_LENGTH = 2**31 - 1  # MLX's limit for one dimension.

SAVE_AGAIN = "load it with torch and save it again: torch.save(state_dict, 'pytorch_model.bin')"


class TorchFile(NamedTuple):
    """What a file holds.

    Args:
        tensors: The model's state dict, by names as they are in the file.
        left_out: What else it holds and how many tensors there are in that:
            ``"'optimizer' (12 tensors)"``.
    """

    tensors: dict[str, StoredTensor]
    left_out: list[str]


def read_torch_file(file: Path) -> TorchFile:
    """The state dict that ``torch.save`` wrote, by itself or within a training checkpoint.

    Raises:
        ValueError: If the file is of another format, truncated, corrupt, holds no state
            dict, or wants to run code.
        OSError: If it cannot be read.
    """
    _check_format(file)
    try:
        archive = _Archive.open(file)
        state_dict, outside = _find_state_dict(archive.read_pickle())
        tensors = {name: _locate(archive, name, tensor) for name, tensor in state_dict.items()}
    except ValueError as error:
        raise ValueError(f"{file.name} cannot be read: {error}") from None
    return TorchFile(tensors, _describe(outside))


def _check_format(file: Path) -> None:
    """Tells formats apart by their first bytes, and says what can be done about the others."""
    with open(file, "rb") as stream:
        start = stream.read(512)
    if start.startswith(b"PK\3\4"):
        return
    if (0x1950A86A20F9469CFC6C).to_bytes(10, "little") in start[:32]:
        problem = f"is in the format of torch before 1.6; {SAVE_AGAIN}"
    elif start[257:262] == b"ustar":
        problem = f"is in the tar format of torch before 0.1.10; {SAVE_AGAIN}"
    elif start.startswith(b"\x80"):
        problem = f"is a pickle, but not of torch.save; {SAVE_AGAIN}"
    elif start.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer: the weights themselves were not downloaded (git lfs pull)"
    elif not start.strip(b"\0"):
        problem = "is empty"
    else:
        problem = f"is not a file of torch.save: it begins with {start[:20]!r}"
    raise ValueError(f"{file.name} {problem}")


# What the pickle's values stand for.


@dataclass(frozen=True, eq=False)
class _Storage:
    """Numbers in a row, in the archive's ``data/KEY``; bytes if ``dtype`` is ``"U8"``."""

    key: str
    dtype: str
    size: int


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage, as the pickle describes it: nothing is checked yet but types."""

    storage: _Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any


@dataclass(frozen=True, eq=False)
class _Dtype:
    """What ``torch.FloatStorage`` and ``torch.float32`` name."""

    name: str


def _rebuild_tensor(*arguments: Any) -> _Tensor:
    match arguments:
        case (_Storage() as storage, offset, shape, strides, _, _, *_):
            return _Tensor(storage, storage.dtype, offset, shape, strides)
    raise ValueError("its pickle is corrupt: a tensor without its storage")


def _rebuild_tensor_with_dtype(*arguments: Any) -> _Tensor:
    """For dtypes that have no storage class: the storage is one of bytes."""
    match arguments:
        case (_Storage(dtype="U8") as storage, offset, shape, strides, _, _, _Dtype(dtype), *_):
            size, rest = divmod(storage.size, DTYPES[dtype].size)
            if rest == 0:
                typed = _Storage(storage.key, dtype, size)
                return _Tensor(typed, dtype, offset, shape, strides)
    raise ValueError("its pickle is corrupt: a tensor without its storage")


def _rebuild_parameter(*arguments: Any) -> _Tensor:
    match arguments:
        case (_Tensor() as tensor, *_):
            return tensor
    raise ValueError("its pickle is corrupt: a parameter without its tensor")


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise ValueError("its pickle is corrupt: an OrderedDict that does not begin empty")
    return {}


def _size(*arguments: Any) -> tuple[Any, ...]:
    match arguments:
        case (tuple(shape),):
            return shape
    raise ValueError("its pickle is corrupt: a torch.Size of something else than a tuple")


def _device(*arguments: Any) -> None:
    return None  # Where a tensor was is of no interest.


def _resolve(reference: Any) -> _Storage:
    match reference:
        case ("storage", _Dtype(dtype), str(key), _, int(size)):
            return _Storage(key, dtype, size)
    raise ValueError("its pickle is corrupt: it refers to something else than a storage")


NAMES = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_with_dtype,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.storage.UntypedStorage": _Dtype("U8"),
    **{f"torch.{name}Storage": _Dtype(dtype) for name, dtype in STORAGES.items()},
    **{f"torch.{name}": _Dtype(dtype) for name, dtype in TORCH_DTYPES.items()},
}


class _Archive(NamedTuple):
    """The zip archive: its files, by their names without the folder that all are in."""

    file: Path
    records: dict[str, Record]

    @classmethod
    def open(cls, file: Path) -> "_Archive":
        records = read_records(file)
        folders = {name.partition("/")[0] for name in records}
        inside = {name.partition("/")[2]: record for name, record in records.items()}
        archive = cls(file, inside)
        if "constants.pkl" in inside:
            raise ValueError(
                "it is a TorchScript program, not weights; in torch, save "
                "torch.jit.load(file).state_dict()"
            )
        if len(folders) != 1 or "data.pkl" not in inside:
            raise ValueError("it is a zip archive, but not one of torch.save")
        if any(record.compressed for record in inside.values()):
            raise ValueError(
                "it is compressed, which torch.save never does; unpack it and zip it again "
                "without compression (zip -0)"
            )
        if "byteorder" in inside and (order := archive.read("byteorder", 16)) != b"little":
            raise ValueError(f"it was written on a machine with byte order {order!r}; {SAVE_AGAIN}")
        return archive

    def read(self, name: str, limit: int) -> bytes:
        record = self.records[name]
        if record.size > limit:
            raise ValueError(f"it is corrupt: {name} in it has {record.size} bytes")
        with open(self.file, "rb") as stream:
            stream.seek(record.offset)
            return stream.read(record.size)

    def read_pickle(self) -> Any:
        return read_pickle(self.read("data.pkl", MAX_PICKLE_SIZE), NAMES, _resolve)


def _find_state_dict(value: Any) -> tuple[dict[Any, Any], list[tuple[Any, Any]]]:
    """The dictionary with the model's tensors, and the items that are outside of it."""
    outside: list[tuple[Any, Any]] = []
    for _ in range(MAX_NESTING):
        if not isinstance(value, dict):
            break
        inner = [key for key in STATE_DICT_KEYS if isinstance(value.get(key), dict)]
        if not inner:
            break
        outside += [item for item in value.items() if item[0] != inner[0]]
        value = value[inner[0]]
    if not isinstance(value, dict) or not any(isinstance(v, _Tensor) for v in value.values()):
        keys = ", ".join(STATE_DICT_KEYS)
        raise ValueError(f"it holds no state dict, neither by itself nor under {keys}")
    tensors = {key: item for key, item in value.items() if isinstance(item, _Tensor)}
    return tensors, outside + [item for item in value.items() if item[0] not in tensors]


def _describe(items: list[tuple[Any, Any]]) -> list[str]:
    """Keys, with how many tensors are in their values."""
    seen: set[int] = set()
    described = []
    for key, value in items[:MAX_DESCRIBED]:
        count = _count_tensors(value, seen)
        tensors = f" ({count} tensor{'s' * (count > 1)})" if count else ""
        described.append(f"{str(key)[:100]!r}{tensors}")
    if len(items) > MAX_DESCRIBED:
        described.append(f"{len(items) - MAX_DESCRIBED} more")
    return described


def _count_tensors(value: Any, seen: set[int]) -> int:
    """Each tensor counts once: pickles can hold a value in many places, even within itself."""
    count = 0
    pending = [value]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        count += isinstance(item, _Tensor)
        if isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, list | tuple):
            pending.extend(item)
    return count


def _locate(archive: _Archive, name: Any, tensor: _Tensor) -> StoredTensor:
    """Where a tensor lies, after checking that it does."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 1000:
        raise ValueError(f"it is corrupt: a tensor is named {str(name)[:100]!r}")
    storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
    if not (
        isinstance(shape, tuple)
        and isinstance(strides, tuple)
        and all(type(number) is int and number >= 0 for number in (offset, *shape, *strides))
        and len(shape) == len(strides) <= MAX_DIMENSIONS
        and max(shape, default=0) <= MAX_LENGTH
    ):
        raise ValueError(f"it is corrupt: shape, strides or offset of {name} make no sense")

    path = f"data/{storage.key[:100]}"
    if path not in archive.records:
        raise ValueError(f"it is corrupt: {name} lies in {path!r}, which it does not hold")
    record = archive.records[path]
    item_size = DTYPES[tensor.dtype].size
    if record.size != storage.size * item_size:
        raise ValueError(
            f"it is corrupt: {name} lies in {path!r}, which has {record.size} bytes instead of "
            f"{item_size} for each of {storage.size} numbers"
        )
    size = math.prod(shape)
    if size == 0:
        return StoredTensor(archive.file, tensor.dtype, shape, record.offset)
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if last >= storage.size:
        raise ValueError(
            f"it is corrupt: {name} reaches to number {last} of {path!r}, which has {storage.size}"
        )
    if size > storage.size:  # A few bytes could stand for any amount of memory.
        raise ValueError(
            f"{name} repeats {storage.size} numbers to {size} (expand); save it with .contiguous()"
        )
    start = record.offset + offset * item_size
    in_order = itertools.accumulate(reversed(shape), operator.mul, initial=1)
    steps = zip(reversed(shape), reversed(strides), in_order, strict=False)
    if all(n == 1 or stride == expected for n, stride, expected in steps):
        return StoredTensor(archive.file, tensor.dtype, shape, start)
    # Where there is no next index, the stride may be any number.
    strides = tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))
    return StoredTensor(archive.file, tensor.dtype, shape, start, strides)
