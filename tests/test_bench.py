"""hgrn2 bench at a tiny size: what it counts is right; how fast anything is, is not asserted."""

import json
import sys

import metal_host
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from conftest import FIXTURES
from mlx.utils import tree_flatten

from hgrn2_mlx.bench import Size, random_subject
from hgrn2_mlx.bench.mlx_recurrence_peer import gla, mlx_recurrence, rglru
from hgrn2_mlx.bench.model_timing import add_lora, fits_training, time_training
from hgrn2_mlx.bench.models import build_hgrn2, build_llama, build_mamba2, in_type, read_subject
from hgrn2_mlx.bench.participant import CannotTakePart
from hgrn2_mlx.bench.peers import PEERS, find_peers
from hgrn2_mlx.bench.results import Row
from hgrn2_mlx.bench.settings import QUANTITIES
from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import convert
from hgrn2_mlx.info import read_info
from hgrn2_mlx.ops import elementwise_recurrence, gated_recurrence

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
    generation = list(QUANTITIES)[:4]
    assert set(rows) == {(name, *case) for name in generation for case in CASES} | {
        (name, 1, tokens) for name in QUANTITIES if name not in generation for tokens in (8, 16)
    }
    for (quantity, *_), row in rows.items():
        peers = ["mlx-recurrence"] if quantity.startswith("recurrence") else ["mamba2", "llama"]
        assert list(row["values"]) == ["hgrn2", *peers]
        assert all(value > 0 for value in row["values"].values())
        assert list(row["ratios"]) == peers
    assert results["parameters"]["mlx-recurrence"] is None
    assert "gla_scan" in results["notes"]["mlx-recurrence"]

    def cache(name, *case):
        return rows["state or cache", *case]["values"][name]

    # A head of 64 keys and 64 values in float32; keys and values of 64, 256 tokens at a time.
    assert [cache("hgrn2", *case) for case in ((1, 8), (1, 300))] == [64 * 64 * 4] * 2
    assert cache("hgrn2", 3, 8) == 3 * 64 * 64 * 4
    assert [cache("llama", *case) for case in ((1, 8), (1, 300))] == [
        2 * 64 * 4 * tokens for tokens in (256, 512)
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*.partial*"))
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
    trained = {row["quantity"] for row in results["rows"] if "step" in row["quantity"]}
    assert ("training step" in trained) == (kind == "config")
    assert ("training step" in results["notes"]) == (kind == "quantized")
    assert "LoRA step" in trained
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
    settings = {"bits": 4, "group_size": 64, "mode": "affine"}
    model = in_type(build_llama(Size(64, 1, 100)), mx.float32, settings)
    assert model.layers[0].self_attn.q_proj.bits == 4
    assert model(mx.array([[1, 2]])).shape == (1, 2, 100)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "nothing"], "nothing does not exist, nor is it a Hugging Face Hub repository"),
        (["--plot", "bench.txt"], "--plot bench.txt: the name must end in .pdf, .png, .svg"),
        (["--prompt-tokens", "0"], "must be at least 1"),
        (["--json", "no-folder/bench.json"], "cannot write"),
        (["--hidden-size", "100"], "mamba2 needs a hidden size that 32 divides, not 100"),
        (["--layers", "0"], "num_hidden_layers must be at least 1, got 0"),
        (["--peers", "mlx-recurrence"], "mlx-recurrence is not installed: pip install mlx-rec"),
        (["--peers", "fla"], "fla is not installed: pip install torch flash-linear-attention"),
    ],
)
def test_what_cannot_be_done_is_one_line(flags, message, capsys, monkeypatch):
    for package in ("mlx_recurrence", "fla"):
        monkeypatch.setitem(sys.modules, package, None)  # As if it was not installed.
    assert main(["bench", *TINY, *flags]) == 1
    *notes, line = capsys.readouterr().err.splitlines()
    assert all(note.startswith("note: MLX multiplies with its own") for note in notes)
    assert line.startswith("hgrn2: error: ") and message in line


def test_mamba2_is_as_published():
    """state-spaces/mamba2-130m: width 768, 24 layers; 129M parameters, the head tied."""
    model = build_mamba2(Size(768, 24, 50288))
    sizes = {name: array.size for name, array in tree_flatten(model.parameters())}
    assert sum(sizes.values()) - sizes["lm_head.weight"] == pytest.approx(128.9e6, rel=0.01)


# Training steps


@pytest.mark.parametrize("lora", [False, True])
def test_a_training_step_moves_every_weight_and_a_lora_step_the_adapters_only(lora):
    mx.random.seed(0)
    model = build_hgrn2(Size(64, 2, 100))
    if lora:
        add_lora(model)
    before = {name: mx.array(x) for name, x in tree_flatten(model.parameters())}
    # Twice, as the first leaves one of an adapter's two factors without a gradient.
    time_training(model, optim.AdamW(1e-3), 16, trials=2)
    after = dict(tree_flatten(model.parameters()))
    moved = {name for name, x in after.items() if not mx.array_equal(x, before[name])}
    assert moved == {name for name in after if not lora or "lora_" in name}


@pytest.mark.parametrize("memory, fits", [(3.9, False), (4.1, True)])
def test_all_weights_are_trained_where_four_times_their_size_fits(memory, fits, monkeypatch):
    model = nn.Linear(100, 100, bias=False)
    device = {"max_recommended_working_set_size": int(memory * 40_000)}
    monkeypatch.setattr(mx, "device_info", lambda: device)
    assert fits_training(model) == fits


def test_it_says_that_not_all_weights_are_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("hgrn2_mlx.bench.model_timing.fits_training", lambda model: False)
    results = bench(tmp_path, "--hidden-size", "64", "--layers", "1", "--peers")
    assert "training step" not in {row["quantity"] for row in results["rows"]}
    assert "AdamW's averages does not fit in memory" in results["notes"]["training step"]


def test_training_can_be_left_out(tmp_path):
    results = bench(tmp_path, "--hidden-size", "64", "--layers", "1", "--train-tokens")
    assert {row["quantity"] for row in results["rows"]} == set(list(QUANTITIES)[:4])


# mlx-recurrence


def test_peers_that_are_not_installed_are_left_out(monkeypatch):
    subject = random_subject(Size(64, 1, 100), mx.float32)
    everywhere = ["mamba2", "llama"]
    assert [peer.name for peer in find_peers(subject, None)][:3] == [*everywhere, "mlx-recurrence"]
    for package in ("mlx_recurrence", "fla"):
        monkeypatch.setitem(sys.modules, package, None)
    assert [peer.name for peer in find_peers(subject, None)] == everywhere
    assert list(PEERS) == [*everywhere, "mlx-recurrence", "fla"]


@pytest.mark.parametrize("on_metal", [False, True], ids=["reference", "kernel"])
def test_gla_is_the_recurrence_where_all_channels_have_one_gate(on_metal, relative_error):
    """Then HGRN2's keys are one too, so one of GLA's heads is compared for each."""
    tokens, heads, dim = 64, 2, 32
    peer = gla(heads, dim, mx.float32, on_metal)
    q, _, v, gates = peer.arguments(tokens)

    def ours(q, v, gates):
        logits = mx.broadcast_to(mx.log(gates / (1 - gates))[..., None], q.shape)
        return gated_recurrence(q, logits, v, scale=1.0, query_act=lambda x: x)[0]

    def theirs(q, v, gates):
        keys = mx.broadcast_to(1 - gates[..., None], q.shape)
        return peer.run(q, keys, v, gates)

    with metal_host.executing() as runs:
        outputs, gradients = mx.vjp(theirs, [q, v, gates], [v])
        mx.eval(outputs, gradients)
    assert bool(runs) == on_metal
    expected_outputs, expected_gradients = mx.vjp(ours, [q, v, gates], [v])
    assert relative_error(outputs[0], expected_outputs[0]) < 1e-5
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert relative_error(gradient, expected) < 1e-4


@pytest.mark.parametrize("on_metal", [False, True], ids=["reference", "kernel"])
def test_rglru_is_the_recurrence_of_hgrn(on_metal, relative_error):
    peer = rglru(32, mx.float32, on_metal)
    gates, inputs = peer.arguments(64)
    with metal_host.executing() as runs:
        outputs = peer.run(gates, (1 - gates) * nn.silu(inputs))
        mx.eval(outputs)
    assert bool(runs) == on_metal
    ours, _ = elementwise_recurrence(inputs, mx.log(gates / (1 - gates)))
    assert relative_error(outputs, ours) < 1e-5


def test_recurrences_are_measured_in_16_bits(tmp_path):
    size = ("--hidden-size", "64", "--layers", "1", "--dtype", "bfloat16")
    results = bench(tmp_path, *size, "--peers", "mlx-recurrence")
    values = [row["values"] for row in results["rows"] if row["quantity"].startswith("recurrence")]
    assert [list(value) for value in values] == 6 * [["hgrn2", "mlx-recurrence"]]


def test_where_its_kernels_do_not_fit_its_references_run():
    peer = gla(2, 48, mx.float32, on_metal=True)
    assert peer.run(*peer.arguments(8)).shape == (1, 8, 2, 48)


def test_heads_with_more_values_than_keys_are_refused(tmp_path):
    config = {"model_type": "hgrn2", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
    config |= {"expand_ratio": 48, "use_lower_bound": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CannotTakePart, match="as many keys as values, not of 48 and 64"):
        mlx_recurrence(read_subject(tmp_path / "config.json"))
