"""Converting checkpoints of flash-linear-attention: what comes out, and what is refused."""

import json
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
import sentencepiece
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

import hgrn2_mlx
from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import convert
from hgrn2_mlx.convert.sentencepiece_model import convert_sentencepiece
from hgrn2_mlx.models.hgrn2 import Model, ModelArgs

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("hgrn2-default", "hgrn2-short-conv", "hgrn2-hybrid")
DEMO = Path(hgrn2_mlx.__file__).parent / "demo_checkpoint"

TINY = {
    "model_type": "hgrn2",
    "vocab_size": 400,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "expand_ratio": 32,
    "intermediate_size": 128,
}

ODD_TEXTS = [
    "The sun rises.",
    "  leading and trailing  ",
    "runs   of    spaces",
    "\n\nlines\n  indented\r\n\ttabs\n",
    "café naïve 你好 😀 👩‍👩‍👧 ﬁ ½ e\u0301",
    " ",
    "",
    "unseen: ЖЩЪ ༀ \x07",
    "<sep>a<sep> b <sep>",
]


def write_checkpoint(
    folder: Path, weights: dict[str, mx.array], config: dict, shards: int = 1
) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[shard::shards]}
        mx.save_safetensors(str(folder / file), part)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def torch_weights(config: dict, dtype: mx.Dtype = mx.float32) -> dict[str, mx.array]:
    """Random weights in torch's layout."""
    mx.random.seed(0)
    weights = {}
    for name, weight in tree_flatten(Model(ModelArgs.from_dict(config)).parameters()):
        shape = weight.shape
        if name.endswith("conv1d.weight"):
            shape = (shape[0], 1, shape[1])
        weights[name] = (0.1 * mx.random.normal(shape)).astype(dtype)
    return weights


def read_fixture(name: str) -> tuple[dict[str, mx.array], dict]:
    folder = FIXTURES / name
    return mx.load(str(folder / "model.safetensors")), json.loads(
        (folder / "config.json").read_text()
    )


def load(folder: Path) -> Model:
    model, _ = mlx_lm.utils.load_model(folder)
    return model


def logits_error(folder: Path, fixture: str) -> float:
    """Largest difference from the logits of flash-linear-attention."""
    expected = mx.load(str(FIXTURES / fixture / "expected.safetensors"))
    return mx.abs(load(folder)(expected["tokens"]) - expected["logits"]).max().item()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def train_sentencepiece(folder: Path, **settings) -> sentencepiece.SentencePieceProcessor:
    corpus = folder / "corpus.txt"
    lines = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    corpus.write_text("\n".join(lines)[:60_000], encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        minloglevel=2,
        **({"model_type": "bpe", "byte_fallback": True, "character_coverage": 0.99} | settings),
    )
    (folder / "tokenizer.vocab").unlink()
    corpus.unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# Converted folders.


@pytest.mark.parametrize("fixture", NAMES)
def test_converted_folder_computes_what_fla_computes(fixture, tmp_path):
    report = convert(FIXTURES / fixture, tmp_path / "mlx")
    assert logits_error(tmp_path / "mlx", fixture) < 1e-4
    weights, config = read_fixture(fixture)
    assert {record.name for record in report.tensors} == weights.keys()
    assert report.parameters == sum(weight.size for weight in weights.values())
    assert sum(report.layers.values()) == config["num_hidden_layers"]
    assert report.warnings == ["no tokenizer found: only the weights were converted"]
    written = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert written == config | {"model_file": "hgrn2.py"}


def test_sharded_checkpoint(tmp_path):
    source = write_checkpoint(tmp_path / "source", *read_fixture("hgrn2-short-conv"), shards=3)
    convert(source, tmp_path / "mlx")
    assert logits_error(tmp_path / "mlx", "hgrn2-short-conv") < 1e-4


def test_sharded_output(tmp_path):
    convert(FIXTURES / "hgrn2-hybrid", tmp_path / "mlx", shard_size=0)
    index = json.loads((tmp_path / "mlx" / "model.safetensors.index.json").read_text())
    assert "model-00048-of-00048.safetensors" in index["weight_map"].values()
    assert logits_error(tmp_path / "mlx", "hgrn2-hybrid") < 1e-4
    convert(tmp_path / "mlx", tmp_path / "again")
    assert logits_error(tmp_path / "again", "hgrn2-hybrid") < 1e-4


def test_dtype_is_kept_unless_asked_for(tmp_path):
    weights, config = read_fixture("hgrn2-short-conv")
    halved = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
    source = write_checkpoint(tmp_path / "source", halved, config)
    convert(source, tmp_path / "kept")
    kept = mx.load(str(tmp_path / "kept" / "model.safetensors"))
    assert {weight.dtype for weight in kept.values()} == {mx.bfloat16}

    convert(FIXTURES / "hgrn2-short-conv", tmp_path / "cast", dtype="float16")
    cast = mx.load(str(tmp_path / "cast" / "model.safetensors"))
    assert cast.pop("model.lower_bounds").dtype == mx.float32
    assert {weight.dtype for weight in cast.values()} == {mx.float16}
    assert json.loads((tmp_path / "cast" / "config.json").read_text())["dtype"] == "float16"


@pytest.mark.parametrize(
    "settings",
    [
        {"q_bits": 4},
        {"q_bits": 8, "q_group_size": 32},
        {"q_bits": 4, "dtype": "bfloat16"},
        {"q_mode": "mxfp4"},
    ],
)
def test_quantization_touches_only_embeddings_and_projections(tmp_path, settings):
    config = TINY | {"use_short_conv": True, "attnres_block_size": 2}
    weights = torch_weights(config)
    source = write_checkpoint(tmp_path / "source", weights, config)
    convert(source, tmp_path / "mlx", quantize=True, **settings)

    written = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    quantized = {name[: -len(".scales")] for name in written if name.endswith(".scales")}
    projections = re.compile(r"lm_head|.*\.(embeddings|[qfio]_proj|gate_proj|up_proj|down_proj)")
    assert quantized == {
        name[: -len(".weight")]
        for name in weights
        if projections.fullmatch(name.removesuffix(".weight"))
    }
    model = Model(ModelArgs.from_dict(config))
    dtype = mx.bfloat16 if "dtype" in settings else mx.float32
    protected = 0
    for name, weight in model.sanitize(weights).items():
        if name.removesuffix(".weight") not in quantized:
            expected = weight if name.endswith("lower_bounds") else weight.astype(dtype)
            assert written[name].dtype == expected.dtype
            assert mx.array_equal(written[name], expected), name
            protected += 1
    assert protected == 2 + 2 + 2 * (3 + 3 + 4)  # Final, bounds, and norms, convolutions, queries.

    assert mx.isfinite(load(tmp_path / "mlx")(mx.array([[1, 2, 3]]))).all()


def test_eight_bits_are_close(tmp_path):
    convert(FIXTURES / "hgrn2-default", tmp_path / "mlx", quantize=True, q_bits=8)
    expected = mx.load(str(FIXTURES / "hgrn2-default" / "expected.safetensors"))["logits"]
    error = logits_error(tmp_path / "mlx", "hgrn2-default")
    assert error < 0.05 * mx.abs(expected).max().item()


def test_tied_head_must_equal_the_embedding(tmp_path):
    config = TINY | {"tie_word_embeddings": True}
    weights = torch_weights(config)
    convert(write_checkpoint(tmp_path / "absent", weights, config), tmp_path / "mlx-absent")

    weights["lm_head.weight"] = weights["model.embeddings.weight"]
    repeated = write_checkpoint(tmp_path / "repeated", weights, config)
    report = convert(repeated, tmp_path / "mlx-repeated")
    assert report.tensors[-1].transform == "tied to the embedding"
    assert contents(tmp_path / "mlx-absent") == contents(tmp_path / "mlx-repeated")

    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    different = write_checkpoint(tmp_path / "different", weights, config)
    with pytest.raises(ValueError, match="lm_head.weight differs"):
        convert(different, tmp_path / "mlx-different")


def test_same_bytes_every_time(tmp_path):
    source = write_checkpoint(tmp_path / "source", torch_weights(TINY), TINY)
    train_sentencepiece(source)
    for name in ("first", "second"):
        convert(source, tmp_path / name, quantize=True)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_command_accepts_both_spellings_and_stock_mlx_lm_runs_the_folder(tmp_path, capsys):
    source = write_checkpoint(tmp_path / "source", torch_weights(TINY), TINY)
    train_sentencepiece(source)
    assert main(["convert", "--hf-path", str(source), "--mlx-path", str(tmp_path / "a")]) == 0
    assert main(["convert", str(source), str(tmp_path / "b"), "-q"]) == 0
    output, errors = capsys.readouterr()
    assert "model.layers.*.attn.q_proj.weight" in output
    assert errors == ""
    stock = [sys.executable, "-m", "mlx_lm", "generate", "--trust-remote-code"]
    result = subprocess.run(
        [*stock, "--model", tmp_path / "b", "--prompt", "import", "--max-tokens", "4"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Generation: " in result.stdout


# Tokenizers.


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"normalization_rule_name": "identity", "user_defined_symbols": ["\n", "<sep>"]},
        {"add_dummy_prefix": False},
        {"model_type": "unigram"},
        {"byte_fallback": False},
    ],
)
def test_sentencepiece_ids_and_streamed_text(tmp_path, settings):
    source = write_checkpoint(tmp_path / "source", torch_weights(TINY), TINY)
    original = train_sentencepiece(source, **settings)
    assert convert(source, tmp_path / "mlx").tokenizer == "tokenizer.model"

    _, tokenizer = mlx_lm.load(tmp_path / "mlx")
    assert (tmp_path / "mlx" / "tokenizer.model").exists()
    assert tokenizer.eos_token_id == original.eos_id()
    detokenizer = tokenizer.detokenizer
    assert isinstance(detokenizer, SPMStreamingDetokenizer)
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == original.encode(text)
        if original.unk_id() in ids:
            continue  # sentencepiece decodes it as a symbol of its own.
        assert tokenizer.decode(ids) == original.decode(ids)
        detokenizer.reset()
        for token in ids:
            detokenizer.add_token(token)
        detokenizer.finalize()
        # mlx-lm's detokenizer drops every leading space, not only the one of the prefix.
        assert detokenizer.text.lstrip(" ") == original.decode(ids).lstrip(" ")


def test_tokenizer_json_is_taken_as_it_is(tmp_path):
    source = write_checkpoint(tmp_path / "source", torch_weights(TINY), TINY)
    train_sentencepiece(source, normalization_rule_name="identity", remove_extra_whitespaces=False)
    original = convert_sentencepiece(source / "tokenizer.model")
    original.save(str(source / "tokenizer.json"))
    # With this class transformers would rebuild it, and change what leading spaces give.
    config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "add_bos_token": False}
    (source / "tokenizer_config.json").write_text(json.dumps(config))

    assert convert(source, tmp_path / "mlx").tokenizer == "tokenizer.json"
    _, tokenizer = mlx_lm.load(tmp_path / "mlx")
    for text in ODD_TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text).ids


def test_embedded_checkpoint_converts(tmp_path):
    convert(DEMO, tmp_path / "mlx")
    _, tokenizer = mlx_lm.load(tmp_path / "mlx")
    original = sentencepiece.SentencePieceProcessor(model_file=str(DEMO / "tokenizer.model"))
    for text in ODD_TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text)


# Refusals: one line, nothing left behind.


@pytest.fixture
def refusal(tmp_path, capsys):
    """Converts, and gives the one line by which that is refused."""

    def refusal(source: Path | str, *options: str, destination: Path | None = None) -> str:
        destination = destination or tmp_path / "output" / "mlx"
        if destination.parent == tmp_path / "output":
            destination.parent.mkdir(exist_ok=True)
        before = sorted(tmp_path.rglob("*"))
        assert main(["convert", str(source), str(destination), *options]) == 1
        output, errors = capsys.readouterr()
        assert output == ""
        assert errors.startswith("hgrn2: error: ") and errors.count("\n") == 1, errors
        assert sorted(tmp_path.rglob("*")) == before
        return errors

    return refusal


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(FIXTURES / "hgrn2-default", tmp_path / "source")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_weights(folder: Path, edit) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    edit(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def edit_header(folder: Path, edit) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data[8 + size :]
    )


def test_refuses_what_is_not_a_checkpoint(tmp_path, refusal, checkpoint):
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")
    assert "not a file of torch.save" in refusal(checkpoint / "config.json")
    assert "does not exist" in refusal(tmp_path / "absent")
    (checkpoint / "config.json").write_text("<!DOCTYPE html><html></html>")
    assert "config.json is not JSON" in refusal(checkpoint)
    (checkpoint / "config.json").write_bytes(b"\x80\x02}q\x00.")
    assert "not text" in refusal(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    assert "does not hold a JSON object" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"rotary_dim": 3}, "unknown key 'rotary_dim'"),
        ({"quantization": {"bits": 4}}, "quantized already"),
        ({"hidden_size": "many"}, "hidden_size: expected a whole number, got 'many'"),
        ({"model_type": ["hgrn2"]}, "model_type is ['hgrn2']"),
    ],
)
def test_refuses_other_configs(refusal, checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    assert message in refusal(checkpoint)


def test_refuses_truncated_files(refusal, checkpoint):
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    for size in (len(data) - 1, len(data) // 2, 100, 3, 0):
        file.write_bytes(data[:size])
        assert "model.safetensors is truncated" in refusal(checkpoint)
    file.write_bytes(data + b"\0")
    assert "model.safetensors is corrupt" in refusal(checkpoint)
    file.unlink()
    assert "has no model.safetensors" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("dtype", "F12", "unknown dtype 'F12'"),
        ("dtype", ["F32"], "makes no sense"),
        ("dtype", "F64", "is corrupt"),
        ("shape", [64], "is corrupt"),
        ("shape", [-128], "makes no sense"),
        ("shape", 128, "makes no sense"),
        ("data_offsets", [0, 1 << 60], "is corrupt"),
        ("data_offsets", [512, 1024], "is corrupt"),
        ("data_offsets", [0], "makes no sense"),
    ],
)
def test_refuses_corrupt_headers(refusal, checkpoint, key, value, message):
    edit_header(checkpoint, lambda header: header["model.norm.weight"].update({key: value}))
    assert message in refusal(checkpoint)


def test_refuses_headers_that_are_not_json(refusal, checkpoint):
    for prefix in (b"\xff" * 8, struct.pack("<Q", 4) + b"spam", struct.pack("<Q", 2) + b"[]"):
        (checkpoint / "model.safetensors").write_bytes(prefix + bytes(64))
        assert "is corrupt" in refusal(checkpoint)


def test_refuses_shards_that_contradict_their_index(tmp_path, refusal):
    source = write_checkpoint(tmp_path / "source", *read_fixture("hgrn2-default"), shards=2)
    second = "model-00002-of-00002.safetensors"
    index = source / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    unlisted = {name: file for name, file in weight_map.items() if name != "model.norm.weight"}
    index.write_text(json.dumps({"weight_map": unlisted}))
    assert "does not list: model.norm.weight" in refusal(source)
    index.write_text(json.dumps({"weight_map": weight_map | {"spam": second}}))
    assert "lists in it: spam" in refusal(source)
    index.write_text(json.dumps({"weight_map": weight_map | {"spam": "../spam"}}))
    assert "files beside it" in refusal(source)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (source / second).unlink()
    assert f"missing shards: {second}" in refusal(source)


def test_names_every_tensor_that_does_not_fit(refusal, checkpoint):
    def edit(weights):
        for layer in (0, 2):
            del weights[f"model.layers.{layer}.attn.q_proj.weight"]
        weights["model.layers.1.attn.k_proj.weight"] = mx.zeros((4, 2))
        weights["model.norm.weight"] = mx.ones(64)
        weights["lm_head.weight"] = weights["lm_head.weight"].astype(mx.int32)

    edit_weights(checkpoint, edit)
    message = refusal(checkpoint)
    assert "missing (2): model.layers.{0,2}.attn.q_proj.weight [128, 128];" in message
    assert "unexpected (1): model.layers.1.attn.k_proj.weight [4, 2];" in message
    assert "wrong shape (1): model.norm.weight [64] instead of [128];" in message
    assert "neither float16, bfloat16 nor float32 (1): lm_head.weight I32" in message


def test_refuses_nan_and_infinity(refusal, checkpoint):
    def edit(weights):
        weights["model.norm.weight"][3] = float("nan")
        for layer in (1, 2):
            weights[f"model.layers.{layer}.mlp.up_proj.weight"][:2, 0] = float("-inf")

    edit_weights(checkpoint, edit)
    message = refusal(checkpoint)
    assert "model.norm.weight (1 of 128)" in message
    assert "model.layers.{1,2}.mlp.up_proj.weight (2 of " in message


def test_refuses_overflow_of_the_dtype_asked_for(refusal, checkpoint):
    edit_weights(
        checkpoint, lambda weights: weights.update({"model.norm.weight": mx.full(128, 1e5)})
    )
    message = refusal(checkpoint, "--dtype", "float16")
    assert "beyond the range" in message and "model.norm.weight (128 of 128)" in message


def test_refuses_tokenizers_that_do_not_fit(tmp_path, refusal, checkpoint):
    train_sentencepiece(checkpoint)
    assert "tokenizer.model has ids up to 399, but config.json's vocab_size is 97" in refusal(
        checkpoint
    )
    # sentencepiece leaves such symbols alone, tokenizers would normalise the line end first.
    train_sentencepiece(checkpoint, user_defined_symbols=["\n"])
    assert "tokenizer.model cannot be converted: '\\n'" in refusal(checkpoint)
    (checkpoint / "tokenizer.model").write_bytes(b"<!DOCTYPE html>")
    assert "not a sentencepiece model" in refusal(checkpoint)
    (checkpoint / "tokenizer.json").write_text("{}")
    assert "tokenizer.json cannot be read" in refusal(checkpoint)


def test_refuses_impossible_quantization(tmp_path, refusal, checkpoint):
    narrow = TINY | {"intermediate_size": 64}
    source = write_checkpoint(tmp_path / "narrow", torch_weights(narrow), narrow)
    assert "nothing can be quantized" in refusal(source, "-q", "--q-group-size", "128")
    assert "bits" in refusal(checkpoint, "-q", "--q-bits", "9")
    assert "need --quantize" in refusal(checkpoint, "--q-bits", "4")
    assert "need --quantize" in refusal(checkpoint, "--q-mode", "mxfp4")
    assert "go with neither" in refusal(checkpoint, "--to-pytorch", "--q-mode", "mxfp4")
    assert "--q-bits must be at least 1" in refusal(checkpoint, "-q", "--q-bits", "0")
    assert "--q-group-size must be" in refusal(checkpoint, "-q", "--q-group-size", "0")


def test_refuses_outputs_that_cannot_be_written(tmp_path, refusal, checkpoint, monkeypatch):
    assert "exists already" in refusal(checkpoint, destination=checkpoint)
    below_a_file = checkpoint / "config.json" / "mlx"
    assert "Not a directory" in refusal(checkpoint, destination=below_a_file)
    assert "No such file" in refusal(checkpoint, destination=tmp_path / "absent" / "mlx")
    assert "cannot make /proc/mlx" in refusal(checkpoint, destination=Path("/proc/mlx"))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert "no room" in refusal(checkpoint)


def test_debug_shows_the_traceback(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "mlx"), "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


# Interrupted half way, in a process of its own.


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory) -> Path:
    """Takes most of a second to convert, which leaves time to interrupt it."""
    config = TINY | {"hidden_size": 512, "num_hidden_layers": 10, "intermediate_size": 1536}
    folder = tmp_path_factory.mktemp("large") / "source"
    yield write_checkpoint(folder, torch_weights(config), config)
    shutil.rmtree(folder)


def start_conversion(source: Path, destination: Path, before_start=None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "hgrn2_mlx", "convert", str(source), str(destination), "-q"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=before_start,
    )


def default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_interrupted_half_way(tmp_path, large_checkpoint, number):
    process = start_conversion(large_checkpoint, tmp_path / "mlx", default_signals)
    while not (half_written := list(tmp_path.glob(".*/model.safetensors"))):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    output, errors = process.communicate()
    assert output == ""
    assert not (tmp_path / "mlx").exists()
    if number == signal.SIGKILL:
        assert half_written[0].exists()  # Nobody was left to remove it.
        return
    assert process.returncode == 128 + number
    assert errors == "hgrn2: error: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_disk_full(tmp_path, large_checkpoint):
    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    process = start_conversion(large_checkpoint, tmp_path / "mlx", limit_file_size)
    output, errors = process.communicate()
    assert (process.returncode, output) == (1, "")
    assert errors == "hgrn2: error: File too large\n"
    assert list(tmp_path.iterdir()) == []
