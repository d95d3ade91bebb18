"""From an MLX folder back to a checkpoint of flash-linear-attention."""

import json
import shutil
import struct
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

import hgrn2_mlx
from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import check, convert, export, fla_on_cpu
from hgrn2_mlx.fuse import fuse

FIXTURES = Path(__file__).parent / "fixtures"
DEMO = Path(hgrn2_mlx.__file__).parent / "demo_checkpoint"
NAMES = ("hgrn-default", "hgrn2-default", "hgrn2-short-conv", "hgrn2-hybrid")


def read_weights(folder: Path) -> dict[str, mx.array]:
    weights = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))
    return weights


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def assert_same_bits(weights: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert (weight.dtype, weight.shape) == (expected[name].dtype, expected[name].shape), name
        assert mx.array_equal(weight.view(mx.uint8), expected[name].view(mx.uint8)), name


def metadata(file: Path) -> dict:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size])["__metadata__"]


@pytest.fixture
def source(tmp_path):
    """Copies of a fixture's checkpoint alone, its weights in another dtype or edited."""

    def source(fixture: str, edit=lambda weights: weights, **config) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        weights = edit(mx.load(str(FIXTURES / fixture / "model.safetensors")))
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        content = read_config(FIXTURES / fixture) | config
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return source


@pytest.mark.parametrize("fixture", NAMES)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_round_trip_keeps_every_bit(tmp_path, source, fixture, dtype):
    original = source(fixture, lambda weights: {n: w.astype(dtype) for n, w in weights.items()})
    convert(original, tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), read_weights(original))
    assert read_config(tmp_path / "back") == read_config(original)
    assert metadata(tmp_path / "back" / "model.safetensors") == {"format": "pt"}
    assert not list((tmp_path / "back").glob("*.py"))
    assert check(tmp_path / "mlx", tmp_path / "back", to_pytorch=True).differences == []


def test_round_trip_of_settings_and_tokenizer(tmp_path):
    convert(DEMO, tmp_path / "mlx")
    command = ["convert", "--to-pytorch", "--model", str(tmp_path / "mlx")]
    assert main([*command, "--save-path", str(tmp_path / "back")]) == 0
    assert_same_bits(read_weights(tmp_path / "back"), read_weights(DEMO))
    assert read_config(tmp_path / "back") == read_config(DEMO)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "mlx" / name).read_bytes()
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == generation


def test_tied_checkpoint(tmp_path, source):
    def tie(weights):
        del weights["lm_head.weight"]
        return weights

    original = source("hgrn2-default", tie, tie_word_embeddings=True)
    convert(original, tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "back")
    assert_same_bits(read_weights(tmp_path / "back"), read_weights(original))


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_quantized_folders_are_dequantized(tmp_path, mode):
    fixture = FIXTURES / "hgrn2-short-conv"
    convert(fixture, tmp_path / "mlx", quantize=True, q_mode=mode)
    report = export(tmp_path / "mlx", tmp_path / "back")
    transforms = {record.name: record.transform for record in report.tensors}
    assert transforms["model.layers.0.attn.q_proj.scales"] == "dequantized"

    model, config = mlx_lm.utils.load_model(tmp_path / "mlx")
    expected = dict(tree_flatten(mlx_lm.utils.dequantize_model(model).parameters()))
    written = read_weights(tmp_path / "back")
    assert written.keys() == mx.load(str(fixture / "model.safetensors")).keys()
    for name, weight in written.items():
        assert weight.dtype == mx.float32
        assert mx.array_equal(weight.reshape(expected[name].shape), expected[name]), name
    assert "quantization" in config
    assert read_config(tmp_path / "back") == read_config(fixture)


def test_a_fused_adapter_is_in_the_weights(tmp_path):
    convert(DEMO, tmp_path / "mlx")
    model, _ = mlx_lm.load(tmp_path / "mlx")
    model.freeze()
    settings = {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["attn.q_proj", "mlp.up_proj"]}
    linear_to_lora_layers(model, -1, settings)
    for name, module in model.named_modules():
        if hasattr(module, "lora_b"):
            mx.random.seed(len(name))
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    adapted = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), adapted)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": settings})
    )
    fuse(tmp_path / "mlx", adapter, tmp_path / "fused")
    export(tmp_path / "fused", tmp_path / "back")
    written, original = read_weights(tmp_path / "back"), read_weights(DEMO)
    assert written.keys() == original.keys()
    changed = {name for name in written if not mx.array_equal(written[name], original[name])}
    assert changed == {
        f"model.layers.{layer}.{key}.weight" for layer in range(6) for key in settings["keys"]
    }
    assert read_config(tmp_path / "back") == read_config(DEMO)


def test_shards_are_deterministic(tmp_path):
    convert(FIXTURES / "hgrn2-default", tmp_path / "mlx", quantize=True)
    for name in ("first", "second"):
        export(tmp_path / "mlx", tmp_path / name, shard_size=1 / 1024)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert "model-00004-of-00004.safetensors" in files
    for name in files:
        content = (tmp_path / "first" / name).read_bytes()
        assert content == (tmp_path / "second" / name).read_bytes()
        if name.startswith("model-"):
            assert metadata(tmp_path / "first" / name) == {"format": "pt"}


# What is refused: one line, nothing left behind.


@pytest.fixture
def refusal(tmp_path, capsys):
    def refusal(folder: Path, *options: str) -> str:
        before = sorted(tmp_path.iterdir())
        command = ["convert", "--to-pytorch", str(folder), str(tmp_path / "back"), *options]
        assert main(command) == 1
        output, errors = capsys.readouterr()
        assert output == "" and errors.startswith("hgrn2: error: ") and errors.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
        return errors

    return refusal


def test_refuses_a_model_that_fla_cannot_compute(tmp_path, refusal):
    convert(FIXTURES / "official-small-bin", tmp_path / "mlx")
    message = refusal(tmp_path / "mlx")
    assert "flash-linear-attention cannot compute this model" in message
    assert "recurrence_scale" in message


def test_refuses_quantized_weights_whose_parts_do_not_fit(tmp_path, refusal):
    convert(FIXTURES / "hgrn2-default", tmp_path / "mlx", quantize=True)
    config = read_config(tmp_path / "mlx")

    def with_quantization(quantization: dict | None) -> Path:
        changed = {k: v for k, v in config.items() if not k.startswith("quantization")}
        if quantization is not None:
            changed["quantization"] = quantization
        (tmp_path / "mlx" / "config.json").write_text(json.dumps(changed))
        return tmp_path / "mlx"

    message = refusal(with_quantization({"group_size": 64, "bits": 8}))
    assert "quantized with 8 bits in groups of 64, but its parts do not fit together" in message
    for quantization in (None, {}, {"group_size": "64", "bits": 4}, {"group_size": 0, "bits": 4}):
        message = refusal(with_quantization(quantization))
        assert "config.json: quantization does not say how" in message
    odd = {"group_size": 64, "bits": 4, "mode": "spam"}
    assert "spam" in refusal(with_quantization(odd))


def test_refuses_other_options(tmp_path, refusal):
    convert(FIXTURES / "hgrn2-default", tmp_path / "mlx")
    for option in (["-q"], ["--dtype", "float16"]):
        assert "--to-pytorch" in refusal(tmp_path / "mlx", *option)
    shutil.rmtree(tmp_path / "mlx")
    assert "does not exist" in refusal(tmp_path / "mlx")


# Real flash-linear-attention.


@pytest.mark.parity
@pytest.mark.skipif(not fla_on_cpu.is_installed(), reason="needs the parity extra")
@pytest.mark.parametrize("fixture", NAMES)
def test_fla_loads_it_strictly_and_computes_the_same(tmp_path, fixture):
    """The logits are those that fla computed before the round trip, to the bit or nearly."""
    from safetensors.torch import load_file

    convert(FIXTURES / fixture, tmp_path / "mlx")
    export(tmp_path / "mlx", tmp_path / "back")
    model = fla_on_cpu.load_model(tmp_path / "back")
    model.load_state_dict(load_file(tmp_path / "back" / "model.safetensors"), strict=True)

    expected = mx.load(str(FIXTURES / fixture / "expected.safetensors"))
    tokens = expected["tokens"][:1, :24]
    logits = fla_on_cpu.logits(tmp_path / "back", tokens)
    assert mx.abs(logits - expected["logits"][:1, :24]).max().item() < 1e-5
    ours, _ = mlx_lm.utils.load_model(tmp_path / "mlx")
    assert mx.abs(logits - ours(tokens)).max().item() < 1e-4
