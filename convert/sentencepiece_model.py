"""A sentencepiece model as a ``tokenizers`` tokenizer that gives the same ids.

transformers' own conversion of a ``tokenizer.model`` assumes Llama's settings;
this one follows those in the file, and compares the two on difficult strings.
"""

import re
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

SPACE = "▁"

# Where conversions go wrong: spaces at the ends and in runs, line ends, characters
# outside the vocabulary, several scripts, combining and compatibility characters.
PROBES = [
    "",
    " ",
    "   ",
    "Hello, world!",
    "  two  spaces, and more   at the end  ",
    "\n",
    "one\ntwo\n\nthree\r\n  four\n",
    "\ttab\tand\u00a0no-break\u3000ideographic space",
    "In the year 1984, 3.14159 of 1,000,000 were 42.",
    "naïve café — “quotes” … ﬁne",
    "e\u0301 and \u00e9, Å and \u212b, ½ and ²",
    "你好，世界。こんにちは 안녕하세요",
    "Здравствуй, мир! שלום مرحبا नमस्ते",
    "😀 👩‍👩‍👧 🇫🇷",
    "def f(x):\n    return x ** 2  # square\n",
    f"a{SPACE}b {SPACE} c",
    "aaaaaaaaaaaaaaaa bbbb the the  the",
]


def convert_sentencepiece(path: Path) -> Tokenizer:
    """Converts a BPE or unigram ``tokenizer.model``.

    Control symbols (``<s>``) become special tokens, which a text may then contain.

    Raises:
        ValueError: If it is not a sentencepiece model, is of another kind, or
            the converted tokenizer does not give the same ids.
    """
    try:
        original = SentencePieceProcessor(model_file=str(path))
        proto = ModelProto.FromString(path.read_bytes())
    except Exception as error:  # Both libraries raise classes of their own.
        raise ValueError(f"{path.name} is not a sentencepiece model") from error

    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = _normalizer(proto)
    tokenizer.pre_tokenizer = _pre_tokenizer(proto)
    tokenizer.decoder = _decoder(proto)
    kinds = ModelProto.SentencePiece
    tokenizer.add_special_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in proto.pieces
            if piece.type in (kinds.CONTROL, kinds.UNKNOWN)
        ]
    )

    symbols = [f"one{symbol}two {symbol} three" for symbol in _user_defined(proto)]
    for text in PROBES + symbols:
        if tokenizer.encode(text, add_special_tokens=False).ids != original.encode(text):
            raise ValueError(
                f"{path.name} cannot be converted: {text!r} would become other tokens; "
                "give the checkpoint a tokenizer.json"
            )
    return tokenizer


def _user_defined(proto: ModelProto) -> list[str]:
    kinds = ModelProto.SentencePiece
    return [piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED]


def _model(proto: ModelProto) -> BPE | Unigram:
    byte_fallback = proto.trainer_spec.byte_fallback
    unknown = proto.trainer_spec.unk_id
    if proto.trainer_spec.model_type == TrainerSpec.UNIGRAM:
        scores = [(piece.piece, piece.score) for piece in proto.pieces]
        return Unigram(scores, unk_id=unknown, byte_fallback=byte_fallback)
    if proto.trainer_spec.model_type != TrainerSpec.BPE:
        raise ValueError("tokenizer.model is neither a BPE nor a unigram model")
    return BPE(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=_merges(proto),
        unk_token=proto.pieces[unknown].piece,
        fuse_unk=True,
        byte_fallback=byte_fallback,
        # The pre-tokenizer isolates user-defined symbols, which no merge builds.
        ignore_merges=_pre_tokenizer(proto) is not None,
    )


def _merges(proto: ModelProto) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored first.

    sentencepiece stores no merges: it joins any neighbours that form a piece.
    """
    normal = [piece for piece in proto.pieces if piece.type == ModelProto.SentencePiece.NORMAL]
    pieces = {piece.piece for piece in normal}
    return [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in sorted(normal, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in pieces and piece.piece[cut:] in pieces
    ]


def _normalizer(proto: ModelProto) -> normalizers.Normalizer:
    spec = proto.normalizer_spec
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    steps.append(normalizers.Replace(" ", SPACE))
    return normalizers.Sequence(steps)


def _pre_tokenizer(proto: ModelProto) -> pre_tokenizers.PreTokenizer | None:
    """Cuts out user-defined symbols of several characters; single ones are whole anyway."""
    symbols = [s.replace(" ", SPACE) for s in _user_defined(proto) if len(s) > 1]
    if not symbols:
        return None
    longest_first = sorted(symbols, key=len, reverse=True)
    return pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated")


def _decoder(proto: ModelProto) -> decoders.Decoder:
    """In the form by which mlx-lm recognises sentencepiece and streams without losing spaces."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    return decoders.Sequence(steps)
