"""hgrn2 bench at a tiny size: what it counts is right; how fast anything is, is not asserted."""

import json

import mlx.core as mx
import pytest
from conftest import FIXTURES
from mlx.utils import tree_flatten

from hgrn2_mlx.bench import QUANTITIES, Row, Size, build_llama, build_mamba2, quantize
from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import convert
from hgrn2_mlx.info import read_info

TINY = [
    *("--prompt-tokens", "8", "300", "--batch-size", "1", "3", "--generation-tokens", "2"),
    *("--train-tokens", "8", "16", "--num-trials", "1"),
]
CASES = {(1, 8), (1, 300), (3, 8)}


def bench(tmp_path, *flags):
    file = tmp_path / "bench.json"
    assert main(["bench", *TINY, *flags, "--json", str(file)]) == 0
    return json.loads(file.read_text())


def test_every_quantity_of_every_model_with_ratios_and_a_picture(tmp_path, capsys):
    picture = tmp_path / "bench.png"
    size = ("--hidden-size", "64", "--layers", "1", "--vocab-size", "100")
    results = bench(tmp_path, *size, "--dtype", "float32", "--plot", str(picture))
    rows = {(row["quantity"], row["batch"], row["tokens"]): row for row in results["rows"]}
    generation = [name for name in QUANTITIES if not name.startswith("LoRA")]
    assert set(rows) == {(name, *case) for name in generation for case in CASES} | {
        (name, 1, tokens) for name in QUANTITIES if name not in generation for tokens in (8, 16)
    }
    for row in rows.values():
        assert list(row["values"]) == ["hgrn2", "mamba2", "llama"]
        assert all(value > 0 for value in row["values"].values())
        assert list(row["ratios"]) == ["mamba2", "llama"]

    def cache(name, *case):
        return rows["state or cache", *case]["values"][name]

    # A head of 64 keys and 64 values in float32; keys and values of 64, 256 tokens at a time.
    assert [cache("hgrn2", *case) for case in ((1, 8), (1, 300))] == [64 * 64 * 4] * 2
    assert cache("hgrn2", 3, 8) == 3 * 64 * 64 * 4
    assert [cache("llama", *case) for case in ((1, 8), (1, 300))] == [
        2 * 64 * 4 * tokens for tokens in (256, 512)
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*.partial"))
    table = capsys.readouterr().out
    assert "width 64, depth 1, float32" in table and "16.38 kB" in table


def test_ratios_say_how_many_times_better_the_first_is():
    speed = Row("decode", 1, 8, {"hgrn2": 30.0, "llama": 10.0})
    memory = Row("state or cache", 1, 8, {"hgrn2": 30.0, "llama": 10.0})
    assert (speed.ratios(), memory.ratios()) == ({"llama": 3.0}, {"llama": pytest.approx(1 / 3)})


@pytest.mark.parametrize("kind", ["quantized", "config"])
def test_a_model_is_measured_beside_peers_of_its_size_and_type(tmp_path, kind):
    folder = tmp_path / "model"
    convert(FIXTURES / "hgrn2-default", folder, quantize=True, q_group_size=32, dtype="bfloat16")
    model = folder if kind == "quantized" else FIXTURES / "hgrn2-default" / "config.json"
    results = bench(tmp_path, "--model", str(model), "--peers", "llama")
    info = read_info(model)
    assert results["parameters"]["hgrn2"] == info.parameters
    assert results["dtype"] == info.dtype
    assert results["size"]["layers"] == len(info.layers)
    quantization = {"bits": 4, "group_size": 32, "mode": "affine"}
    assert results["quantization"] == (quantization if kind == "quantized" else None)
    (state,) = {
        row["values"]["hgrn2"]
        for row in results["rows"]
        if (row["quantity"], row["batch"]) == ("state or cache", 1)
    }
    assert state == info.state_bytes


def test_no_peers_and_hgrn(tmp_path):
    results = bench(tmp_path, "--model", str(FIXTURES / "hgrn-default"), "--peers")
    assert list(results["parameters"]) == ["hgrn"]
    assert all(row["ratios"] == {} for row in results["rows"])


def test_peers_are_quantized_where_they_can_be():
    model = build_llama(Size(64, 1, 100))
    quantize(model, {"bits": 4, "group_size": 64, "mode": "affine"})
    assert model.layers[0].self_attn.q_proj.bits == 4
    assert model(mx.array([[1, 2]])).shape == (1, 2, 100)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nothing"], "nothing does not exist: give a config.json or the folder"),
        (["--plot", "bench.txt"], "--plot bench.txt: the name must end in .pdf, .png, .svg"),
        (["--prompt-tokens", "0"], "must be at least 1"),
        (["--json", "no-folder/bench.json"], "cannot write"),
        (["--hidden-size", "100"], "mamba2 needs a hidden size that 32 divides, not 100"),
        (["--layers", "0"], "num_hidden_layers must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_done_is_one_line(flags, message, capsys):
    assert main(["bench", *TINY, *flags]) == 1
    *notes, line = capsys.readouterr().err.splitlines()
    assert all(note.startswith("note: MLX multiplies with its own") for note in notes)
    assert line.startswith("hgrn2: error: ") and message in line


def test_mamba2_is_as_published():
    """state-spaces/mamba2-130m: width 768, 24 layers; 129M parameters, the head tied."""
    model = build_mamba2(Size(768, 24, 50288))
    sizes = {name: array.size for name, array in tree_flatten(model.parameters())}
    assert sum(sizes.values()) - sizes["lm_head.weight"] == pytest.approx(128.9e6, rel=0.01)
