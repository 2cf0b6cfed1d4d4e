"""GLM-4's file of ranked tokens as a tokenizer of the tokenizers library, with the same ids for every text."""

import base64
import binascii
from pathlib import Path
from typing import Any, Final

from lococo.errors import ConversionError

# Where GLM-4 cuts a text before bytes are merged: contractions, words, up to three digits, punctuation, line breaks.
CUTS: Final = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a file with a token in base64 and its rank on each line.

    Raises:
        ConversionError: If it is no such file, or a rank is missing.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ConversionError(
                f"{path}, line {number}: expected a token in base64 and its rank, as GLM-4 has; fetch the file again"
            ) from error
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))):
        raise ConversionError(
            f"{path} leaves out ranks, or gives one twice; expected 0, 1, 2, ...: fetch the file again"
        )
    return ranks


def tokenizer_of(ranks: dict[bytes, int]) -> Any:
    """Return a `tokenizers.Tokenizer` that merges bytes by their ranks.

    Args:
        ranks: Of each token, which is its id.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    from lococo.convert.merges import merges_of

    letters = bytes_to_unicode()
    ids = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    ordered = sorted(ids, key=ids.__getitem__)
    # tiktoken looks a whole cut up before it merges anything.
    tokenizer = Tokenizer(models.BPE(ids, merges_of(ordered, ids), fuse_unk=False, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
