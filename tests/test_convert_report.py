"""The report of a conversion, its check, and what it says of tokenizers."""

import hashlib
import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Tokenizer, GPTNeoXTokenizer

from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import check, convert, fla_on_cpu
from hgrn2_mlx.convert.writer import SHARD_SIZE

FIXTURES = Path(__file__).parent / "fixtures"
DEFAULT = FIXTURES / "hgrn2-default"
SHORT_CONV = FIXTURES / "hgrn2-short-conv"
VOCAB_SIZE = 97  # Of the fixtures.

TEXTS = ["The lamp, the lamp!", "  two  spaces\n\n", "naïve ½ e\u0301 你好 😀", "", " x"]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return shutil.copytree(DEFAULT, tmp_path / "source")


def edit_json(file: Path, **changes) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


def stored_checksums(file: Path) -> dict[str, str]:
    """SHA-256 of each tensor's bytes as they lie in a safetensors file."""
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in header.items()}
    return {
        name: hashlib.sha256(data[8 + size + start : 8 + size + stop]).hexdigest()
        for name, (start, stop) in spans.items()
    }


def train_byte_level_bpe(folder: Path, **config) -> None:
    """``vocab.json`` and ``merges.txt`` as GPT-2 has them, for a vocabulary of 300."""
    tokenizer = ByteLevelBPETokenizer()
    lines = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    tokenizer.train_from_iterator(lines, vocab_size=300, special_tokens=["<|endoftext|>"])
    tokenizer.save_model(str(folder))
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>", **config)


def enlarge_vocabulary(folder: Path, vocab_size: int) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    for name in ("model.embeddings.weight", "lm_head.weight"):
        weights[name] = mx.random.normal((vocab_size, weights[name].shape[1]))
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    edit_json(folder / "config.json", vocab_size=vocab_size)


# The report.


@pytest.mark.parametrize("options", [[], ["--dtype", "bfloat16"], ["-q", "--q-bits", "8"]])
def test_report_accounts_for_every_byte(tmp_path, capsys, options):
    file = tmp_path / "report.json"
    command = ["convert", str(SHORT_CONV), str(tmp_path / "mlx"), *options]
    assert main([*command, "--report", str(file)]) == 0
    assert "model.layers.*.attn.q_conv1d.weight" in capsys.readouterr().out

    report = json.loads(file.read_text())
    sources = {record["name"]: record["checksum"] for record in report["tensors"]}
    assert sources == stored_checksums(SHORT_CONV / "model.safetensors")
    outputs = [output for record in report["tensors"] for output in record["outputs"]]
    written = {output["name"]: output["checksum"] for output in outputs}
    assert written == stored_checksums(tmp_path / "mlx" / "model.safetensors")
    convolution = next(r for r in report["tensors"] if r["name"].endswith("q_conv1d.weight"))
    assert convolution["transform"] == "transposed"
    assert convolution["shape"] == [64, 1, 4] and convolution["outputs"][0]["shape"] == [64, 4, 1]
    assert report["dialect"] == "flash-linear-attention" and "hgrn2" in report["reason"]
    assert {"python", "hgrn2-mlx", "mlx", "mlx-lm"} <= report["versions"].keys()
    assert report["source_size"] > 0 and report["tokenizer"] is None


def test_report_that_cannot_be_written(tmp_path, capsys):
    for file in (tmp_path, tmp_path / "absent" / "report.json"):
        command = ["convert", str(DEFAULT), str(tmp_path / "mlx"), "--report", str(file)]
        assert main(command) == 1
        assert capsys.readouterr().err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_leaves_no_report(tmp_path, checkpoint, capsys):
    (checkpoint / "model.safetensors").unlink()
    report = tmp_path / "report.json"
    report.write_text("of an earlier conversion")
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(checkpoint), str(tmp_path / "mlx"), "--report", str(report)]) == 1
    assert sorted(tmp_path.iterdir()) == before
    assert report.read_text() == "of an earlier conversion"


def test_shard_size(tmp_path):
    megabyte = 1 / 1024
    for name in ("first", "second"):
        convert(DEFAULT, tmp_path / name, shard_size=megabyte)
    files = sorted((tmp_path / "first").glob("model-*.safetensors"))
    sizes = [sum(w.nbytes for w in mx.load(str(file)).values()) for file in files]
    assert len(files) > 2 and max(sizes) <= 1 << 20
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()
    assert SHARD_SIZE == mlx_lm.utils.MAX_FILE_SIZE_GB
    with pytest.raises(ValueError, match="makes no sense"):
        convert(DEFAULT, tmp_path / "mlx", shard_size=-1)


# The check.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "quantize": True},
        {"quantize": True, "q_mode": "mxfp8"},
        {"shard_size": 0},
    ],
)
def test_what_was_converted_passes_its_check(tmp_path, options):
    convert(SHORT_CONV, tmp_path / "mlx", **options)
    report = check(SHORT_CONV, tmp_path / "mlx")
    assert report.differences == []
    assert report.tensors == sum(
        len(stored_checksums(file)) for file in (tmp_path / "mlx").glob("*.safetensors")
    )


def test_every_difference_is_listed(tmp_path, checkpoint, capsys):
    edit_json(checkpoint / "generation_config.json", eos_token_id=2)
    folder = tmp_path / "mlx"
    convert(checkpoint, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    for layer in (0, 1):
        weights[f"model.layers.{layer}.attn.q_proj.weight"][:2, 0] += 1
        del weights[f"model.layers.{layer}.mlp_norm.weight"]
    weights["spam"] = mx.zeros(3)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
    weights["lm_head.weight"] = weights["lm_head.weight"].astype(mx.bfloat16)
    weights["model.embeddings.weight"] = weights["model.embeddings.weight"].astype(mx.float16)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "model.safetensors.index.json").unlink()  # It lists the two.
    edit_json(folder / "config.json", norm_eps=0.1)
    (folder / "generation_config.json").unlink()
    (folder / "hgrn2.py").write_text("spam")

    assert main(["convert", "--check", str(checkpoint), str(folder)]) == 1
    output, errors = capsys.readouterr()
    assert errors == f"hgrn2: error: {folder} is not what {checkpoint} becomes\n"
    assert output.splitlines() == [
        "missing (2): model.layers.{0,1}.mlp_norm.weight [128]",
        "unexpected (1): spam [3]",
        "wrong shape (1): model.norm.weight [127] instead of [128]",
        "wrong dtype (2): model.embeddings.weight F16 instead of float32, "
        "lm_head.weight BF16 instead of float32",
        "other values (2): model.layers.{0,1}.attn.q_proj.weight (2 of 16,384)",
        "config.json: norm_eps is 0.1 instead of 1e-06",
        "generation_config.json: missing",
        "hgrn2.py: other content",
    ]


def test_one_flipped_bit_of_a_quantized_weight_is_found(tmp_path):
    convert(DEFAULT, tmp_path / "mlx", quantize=True, q_bits=8)
    file = tmp_path / "mlx" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (difference,) = check(DEFAULT, tmp_path / "mlx").differences
    assert difference.startswith("other values (1): ") and "(1 of " in difference


def test_a_check_writes_and_changes_nothing(tmp_path, capsys):
    convert(DEFAULT, tmp_path / "mlx")
    for option in (["-q"], ["--dtype", "float16"], ["--report", "r.json"], ["--shard-size", "1"]):
        assert main(["convert", "--check", str(DEFAULT), str(tmp_path / "mlx"), *option]) == 1
        assert "--check" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "mlx"]


@pytest.mark.parity
@pytest.mark.skipif(not fla_on_cpu.is_installed(), reason="needs the parity extra")
@pytest.mark.parametrize("fixture", ["hgrn2-short-conv", "hgrn2-hybrid"])
def test_check_runs_both_models_where_fla_is_installed(tmp_path, fixture, capsys):
    convert(FIXTURES / fixture, tmp_path / "mlx")
    assert main(["convert", "--check", str(FIXTURES / fixture), str(tmp_path / "mlx")]) == 0
    result = capsys.readouterr().out.splitlines()[-1]
    assert float(result.removeprefix("largest difference of logits: ")) < 1e-4


# Tokenizers and special tokens.


@pytest.mark.parametrize("original", [GPT2Tokenizer, GPTNeoXTokenizer])
@pytest.mark.parametrize("prefix", [False, True])
def test_byte_level_vocabulary(tmp_path, checkpoint, original, prefix):
    enlarge_vocabulary(checkpoint, 320)
    train_byte_level_bpe(checkpoint, tokenizer_class=original.__name__, add_prefix_space=prefix)
    report = convert(checkpoint, tmp_path / "mlx")
    assert report.tokenizer == "vocab.json" and report.rows_without_token == 20

    _, tokenizer = mlx_lm.load(tmp_path / "mlx")
    expected = original(
        str(checkpoint / "vocab.json"), str(checkpoint / "merges.txt"), add_prefix_space=prefix
    )
    assert tokenizer.eos_token_id == 0
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == expected.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(ids) == expected.decode(ids)


def test_added_tokens_of_a_byte_level_vocabulary(tmp_path, checkpoint, capsys):
    enlarge_vocabulary(checkpoint, 320)
    train_byte_level_bpe(checkpoint)
    edit_json(checkpoint / "added_tokens.json", **{"<|user|>": 300, "<|model|>": 301})
    assert convert(checkpoint, tmp_path / "mlx").rows_without_token == 18
    _, tokenizer = mlx_lm.load(tmp_path / "mlx")
    assert tokenizer.encode("<|model|><|user|>", add_special_tokens=False) == [301, 300]

    edit_json(checkpoint / "added_tokens.json", **{"<|model|>": 400})
    assert main(["convert", str(checkpoint), str(tmp_path / "other")]) == 1
    assert "'<|model|>' has the id 400" in capsys.readouterr().err
    (checkpoint / "merges.txt").write_text("spam spam spam\n")
    assert main(["convert", str(checkpoint), str(tmp_path / "other")]) == 1
    assert "vocab.json and merges.txt cannot be read" in capsys.readouterr().err


def test_the_tokenizer_wins_over_other_files(tmp_path, checkpoint, capsys):
    enlarge_vocabulary(checkpoint, 320)
    train_byte_level_bpe(checkpoint, bos_token={"content": "<|endoftext|>"}, pad_token="<pad>")
    edit_json(checkpoint / "config.json", eos_token_id=50256, bos_token_id=0, pad_token_id=1)
    edit_json(checkpoint / "generation_config.json", eos_token_id=[5, 0], bos_token_id=7)
    assert main(["convert", str(checkpoint), str(tmp_path / "mlx")]) == 0
    output, warnings = capsys.readouterr()
    output = " ".join(output.split())  # However wide the terminal is.
    assert "tokenizer: vocab.json (20 rows of the embedding have no token)" in output
    assert warnings.splitlines() == [
        "hgrn2: warning: the tokenizer's pad token '<pad>' is not in its vocabulary",
        "hgrn2: warning: generation_config.json: bos_token_id is 7, "
        "the tokenizer's '<|endoftext|>' is 0: 0 was written",
        "hgrn2: warning: config.json: eos_token_id is 50256, "
        "the tokenizer's '<|endoftext|>' is 0: 0 was written",
    ]
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == (0, 0, 1)
    generation = json.loads((tmp_path / "mlx" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [5, 0], "bos_token_id": 0}
    assert check(checkpoint, tmp_path / "mlx").differences == []


def test_conflicts_that_no_tokenizer_settles(tmp_path, checkpoint):
    edit_json(checkpoint / "config.json", eos_token_id=VOCAB_SIZE, bos_token_id=1)
    edit_json(checkpoint / "generation_config.json", eos_token_id=2, bos_token_id=1)
    report = convert(checkpoint, tmp_path / "mlx")
    assert report.warnings == [
        "config.json: eos_token_id is 97, but vocab_size is 97",
        "eos_token_id is 97 in config.json, 2 in generation_config.json, "
        "and no tokenizer says which: both were kept",
        "no tokenizer found: only the weights were converted",
    ]


def test_a_broken_generation_config_is_refused(tmp_path, checkpoint, capsys):
    (checkpoint / "generation_config.json").write_text("spam")
    assert main(["convert", str(checkpoint), str(tmp_path / "mlx")]) == 1
    assert "generation_config.json is not JSON" in capsys.readouterr().err
