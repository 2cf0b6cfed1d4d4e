"""GLM-4's tokens are those of merging bytes by their ranks, one after the other."""

import base64
import random
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from chatglm_checkpoints import TEXT, ranks

from lococo.convert.tiktoken_model import CUTS, read_ranks, tokenizer_of
from lococo.errors import ConversionError


def naive(text: str, known: dict[bytes, int]) -> list[int]:
    """Cut the text, then merge the pair of lowest rank again and again."""
    ids = []
    for found in regex.finditer(CUTS, text):
        parts = [bytes([byte]) for byte in found.group().encode()]
        while pairs := [(known[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in known]:
            _, first = min(pairs)
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        ids += [known[part] for part in parts]
    return ids


def test_ids_are_those_of_merging_by_rank(tmp_path: Path) -> None:
    draw = random.Random(0)
    # Merges of merges of merges, so that several ways lead to a token.
    tokens = [bytes([byte]) for byte in range(256)]
    for _ in range(400):
        token = draw.choice(tokens[96:]) + draw.choice(tokens[96:123])
        if token not in tokens:
            tokens.append(token)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    known = read_ranks(path)
    assert known == {token: rank for rank, token in enumerate(tokens)}
    tokenizer = tokenizer_of(known)
    letters = "".join(map(chr, range(97, 123)))
    for text in [
        TEXT,
        "  it's 12345 \n\n x",
        "狐狸🦊",
        *("".join(draw.choices(letters + " \n'1", k=30)) for _ in range(200)),
    ]:
        assert tokenizer.encode(text).ids == naive(text, known), text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"\x80\x00\xff\x80", "tokenizer.model, line 1: expected a token in base64 and its rank"),
        (b"IQ== 0\nIg==\n", "line 2: expected a token in base64"),
        (b"IQ== 0\nIg== 2\n", "leaves out ranks, or gives one twice"),
        (b"", "leaves out ranks"),
    ],
)
def test_other_files_are_refused(data: bytes, line: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=line):
        read_ranks(path)


def test_the_file_of_the_tiny_model_is_one() -> None:
    assert len(ranks().splitlines()) == 259
