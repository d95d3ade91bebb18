"""hgrn2 generate --save-state and --load-state: going on from a state is reading its text again."""

import json
import resource
import shutil

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from test_mlx_lm import MODELS, TEXT, prompts_of, save_folder

from hgrn2_mlx.cli import main
from hgrn2_mlx.saved_state import load_state, save_state


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, of in MODELS.items():
        (root / name).mkdir()
        save_folder(root / name, *of)
    return root


def generate(folder, prompt, capsys, *flags, max_tokens=12):
    """The text that the command writes."""
    arguments = ["--model", folder, "--prompt", prompt, "--max-tokens", max_tokens, *flags]
    status = main(["generate", "--verbose", "False", *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out.removesuffix("\n")


@pytest.mark.parametrize("name", MODELS)
def test_going_on_equals_reading_the_text_again(folders, tmp_path, capsys, name):
    file = tmp_path / "state.safetensors"
    document, question = TEXT * 3, " the keys"
    saving = ("--save-state", file, "--prefill-step-size", 16)
    assert generate(folders / name, document, capsys, *saving, max_tokens=0) == ""
    answer = generate(folders / name, question, capsys, "--load-state", file)

    model, tokenizer = mlx_lm.load(str(folders / name))
    tokens = tokenizer.encode(document) + tokenizer.encode(question)
    assert answer == mlx_lm.generate(model, tokenizer, tokens, max_tokens=12)


def test_saving_does_not_change_what_is_written(folders, tmp_path, capsys):
    folder, file = folders / "everything", tmp_path / "state.safetensors"
    model, tokenizer = mlx_lm.load(str(folder))
    expected = mlx_lm.generate(model, tokenizer, tokenizer.encode(TEXT), max_tokens=12)
    assert generate(folder, TEXT, capsys, "--save-state", file) == expected


def test_a_full_disk_leaves_the_state_that_was_there(folders, tmp_path, capsys):
    file = tmp_path / "state.safetensors"
    generate(folders / "everything", TEXT, capsys, "--save-state", file, max_tokens=0)
    saved = file.read_bytes()

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(saved) // 2, limit[1]))
    try:
        arguments = ["--model", str(folders / "everything"), "--prompt", TEXT, "--max-tokens", "0"]
        assert main(["generate", *arguments, "--save-state", str(file)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hgrn2: error: [write] ") and line.endswith(" Is the disk full?")
    assert file.read_bytes() == saved
    assert [*tmp_path.iterdir()] == [file]


def test_a_text_may_be_read_in_parts(folders, tmp_path, capsys):
    folder = folders / "everything"
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    generate(folder, TEXT, capsys, "--save-state", files[0], max_tokens=0)
    loading = ("--load-state", files[0])
    generate(folder, TEXT, capsys, *loading, "--save-state", files[1], max_tokens=0)

    model, tokenizer = mlx_lm.load(str(folder))
    tokens = 2 * tokenizer.encode(TEXT)
    cache, read = load_state(files[1], model)
    assert read == len(tokens)
    more = mx.array([tokenizer.encode(" values")])
    expected = model(mx.array([tokens + more[0].tolist()]))[:, -more.shape[1] :]
    assert mx.allclose(model(more, cache), expected, atol=1e-4)


def test_the_beginning_of_a_text_is_not_marked_again(folders, tmp_path, capsys):
    """With a tokenizer that begins every text with <s>, as sentencepiece models do."""
    folder = shutil.copytree(folders / "recurrent", tmp_path / "model")
    file = tmp_path / "state.safetensors"
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    generate(folder, TEXT, capsys, "--save-state", file, max_tokens=0)
    answer = generate(folder, " the keys", capsys, "--load-state", file)

    model, tokenizer = mlx_lm.load(str(folder))
    tokens = tokenizer.encode(TEXT + " the keys")
    assert tokens.count(tokenizer.bos_token_id) == 1
    assert answer == mlx_lm.generate(model, tokenizer, tokens, max_tokens=12)


def test_the_file_is_as_large_after_any_text(folders, tmp_path, capsys):
    sizes = set()
    for times in (1, 30):
        file = tmp_path / f"{times:04}.safetensors"
        saving = ("--save-state", file)
        generate(folders / "recurrent", TEXT * times, capsys, *saving, max_tokens=0)
        sizes.add(file.stat().st_size)
    state = sum(layer.nbytes for layer in load_prompt_cache(str(file)))
    assert max(sizes) - min(sizes) <= 8  # The number of tokens has more digits.
    assert state < max(sizes) < state + 4096


@pytest.fixture
def state(folders, tmp_path):
    """A state of the recurrent model, and the model."""
    model, tokenizer = mlx_lm.load(str(folders / "recurrent"))
    cache = make_prompt_cache(model)
    model(mx.array(prompts_of(tokenizer, 20)), cache)
    file = tmp_path / "state.safetensors"
    save_state(file, cache, model, 20)
    return file, model


def refusal(file, model) -> str:
    with pytest.raises(ValueError) as error:
        load_state(file, model)
    return str(error.value)


def test_it_is_refused_by_other_weights(state):
    file, model = state
    name, weight = tree_flatten(model.parameters())[-1]
    changed = mx.array(weight)
    changed[-1] += 1e-6
    model.load_weights([(name, changed)], strict=False)
    assert "another model: its weights" in refusal(file, model)


def test_it_is_refused_by_another_configuration(state, folders):
    message = refusal(state[0], mlx_lm.load(str(folders / "everything"))[0])
    assert "another model: attn is None there, {" in message
    assert "num_hidden_layers is 2 there, 4 here" in message


def test_another_version_is_refused(state):
    file, model = state
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    save_prompt_cache(str(file), cache, metadata | {"version": "2"})
    assert "has version 2 of the format; this program reads version 1" in refusal(file, model)


def test_a_prompt_cache_of_mlx_lm_is_refused(state):
    file, model = state
    save_prompt_cache(str(file), make_prompt_cache(model))
    assert "not a state that hgrn2 saved" in refusal(file, model)


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_damaged_file_is_refused(state, content):
    file, model = state
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)
    assert "is not a saved state, or is damaged" in refusal(file, model)


def test_weights_are_no_state(state, folders):
    assert "is not a saved state" in refusal(folders / "recurrent" / "model.safetensors", state[1])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--load-state", "none.safetensors"], "--save-state and --load-state need --prompt"),
        (
            ["-p", "a", "--load-state", "none.safetensors"],
            "none.safetensors: No such file or directory",
        ),
        (
            ["-p", "a", "--save-state", "state.bin"],
            "state.bin: the name of a saved state must end in",
        ),
        (
            ["-p", "a", "--save-state", "no/state.safetensors"],
            "no/state.safetensors: there is no such folder",
        ),
        (
            ["-p", "a", "--save-state", "s.safetensors", "--draft-model=m"],
            "--draft-model does not go with",
        ),
    ],
)
def test_wrong_flags_are_one_line(folders, capsys, flags, message):
    assert main(["generate", "--model", str(folders / "recurrent"), *flags]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hgrn2: error: ") and message in line


def test_a_failure_leaves_nothing_behind(folders, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr("hgrn2_mlx.saved_state.save_prompt_cache", fail)
    file = tmp_path / "state.safetensors"
    arguments = ["--model", str(folders / "recurrent"), "-p", "a", "--save-state", str(file)]
    assert main(["generate", *arguments]) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
