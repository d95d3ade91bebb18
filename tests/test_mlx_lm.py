"""HGRN2 and HGRN through mlx-lm: loading, generating, serving, quantizing, training."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import pytest
from conftest import FIXTURES
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.perplexity import eval_ppl
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import dequantize_model, quantize_model, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hgrn2_mlx.models import ARCHITECTURES
from hgrn2_mlx.models.hgrn2 import Model
from hgrn2_mlx.models.language_model import Block
from hgrn2_mlx.registration import MODEL_FILES

TEXT = "the state of a linear recurrence is expanded by an outer product of keys and values"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"

MODELS = {
    "recurrent": ("hgrn2-default", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "everything": ("hgrn2-hybrid", {"use_short_conv": True, "attnres_block_size": 2}),
    "hgrn": ("hgrn-default", {"num_hidden_layers": 2, "use_short_conv": True}),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def save_folder(folder, fixture, options):
    """A converted model as a user has it: random weights, tokenizer, model file."""
    tokenizer = make_tokenizer()
    config = json.loads((FIXTURES / fixture / "config.json").read_text())
    config |= options | {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "model_file": MODEL_FILES[config["model_type"]].name,
    }
    mx.random.seed(0)
    architecture = ARCHITECTURES[config["model_type"]]
    model = architecture.Model(architecture.ModelArgs.from_dict(config))
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    save_model(folder, model)
    save_config(config, folder / "config.json")
    tokenizer.save_pretrained(folder)
    shutil.copy(MODEL_FILES[config["model_type"]], folder)


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_folder(folder, *MODELS[request.param])
    return folder


@pytest.fixture(scope="module")
def one_folder(tmp_path_factory):
    """For what does not depend on the kind of model."""
    folder = tmp_path_factory.mktemp("everything")
    save_folder(folder, *MODELS["everything"])
    return folder


@pytest.fixture
def loaded(folder):
    return mlx_lm.load(str(folder))


def greedy(model, tokenizer, prompt, max_tokens):
    """The continuation by its definition: the whole text again for every token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(model(mx.array([tokens]))[0, -1].argmax().item())
        if tokens[-1] in tokenizer.eos_token_ids:
            break
    return tokens[len(prompt) :]


def prompts_of(tokenizer, *lengths):
    tokens = tokenizer.encode(TEXT * 3)
    return [tokens[n : n + length] for n, length in enumerate(lengths)]


def test_importing_the_package_makes_a_folder_load_without_trust(folder):
    model, _ = mlx_lm.load(str(folder))
    assert type(model).__name__ == "Model"
    assert all(isinstance(layer, Block) for layer in model.layers)


def test_a_folder_without_a_model_file_loads_too(one_folder, tmp_path):
    folder = shutil.copytree(one_folder, tmp_path / "model")
    (folder / "hgrn2.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["model_file"]
    save_config(config, folder / "config.json")
    assert isinstance(mlx_lm.load(str(folder))[0], Model)


def test_another_model_file_is_refused_and_not_run(one_folder, tmp_path):
    folder = shutil.copytree(one_folder, tmp_path / "model")
    trace = tmp_path / "was_run"
    (folder / "hgrn2.py").write_text(
        MODEL_FILES["hgrn2"].read_text() + f"open({str(trace)!r}, 'w')\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        mlx_lm.load(str(folder))
    assert not trace.exists()


def test_generate_and_stream_generate_are_the_greedy_continuation(loaded):
    model, tokenizer = loaded
    (prompt,) = prompts_of(tokenizer, 17)
    expected = greedy(model, tokenizer, prompt, 24)
    stream = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=24))
    assert [response.token for response in stream] == expected
    text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=24)
    assert text == "".join(response.text for response in stream)


@pytest.mark.parametrize("prefill_step_size", [1, 7, 40])
def test_the_prefill_step_changes_nothing(loaded, prefill_step_size):
    model, tokenizer = loaded
    (prompt,) = prompts_of(tokenizer, 40)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=8)
    step = {"prefill_step_size": prefill_step_size}
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=8, **step) == expected


@pytest.mark.parametrize("options", [{}, {"prefill_step_size": 6}, {"completion_batch_size": 2}])
def test_batch_generate_gives_each_prompt_what_it_gets_alone(loaded, options):
    model, tokenizer = loaded
    prompts, max_tokens = prompts_of(tokenizer, 3, 31, 1, 12, 30), [10, 4, 8, 10, 6]
    response = mlx_lm.batch_generate(
        model, tokenizer, prompts, max_tokens=max_tokens, return_token_ids=True, **options
    )
    for prompt, count, tokens in zip(prompts, max_tokens, response.token_ids, strict=True):
        assert tokens == greedy(model, tokenizer, prompt, count)


def test_a_batch_s_caches_come_apart_and_together_again(loaded):
    """A second turn, in another order, from the caches the first batch returned."""
    model, tokenizer = loaded
    first, second = prompts_of(tokenizer, 3, 31, 12), prompts_of(tokenizer, 9, 2, 5)
    response = mlx_lm.batch_generate(
        model, tokenizer, first, max_tokens=6, return_prompt_caches=True, return_token_ids=True
    )
    order = [2, 0, 1]
    continued = mlx_lm.batch_generate(
        model,
        tokenizer,
        [second[n] for n in order],
        prompt_caches=[response.caches[n] for n in order],
        max_tokens=6,
        return_token_ids=True,
    )
    for n, tokens in zip(order, continued.token_ids, strict=True):
        history = first[n] + response.token_ids[n] + second[n]
        assert tokens == greedy(model, tokenizer, history, 6)


def test_a_saved_prompt_cache_continues_identically(loaded, tmp_path):
    model, tokenizer = loaded
    prompt, more = prompts_of(tokenizer, 33, 4)
    cache = make_prompt_cache(model)
    model(mx.array([prompt]), cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    restored = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert [type(c) for c in restored] == [type(c) for c in cache]
    for tokens in (more, more[:1], more[1:2]):
        expected, actual = (model(mx.array([tokens]), c) for c in (cache, restored))
        assert mx.array_equal(actual, expected)


def test_perplexity_is_the_exponential_of_the_mean_loss(loaded):
    model, tokenizer = loaded
    data = mx.array(prompts_of(tokenizer, 20, 20, 20))
    losses = nn.losses.cross_entropy(model(data[:, :-1]), data[:, 1:])
    perplexity, _ = eval_ppl(model, data, batch_size=2)
    assert perplexity == pytest.approx(math.exp(losses.mean().item()), rel=1e-5)


def run_mlx_lm(*arguments, **options):
    """A stock mlx_lm command: a process that does not import hgrn2_mlx by itself."""
    return subprocess.run(
        [sys.executable, "-m", "mlx_lm", *arguments],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def test_the_stock_generate_command_runs_a_folder(folder):
    arguments = ["generate", "--model", str(folder), "--prompt", "the state", "--max-tokens"]
    trusted = run_mlx_lm(*arguments, "8", "--ignore-chat-template", "--trust-remote-code")
    assert trusted.returncode == 0, trusted.stderr
    model, tokenizer = mlx_lm.load(str(folder))
    expected = mlx_lm.generate(model, tokenizer, "the state", max_tokens=8)
    assert expected in trusted.stdout


def test_the_stock_chat_command_answers(one_folder):
    arguments = ["chat", "--model", str(one_folder), "--max-tokens", "8", "--trust-remote-code"]
    chat = run_mlx_lm(*arguments, input="the state\nq\n")
    assert chat.returncode == 0, chat.stderr
    model, tokenizer = mlx_lm.load(str(one_folder))
    assert mlx_lm.generate(model, tokenizer, "the state\n", max_tokens=8) in chat.stdout


@pytest.fixture(scope="module")
def server(one_folder):
    """The address of a running stock server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["server", "--model", str(one_folder), "--trust-remote-code", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_lm", *command],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, "the server stopped"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=60).close()
                break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def complete(server, **request) -> str:
    request |= {"prompt": "the state of", "max_tokens": 8, "temperature": 0}
    data, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    posted = urllib.request.Request(f"{server}/v1/completions", data, headers)
    with urllib.request.urlopen(posted, timeout=120) as response:
        return response.read().decode()


def test_the_stock_server_completes_a_prompt_whole_and_streamed(server, one_folder):
    model, tokenizer = mlx_lm.load(str(one_folder))
    expected = mlx_lm.generate(model, tokenizer, "the state of", max_tokens=8)
    # Twice: the second time the server continues from the prompt cache it kept.
    for _ in range(2):
        assert json.loads(complete(server))["choices"][0]["text"] == expected

    events = [line.removeprefix("data: ") for line in complete(server, stream=True).split("\n\n")]
    chunks = [json.loads(event) for event in events if event.startswith("{")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]) == expected
    assert "[DONE]" in events


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_touches_only_matrices(loaded, relative_error, bits):
    model, tokenizer = loaded
    before = dict(tree_flatten(model.parameters()))
    model, config = quantize_model(model, {}, 32, bits)
    assert config["quantization"]["bits"] == bits

    after = dict(tree_flatten(model.parameters()))
    quantized = {name.removesuffix(".scales") for name in after if name.endswith(".scales")}
    assert {f"{name}.weight" for name in quantized} == {
        name
        for name, weight in before.items()
        if weight.ndim == 2 and weight.shape[0] > 1 and not name.endswith("lower_bounds")
    }
    for name in before.keys() - {f"{name}.weight" for name in quantized}:
        assert mx.array_equal(after[name], before[name]), name

    tokens = mx.array(prompts_of(tokenizer, 30))
    logits = model(tokens)
    assert relative_error(logits, dequantize_model(model)(tokens)) < 1e-4


def test_mlx_lm_convert_makes_a_smaller_folder_that_loads(one_folder, tmp_path):
    model, tokenizer = mlx_lm.load(str(one_folder))
    converted = tmp_path / "converted"
    options = {"quantize": True, "q_bits": 8, "q_group_size": 32, "dtype": "bfloat16"}
    mlx_lm.convert(str(one_folder), converted, **options)
    small, _ = mlx_lm.load(str(converted))
    assert small.model.lower_bounds.dtype == mx.float32
    assert small.model.norm.weight.dtype == mx.bfloat16
    assert isinstance(small.lm_head, nn.QuantizedLinear)
    tokens = mx.array(prompts_of(tokenizer, 30))
    agreement = small(tokens).argmax(-1) == model(tokens).argmax(-1)
    assert agreement.mean() > 0.8  # random weights: many near ties


@pytest.fixture(params=["operations", pytest.param("compiled", marks=pytest.mark.slow)])
def training_step(request):
    """mlx-lm compiles its training step, which takes the CPU's C++ compiler a minute."""
    if request.param == "operations":
        mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.usefixtures("training_step")
@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("kind", ["recurrent", "hgrn"])
def test_lora_training_lowers_the_loss_and_its_adapters_load(
    tmp_path, monkeypatch, kind, grad_checkpoint
):
    # mlx-lm's gradient checkpointing replaces the layers' method.
    monkeypatch.setattr(Block, "__call__", Block.__call__)
    save_folder(tmp_path / "model", *MODELS[kind])
    lora = {"rank": 4, "scale": 20.0, "dropout": 0.0}
    model, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    before = dict(tree_flatten(model.parameters()))
    model.freeze()
    linear_to_lora_layers(model, 2, lora)
    dataset = [(tokens, 0) for tokens in prompts_of(tokenizer, 40, 33, 20, 28)]

    losses = []

    class Callback:
        def on_train_loss_report(self, info):
            losses.append(info["train_loss"])

    arguments = TrainingArgs(
        batch_size=4,
        iters=4,
        steps_per_report=1,
        adapter_file=str(tmp_path / "adapters.safetensors"),
        grad_checkpoint=grad_checkpoint,
    )
    optimizer = optim.Adam(learning_rate=1e-3)
    train(model, optimizer, dataset, args=arguments, training_callback=Callback())
    assert losses[-1] < losses[0] - 1

    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": lora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    adapted, _ = mlx_lm.load(str(tmp_path / "model"), adapter_path=str(tmp_path))
    tokens = mx.array([dataset[0][0]])
    model.eval()
    assert mx.allclose(adapted(tokens), model(tokens), atol=1e-4)
    after = dict(tree_flatten(adapted.parameters()))
    for name in before.keys() & after.keys():
        assert mx.array_equal(after[name], before[name]), name
