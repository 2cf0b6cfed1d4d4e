"""Token ids of a text that is read piece by piece are those of the whole text at once."""

import json
import random
from collections.abc import Iterator

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lococo import tokenization
from lococo.documents import demo_text
from lococo.models import load_tokenizer
from lococo.tokenization import encode_stream

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
    seen, encode = [], tokenization._encode

    def counted(tokenizer, window):
        seen.append(len(window))
        return encode(tokenizer, window)

    monkeypatch.setattr(tokenization, "_encode", counted)
    return seen


def test_long_word_is_encoded_a_bounded_number_of_times(gpt2, windows):
    text = "ab" * 150_000 + " end"
    assert streamed(gpt2, [text], block_chars=1000) == whole(gpt2, text)
    assert sum(windows) < 4 * len(text)


def test_text_without_any_word_end_does_not_stay_in_memory(gpt2, windows, monkeypatch):
    monkeypatch.setattr(tokenization, "LONGEST_WORD_CHARS", 4000)
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
    calls, after = [], tokenization._after

    def contradicted(tokens, lead):
        calls.append(bool(lead.ids))
        return None if lead.ids and sum(calls) % 4 == 0 else after(tokens, lead)

    monkeypatch.setattr(tokenization, "_after", contradicted)
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
    from lococo import cached, default_model

    folder = cached.cache_folder() / f"{default_model.DEFAULT_MODEL}-{default_model.WHEEL_SHA256[:16]}"
    if not folder.is_dir():
        pytest.skip("the default model is not in the cache")
    tokenizer = load_tokenizer(folder)
    check_random_texts(tokenizer)
