"""A sentencepiece model as a tokenizer of the tokenizers library, with the same ids.

Source: sentencepiece_model.proto says what the fields mean. A text is normalised, gets a space in front, has its
spaces written as U+2581, and is cut into pieces; a character without a piece becomes its bytes. BPE models gave the
same ids for every text that was tried (1.5 million tokens). Unigram models of the tokenizers library differ in two
ways: they take the name of a control piece, spelled out in a text, for that piece, and may choose otherwise between
equally likely cuts.
"""

import re
from pathlib import Path
from typing import Any, Final

from lococo.errors import ConversionError

SPACE: Final = "\u2581"
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, USER_DEFINED = 1, 2, 4


def read_model(path: Path) -> Any:
    """Parse a sentencepiece model.

    Raises:
        ConversionError: If it is none, or of a kind that is not converted.
    """
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ConversionError(f"{path} is no sentencepiece model ({error}); fetch the file again") from error
    if not proto.pieces:
        raise ConversionError(f"{path} holds no pieces; expected a sentencepiece model: fetch the file again")
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise ConversionError(f"{path} cuts text into words or characters; expected a unigram or a BPE model")
    if not proto.normalizer_spec.escape_whitespaces or proto.trainer_spec.treat_whitespace_as_suffix:
        raise ConversionError(f"{path} keeps spaces as they are, or behind words; expected them in front, as {SPACE}")
    return proto


def tokenizer_of(proto: Any) -> Any:
    """Return a `tokenizers.Tokenizer` that gives the ids of a sentencepiece model.

    Args:
        proto: The model, parsed.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(_unigram(proto) if proto.trainer_spec.model_type == UNIGRAM else _bpe(proto))
    steps = _normalizers(proto.normalizer_spec)
    tokenizer.normalizer = normalizers.Sequence(steps)
    if symbols := [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]:
        # Longer symbols first, as sentencepiece looks for them; each stays in one piece.
        longest = sorted(symbols, key=len, reverse=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, longest))), behavior="isolated")
    made = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        made.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(made)
    return tokenizer


def _normalizers(spec: Any) -> list[Any]:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _bpe(proto: Any) -> Any:
    from tokenizers import models

    from lococo.convert.merges import merges_of

    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == NORMAL]
    # Pieces with the highest score are made first; sorting keeps the order of equals.
    ordered = [piece.piece for piece in sorted(normal, key=lambda piece: -piece.score)]
    return models.BPE(
        ids,
        merges_of(ordered, {piece.piece: ids[piece.piece] for piece in normal}),
        unk_token=_unknown(proto),
        fuse_unk=True,
        byte_fallback=bool(proto.trainer_spec.byte_fallback),
        # A symbol is made by no merges, so what stands alone must be looked up whole.
        ignore_merges=any(piece.type == USER_DEFINED for piece in proto.pieces),
    )


def _unigram(proto: Any) -> Any:
    from tokenizers import models

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = [piece.piece for piece in proto.pieces].index(_unknown(proto))
    return models.Unigram(pieces, unk_id=unknown, byte_fallback=bool(proto.trainer_spec.byte_fallback))


def _unknown(proto: Any) -> str:
    return str(next(piece.piece for piece in proto.pieces if piece.type == UNKNOWN))
