"""The converted tokenizer gives the ids that sentencepiece itself gives."""

import random
from pathlib import Path

import pytest
import sentencepiece
from chatglm_checkpoints import SYMBOL, TEXT, pieces

from lococo.convert.sentencepiece_model import read_model, tokenizer_of
from lococo.errors import ConversionError

KINDS = {
    "bpe": {"kind": "bpe"},
    "unigram": {"kind": "unigram"},
    "bpe, normalised": {"kind": "bpe", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "unigram, normalised": {
        "kind": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "bpe, no space in front": {"kind": "bpe", "add_dummy_prefix": False},
    "bpe, symbols": {"kind": "bpe", "user_defined_symbols": f"{SYMBOL},ab,abab"},
    "unigram, symbols": {"kind": "unigram", "user_defined_symbols": f"{SYMBOL},ab"},
    "bpe, no bytes": {"kind": "bpe", "byte_fallback": False},
}
TEXTS = [
    "",
    " ",
    "fox",
    " fox",
    "  two   spaces  ",
    "\n",
    "\n\n  fox\n",
    TEXT,
    TEXT * 7,
    "Łódź, 東京, 狐, ∑, \u200b, ﬁ, Å, 🦊",
    "a\tb\r\nc",
    "12345678901234567890",
    "soporific sop eop [MASK]",
    "aaaaaaa thethethe quickquick",
    "\u2581fox\u2581",
]
CONTROLS = "<s></s><unk><0x41>"  # plain text to sentencepiece; the library's unigram model takes it for the pieces
SYMBOLS = [f"fox{SYMBOL}dog", f"{SYMBOL} fox", f"{SYMBOL}{SYMBOL}", f" {SYMBOL}", "xababab", "abababab", "ab ab"]


def both(folder: Path, **options: object) -> tuple[sentencepiece.SentencePieceProcessor, object]:
    path = folder / "tokenizer.model"
    path.write_bytes(pieces(**options))
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), tokenizer_of(read_model(path))


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_sentencepiece(name: str, tmp_path: Path) -> None:
    oracle, tokenizer = both(tmp_path, **KINDS[name])
    assert tokenizer.get_vocab_size() == oracle.vocab_size()
    assert [tokenizer.id_to_token(index) for index in range(oracle.vocab_size())] == [
        oracle.id_to_piece(index) for index in range(oracle.vocab_size())
    ]
    for text in [*TEXTS, *(SYMBOLS if "symbols" in name else []), *([CONTROLS] if name.startswith("bpe") else [])]:
        assert tokenizer.encode(text).ids == oracle.encode(text), (text, tokenizer.encode(text).tokens)


@pytest.mark.parametrize("name", ["bpe", "unigram", "bpe, no space in front", "bpe, symbols"])
def test_text_comes_back(name: str, tmp_path: Path) -> None:
    oracle, tokenizer = both(tmp_path, **KINDS[name])
    for text in TEXTS:
        if "\u2581" not in text:
            assert tokenizer.decode(tokenizer.encode(text).ids) == oracle.decode(oracle.encode(text)) == text


def test_random_texts(tmp_path: Path) -> None:
    draw = random.Random(0)
    for name in ("bpe", "unigram"):
        oracle, tokenizer = both(tmp_path, **KINDS[name])
        for _ in range(300):
            text = "".join(draw.choices(TEXT + "  \n", k=draw.randrange(1, 40)))
            assert tokenizer.encode(text).ids == oracle.encode(text), (name, text)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"", "holds no pieces; expected a sentencepiece model"),
        (b"\xff\xff\xff\xff", "is no sentencepiece model"),
        ({"kind": "char"}, "cuts text into words or characters; expected a unigram or a BPE model"),
        ({"treat_whitespace_as_suffix": True}, "keeps spaces as they are, or behind words"),
    ],
)
def test_other_files_are_refused(data: object, line: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data if isinstance(data, bytes) else pieces(**data))
    with pytest.raises(ConversionError, match=line):
        read_model(path)
