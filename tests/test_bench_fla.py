"""hgrn2 bench's peer in flash-linear-attention, run on the CPU in Triton's interpreter."""

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import FIXTURES

from hgrn2_mlx.bench import Settings, Size, bench, random_subject, read_subject
from hgrn2_mlx.bench.fla_peer import fla
from hgrn2_mlx.bench.participant import CannotTakePart
from hgrn2_mlx.bench.peers import PEERS
from hgrn2_mlx.convert import fla_on_cpu

pytestmark = pytest.mark.parity

if not fla_on_cpu.is_installed():
    reason = "needs real flash-linear-attention: pip install 'hgrn2-mlx[parity]'"
    pytest.skip(reason, allow_module_level=True)

from hgrn2_mlx.bench.fla_timing import build_fla_model  # noqa: E402

SETTINGS = Settings(
    prompt_tokens=(6, 9), generation_tokens=2, batch_sizes=(1, 2), train_tokens=(8,), trials=2
)
# PyTorch counts memory on a GPU only.
MEASURED = {("training step", 1, 8)} | {
    (quantity, *case)
    for quantity in ("prefill", "decode", "state or cache")
    for case in ((1, 6), (1, 9), (2, 6))
}


@pytest.fixture(params=["hgrn2", "hgrn2-short-conv", "hgrn-default"])
def subject(request):
    if request.param == "hgrn2":
        return random_subject(Size(64, 2, 100), mx.float32)
    return read_subject(FIXTURES / request.param / "config.json", mx.float32)


def test_the_same_model_is_measured_at_the_same_sizes(subject, monkeypatch):
    monkeypatch.setitem(PEERS, "fla", lambda subject: fla(subject, device="cpu"))
    results = bench(subject, ["fla"], SETTINGS)
    values = {(row.quantity, row.batch, row.tokens): row.values for row in results.rows}
    assert {case for case in values if "fla" in values[case]} == MEASURED
    assert all(figure > 0 for figures in values.values() for figure in figures.values())
    for case in MEASURED:
        # fla's short convolutions keep a token more than they need.
        if case[0] == "state or cache" and not subject.args.use_short_conv:
            assert values[case]["fla"] == values[case][subject.name]
    assert results.notes["fla"].startswith("flash-linear-attention ")


def test_it_has_as_many_parameters(subject):
    model = build_fla_model(subject.args, "cpu")
    assert sum(weight.numel() for weight in model.parameters()) == subject.parameters


@pytest.mark.skipif(mx.cuda.is_available(), reason="here is a GPU")
def test_without_a_gpu_it_says_what_it_needs():
    with pytest.raises(CannotTakePart, match="on an NVIDIA GPU, and MLX uses none here: pip inst"):
        fla(random_subject(Size(64, 1, 100)))


def test_what_it_does_not_have_is_refused():
    subject = random_subject(Size(64, 1, 100))
    quantized = replace(subject, quantization={"bits": 4, "group_size": 64})
    with pytest.raises(CannotTakePart, match="no quantized models"):
        fla(quantized, device="cpu")
    of_the_authors = replace(subject, args=replace(subject.args, norm_type="simplermsnorm"))
    with pytest.raises(CannotTakePart, match="cannot compute this model: norm_type"):
        fla(of_the_authors, device="cpu")
