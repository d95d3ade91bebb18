"""Data to fine-tune on: mlx-lm's JSONL formats, and plain text.

Everything is read and tokenized before training starts, so that a bad line
ends the run at once and not after hours.
"""

import json
from pathlib import Path
from types import SimpleNamespace

from mlx_lm.cli_ui import rprint
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tuner.datasets import ChatDataset, CompletionsDataset, create_dataset
from mlx_lm.tuner.datasets import load_dataset as load_hub_dataset

from .convert.hub import is_repository_id

NAMES = ("train", "valid", "test")

# Windows of a single text file held out for validation, and as many for the test.
HELD_OUT_SHARE = 0.1

# For base models, whose tokenizers have no chat template. Plain words, because no token
# of theirs is reserved for turns.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' }}\n"
    "{% endfor %}{{ 'Assistant:' if add_generation_prompt }}"
)


class TokenDataset:
    """Tokenized examples as mlx-lm's trainer takes them.

    Args:
        examples: Token ids of each, and how many of them are a prompt that the
            loss leaves out.
    """

    def __init__(self, examples: list[tuple[list[int], int]]):
        self._examples = examples

    def __getitem__(self, index: int) -> tuple[list[int], int]:
        return self._examples[index]

    def __len__(self) -> int:
        return len(self._examples)

    @staticmethod
    def process(example: tuple[list[int], int]) -> tuple[list[int], int]:
        return example


def cut_windows(tokens: list[int], length: int) -> list[tuple[list[int], int]]:
    """Examples of ``length`` tokens that share one with the next, so that each is predicted once.

    The tokens left over at the end are dropped.
    """
    stride = length - 1
    starts = range(0, len(tokens) - stride, stride)
    return [(tokens[start : start + length], 0) for start in starts]


def load_data(
    args: SimpleNamespace, tokenizer: TokenizerWrapper
) -> tuple[TokenDataset, TokenDataset, TokenDataset]:
    """Training, validation and test examples; what is not there is empty.

    ``args.data`` is a folder with ``{train,valid,test}.jsonl`` or ``.txt``, a text
    file, which is split, or a data set on the Hugging Face Hub. Chat and
    prompt/completion data use the tokenizer's chat template; if it has none,
    :data:`PLAIN_CHAT_TEMPLATE` becomes it and is noted in ``args.chat_template``.

    Args:
        args: Settings of ``hgrn2 lora``.
        tokenizer: The model's.

    Raises:
        ValueError: If data that ``args.train`` or ``args.test`` asks for is missing,
            malformed (naming file and line), or less than a batch.
        OSError: If a file cannot be read.
    """
    path = Path(args.data or "")
    if getattr(args, "hf_dataset", None) or not path.exists():
        sets = _load_from_hub(args, tokenizer)
    elif path.is_file():
        sets = _split_text(path, args, tokenizer)
    elif any((path / f"{name}.jsonl").is_file() for name in NAMES):
        sets = [_read_jsonl(path / f"{name}.jsonl", args, tokenizer) for name in NAMES]
    else:
        sets = [_read_windows(path / f"{name}.txt", args, tokenizer) for name in NAMES]

    train, valid, test = sets
    if args.train:
        _require_a_batch(train, "train", args)
        if len(valid):
            _require_a_batch(valid, "valid", args)
        else:
            rprint("No validation data: there will be no validation loss")
    if args.test:
        _require_a_batch(test, "test", args)
    return train, valid, test


def _require_a_batch(dataset: TokenDataset, name: str, args: SimpleNamespace) -> None:
    if len(dataset) == 0:
        raise ValueError(f"no {name} data: {args.data} has no {name}.jsonl or {name}.txt")
    if len(dataset) < args.batch_size:
        raise ValueError(
            f"the {name} data has {len(dataset)} examples, less than a batch of "
            f"{args.batch_size}; lower --batch-size"
        )


def _load_from_hub(args: SimpleNamespace, tokenizer: TokenizerWrapper) -> tuple:
    if not getattr(args, "hf_dataset", None) and not is_repository_id(args.data):
        raise ValueError(f"{args.data} does not exist, nor is it a Hub data set (owner/name)")
    _ensure_chat_template(args, tokenizer)
    try:
        return load_hub_dataset(args, tokenizer)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{args.data} is not here, and a Hub data set needs: pip install {error.name}"
        ) from error


def _read_jsonl(path: Path, args: SimpleNamespace, tokenizer: TokenizerWrapper) -> TokenDataset:
    """One of mlx-lm's formats, which the first line decides; empty if there is no file."""
    if not path.is_file():
        return TokenDataset([])
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, which JSONL examples end with")
    records = []
    # Not splitlines(): a string may contain other line ends, such as U+2028.
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n"), start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        records.append(record)

    try:
        dataset = create_dataset(records, tokenizer, args)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(dataset, (ChatDataset, CompletionsDataset)):
        _ensure_chat_template(args, tokenizer)
    examples = []
    for number, record in enumerate(records, start=1):
        try:
            tokens, prompt = dataset.process(record)
        except KeyError as error:
            raise ValueError(f"{path}, line {number}: has no {error}") from None
        except Exception as error:  # The template and the tokenizer raise classes of their own.
            raise ValueError(f"{path}, line {number}: {error}") from error
        if prompt >= min(len(tokens), args.max_seq_length):
            raise ValueError(
                f"{path}, line {number}: nothing to learn after a prompt of {prompt} tokens; "
                "raise --max-seq-length"
            )
        examples.append((tokens, prompt))
    return TokenDataset(examples)


def _ensure_chat_template(args: SimpleNamespace, tokenizer: TokenizerWrapper) -> None:
    if tokenizer.has_chat_template or getattr(args, "chat_template", None):
        return
    rprint(
        "The tokenizer has no chat template: using 'User: ...', 'Assistant: ...' "
        "(hgrn2 fuse writes it into the fused folder)"
    )
    tokenizer.chat_template = args.chat_template = PLAIN_CHAT_TEMPLATE


def _read_windows(path: Path, args: SimpleNamespace, tokenizer: TokenizerWrapper) -> TokenDataset:
    """A text in windows; empty if there is no file."""
    if not path.is_file():
        return TokenDataset([])
    windows = cut_windows(tokenizer.encode(read_text(path)), args.max_seq_length)
    if not windows:
        raise ValueError(
            f"{path} does not fill a window of {args.max_seq_length} tokens; lower --max-seq-length"
        )
    return TokenDataset(windows)


def _split_text(path: Path, args: SimpleNamespace, tokenizer: TokenizerWrapper) -> list:
    """A single file: its end is held out, first windows for validation, then as many for the test.

    At least a batch of each.
    """
    if path.suffix != ".txt":
        raise ValueError(f"{path} is a file: give a .txt, or the folder that holds train.jsonl")
    tokens = tokenizer.encode(read_text(path))
    windows = cut_windows(tokens, args.max_seq_length)
    held_out = max(args.batch_size, round(HELD_OUT_SHARE * len(windows)))
    if len(windows) < 2 * held_out + args.batch_size:
        raise ValueError(
            f"{path}: its {len(tokens):,} tokens make {len(windows)} windows of "
            f"{args.max_seq_length}, too few for three batches of {args.batch_size}; "
            "lower --max-seq-length or --batch-size"
        )
    rprint(
        f"{path}: {len(tokens):,} tokens in windows of {args.max_seq_length}: the first "
        f"{len(windows) - 2 * held_out} to train, the next {held_out} for validation, "
        f"the last {held_out} for the test"
    )
    return [
        TokenDataset(windows[: -2 * held_out]),
        TokenDataset(windows[-2 * held_out : -held_out]),
        TokenDataset(windows[-held_out:]),
    ]


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        ValueError: If it is empty or not UTF-8.
        OSError: If it cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text
