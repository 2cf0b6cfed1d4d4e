"""Documents come as exact pieces of text, and their token ids are those of the whole text at once."""

import io
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lococo import documents
from lococo.documents import PIECE_BYTES, demo_text, encode_stream, read_text
from lococo.errors import DocumentError

FRAGMENTS = [
    "😀",
    "👩‍👩‍👧‍👦",
    "漢字仮名交じり文",
    "。",
    "é",
    "e\u0301",
    "\u0301",
    "\u200b",
    "\u3000",
    "Привет",
    "नमस्ते",
    "한국어",
]
FRAGMENTS += ["12345678901234", "it's", "<|im_end|>", "<|im_start|>user", "...", "{", "  }\n", "!!!\n\n", "=-" * 80]
FRAGMENTS += [" " * 17, " " * 300, "\n" * 5, "\n\n  ", "\t\t", "def f(x):\n    return x + 1\n", "a" * 200]
FRAGMENTS += [" x  5 ", " the quick brown fox"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def text_of(source) -> str:
    return "".join(read_text(source))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def pdf_with(text: str) -> PdfWriter:
    writer = PdfWriter()
    page = writer.add_blank_page(200, 200)
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    fonts = DictionaryObject(
        {NameObject("/F1"): DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})}
    )
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(stream)
    return writer


def saved(writer: PdfWriter, path: Path) -> Path:
    with path.open("wb") as file:
        writer.write(file)
    return path


def test_text_is_exact_with_newlines_translated_and_bom_removed(tmp_path):
    path = written(tmp_path, "a.py", b"\xef\xbb\xbfdef f():\r\n    return '\xc3\xa9'\r\x0c\n")
    assert text_of(path) == "def f():\n    return 'é'\n\x0c\n"
    assert text_of(str(path)) == text_of(path)


@pytest.mark.parametrize("shift", range(5))
def test_characters_and_newlines_survive_on_a_piece_boundary(tmp_path, shift):
    content = "x" * (PIECE_BYTES - shift) + "😀\r\n😀"
    path = written(tmp_path, "a.txt", content.encode())
    pieces = list(read_text(path))
    assert "".join(pieces) == content.replace("\r\n", "\n")
    assert len(pieces) == 2
    assert all(pieces)


def test_file_is_read_piece_by_piece(tmp_path):
    path = written(tmp_path, "a.txt", b"y" * (3 * PIECE_BYTES) + b"\xff")
    pieces = read_text(path)
    assert [len(next(pieces)) for _ in range(3)] == [PIECE_BYTES] * 3
    with pytest.raises(DocumentError, match=rf"0xff at offset {3 * PIECE_BYTES}; .*iconv -f .* -t utf-8"):
        next(pieces)


def test_html_gives_visible_text(tmp_path):
    page = b"""<!DOCTYPE html><html><head><title>T</title><style>p {color: red}</style></head><body><!-- no -->
    <script>var x = 1;</script><h1>Head</h1><p>One <b>bo</b>ld
    line &amp; more</p><ul><li>a</li><li>b</li></ul><pre>  def f():
    return  1</pre><table><tr><td>1</td><td>2</td></tr></table></body></html>"""
    expected = "T\nHead\nOne bold line & more\na\nb\n  def f():\n    return  1\n1 2\n"
    assert text_of(written(tmp_path, "a.html", page)) == expected
    assert text_of(written(tmp_path, "a.HTM", page)) == expected


def test_pdf_gives_text_of_its_pages(tmp_path):
    writer = pdf_with("Hello page one")
    writer.append(io.BytesIO(saved(pdf_with("and two"), tmp_path / "2.pdf").read_bytes()))
    assert list(read_text(saved(writer, tmp_path / "a.pdf"))) == ["Hello page one\n", "and two\n"]


def test_encrypted_pdf_is_refused(tmp_path):
    writer = pdf_with("secret")
    writer.encrypt("password", algorithm="RC4-128")
    with pytest.raises(DocumentError, match=r"encrypted PDF; save it without a password"):
        text_of(saved(writer, tmp_path / "a.pdf"))


def test_pdf_without_text_is_refused(tmp_path):
    writer = PdfWriter()
    writer.add_blank_page(200, 200)
    with pytest.raises(DocumentError, match=r"PDF without text .*OCR"):
        text_of(saved(writer, tmp_path / "a.pdf"))


def test_damaged_pdf_is_refused(tmp_path):
    with pytest.raises(DocumentError, match="no readable PDF"):
        text_of(written(tmp_path, "a.pdf", b"%PDF-1.4\nnonsense"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected some text"),
        (b" \n\t\r\n", "is empty but for white space"),
        (b" " * (2 * PIECE_BYTES), "is empty but for white space"),
        (b"text\0more", "binary .a NUL at byte 4"),
        (b"caf\xe9 au lait", "not UTF-8: byte 0xe9 at offset 3; .*iconv -f .* -t utf-8"),
        (b"cut off \xf0\x9f\x98", "byte 0xf0 at offset 8"),
        (b"x" * (PIECE_BYTES - 1) + b"\xc3" + b"z", f"byte 0xc3 at offset {PIECE_BYTES - 1}"),
        (b"\xff\xfeh\0i\0", "UTF-16"),
        (b"\x7fELF", "program"),
        (b"\x89PNG\r\n", "PNG"),
        (b"PK\x03\x04", "zip"),
        (b"\x1f\x8b", "gunzip"),
        (b"%PDF-1.4", "ends in .pdf"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    with pytest.raises(DocumentError, match=message) as caught:
        text_of(written(tmp_path, "a.txt", content))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DocumentError, match=r"none\.txt: no such file"):
        next(read_text(tmp_path / "none.txt"))
    with pytest.raises(DocumentError, match="is a folder; expected a file"):
        next(read_text(tmp_path))


def test_permission_is_explained(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DocumentError, match="permission denied; allow it with `chmod"):
        next(read_text(tmp_path / "a.txt"))


def test_blank_start_is_held_back(tmp_path):
    path = written(tmp_path, "a.txt", b"\n" * PIECE_BYTES + b"x")
    assert list(read_text(path)) == ["\n" * PIECE_BYTES + "x"]


def test_standard_input_and_open_files(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffdé\r\n".encode()), encoding="ascii"))
    assert text_of("-") == "dé\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("plain"))
    assert text_of("-") == "plain"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(DocumentError, match="standard input is empty"):
        text_of("-")
    assert text_of(io.StringIO("\ufeffa\r\nb")) == "a\nb"
    with pytest.raises(DocumentError, match="byte 0xff at offset 1"):
        text_of(io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    with pytest.raises(DocumentError, match="not UTF-8"):
        text_of(io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8", errors="surrogateescape"))
    with pytest.raises(DocumentError, match="NUL"):
        text_of(io.StringIO("a\0"))


def test_demo_text_is_long_real_and_the_same_each_time():
    text = demo_text()
    assert text == demo_text()
    assert len(text) > 300_000
    assert text.startswith("assert\n\n")
    assert 'The simple form, "assert expression", is equivalent to' in text
    assert text.index("\nwith\n\n") > text.index("\nwhile\n\n")


def trained(normalizer, pre_tokenizer, post_processor=None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_text()[:60_000], *FRAGMENTS], trainer)
    if post_processor:
        tokenizer.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>")


def byte_level(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.fixture(scope="module")
def gpt2() -> PreTrainedTokenizerFast:
    return trained(None, pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(scope="module", params=["gpt2", "prefix space", "trimmed offsets", "llama3", "composing"])
def tokenizer(request, gpt2) -> PreTrainedTokenizerFast:
    if request.param == "gpt2":
        return gpt2
    if request.param == "prefix space":
        return trained(None, pre_tokenizers.ByteLevel(add_prefix_space=True))
    if request.param == "trimmed offsets":
        return trained(None, pre_tokenizers.ByteLevel(add_prefix_space=True), processors.ByteLevel(trim_offsets=True))
    return trained(normalizers.NFC() if request.param == "composing" else None, byte_level(LLAMA3))


@pytest.fixture(scope="module")
def sentencepiece() -> PreTrainedTokenizerFast:
    """Llama 2's construction: no pre-tokenizer, a space put before the text, unknown characters as bytes."""
    plain = trained(None, pre_tokenizers.Metaspace()).backend_tokenizer
    vocab = plain.get_vocab(with_added_tokens=True)
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)} | {"<unk>": len(vocab) + 256}
    merges = [tuple(pair) for pair in json.loads(plain.to_str())["model"]["merges"]]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def whole(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def streamed(tokenizer, pieces, **options) -> list[int]:
    blocks = list(encode_stream(tokenizer, pieces, **options))
    assert all(blocks)
    return [index for block in blocks for index in block]


def check_random_texts(tokenizer, count: int = 50) -> None:
    rng, prose = random.Random(0), demo_text()
    for _ in range(count):
        parts = []
        for _ in range(rng.choice([1, 5, 30, 100])):
            start = rng.randrange(len(prose) - 400)
            parts.append(rng.choice(FRAGMENTS) if rng.random() < 0.7 else prose[start : start + rng.randrange(400)])
        text, block_chars = "".join(parts), rng.choice([1, 16, 64, 200, 1000])
        expected = whole(tokenizer, text)
        assert streamed(tokenizer, parts, block_chars=block_chars) == expected
        assert streamed(tokenizer, [text], block_chars=block_chars) == expected


def test_streamed_ids_equal_the_whole_text(tokenizer):
    check_random_texts(tokenizer)


def test_streamed_ids_equal_the_whole_text_without_words(sentencepiece):
    check_random_texts(sentencepiece)


@pytest.mark.parametrize("text", ["", "a", " ", "\n\n", "漢"])
def test_short_texts(gpt2, text):
    assert streamed(gpt2, [text, ""]) == whole(gpt2, text)


@pytest.fixture
def windows(monkeypatch) -> list[int]:
    """Collect the length in characters of every window that is encoded."""
    seen, encode = [], documents._encode

    def counted(tokenizer, window):
        seen.append(len(window))
        return encode(tokenizer, window)

    monkeypatch.setattr(documents, "_encode", counted)
    return seen


def test_long_word_is_encoded_a_bounded_number_of_times(gpt2, windows):
    text = "ab" * 150_000 + " end"
    assert streamed(gpt2, [text], block_chars=1000) == whole(gpt2, text)
    assert sum(windows) < 4 * len(text)


def test_text_without_any_word_end_does_not_stay_in_memory(gpt2, windows, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_WORD_CHARS", 4000)
    rng = random.Random(1)
    text = "".join(rng.choice("abcdef") for _ in range(40_000))
    assert streamed(gpt2, [text], block_chars=250) == whole(gpt2, text)
    assert max(windows) < 8000


def test_special_tokens_inside_a_document_are_plain_text(gpt2):
    text = "end<|im_end|> of <|im_start|>"
    ids = streamed(gpt2, [text])
    assert not {0, 1} & set(ids)
    assert gpt2.convert_tokens_to_ids("<|im_end|>") == 1
    assert gpt2(text)["input_ids"].count(1) == 1


def odd_texts(count: int) -> Iterator[str]:
    """Short texts of emoji, CJK, combining marks, code and single characters in any order."""
    rng = random.Random(2)
    single = "aZ0 .\n\t\"'🦓é\u0301\u200d️漢한नि\u00a0ß"
    for _ in range(count):
        parts = [rng.choice(FRAGMENTS) if rng.random() < 0.4 else rng.choice(single) for _ in range(rng.randrange(40))]
        yield "".join(parts)[:400]


def test_a_text_that_comes_character_by_character(tokenizer):
    for text in odd_texts(100):
        assert streamed(tokenizer, text, block_chars=48) == whole(tokenizer, text)


def test_a_text_that_comes_character_by_character_without_words(sentencepiece):
    for text in odd_texts(100):
        assert streamed(sentencepiece, text, block_chars=48) == whole(sentencepiece, text)


@pytest.mark.parametrize("kind", ["gpt2", "prefix space", "sentencepiece"])
def test_a_text_that_goes_on_from_another(kind, gpt2, sentencepiece):
    prefixed = trained(None, pre_tokenizers.ByteLevel(add_prefix_space=True))
    tokenizer = {"gpt2": gpt2, "prefix space": prefixed, "sentencepiece": sentencepiece}[kind]
    before = "what came before 漢"  # joins with nothing
    for text in ("the quick brown fox", "漢字", "\n\n  indented", "<|im_end|> and so on. " * 40, ""):
        for pieces in ([text], text):
            ids = whole(tokenizer, before) + streamed(tokenizer, pieces, block_chars=100, continues=True)
            assert ids == whole(tokenizer, before + text)


def test_long_text_gives_no_warning(gpt2, caplog):
    gpt2.model_max_length = 10
    try:
        assert len(streamed(gpt2, ["many words " * 100])) > 10
    finally:
        gpt2.model_max_length = int(1e30)
    assert not caplog.records


def test_cut_that_the_next_window_contradicts_is_taken_back(gpt2, windows, monkeypatch):
    calls, after = [], documents._after

    def contradicted(tokens, lead):
        calls.append(bool(lead.ids))
        return None if lead.ids and sum(calls) % 4 == 0 else after(tokens, lead)

    monkeypatch.setattr(documents, "_after", contradicted)
    text = demo_text()[:20_000]
    assert streamed(gpt2, [text], block_chars=300) == whole(gpt2, text)
    assert sum(calls) > 40
    assert max(windows) > 750  # two windows as one


def test_tokenizer_without_offsets_gets_the_text_at_once():
    class Slow:
        is_fast = False

        def __call__(self, text, **options):
            assert options == {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return {"input_ids": [ord(character) for character in text]}

    assert list(encode_stream(Slow(), ["ab", "c"])) == [[97, 98, 99]]
    assert list(encode_stream(Slow(), [])) == []


@pytest.mark.real_model
def test_streamed_ids_of_the_default_model():
    from lococo import cached
    from lococo import models as loading

    folder = cached.cache_folder() / f"{loading.DEFAULT_MODEL}-{loading.WHEEL_SHA256[:16]}"
    if not folder.is_dir():
        pytest.skip("the default model is not in the cache")
    tokenizer = loading._load_tokenizer(str(folder), loading.DEFAULT_MODEL, False)
    check_random_texts(tokenizer)
