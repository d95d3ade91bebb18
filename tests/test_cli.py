"""The command line: quick help, mlx-lm's programs and flags, errors in one line."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from test_mlx_lm import MODELS, TEXT, prompts_of, save_folder

from hgrn2_mlx.cli import COMMANDS, main

SLOW_TO_IMPORT = {"mlx", "numpy", "mlx_lm", "transformers", "huggingface_hub", "rich", "yaml"}
HGRN2 = Path(sys.executable).with_name("hgrn2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_folder(folder, *MODELS["everything"])
    return folder


def run_python(*arguments, **options):
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, *arguments], **options)


# Starting


@pytest.mark.parametrize(
    "statement",
    [
        "import hgrn2_mlx",
        "from hgrn2_mlx.cli import main; main(['--help'])",
        *(
            f"from hgrn2_mlx.cli import main; main(['{name}', '--help'])"
            for name in (
                *("convert", "fuse", "train", "eval", "quantize"),
                *("doctor", "bench", "info", "demo"),
            )
        ),
    ],
)
def test_nothing_slow_is_imported_for_help(statement):
    script = (
        f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); "
        f"{statement}"
    )
    ended = run_python("-c", script)
    assert ended.returncode == 0
    assert not SLOW_TO_IMPORT & set(ended.stderr.split())


def test_the_module_is_the_command():
    texts = {
        run_python("-m", "hgrn2_mlx", "--help").stdout,
        subprocess.run([HGRN2, "--help"], capture_output=True, text=True).stdout,
    }
    (text,) = texts
    assert all(f"\n    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_s_help_has_an_example_of_flags_that_it_has(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    text, example = capsys.readouterr().out.split("\nexample:\n")
    assert text.startswith(f"usage: hgrn2 {name} ")
    assert "--debug" in text
    for line in example.splitlines():
        command, *words = line.split()
        assert [command, words[0]] == ["hgrn2", name]
        for flag in (word for word in words if word.startswith("--")):
            assert f"{flag} " in text or f"{flag}\n" in text


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["convert", "--nothing"]])
def test_a_wrong_command_line_says_how_it_goes(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage: hgrn2" in capsys.readouterr().err


def test_a_shell_can_complete(tmp_path):
    for line, completion in (("hgrn2 in", "info "), ("hgrn2 info --js", "--json ")):
        answer = tmp_path / "answer"
        environment = os.environ | {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
        }
        run_python("-m", "hgrn2_mlx", env=environment)
        assert answer.read_text() == completion


# Registering with mlx-lm


@pytest.mark.parametrize(
    "imports",
    [
        "hgrn2_mlx, mlx_lm",
        "mlx_lm, hgrn2_mlx",
        "hgrn2_mlx.models, mlx_lm",
        "mlx_lm.models, hgrn2_mlx.models",
    ],
)
def test_the_order_of_imports_does_not_matter(folder, imports):
    script = (
        f"import {imports}, sys, importlib, mlx_lm; model, tokenizer = mlx_lm.load(sys.argv[1]); "
        "theirs = importlib.import_module('mlx_lm.models.hgrn'); "
        "ours = importlib.import_module('hgrn2_mlx.models.hgrn'); "
        "assert theirs is ours is mlx_lm.models.hgrn; "
        "assert ours.__spec__.name == ours.__name__ == 'hgrn2_mlx.models.hgrn'; "
        "print(type(model).__module__, callable(hgrn2_mlx.gated_recurrence))"
    )
    ended = run_python("-c", script, str(folder))
    assert ended.stdout.split() == ["hgrn2_mlx.models.hgrn2", "True"], ended.stderr


def test_other_architectures_are_found_as_ever():
    script = "import hgrn2_mlx; from mlx_lm.models import llama; print(llama.__name__)"
    assert run_python("-c", script).stdout == "mlx_lm.models.llama\n"


def test_the_public_names_are_there():
    import hgrn2_mlx

    assert set(hgrn2_mlx.__all__) <= set(dir(hgrn2_mlx))
    with pytest.raises(AttributeError, match="hgrn2_mlx.*nothing"):
        hgrn2_mlx.nothing  # noqa: B018


# mlx-lm's programs


def test_generate_is_mlx_lm_s(folder, capsys):
    flags = ["--prompt", "the state", "--max-tokens", "8", "--ignore-chat-template"]
    assert main(["generate", "--model", str(folder), *flags, "--verbose=F"]) == 0
    model, tokenizer = mlx_lm.load(str(folder))
    expected = mlx_lm.generate(model, tokenizer, "the state", max_tokens=8)
    assert capsys.readouterr().out == f"{expected}\n"


def test_chat_answers(folder):
    command = ["-m", "hgrn2_mlx", "chat", "--model", str(folder), "--max-tokens", "8"]
    chat = run_python(*command, input="the state\nq\n")
    assert chat.returncode == 0, chat.stderr
    model, tokenizer = mlx_lm.load(str(folder))
    assert mlx_lm.generate(model, tokenizer, "the state\n", max_tokens=8) in chat.stdout


def test_serve_answers(folder):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [HGRN2, "serve", "--model", str(folder), "--port", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=60).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        request = json.dumps({"prompt": "the state", "max_tokens": 8}).encode()
        headers = {"Content-Type": "application/json"}
        posted = urllib.request.Request(f"{address}/v1/completions", request, headers)
        with urllib.request.urlopen(posted, timeout=60) as response:
            text = json.load(response)["choices"][0]["text"]
        model, tokenizer = mlx_lm.load(str(folder))
        assert text == mlx_lm.generate(model, tokenizer, "the state", max_tokens=8)
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_perplexity_is_that_of_every_window(folder, tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 3)
    flags = ["--data-path", str(file), "--sequence-length", "16", "--batch-size", "3"]
    assert main(["eval", "--model", str(folder), *flags]) == 0
    printed = capsys.readouterr().out

    model, tokenizer = mlx_lm.load(str(folder))
    tokens = mx.array(tokenizer.encode(TEXT * 3))
    losses = []
    for start in range(0, tokens.size - 15, 15):
        window = tokens[None, start : start + 16]
        losses.append(nn.losses.cross_entropy(model(window[:, :-1]), window[:, 1:]).mean())
    loss = mx.stack(losses).mean().item()
    perplexity = float(re.search(r"perplexity ([\d.]+) ", printed)[1])
    assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert f"on {15 * len(losses)} tokens in {len(losses)} windows of 16" in printed


@pytest.mark.parametrize(
    "flags, module, passed_on",
    [
        (["--tasks", "a", "b", "--limit", "9"], "evaluate", ["--tasks", "a", "b"]),
        (["--data-path", "owner/set"], "perplexity", ["--data-path=owner/set"]),
    ],
)
def test_tasks_and_hub_data_sets_are_mlx_lm_s(folder, monkeypatch, flags, module, passed_on):
    given = []
    program = types.ModuleType(module)
    program.main = lambda: given.extend(sys.argv)
    monkeypatch.setitem(sys.modules, f"mlx_lm.{module}", program)
    monkeypatch.setattr(sys, "argv", ["hgrn2"])
    assert main(["eval", "--model", str(folder), *flags]) == 0
    assert given[0] == "hgrn2 eval"
    assert given[given.index("--model") + 1] == str(folder)
    assert " ".join(passed_on) in " ".join(given)
    assert "--batch-size=8" in given or given[given.index("--batch-size") + 1] == "8"


@pytest.mark.parametrize("recipe", [None, "mixed_4_6"])
def test_quantizing_is_mlx_lm_s_and_can_be_undone(folder, tmp_path, recipe):
    flags = ["--q-group-size", "32", *(["--quant-predicate", recipe] if recipe else [])]
    quantized, undone = str(tmp_path / "quantized"), str(tmp_path / "undone")
    assert main(["quantize", "--model", str(folder), "--mlx-path", quantized, *flags]) == 0
    assert main(["quantize", "--model", quantized, "--mlx-path", undone, "--dequantize"]) == 0

    theirs = tmp_path / "theirs"
    mlx_lm.convert(str(folder), theirs, quantize=True, q_group_size=32, quant_predicate=recipe)
    tokens = mx.array(prompts_of(mlx_lm.load(str(folder))[1], 20))
    expected = mlx_lm.load(str(theirs))[0](tokens)
    model = mlx_lm.load(quantized)[0]
    assert isinstance(model.lm_head, nn.QuantizedLinear)
    assert mx.array_equal(model(tokens), expected)
    model = mlx_lm.load(undone)[0]
    assert isinstance(model.lm_head, nn.Linear)
    assert mx.allclose(model(tokens), expected, atol=1e-3)


# Errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate"], "generate with what? give --model, a converted folder"),
        (["chat", "--max-tokens", "3"], "chat with what? give --model, a converted folder"),
        (["generate", "--model", "no-folder"], "no-folder does not exist, nor is it a Hub"),
        (["serve", "--model", "no-folder"], "no-folder does not exist, nor is it a Hub"),
        (["quantize", "--model", "no-folder"], "no-folder does not exist, nor is it a Hub"),
        (["eval", "--model", "FOLDER"], "measure on what? give --data-path or --tasks"),
        (["eval", "--model", "FOLDER", "--data-path", "none.txt"], "none.txt does not exist"),
        (
            ["eval", "--model", "FOLDER", "--data-path", "FOLDER/hgrn2.py"],
            "does not fill a window of 512 tokens; lower --sequence-length",
        ),
        (["eval", "--model", "FOLDER", "--data-path", __file__, "--batch-size=0"], "at least 1"),
        (["eval", "--model", "FOLDER", "--data-path", __file__, "--num-samples=0"], "got 0"),
        (["quantize", "--model", "FOLDER", "--dequantize"], "is not quantized"),
        (["quantize", "--model", "FOLDER", "--q-bits", "0"], "--q-bits must be at least 1, got 0"),
        (["quantize", "--model", "FOLDER", "-d", "--q-bits", "3"], "--dequantize goes with no"),
        (["quantize", "--model", "FOLDER", "--q-group-size", "7"], "nothing can be quantized"),
        (
            ["quantize", "--model", "FOLDER", "--quant-predicate=mixed_2_6", "--q-bits=8"],
            "leave out --q-bits",
        ),
        (["fuse", "--model", "FOLDER", "--q-mode", "mxfp4"], "need --quantize"),
        (["quantize", "--model", "FOLDER", "--mlx-path", "FOLDER"], "exists already"),
    ],
)
def test_what_cannot_be_done_is_one_line(folder, capsys, arguments, message):
    arguments = [argument.replace("FOLDER", str(folder)) for argument in arguments]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("hgrn2: error: ") and message in line


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", None, "has no config.json"),
        ("config.json", b"<html>", "config.json is not JSON"),
        ("model.safetensors", b"\0" * 3, "model.safetensors is truncated"),
        ("tokenizer.json", None, "has no tokenizer"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["generate", "--prompt", "x"],
        ["serve", "--port", "0"],
        ["eval", "--data-path", __file__],
        ["quantize", "--mlx-path", "FOLDER/quantized"],
        ["lora", "--train", "--data", "."],
    ],
    ids=lambda command: command[0],
)
def test_a_broken_folder_is_one_line_that_names_it(
    folder, tmp_path, capsys, command, file, content, message
):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_bytes(content)
    flags = [flag.replace("FOLDER", str(tmp_path)) for flag in command[1:]]
    assert main([command[0], "--model", str(broken), *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hgrn2: error: {broken} ") and message in line


def test_a_package_that_is_not_there_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    assert main(["eval", "--model", str(folder), "--tasks", "lambada_openai"]) == 1
    assert capsys.readouterr().err == (
        "hgrn2: error: this needs a package that is not installed: pip install lm_eval\n"
    )


@pytest.mark.parametrize("command", ["generate", "info"])
def test_debug_shows_where(command, capsys):
    assert main([command, "--model", "no-folder", "--debug"]) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "ValueError" in errors
