"""Special tokens' ids, on which a checkpoint's files can disagree.

``config.json``, ``generation_config.json`` and the tokenizer each name them, and
mlx-lm stops generating at what the second says. The tokenizer wins: its tokens
are what the model was trained on.
"""

from typing import Any

from .tokenizer import ConvertedTokenizer


def reconcile(
    files: dict[str, dict[str, Any]], tokenizer: ConvertedTokenizer | None, vocab_size: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Gives the ids in configuration files the tokenizer's values.

    An id that is absent or null stays so: it contradicts nothing. A list of ids
    stays if the tokenizer's is among them.

    Args:
        files: Contents of the files by their names.
        tokenizer: ``None`` if the checkpoint has none.
        vocab_size: Rows of the embedding.

    Returns:
        The contents to write, and a warning for each conflict.
    """
    known = {}
    warnings = []
    if tokenizer is not None:
        ids = {token: index for index, token in tokenizer.vocabulary.items()}
        known = {symbol: ids.get(token) for symbol, token in tokenizer.special_tokens.items()}
        warnings += [
            f"the tokenizer's {symbol} token {tokenizer.special_tokens[symbol]!r} "
            "is not in its vocabulary"
            for symbol, index in known.items()
            if index is None
        ]
    reconciled = {file: content.copy() for file, content in files.items()}
    for symbol in ("bos", "eos", "pad"):
        key = f"{symbol}_token_id"
        stated = {
            file: content[key] for file, content in files.items() if content.get(key) is not None
        }
        wanted = known.get(symbol)
        for file, value in stated.items():
            ids = value if isinstance(value, list) else [value]
            if wanted is not None and wanted not in ids:
                token = tokenizer.special_tokens[symbol]
                warnings.append(
                    f"{file}: {key} is {value}, the tokenizer's {token!r} is {wanted}: "
                    f"{wanted} was written"
                )
                reconciled[file][key] = wanted
            elif not all(isinstance(index, int) and 0 <= index < vocab_size for index in ids):
                warnings.append(f"{file}: {key} is {value}, but vocab_size is {vocab_size}")
        if wanted is None and len(set(map(str, stated.values()))) > 1:
            values = ", ".join(f"{value} in {file}" for file, value in stated.items())
            warnings.append(f"{key} is {values}, and no tokenizer says which: both were kept")
    return reconciled, warnings
