"""The tokenizer files of an MLX folder."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from .byte_level_bpe import convert_byte_level_bpe
from .sentencepiece_model import convert_sentencepiece
from .source import read_json

# Files that change nothing but are looked for beside tokenizer.json.
COPIED = [
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]


class ConvertedTokenizer(NamedTuple):
    """What was made of a checkpoint's tokenizer.

    Args:
        origin: The file that it came from.
        vocabulary: Tokens by id.
        special_tokens: The text of ``"bos"``, ``"eos"`` and so on.
    """

    origin: str
    vocabulary: dict[int, str]
    special_tokens: dict[str, str]


def convert_tokenizer(source: Path, folder: Path, vocab_size: int) -> ConvertedTokenizer | None:
    """Writes into ``folder`` what ``mlx_lm.load`` needs of the tokenizer in ``source``.

    A ``tokenizer.json`` is copied; failing that, one is made of ``tokenizer.model``,
    or of ``vocab.json`` and ``merges.txt``.

    Returns:
        The tokenizer; ``None`` if there is none.

    Raises:
        ValueError: If the tokenizer cannot be read or converted exactly, or has
            ids that the model does not.
    """
    config = {}
    if (source / "tokenizer_config.json").is_file():
        config = read_json(source / "tokenizer_config.json")
    converted = folder / "tokenizer.json"
    if (source / "tokenizer.json").is_file():
        origin = source / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(origin))
        except Exception as error:  # tokenizers raises nothing more specific.
            raise ValueError(f"tokenizer.json cannot be read: {error}") from error
        shutil.copyfile(origin, converted)
    elif (source / "tokenizer.model").is_file():
        origin = source / "tokenizer.model"
        tokenizer = convert_sentencepiece(origin)
        tokenizer.save(str(converted))
        config = _sentencepiece_symbols(origin) | config
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        origin = source / "vocab.json"
        tokenizer = convert_byte_level_bpe(source, config)
        tokenizer.save(str(converted))
    else:
        return None

    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(vocabulary, default=0) >= vocab_size:
        raise ValueError(
            f"{origin.name} has ids up to {max(vocabulary)}, "
            f"but config.json's vocab_size is {vocab_size}"
        )
    # Classes named after a model (LlamaTokenizer) rebuild the tokenizer with settings
    # of their own, and ids can differ; this one takes tokenizer.json as it is.
    config.pop("auto_map", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return ConvertedTokenizer(origin.name, vocabulary, _special_tokens(source, config))


def _sentencepiece_symbols(file: Path) -> dict[str, str]:
    """Special tokens of a ``tokenizer.model``, by the keys of ``tokenizer_config.json``."""
    proto = ModelProto.FromString(file.read_bytes())
    spec = proto.trainer_spec
    symbols = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
    return {
        f"{symbol}_token": proto.pieces[index].piece
        for symbol, index in symbols.items()
        if index >= 0
    }


def _special_tokens(source: Path, config: dict[str, Any]) -> dict[str, str]:
    stated = {}
    if (source / "special_tokens_map.json").is_file():
        stated = read_json(source / "special_tokens_map.json")
    stated |= config
    tokens = {}
    for symbol in ("bos", "eos", "pad"):
        token = stated.get(f"{symbol}_token")
        if isinstance(token, dict):  # With how it is to be matched.
            token = token.get("content")
        if isinstance(token, str):
            tokens[symbol] = token
    return tokens
