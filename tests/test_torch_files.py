"""Files of ``torch.save``, read without torch: bit for bit, and nothing in them ever run.

The files in fixtures/torch_files were written by torch (make.py there).
"""

import hashlib
import io
import json
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import convert
from hgrn2_mlx.convert.safetensors_files import read_header
from hgrn2_mlx.convert.torch_files import read_torch_file
from hgrn2_mlx.convert.weight_files import read_weights

FIXTURES = Path(__file__).parent / "fixtures"
FILES = FIXTURES / "torch_files"
VALID = ("dtypes.bin", "views.bin", "state_dict.pt", "protocol_4.pt", "nested.pth", "training.ckpt")
MODEL = FIXTURES / "hgrn2-default"


def bits(array: mx.array) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, bytes(memoryview(mx.flatten(array).view(mx.uint8)))


# Files that torch wrote.


@pytest.mark.parametrize("source", [*VALID, "sharded"])
def test_reads_every_bit(source):
    expected = {
        name.removeprefix(f"{source}:"): tensor
        for name, tensor in read_header(FILES / "expected.safetensors").items()
        if name.startswith(f"{source}:")
    }
    tensors = read_weights(FILES / source).tensors
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == expected[name].dtype, name
        assert bits(tensor.load()) == bits(expected[name].load()), name
        assert tensor.shape == expected[name].shape, name


def test_views_stay_views_until_they_are_loaded():
    tensors = read_torch_file(FILES / "views.bin").tensors
    assert tensors["tied"] == tensors["whole"]
    assert tensors["offset"].offset == tensors["whole"].offset + 2 * 8 * 5 * 4
    assert tensors["transposed"].strides == (1, 40, 5)
    assert tensors["offset"].strides is tensors["scalar"].strides is None


def test_says_what_it_leaves_out():
    assert read_weights(FILES / "state_dict.pt").notes == []
    left_out = "'epoch', 'optimizer' (9 tensors), 'losses' (1 tensor), 'device', 'dtype', 'size'"
    assert read_weights(FILES / "training.ckpt").notes == [
        f"training.ckpt: left out {left_out}",
        "left out of the tensors' names: module",
    ]


def test_prefers_safetensors(tmp_path):
    source = shutil.copytree(MODEL, tmp_path / "source")
    shutil.copy(FILES / "state_dict.pt", source / "pytorch_model.bin")
    shutil.copy(FILES / "state_dict.pt", source / "optimizer.pt")
    assert read_weights(source).notes == [
        "weights are those of model.safetensors; not read: optimizer.pt, pytorch_model.bin"
    ]
    (source / "model.safetensors").unlink()
    weights = read_weights(source)
    assert weights.tensors.keys() == read_torch_file(FILES / "state_dict.pt").tensors.keys()
    assert weights.notes == ["weights are those of pytorch_model.bin; not read: optimizer.pt"]


def test_command_says_in_one_line_what_is_wrong(tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(MODEL / "config.json", source)
    marker = tmp_path / "marker"

    def refusal(name: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main(["convert", str(source / name), str(tmp_path / "mlx")]) == 1
        assert sorted(tmp_path.rglob("*")) == before
        output, errors = capsys.readouterr()
        assert output == "" and errors.count("\n") == 1
        return errors

    assert "nor an index of shards\n" in refusal(".")
    write_archive(source / "evil.bin", call("os.system", f"touch {marker}"))
    assert "evil.bin cannot be read: it wants to run 'os.system'" in refusal("evil.bin")
    shutil.copy(FILES / "legacy.bin", source)
    assert "legacy.bin is in the format of torch before 1.6; load it" in refusal("legacy.bin")
    assert "to convert one of evil.bin, legacy.bin, give the file itself" in refusal(".")


# Archives made here: what torch writes, and what it does not.


def write_archive(file: Path, pickled: bytes, storages: dict[str, bytes] | None = None, **extra):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in extra.items():
            archive.writestr(f"archive/{name}", data)
    return file


class Raw(bytes):
    """Opcodes that stand for a value."""


def opcodes(value: object) -> bytes:
    """A value in opcodes of protocol 2; numbers of any size."""
    match value:
        case Raw():
            return bytes(value)
        case None:
            return pickle.NONE
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            digits = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return pickle.LONG1 + bytes([len(digits)]) + digits
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return pickle.MARK + b"".join(map(opcodes, value)) + pickle.TUPLE
        case dict():
            items = b"".join(opcodes(key) + opcodes(item) for key, item in value.items())
            return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    raise TypeError(value)


def name(dotted: str) -> Raw:
    module, _, attribute = dotted.rpartition(".")
    return Raw(pickle.GLOBAL + f"{module}\n{attribute}\n".encode())


def reduce(dotted: str, *arguments: object) -> Raw:
    return Raw(name(dotted) + opcodes(arguments) + pickle.REDUCE)


def tensor(
    shape=(2, 3), strides=(3, 1), offset=0, size=6, key="0", storage="torch.FloatStorage"
) -> Raw:
    reference = opcodes(("storage", name(storage), key, "cpu", size))
    storage = Raw(reference + pickle.BINPERSID)
    hooks = reduce("collections.OrderedDict")
    return reduce("torch._utils._rebuild_tensor_v2", storage, offset, shape, strides, False, hooks)


def pickled(value: object) -> bytes:
    return pickle.PROTO + b"\x02" + opcodes(value) + pickle.STOP


SIX_FLOATS = {"0": np.arange(6, dtype=np.float32).tobytes()}


def test_archives_of_these_tests_are_valid(tmp_path):
    file = write_archive(tmp_path / "a.bin", pickled({"weight": tensor()}), SIX_FLOATS)
    array = read_torch_file(file).tensors["weight"].load()
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_converts_to_the_same_bytes_as_safetensors(tmp_path):
    convert(MODEL, tmp_path / "expected")
    weights = mx.load(str(MODEL / "model.safetensors"))
    file = write_model(tmp_path / "single" / "pytorch_model.bin", weights)
    convert(file.parent, tmp_path / "from-folder")

    shutil.copy(MODEL / "config.json", tmp_path)
    convert(file.rename(tmp_path / "step_1000.pt"), tmp_path / "from-file")

    weight_map = {}
    for number in (1, 2):
        shard = {name: weights[name] for name in sorted(weights)[number - 1 :: 2]}
        file = write_model(tmp_path / "sharded" / f"pytorch_model-0000{number}-of-2.bin", shard)
        weight_map |= dict.fromkeys(shard, file.name)
    index = file.with_name("pytorch_model.bin.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    convert(file.parent, tmp_path / "from-shards")

    expected = contents(tmp_path / "expected")
    for folder in ("from-folder", "from-file", "from-shards"):
        assert contents(tmp_path / folder) == expected


def write_model(file: Path, weights: dict[str, mx.array]) -> Path:
    """A file of float32 weights, with the model's config beside it."""
    file.parent.mkdir(exist_ok=True)
    shutil.copy(MODEL / "config.json", file.parent)
    tensors, storages = {}, {}
    for key, (weight, array) in enumerate(weights.items()):
        strides = tuple(size // 4 for size in np.asarray(array).strides)
        tensors[weight] = tensor(array.shape, strides, 0, array.size, str(key))
        storages[str(key)] = bits(array)[2]
    return write_archive(file, pickled(tensors), storages)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"shape": (3, 3)}, "reaches to number 8 of 'data/0', which has 6"),
        ({"offset": 1}, "reaches to number 6"),
        ({"strides": (1 << 70, 1)}, "reaches to number"),
        ({"shape": (1 << 40, 3)}, "make no sense"),
        ({"shape": (1 << 30,), "strides": (0,)}, "repeats 6 numbers to 1073741824"),
        ({"shape": (-1, 3)}, "make no sense"),
        ({"strides": (-3, 1)}, "make no sense"),
        ({"offset": -1}, "make no sense"),
        ({"strides": (1,)}, "make no sense"),
        ({"shape": (1,) * 33, "strides": (1,) * 33}, "make no sense"),
        ({"shape": "ab"}, "make no sense"),
        ({"shape": (True, 3)}, "make no sense"),
        ({"key": "1"}, "'data/1', which it does not hold"),
        ({"key": "../data.pkl"}, "which it does not hold"),
        ({"size": 7}, "24 bytes instead of 4 for each of 7 numbers"),
        ({"size": -6}, "24 bytes instead of"),
        ({"storage": "torch.DoubleStorage"}, "24 bytes instead of 8 for each"),
        ({"storage": "torch.QInt8Storage"}, "wants to run 'torch.QInt8Storage'"),
    ],
)
def test_refuses_tensors_that_are_not_in_their_storage(tmp_path, view, message):
    file = write_archive(tmp_path / "a.bin", pickled({"weight": tensor(**view)}), SIX_FLOATS)
    with pytest.raises(ValueError, match="a.bin cannot be read: ") as error:
        read_torch_file(file)
    assert message in str(error.value)


def test_refuses_archives_that_torch_does_not_write(tmp_path):
    def refusal(edit: Callable[[Path], object]) -> str:
        file = tmp_path / "a.bin"
        write_archive(file, pickled({"weight": tensor()}), SIX_FLOATS)
        edit(file)
        with pytest.raises(ValueError, match="^a.bin ") as error:
            read_torch_file(file)
        return str(error.value)

    def rewrite(compression=zipfile.ZIP_STORED, **files: bytes) -> Callable[[Path], None]:
        def edit(file: Path) -> None:
            with zipfile.ZipFile(file, "w", compression) as archive:
                for member, data in files.items():
                    archive.writestr(member, data)

        return edit

    def append(*members: str) -> Callable[[Path], None]:
        def edit(file: Path) -> None:
            with zipfile.ZipFile(file, "a") as archive:
                for member in members:
                    archive.writestr(member, b"big")

        return edit

    def patch(old: bytes, new: bytes) -> Callable[[Path], None]:
        def edit(file: Path) -> None:
            data = file.read_bytes()
            assert old in data
            file.write_bytes(data.replace(old, new))

        return edit

    def tar(file: Path) -> None:
        with tarfile.open(file, "w") as archive:
            archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())

    pickle_only = {"archive/data.pkl": pickled({"weight": tensor()})}
    assert "one of torch.save" in refusal(rewrite(**{"a/b": b""}))
    assert "one of torch.save" in refusal(append("elsewhere/data/0"))
    assert "TorchScript" in refusal(append("archive/constants.pkl"))
    assert "byte order b'big'" in refusal(append("archive/byteorder"))
    assert "compressed" in refusal(rewrite(zipfile.ZIP_DEFLATED, **pickle_only))
    for outside in ("../a", "/a", "archive/../../a", "archive//a", "archive\\..\\a"):
        assert "outside of the archive" in refusal(append(outside))
    with pytest.warns(UserWarning, match="Duplicate"):
        assert "twice" in refusal(append("archive/data/0"))
    directory = b"PK\1\2\x14\3\x14\0"  # Then come the flags.
    assert "encrypted" in refusal(patch(directory + b"\0", directory + b"\1"))
    assert "has two sizes" in refusal(patch(struct.pack("<2L", 24, 24), struct.pack("<2L", 24, 4)))
    lie = struct.pack("<2L", 240, 240)
    assert "runs into what follows" in refusal(patch(struct.pack("<2L", 24, 24), lie))
    assert "not where its directory says" in refusal(swap_names)
    assert "without its end" in refusal(lambda file: file.write_bytes(file.read_bytes()[:-30]))
    assert "behind its end" in refusal(lambda file: file.write_bytes(file.read_bytes() + b"\0"))
    assert "tar format of torch before 0.1.10" in refusal(tar)
    assert "a pickle, but not of torch.save" in refusal(lambda file: file.write_bytes(pickled({})))
    assert "is empty" in refusal(lambda file: file.write_bytes(b""))
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    assert "Git LFS pointer" in refusal(lambda file: file.write_bytes(pointer))
    assert "begins with b'<html>'" in refusal(lambda file: file.write_bytes(b"<html>"))


def swap_names(file: Path) -> None:
    """The directory's first name is not that of the file that it points to."""
    data = file.read_bytes()
    first, rest = data.split(b"PK\1\2", 1)
    file.write_bytes(first + b"PK\1\2" + rest.replace(b"archive/data.pkl", b"archive/data.pkx", 1))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"epoch": 3}, "holds no state dict"),
        (3, "holds no state dict"),
        ({"model": {"model": {"model": {"model": {"weight": tensor()}}}}}, "holds no state dict"),
        ({"a\x1b[31m": tensor()}, "a tensor is named 'a\\x1b[31m'"),
        ({3: tensor()}, "a tensor is named '3'"),
        ({(1, 2): 3}, "keys that state dicts do not have"),
        ({1 << 61: 3}, "keys that state dicts do not have"),
        (reduce("torch._utils._rebuild_tensor_v2", 1, 2), "a tensor without its storage"),
        (reduce("torch._utils._rebuild_parameter", 1), "a parameter without its tensor"),
        (reduce("torch.FloatStorage", 1 << 60), "calls what is no function"),
        (reduce("collections.OrderedDict", ((1, 2),)), "does not begin empty"),
        (Raw(opcodes(("module", "archive")) + pickle.BINPERSID), "else than a storage"),
        (Raw(pickle.EMPTY_DICT + pickle.NONE + pickle.REDUCE), "calls what is no function"),
        (Raw(pickle.BINGET + b"\7"), "values that it does not have"),
        (Raw(pickle.POP), "values that it does not have"),
        (Raw(pickle.EXT1 + b"\1"), "opcode EXT1"),
        (Raw(pickle.BINUNICODE8 + b"\xff" * 8), ""),
        (Raw(pickle.BINUNICODE + b"\xff" * 4), ""),
        (Raw(pickle.LONG4 + b"\xff\xff\xff\x7f"), ""),
        (Raw(pickle.FRAME + b"\xff" * 8 + b"]"), "holds no state dict"),
    ],
)
def test_refuses_pickles_of_anything_else(tmp_path, value, message):
    file = write_archive(tmp_path / "a.bin", pickled(value), SIX_FLOATS)
    with pytest.raises(ValueError, match="a.bin cannot be read: ") as error:
        read_torch_file(file)
    assert message in str(error.value)


def test_values_within_themselves_and_exponential_ones(tmp_path):
    dup = pickle.BINPUT + b"\0" + pickle.BINGET + b"\0"
    cycle = Raw(pickle.EMPTY_LIST + dup + pickle.APPEND)
    doubled = pickle.EMPTY_LIST
    for i in range(200):  # 2 to the power of 200 leaves, were they counted one by one.
        doubled += pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + pickle.TUPLE2
    deep = Raw(pickle.EMPTY_TUPLE + pickle.TUPLE1 * 200_000)
    value = {"weight": tensor(), "cycle": cycle, "doubled": Raw(doubled), "deep": deep}
    file = write_archive(tmp_path / "a.bin", pickled(value), SIX_FLOATS)
    assert read_torch_file(file).left_out == ["'cycle'", "'doubled'", "'deep'"]
    many = pickled({"weight": tensor()} | dict.fromkeys(map(str, range(1000))))
    left_out = read_torch_file(write_archive(file, many, SIX_FLOATS)).left_out
    assert left_out[0] == "'0'" and left_out[-1] == "980 more"


# Code in pickles.

AUDITED = {"exec", "compile", "import", "os.system", "os.posix_spawn", "subprocess.Popen"}
AUDITED |= {"os.exec", "os.fork", "os.remove", "pickle.find_class", "socket.connect"}
recording: list[str] | None = None


def audit(event: str, arguments: tuple) -> None:
    if recording is not None and event in AUDITED:
        recording.append(f"{event} {arguments[0] if arguments else ''}")


sys.addaudithook(audit)


@contextmanager
def nothing_run() -> Iterator[None]:
    """Python itself reports what is imported, looked up, executed or started meanwhile."""
    global recording
    recording = events = []
    try:
        yield
    finally:
        recording = None
    assert events == []


# What a pickle must not call, with an argument that could make the file {}.
FORBIDDEN = {
    "os.system": "touch {}",
    "posix.system": "touch {}",
    "nt.system": "touch {}",
    "builtins.eval": "open('{}', 'w')",
    "builtins.exec": "open('{}', 'w')",
    "builtins.open": "{}",
    "builtins.getattr": "{}",
    "subprocess.Popen": "{}",
    "subprocess.check_output": "{}",
    "importlib.import_module": "{}",
    "runpy.run_path": "{}",
    "shutil.rmtree": "{}",
    "pickle.loads": "{}",
    "torch.load": "{}",
    "torch.hub.load": "{}",
    "torch.jit.load": "{}",
    "torch._utils._rebuild_qtensor": "{}",
    "torch._utils._rebuild_tensor_v2.__globals__": "{}",
    "torch.serialization.os.system": "touch {}",
    "numpy.core.multiarray._reconstruct": "{}",
    "numpy.fromfile": "{}",
    "collections.OrderedDict.fromkeys": "{}",
    "collections.defaultdict": "{}",
    "hgrn2_mlx.cli.main": "{}",
    "_codecs.encode": "{}",
    "operator.attrgetter": "{}",
    "__builtin__.apply": "{}",
}


def call(dotted: str, argument: str, way: str = "REDUCE") -> bytes:
    """A pickle that calls ``dotted`` with one argument, in one of the ways there are."""
    module, _, attribute = dotted.rpartition(".")
    function, result = name(dotted), reduce(dotted, argument)
    stacked = opcodes(module) + opcodes(attribute) + pickle.STACK_GLOBAL
    text = opcodes(argument)
    arguments = text + pickle.TUPLE1
    instance = pickle.INST + f"{module}\n{attribute}\n".encode()
    state = opcodes({"__setstate__": function}) + pickle.BUILD + text + pickle.BUILD
    programs = {
        "REDUCE": result,
        "STACK_GLOBAL": stacked + arguments + pickle.REDUCE,
        "INST": pickle.MARK + text + instance,
        "OBJ": pickle.MARK + function + text + pickle.OBJ,
        "NEWOBJ": function + arguments + pickle.NEWOBJ,
        "NEWOBJ_EX": stacked + arguments + pickle.EMPTY_DICT + pickle.NEWOBJ_EX,
        "BUILD": reduce("collections.OrderedDict") + state,
        "BINPERSID": opcodes(("storage", function, "0", "cpu", 6)) + pickle.BINPERSID,
        "in a state dict": opcodes({"weight": tensor(), "optimizer": {"state": result}}),
        "in a parameter": reduce("torch._utils._rebuild_parameter", tensor(), False, result),
    }
    return pickled(Raw(programs[way]))


CALLS = ["REDUCE", "STACK_GLOBAL", "INST", "OBJ"]
OTHER_WAYS = ["NEWOBJ", "NEWOBJ_EX", "BUILD", "BINPERSID", "in a state dict", "in a parameter"]


@pytest.mark.parametrize("way", CALLS + OTHER_WAYS)
@pytest.mark.parametrize("dotted", FORBIDDEN)
def test_refuses_code_by_name(tmp_path, dotted, way):
    program = call(dotted, FORBIDDEN[dotted].format(tmp_path / "marker"), way)
    file = write_archive(tmp_path / "a.bin", program, SIX_FLOATS)
    with nothing_run(), pytest.raises(ValueError) as error:
        read_torch_file(file)
    assert f"a.bin cannot be read: it wants to run {dotted!r}" in str(error.value)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("way", CALLS)
def test_the_same_pickles_do_run_when_they_are_unpickled(tmp_path, way):
    """So that the test above proves something."""
    marker = tmp_path / "marker"
    with pytest.raises(AssertionError, match="find_class"), nothing_run():
        pickle.loads(call("os.system", f"touch {marker}", way))
    assert marker.exists()


# Malformed files, hundreds of them.

malformed = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
valid_files = st.sampled_from(VALID)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("malformed") / "a.bin"


def read_or_refuse(file: Path) -> str | None:
    """Reads all that the file holds; or gives the one line by which it is refused."""
    started, before = time.monotonic(), peak_memory()
    refusal = None
    with nothing_run():
        try:
            for tensor in read_torch_file(file).tensors.values():
                mx.eval(tensor.load())
        except ValueError as error:
            refusal = str(error)
            assert refusal.startswith("a.bin ") and "\n" not in refusal and len(refusal) < 3000
    assert time.monotonic() - started < 5
    assert peak_memory() - before < 100_000_000
    return refusal


def peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@settings(malformed, max_examples=200)
@given(
    valid=valid_files, flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1)
)
def test_flipped_bits(file, valid, flips):
    flipped = bytearray((FILES / valid).read_bytes())
    for position, bits in flips:
        flipped[position % len(flipped)] ^= bits
    file.write_bytes(flipped)
    read_or_refuse(file)


@settings(malformed, max_examples=100)
@given(
    valid=valid_files, cut=st.tuples(st.integers(0, 8000), st.integers(0, 8000)), end=st.booleans()
)
def test_truncated_files_and_files_with_holes(file, valid, cut, end):
    data = (FILES / valid).read_bytes()
    start, stop = sorted(position % len(data) for position in cut)
    rest = b"" if end else data[stop:]
    file.write_bytes(data[:start] + rest)
    if start < stop:
        assert read_or_refuse(file) is not None


numbers = st.one_of(
    st.integers(-2, 8), st.integers(), st.sampled_from([1 << 31, 1 << 63, 1 << 900])
)


@settings(malformed, max_examples=200)
@given(
    shape=st.lists(numbers, max_size=4),
    strides=st.lists(numbers, max_size=4),
    offset=numbers,
    size=st.one_of(st.just(6), numbers),
)
def test_absurd_tensors(file, shape, strides, offset, size):
    weight = tensor(tuple(shape), tuple(strides), offset, size)
    write_archive(file, pickled({"weight": weight}), SIX_FLOATS)
    read_or_refuse(file)


def opcode_list() -> list[bytes]:
    """All opcodes, and what stands in a state dict's pickle."""
    names = ["torch._utils._rebuild_tensor_v2", "torch.FloatStorage", "collections.OrderedDict"]
    values = [None, True, 0, 6, "0", "storage", (2, 3), {"model": 1}, 1 << 900]
    single = [bytes([code]) for code in range(256)]
    return single + [opcodes(value) for value in values] * 8 + [name(n) for n in names] * 8


@settings(malformed, max_examples=300)
@given(
    before=st.lists(st.sampled_from(opcode_list()), max_size=12),
    between=st.lists(st.sampled_from(opcode_list()), max_size=6),
    cut=st.integers(0, 200),
)
def test_wrong_opcodes(file, before, between, cut):
    valid = pickled({"weight": tensor()})
    program = b"".join(before) + valid[:cut] + b"".join(between) + valid[cut:]
    write_archive(file, program, SIX_FLOATS)
    read_or_refuse(file)


@settings(malformed, max_examples=150)
@given(
    valid=valid_files,
    where=st.integers(0, 300),
    number=st.one_of(st.integers(0, 0xFFFFFFFF), st.sampled_from([0, 0xFFFF, 0xFFFFFFFF])),
)
def test_lies_in_the_directory(file, valid, where, number):
    data = (FILES / valid).read_bytes()
    position = len(data) - 4 - where
    file.write_bytes(data[:position] + struct.pack("<L", number) + data[position + 4 :])
    read_or_refuse(file)


# Files that torch writes now, read by a process in which it cannot be imported.

WITHOUT_TORCH = """
import hashlib, json, sys
from pathlib import Path
sys.modules["torch"] = None
import mlx.core as mx
from hgrn2_mlx.convert.weight_files import read_weights
tensors = read_weights(Path(sys.argv[1])).tensors
digests = {
    name: [list(tensor.shape), hashlib.sha256(tensor.load().flatten().view(mx.uint8)).hexdigest()]
    for name, tensor in tensors.items()
}
print(json.dumps(digests))
try:
    import torch
except ImportError:
    sys.exit(7)
"""


def read_without_torch(source: Path) -> dict[str, list]:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(source)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 7, process.stderr
    return json.loads(process.stdout)


def digests(state_dict: dict) -> dict[str, list]:
    import torch

    return {
        name: [
            list(value.shape),
            hashlib.sha256(value.detach().flatten().view(torch.uint8).numpy()).hexdigest(),
        ]
        for name, value in state_dict.items()
    }


@pytest.fixture(scope="module")
def state_dict():
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'hgrn2-mlx[parity]'")
    load_file = pytest.importorskip("safetensors.torch").load_file
    state_dict = load_file(MODEL / "model.safetensors")
    halves = (torch.bfloat16, torch.float16, torch.float32)
    return {name: x.to(halves[i % 3]) for i, (name, x) in enumerate(state_dict.items())}


def write_single(torch, folder, state_dict):
    torch.save(state_dict, folder / "pytorch_model.bin")


def write_sharded(torch, folder, state_dict):
    weight_map = {}
    for number in (1, 2, 3):
        file = f"pytorch_model-0000{number}-of-00003.bin"
        shard = {name: state_dict[name] for name in list(state_dict)[number - 1 :: 3]}
        torch.save(shard, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_nested(torch, folder, state_dict):
    torch.save({"step": 7, "model": state_dict}, folder / "pytorch_model.bin")


def write_wrapped(torch, folder, state_dict):
    wrapped = {f"module._orig_mod.{name}": value for name, value in state_dict.items()}
    torch.save({"state_dict": wrapped}, folder / "pytorch_model.bin")


def write_views(torch, folder, state_dict):
    """The same values, in storages that they share, transposed and apart."""
    views = {}
    for name, value in state_dict.items():
        storage = torch.zeros(*value.shape[::-1], 2, dtype=value.dtype)
        view = storage[..., 1].permute(*reversed(range(value.dim())))
        views[name] = view.copy_(value)
    torch.save(views, folder / "pytorch_model.bin")


def write_with_optimizer(torch, folder, state_dict):
    parameters = [torch.nn.Parameter(value.float().clone()) for value in state_dict.values()]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    checkpoint = {
        "model": {name: torch.nn.Parameter(value) for name, value in state_dict.items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": {"last_epoch": scheduler.last_epoch},
        "rng": torch.get_rng_state(),
    }
    torch.save(checkpoint, folder / "pytorch_model.bin", pickle_protocol=4)


WRITERS = [write_single, write_sharded, write_nested, write_wrapped, write_views]
WRITERS += [write_with_optimizer]


@pytest.mark.parity
@pytest.mark.parametrize("write", WRITERS)
def test_what_torch_writes_is_read_without_it(tmp_path, state_dict, write):
    import torch

    write(torch, tmp_path, state_dict)
    assert read_without_torch(tmp_path) == digests(state_dict)


@pytest.mark.parity
def test_tied_and_tagged_tensors_of_a_module(tmp_path, state_dict):
    import torch

    embedding, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    module = torch.nn.ModuleDict({"embedding": embedding, "head": head})
    module.register_buffer("steps", torch.tensor(3))
    torch.save(module.state_dict(), tmp_path / "a.pth")
    assert read_without_torch(tmp_path / "a.pth") == digests(module.state_dict())
    tensors = read_torch_file(tmp_path / "a.pth").tensors
    assert tensors["embedding.weight"] == tensors["head.weight"]

    torch.save(module, tmp_path / "module.pt")  # Not its state dict: this pickles the class.
    with pytest.raises(ValueError, match="wants to run 'torch.nn.modules.container.ModuleDict'"):
        read_torch_file(tmp_path / "module.pt")
    torch.save(state_dict, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="torch before 1.6"):
        read_torch_file(tmp_path / "old.bin")


@pytest.mark.parity
@pytest.mark.parametrize("write", WRITERS)
def test_converts_what_torch_writes_to_the_same_bytes(tmp_path, state_dict, write):
    import torch
    from safetensors.torch import save_file

    for folder in ("safetensors", "torch"):
        (tmp_path / folder).mkdir()
        shutil.copy(MODEL / "config.json", tmp_path / folder)
    save_file(state_dict, tmp_path / "safetensors" / "model.safetensors")
    write(torch, tmp_path / "torch", state_dict)
    for folder in ("safetensors", "torch"):
        convert(tmp_path / folder, tmp_path / f"{folder}-mlx")
    assert contents(tmp_path / "torch-mlx") == contents(tmp_path / "safetensors-mlx")
