"""Text files as arrays of tokens on disk, made once for a run and mapped into memory."""

import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from sentencepiece import SentencePieceProcessor

from ..convert.staging import staged_folder
from ..convert.tokenizer import convert_tokenizer
from .config import DataConfig
from .tokenizer import train_tokenizer

# Characters tokenized at a time, up to the next line end.
BLOCK = 1 << 20


@dataclass
class Corpus:
    """A run's tokens.

    Args:
        tokenizer: Folder of the tokenizer's files and nothing else, as mlx-lm loads them.
        train: Token ids, uint16 or uint32, mapped from disk.
        validation: The same of the text held out.
    """

    tokenizer: Path
    train: np.ndarray
    validation: np.ndarray


def prepare(data: DataConfig, vocab_size: int, folder: Path) -> Corpus:
    """Tokenizes the text into ``folder``, unless an earlier call has.

    The files follow each other in the order given, each closed by the
    tokenizer's end-of-text token if it has one.

    Raises:
        ValueError: If a file is not UTF-8 text, the tokenizer cannot be trained or
            does not fit ``vocab_size``, or ``folder`` was made of other text.
        OSError: If a file cannot be read or written.
    """
    digest = _digest(data, vocab_size)
    dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    if not folder.exists():
        with staged_folder(folder) as staging:
            _tokenize(data, vocab_size, dtype, staging)
            (staging / "sha256").write_text(digest)
    elif (folder / "sha256").read_text() != digest:
        raise ValueError(f"data: {folder} was made of other text; choose another output")
    return Corpus(
        tokenizer=folder / "tokenizer",
        train=_map_tokens(folder / "train.bin", dtype),
        validation=_map_tokens(folder / "validation.bin", dtype),
    )


def _map_tokens(path: Path, dtype: type) -> np.ndarray:
    if path.stat().st_size == 0:  # What is empty cannot be mapped.
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _digest(data: DataConfig, vocab_size: int) -> str:
    """Of everything that the tokens depend on: contents of the files, not their names."""
    tokenizers = [] if data.tokenizer is None else [data.tokenizer]
    contents = []
    for path in (*data.train, *data.validation, *tokenizers):
        with open(path, "rb") as file:
            contents.append(hashlib.file_digest(file, "sha256").hexdigest())
    share = None if data.validation else data.validation_share
    everything = [contents, len(data.train), len(tokenizers), share, vocab_size]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def _tokenize(data: DataConfig, vocab_size: int, dtype: type, folder: Path) -> None:
    with tempfile.TemporaryDirectory() as source:
        model = Path(source) / "tokenizer.model"
        if data.tokenizer is None:
            lines = (line for text, _ in _texts(data) for line in text.splitlines())
            model.write_bytes(train_tokenizer(lines, vocab_size))
        else:
            shutil.copyfile(data.tokenizer, model)
        (folder / "tokenizer").mkdir()
        convert_tokenizer(model.parent, folder / "tokenizer", vocab_size)

    tokenizer = SentencePieceProcessor(model_file=str(folder / "tokenizer" / "tokenizer.model"))
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as held:
        for text, held_out in _texts(data):
            _write_tokens(text, tokenizer, dtype, train)
            _write_tokens(held_out, tokenizer, dtype, held)


def _texts(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Training text and validation text, file by file; either may be empty."""
    for path in data.train:
        text = _read(path)
        share = 0.0 if data.validation else data.validation_share
        cut = len(text) - round(share * len(text))
        yield text[:cut], text[cut:]
    for path in data.validation:
        yield "", _read(path)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None


def _write_tokens(
    text: str, tokenizer: SentencePieceProcessor, dtype: type, file: BinaryIO
) -> None:
    if not text:
        return
    lines = io.StringIO(text)
    while block := "".join(lines.readlines(BLOCK)):
        np.array(tokenizer.encode(block), dtype).tofile(file)
    if tokenizer.eos_id() >= 0:
        np.array([tokenizer.eos_id()], dtype).tofile(file)
