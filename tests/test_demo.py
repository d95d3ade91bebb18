"""The carried checkpoint: what ``hgrn2 demo`` converts, writes and measures."""

import json
import re

import mlx_lm
import pytest

from hgrn2_mlx import demo
from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    def convert_with(**options):
        folder = tmp_path_factory.mktemp("demo") / "model"
        convert(demo.CHECKPOINT, folder, dtype="float32", **options)
        return mlx_lm.load(str(folder))

    return convert_with


def test_its_validation_loss_is_flash_linear_attentions(converted):
    loss = demo.validation_loss(*converted(), demo.CHECKPOINT, windows=4)
    assert loss.tokens == 4 * 512
    assert abs(loss.mlx - loss.reference) < 0.002


@pytest.mark.slow
def test_its_validation_loss_on_all_windows_is_flash_linear_attentions(converted):
    loss = demo.validation_loss(*converted(), demo.CHECKPOINT)
    assert loss.windows == loss.all_windows
    assert abs(loss.mlx - loss.reference) < 0.002


def test_quantized_to_4_bits_it_loses_little(converted):
    loss = demo.validation_loss(*converted(quantize=True), demo.CHECKPOINT, windows=2)
    print(f"4 bits: {loss.mlx:.4f} against {loss.reference:.4f} nats per token")
    assert abs(loss.mlx - loss.reference) < 0.02


def test_it_continues_a_prompt_as_flash_linear_attention_does(converted):
    model, tokenizer = converted()
    greedy = json.loads((demo.CHECKPOINT / "validation.json").read_text())["greedy"]
    prompt = tokenizer.encode(greedy["prompt"])
    responses = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=len(greedy["tokens"]))
    assert [response.token for response in responses] == greedy["tokens"]


def test_the_validation_text_is_the_end_of_the_training_example_text(pytestconfig):
    file = pytestconfig.rootpath / "examples" / "data" / "tinyshakespeare.txt"
    text = file.read_bytes()
    held_out = (demo.CHECKPOINT / "validation.txt").read_bytes()
    assert text.endswith(held_out)
    assert len(held_out) == len(text) - len(text) * 9 // 10


def test_the_demo_command_reports_all_three_steps(capsys):
    assert main(["demo", "--max-tokens", "5", "--seconds", "0"]) == 0
    output = capsys.readouterr().out
    assert "64 tensors accounted for" in output
    assert re.search(r"ROMEO:\n.+tokens per second on the .PU, peak memory", output, re.DOTALL)
    assert re.search(r"1 of 87 windows, 512 tokens: MLX \d\.\d{4}", output)
