"""``vocab.json`` and ``merges.txt``, as GPT-2 and GPT-NeoX keep them, as one tokenizer."""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from .source import read_json


def convert_byte_level_bpe(folder: Path, config: dict[str, Any]) -> Tokenizer:
    """Reads the two files, and the tokens that were added to them.

    Args:
        folder: Holds ``vocab.json``, ``merges.txt`` and perhaps ``added_tokens.json``.
        config: The ``tokenizer_config.json``: its class says how text is normalised.

    Raises:
        ValueError: If they cannot be read, or contradict each other.
    """
    try:
        model = BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # tokenizers raises nothing more specific.
        raise ValueError(f"vocab.json and merges.txt cannot be read: {error}") from error
    tokenizer = Tokenizer(model)
    # The one difference between the two families.
    if str(config.get("tokenizer_class", "")).startswith("GPTNeoX"):
        tokenizer.normalizer = normalizers.NFC()
    prefix = config.get("add_prefix_space") is True
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()

    for index, token in sorted(_added_tokens(folder, config).items()):
        tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != index:
            raise ValueError(
                f"the added token {token.content!r} has the id {index}, but vocab.json leaves "
                f"{tokenizer.token_to_id(token.content)} for it"
            )
    return tokenizer


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens beside the merged ones, by id, from the newer place or the older."""
    try:
        if "added_tokens_decoder" in config:
            entries = config["added_tokens_decoder"].items()
            return {int(index): AddedToken(**entry) for index, entry in entries}
        if not (folder / "added_tokens.json").is_file():
            return {}
        entries = read_json(folder / "added_tokens.json").items()
        return {int(index): AddedToken(token, special=True) for token, index in entries}
    except (AttributeError, TypeError) as error:
        raise ValueError(f"the added tokens make no sense: {error}") from error
