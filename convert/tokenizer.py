"""The tokenizer files of an MLX folder."""

import json
import shutil
from pathlib import Path

from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer

from .sentencepiece_model import convert_sentencepiece
from .source import read_json

# Files that change nothing but are looked for beside tokenizer.json.
COPIED = [
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]


def convert_tokenizer(source: Path, folder: Path, vocab_size: int) -> str | None:
    """Writes into ``folder`` what ``mlx_lm.load`` needs of the tokenizer in ``source``.

    A ``tokenizer.json`` is copied; failing that, one is made of ``tokenizer.model``.

    Returns:
        The file that it came from; ``None`` if there is no tokenizer.

    Raises:
        ValueError: If the tokenizer cannot be read or converted exactly, or has
            ids that the model does not.
    """
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
    else:
        return None

    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(
            f"{origin.name} has ids up to {largest}, but config.json's vocab_size is {vocab_size}"
        )
    config = _tokenizer_config(source, origin)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return origin.name


def _tokenizer_config(source: Path, origin: Path) -> dict:
    """The source's ``tokenizer_config.json``, with a class that takes tokenizer.json as it is.

    Classes named after a model (``LlamaTokenizer``) rebuild the tokenizer with
    settings of their own, and ids can differ.
    """
    config = {}
    if (source / "tokenizer_config.json").is_file():
        config = read_json(source / "tokenizer_config.json")
    if origin.name == "tokenizer.model":
        proto = ModelProto.FromString(origin.read_bytes())
        spec = proto.trainer_spec
        symbols = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id, "pad": spec.pad_id}
        for symbol, index in symbols.items():
            if index >= 0:
                config.setdefault(f"{symbol}_token", proto.pieces[index].piece)
    config.pop("auto_map", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return config
