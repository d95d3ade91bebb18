"""hgrn2 info: what a model takes, against what it takes when it runs."""

import json

import mlx.core as mx
import pytest
from conftest import FIXTURES, NAMES, load_reference
from mlx.utils import tree_flatten

from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import convert
from hgrn2_mlx.info import read_info

ROOT = FIXTURES.parents[1]


def write_config(folder, **config):
    file = folder / "config.json"
    file.write_text(json.dumps(config))
    return file


def test_the_published_model(tmp_path):
    """fla-hub/hgrn2-1.3B-100B: 244 tensors of 1,364,396,032 numbers in bfloat16."""
    before = mx.get_active_memory()
    info = read_info(write_config(tmp_path, model_type="hgrn2", torch_dtype="bfloat16"))
    assert (info.parameters, info.weight_bytes) == (1_364_396_032, 2_728_792_064)
    assert info.state_bytes == 24 * 16 * 128 * 128 * 4
    assert info.bytes_per_token == 0
    assert mx.get_active_memory() - before < 1e6


@pytest.mark.parametrize("expand_ratio", [2**n for n in range(8)])
def test_a_larger_state_has_no_more_parameters(tmp_path, expand_ratio):
    """The paper's point (arXiv 2404.07904, section 3): the outer product adds state only."""
    size = {"hidden_size": 128, "num_hidden_layers": 3, "vocab_size": 100}
    hgrn = read_info(write_config(tmp_path, model_type="hgrn", **size))
    info = read_info(write_config(tmp_path, model_type="hgrn2", expand_ratio=expand_ratio, **size))
    assert info.parameters == hgrn.parameters
    assert info.state_bytes == expand_ratio * hgrn.state_bytes


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_those_of_a_running_model(name):
    model = load_reference(name).model
    info = read_info(FIXTURES / name)
    arrays = [array for _, array in tree_flatten(model.parameters())]
    assert info.parameters == sum(array.size for array in arrays)
    assert info.weight_bytes == sum(array.nbytes for array in arrays)

    cache = model.make_cache()
    model(mx.arange(20)[None], cache)
    for layer, layer_cache in zip(info.layers, cache, strict=True):
        if layer.kind == "attention":
            keys, values = layer_cache.keys[..., :20, :], layer_cache.values[..., :20, :]
            assert (layer.state_bytes, layer.window) == (0, layer_cache.max_size)
            assert 20 * layer.bytes_per_token == keys.nbytes + values.nbytes
        else:
            assert (layer.state_bytes, layer.bytes_per_token) == (layer_cache.nbytes, 0)


def test_attention_without_a_window_grows_with_the_text(tmp_path):
    attention = {"layers": [1], "num_heads": 8, "num_kv_heads": 2}
    file = write_config(
        tmp_path, model_type="hgrn2", hidden_size=256, num_hidden_layers=2, attn=attention,
        dtype="bfloat16",
    )  # fmt: skip
    info = read_info(file)
    assert [layer.kind for layer in info.layers] == ["recurrent", "attention"]
    assert info.bytes_per_token == 2 * (2 * 32) * 2  # keys and values of 2 heads of 32, 2 bytes
    assert info.layers[1].window is None


def test_a_quantized_folder_has_its_own_size(tmp_path):
    folder = tmp_path / "model"
    convert(FIXTURES / "hgrn2-default", folder, quantize=True, q_group_size=32, dtype="bfloat16")
    info = read_info(folder)
    assert info.parameters == read_info(FIXTURES / "hgrn2-default").parameters
    assert info.dtype == "bfloat16"
    files = folder.glob("*.safetensors")
    assert info.weight_bytes == sum(a.nbytes for f in files for a in mx.load(str(f)).values())


def test_the_authors_checkpoints_and_runs_from_scratch():
    authors = read_info(FIXTURES / "official-small-bin")
    assert authors.state_bytes == 3 * 4 * 16 * 16 * 4
    run = read_info(ROOT / "examples" / "train_shakespeare.yaml")
    carried = read_info(ROOT / "hgrn2_mlx" / "demo_checkpoint")
    assert (run.parameters, run.layers) == (carried.parameters, carried.layers)


def test_the_command_prints_a_table_or_json(capsys):
    folder = str(FIXTURES / "hgrn2-hybrid")
    assert main(["info", folder]) == 0
    table = capsys.readouterr().out
    assert "hgrn2: 267,584 parameters, 1.07 MB, computes in float32" in table
    assert "2 recurrent  [2, 32, 32] float32" in table
    assert "of the last 24 tokens" in table
    assert main(["info", "--model", folder, "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["state_bytes"], info["bytes_per_token"]) == (16384, 512)
    assert len(info["layers"]) == 4


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist: give a config.json or the folder of a model"),
        ("{", "config.json is not JSON"),
        ('{"model_type": "llama"}', "config.json: model_type is 'llama', not hgrn2 or hgrn"),
        ('{"model_type": "hgrn2", "rope": 1}', "config.json: unknown key 'rope'"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(tmp_path, capsys, content, message):
    file = tmp_path / "config.json"
    if content:
        file.write_text(content)
    assert main(["info", str(file)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_nothing_is_said_of_no_model(capsys):
    assert main(["info"]) == 1
    assert "info on what? give --model" in capsys.readouterr().err
