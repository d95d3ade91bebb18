"""The tokenizer of a run that brings none: byte-pair encoding trained on its own text."""

import io
from collections.abc import Iterator

from sentencepiece import SentencePieceTrainer


def train_tokenizer(lines: Iterator[str], vocab_size: int) -> bytes:
    """Trains a sentencepiece model.

    Nothing is normalised, stripped or prepended, and characters outside the
    vocabulary fall back to bytes, so that decoding gives back the exact text
    and a text can be continued anywhere. Special tokens are Llama's.

    Args:
        lines: The text without its line ends, which are tokens of their own.
        vocab_size: Pieces, special tokens and 256 bytes included.

    Returns:
        The contents of a ``tokenizer.model``.

    Raises:
        ValueError: If the text does not yield that many pieces or needs more.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # Longer lines are left out, and of more lines a sample is taken.
            max_sentence_length=1 << 20,
            input_sentence_size=5_000_000,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise ValueError(f"model.vocab_size: no tokenizer of {vocab_size}: {reason}") from None
    return model.getvalue()
