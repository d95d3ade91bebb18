"""Fine-tuning: what is adapted, the losses, the data, and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hgrn2_mlx.cli import main
from hgrn2_mlx.convert import convert
from hgrn2_mlx.fine_tuning_demo import docstrings, fine_tune_demo
from hgrn2_mlx.fuse import fuse
from hgrn2_mlx.lora import DEFAULTS, TARGETS, read_settings, run
from hgrn2_mlx.lora_data import PLAIN_CHAT_TEMPLATE, load_data
from hgrn2_mlx.models.hgrn2 import Model, ModelArgs
from hgrn2_mlx.models.language_model import AttentionResidualBlock, Block

FIXTURES = Path(__file__).parent / "fixtures"
SENTENCE = "the quick brown fox jumps over the lazy dog. "


def write_tokenizer(folder: Path) -> None:
    """One token for each character, few enough for the fixtures' vocabulary of 97."""
    characters = "abcdefghijklmnopqrstuvwxyzACTUYS0123456789 .,:;!?'\n"
    pieces = ["<unk>", "<s>", "</s>", *characters]
    tokenizer = Tokenizer(
        models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Converted models by name: each fixture, and one of them quantized and in bfloat16."""
    root = tmp_path_factory.mktemp("models")
    converted = {}
    for name in ("hgrn2-default", "hgrn2-hybrid", "hgrn2-short-conv"):
        source = root / f"{name}-source"
        source.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(FIXTURES / name / file, source / file)
        write_tokenizer(source)
        converted[name] = root / name
        convert(source, converted[name])
    source = root / "hgrn2-short-conv-source"
    for name, options in (("4-bit", {"quantize": True}), ("bfloat16", {"dtype": "bfloat16"})):
        converted[name] = root / name
        convert(source, converted[name], **options)

    source = root / "attention residuals-source"
    source.mkdir()
    config = json.loads((FIXTURES / "hgrn2-default" / "config.json").read_text())
    config["attnres_block_size"] = 2
    (source / "config.json").write_text(json.dumps(config))
    mx.random.seed(0)
    weights = dict(tree_flatten(Model(ModelArgs.from_dict(config)).parameters()))
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    write_tokenizer(source)
    converted["attention residuals"] = root / "attention residuals"
    convert(source, converted["attention residuals"])
    return converted


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 30)
    return path


@pytest.fixture
def settings(folders, text, tmp_path):
    """Settings of a short training run, changed by keyword; defaults as in ``hgrn2 lora``."""

    def settings(model: str = "hgrn2-default", **changes):
        given = {
            "model": str(folders[model]),
            "data": str(text),
            "train": True,
            "adapter_path": str(tmp_path / "adapters"),
            "batch_size": 2,
            "max_seq_length": 33,
            "iters": 6,
            "val_batches": 1,
            "steps_per_eval": 100,
            "steps_per_report": 1,
            "learning_rate": 1e-3,
        }
        lora_parameters = {"scale": 2.0} | changes.pop("lora_parameters", {})
        args = read_settings(given | changes)
        args.lora_parameters |= lora_parameters
        return args

    return settings


def losses(args, key: str) -> list[float]:
    lines = (Path(args.adapter_path) / "losses.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


def adapted_modules(args) -> set[str]:
    """Modules with trained tensors, without their layer's name."""
    names = mx.load(str(Path(args.adapter_path) / "adapters.safetensors"))
    return {name.split(".", 3)[3].rpartition(".")[0] for name in names}


# Training


@pytest.mark.parametrize(
    "model, changes",
    [
        ("hgrn2-default", {}),
        ("hgrn2-hybrid", {}),
        ("hgrn2-short-conv", {"optimizer": "adamw"}),
        ("hgrn2-default", {"fine_tune_type": "dora"}),
        ("hgrn2-default", {"fine_tune_type": "full"}),
        ("4-bit", {}),
    ],
)
def test_training_lowers_the_loss(settings, model, changes):
    args = settings(model, **changes)
    run(args)
    first, last = losses(args, "val_loss")
    assert last < first - 0.1
    assert losses(args, "train_loss")[-1] < losses(args, "train_loss")[0]


def test_adapts_every_projection_and_nothing_else(settings):
    args = settings("hgrn2-short-conv", iters=1)
    run(args)
    projections = {f"attn.{name}_proj" for name in "qfio"}
    projections |= {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert adapted_modules(args) == projections

    hybrid = settings("hgrn2-hybrid", iters=1, adapter_path=args.adapter_path + "-hybrid")
    run(hybrid)
    assert adapted_modules(hybrid) == projections | {"attn.k_proj", "attn.v_proj"}


def test_adapts_the_last_layers_if_asked(settings):
    args = settings(iters=1, num_layers=1, lora_parameters={"rank": 2})
    run(args)
    adapter = mx.load(str(Path(args.adapter_path) / "adapters.safetensors"))
    assert {name.split(".")[2] for name in adapter} == {"2"}
    assert adapter["model.layers.2.attn.q_proj.lora_a"].shape == (128, 2)


@pytest.mark.parametrize(
    "name", ["hgrn2-default", "hgrn2-hybrid", "hgrn2-short-conv", "attention residuals"]
)
def test_gradient_checkpointing_changes_nothing(folders, name, monkeypatch, relative_error):
    for block in (Block, AttentionResidualBlock):
        monkeypatch.setattr(block, "__call__", block.__call__)  # Undone after the test.
    mx.random.seed(0)
    model, _ = load(str(folders[name]))
    model.freeze()
    linear_to_lora_layers(model, -1, DEFAULTS["lora_parameters"])
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = 0.01 * mx.random.normal(module.lora_b.shape)
    batch = mx.random.randint(0, 97, (2, 65)), mx.array([[0, 65], [0, 65]])

    def loss_and_gradients():
        (loss, _), gradients = nn.value_and_grad(model, default_loss)(model, *batch)
        mx.eval(loss, gradients)
        return loss, dict(tree_flatten(gradients))

    loss, gradients = loss_and_gradients()
    plain = type(model.layers[0]).__call__
    grad_checkpoint(model.layers[0])
    assert type(model.layers[0]).__call__ is not plain
    checkpointed_loss, checkpointed_gradients = loss_and_gradients()
    assert checkpointed_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert gradients.keys() == checkpointed_gradients.keys()
    for name, gradient in gradients.items():
        assert relative_error(checkpointed_gradients[name], gradient) < 1e-5


def test_accumulation_equals_a_larger_batch(settings, relative_error):
    adapters = []
    for batch_size, accumulated in ((4, 1), (2, 2)):
        args = settings(
            batch_size=batch_size,
            grad_accumulation_steps=accumulated,
            iters=accumulated,
            optimizer="sgd",
            adapter_path=f"adapters-{batch_size}",
        )
        args.adapter_path = str(Path(args.data).parent / args.adapter_path)
        # Just the windows of one batch of 4.
        Path(args.data).with_name("train.txt").write_text((SENTENCE * 3)[:129])
        Path(args.data).with_name("valid.txt").write_text(SENTENCE * 4)
        args.data = str(Path(args.data).parent)
        run(args)
        adapters.append(mx.load(f"{args.adapter_path}/adapters.safetensors"))
    for name, tensor in adapters[0].items():
        assert relative_error(adapters[1][name], tensor) < 1e-4, name


def test_resuming_goes_on(settings):
    args = settings(iters=4)
    run(args)
    before = losses(args, "val_loss")[0]

    resumed = settings(
        iters=2, resume_adapter_file=str(Path(args.adapter_path) / "adapters.safetensors")
    )
    run(resumed)
    lines = (Path(args.adapter_path) / "losses.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [e["iteration"] for e in entries if "train_loss" in e] == [1, 2, 3, 4, 5, 6]
    start = next(e["val_loss"] for e in entries if "val_loss" in e and e["iteration"] == 4)
    assert start < before - 0.1


# Fusing


@pytest.mark.parametrize(
    "model, fine_tune_type",
    [
        ("hgrn2-hybrid", "lora"),
        ("hgrn2-short-conv", "dora"),
        ("hgrn2-default", "full"),
        ("bfloat16", "dora"),
        ("4-bit", "lora"),
    ],
)
def test_fused_model_is_the_adapted_one(settings, tmp_path, model, fine_tune_type, relative_error):
    args = settings(model, fine_tune_type=fine_tune_type, iters=2)
    run(args)
    fuse(args.model, args.adapter_path, tmp_path / "fused", dequantize=model == "4-bit")

    adapted, _ = load(args.model, adapter_path=args.adapter_path)
    fused, _ = load(str(tmp_path / "fused"))
    tokens = mx.random.randint(0, 97, (1, 20), key=mx.random.key(0))
    tolerance = 0.05 if model == "bfloat16" else 1e-4
    logits, expected = (model(tokens).astype(mx.float32) for model in (fused, adapted))
    assert relative_error(logits, expected) < tolerance
    if model == "bfloat16":
        dtypes = {array.dtype for _, array in tree_flatten(fused.parameters())}
        assert dtypes == {mx.bfloat16, fused.model.lower_bounds.dtype}


def test_fused_folder_works_with_stock_mlx_lm(settings, tmp_path, capfd):
    args = settings(iters=2)
    run(args)
    assert main(["fuse", "--model", args.model, "--adapter-path", args.adapter_path,
                 "--save-path", str(tmp_path / "fused"), "--quantize"]) == 0  # fmt: skip
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["quantization"]["bits"] == 4
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tmp_path / "fused")]
    command += ["--trust-remote-code", "--prompt", "the quick", "--max-tokens", "5"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Generation: 5 tokens" in result.stdout


def test_fuse_leaves_nothing_behind_on_failure(settings, tmp_path, capsys):
    args = settings("4-bit", iters=1)
    run(args)
    fused = tmp_path / "fused"
    command = ["fuse", "--model", args.model, "--adapter-path", args.adapter_path]
    assert main([*command, "--save-path", str(fused), "-q"]) == 1
    assert "quantized already" in capsys.readouterr().err
    assert not list(tmp_path.glob("*fused*"))
    fused.mkdir()
    assert main([*command, "--save-path", str(fused)]) == 1
    assert main(["fuse", "--model", args.model, "--adapter-path", str(fused)]) == 1
    assert "no adapter to merge" in capsys.readouterr().err


# Data


def test_text_is_split_without_losing_tokens(settings, folders, capsys):
    args = settings()
    _, tokenizer = load(str(folders["hgrn2-default"]))
    train, valid, test = load_data(args, tokenizer)
    tokens = tokenizer.encode(Path(args.data).read_text())
    assert (len(train), len(valid), len(test)) == (34, 4, 4)
    windows = [window for dataset in (train, valid, test) for window, _ in dataset]
    assert all(len(window) == 33 for window in windows)
    assert sum((window[1:] for window in windows), windows[0][:1]) == tokens[: 42 * 32 + 1]
    assert "the first 34 to train, the next 4 for validation" in capsys.readouterr().out


TURNS = [{"role": "user", "content": "Tell."}, {"role": "assistant", "content": "Yes."}]


@pytest.mark.parametrize(
    "record, mask_prompt, text, prompt",
    [
        ({"text": "the fox"}, False, "the fox</s>", ""),
        (
            {"prompt": "Tell.", "completion": "Yes."},
            True,
            "<s>User: Tell.\nAssistant: Yes.</s>\n",
            "<s>User: Tell.\nAssistant:",
        ),
        (
            {"messages": TURNS},
            True,
            "<s>User: Tell.\nAssistant: Yes.</s>\n",
            "<s>User: Tell.\nAssistant:",
        ),
    ],
)
def test_jsonl_formats(settings, folders, tmp_path, record, mask_prompt, text, prompt):
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 2)
    args = settings(data=str(tmp_path), mask_prompt=mask_prompt)
    _, tokenizer = load(str(folders["hgrn2-default"]))
    train, valid, test = load_data(args, tokenizer)
    assert (len(train), len(valid), len(test)) == (2, 2, 0)
    tokens, masked = train[0]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode(tokens[:masked]) == prompt


def test_a_json_line_may_contain_other_line_ends(settings, folders, tmp_path):
    line = json.dumps({"text": "the\u2028fox"}, ensure_ascii=False)
    (tmp_path / "train.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    _, tokenizer = load(str(folders["hgrn2-default"]))
    train, *_ = load_data(settings(data=str(tmp_path)), tokenizer)
    assert len(train) == 2


def test_fused_folder_keeps_the_template_of_the_training(settings, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    args = settings(data=str(data), batch_size=1, iters=1)
    run(args)
    fuse(args.model, args.adapter_path, tmp_path / "fused")
    _, tokenizer = load(str(tmp_path / "fused"))
    assert tokenizer.chat_template == PLAIN_CHAT_TEMPLATE


def test_example_configuration_is_understood(tmp_path):
    example = Path(__file__).parent.parent / "examples" / "lora.yaml"
    args = read_settings({"config": str(example), "iters": 5})
    assert args.train and args.iters == 5
    assert args.lora_parameters["keys"] == TARGETS


# Losses


def test_losses_are_drawn(settings):
    args = settings(iters=2)
    run(args)
    assert (Path(args.adapter_path) / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_test_loss_of_an_adapter(settings, capfd):
    args = settings()
    run(args)
    run(settings(train=False, test=True))
    run(settings(train=False, test=True, adapter_path=""))
    adapted, base = (
        float(line.split()[2].rstrip(","))
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("Test loss")
    )
    assert adapted < base - 0.1


# The demo


def test_demo_learns_from_docstrings(folders):
    model, tokenizer = load(str(folders["hgrn2-default"]))
    result = fine_tune_demo(model, tokenizer, most_steps=10)
    assert result.loss_after < result.loss_before - 0.1
    assert result.sample_after != result.sample_before
    assert (result.steps, result.tokens) == (10, 640)
    assert 0 < result.adapter_parameters < result.parameters


def test_docstrings_are_those_of_the_public_names():
    text = docstrings("textwrap")
    assert text.startswith("Text wrapping and filling.")
    assert "Collapse and truncate the given text" in text
    assert "  " not in text
    assert "_munge_whitespace" not in text
    assert text == docstrings("textwrap")


# What is refused


def refused(capsys, *flags: object) -> str:
    """The one line that a run refused by the command ends with."""
    assert main(["lora", *map(str, flags)]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("hgrn2: error: ")
    return line


@pytest.fixture
def command(settings, tmp_path):
    """The flags of a good run, which writes to ``tmp_path / "adapters"``."""
    args = settings()
    return ["--train", "--model", args.model, "--adapter-path", args.adapter_path,
            "--data", args.data, "--batch-size", 2, "--max-seq-length", 33]  # fmt: skip


@pytest.mark.parametrize(
    "files, flags, message",
    [
        ({}, ["--data", "nowhere"], "nowhere does not exist"),
        ({}, ["--data", "{here}"], "no train data"),
        ({"a.csv": "x"}, ["--data", "{here}/a.csv"], "give a .txt, or the folder"),
        ({"a.txt": ""}, ["--data", "{here}/a.txt"], "a.txt is empty"),
        ({"a.txt": "short"}, ["--data", "{here}/a.txt"], "its 5 tokens make 0 windows"),
        ({"a.txt": SENTENCE * 3}, ["--data", "{here}/a.txt"], "too few for three batches of 2"),
        ({"train.txt": "short"}, ["--data", "{here}"], "does not fill a window of 33"),
        ({"train.jsonl": ""}, ["--data", "{here}"], "train.jsonl is empty"),
        ({"train.jsonl": '{"text": "a"}\nx'}, ["--data", "{here}"], "line 2: not JSON"),
        ({"train.jsonl": '{"text": "a"}\n{}'}, ["--data", "{here}"], "line 2: has no 'text'"),
        ({"train.jsonl": '{"t": "a"}'}, ["--data", "{here}"], "Unsupported data format"),
        ({"train.jsonl": '{"text": "a"}'}, ["--data", "{here}"], "less than a batch of 2"),
        ({"train.txt": SENTENCE * 9}, ["--data", "{here}", "--test"], "no test data"),
        ({}, ["--batch-size", 0], "batch_size must be at least 1"),
        ({}, ["--num-layers", 0], "num_layers must be at least 1, or -1 for all, got 0"),
        ({}, ["--val-batches", 0], "val_batches must be at least 1, or -1 for all, got 0"),
        ({}, ["--learning-rate", "nan"], "learning_rate must be a number more than 0, got nan"),
        ({}, ["--learning-rate", -1], "learning_rate must be a number more than 0, got -1.0"),
        ({}, ["--num-layers", 9], "the model has 3 layers"),
        ({}, ["--model", "nowhere"], "nowhere does not exist"),
        ({}, ["--resume-adapter-file", "nowhere"], "nothing to resume"),
        ({"a.yaml": "a: ["}, ["--config", "{here}/a.yaml"], "is not YAML"),
        ({"a.yaml": "rnak: 4"}, ["--config", "{here}/a.yaml"], "unknown setting rnak"),
        (
            {"a.yaml": "lora_parameters: {keys: [q]}"},
            ["--config", "{here}/a.yaml"],
            "no layer has any of the keys q",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(command, tmp_path, capsys, files, flags, message):
    here = tmp_path / "data"
    here.mkdir()
    for name, content in files.items():
        (here / name).write_text(content)
    flags = [str(flag).format(here=here) for flag in flags]
    assert message in refused(capsys, *command, *flags)
    assert not (tmp_path / "adapters").exists()


def test_full_fine_tuning_of_a_quantized_model_is_refused(command, folders, capsys):
    flags = ["--model", folders["4-bit"], "--fine-tune-type", "full"]
    assert "is quantized" in refused(capsys, *command, *flags)


def test_an_adapter_is_neither_overwritten_nor_resumed_as_another(
    settings, command, folders, capsys
):
    args = settings(iters=1)
    run(args)
    adapter = Path(args.adapter_path) / "adapters.safetensors"
    before = {path: path.read_bytes() for path in adapter.parent.iterdir()}

    assert "holds an adapter already" in refused(capsys, *command)
    resume = [*command, "--resume-adapter-file", adapter]
    assert "trained with scale 2.0, not 20.0" in refused(capsys, *resume)
    assert "trained with num_layers 3, not 2" in refused(capsys, *resume, "--num-layers", 2)
    dora = ["--fine-tune-type", "dora"]
    assert "trained with fine_tune_type 'lora'" in refused(capsys, *resume, *dora)
    alone = adapter.parent.parent / "alone.safetensors"
    shutil.copyfile(adapter, alone)
    other = [*command, "--resume-adapter-file", alone, "--model", folders["hgrn2-hybrid"]]
    assert "does not fit" in refused(capsys, *other)

    assert before == {path: path.read_bytes() for path in adapter.parent.iterdir()}
