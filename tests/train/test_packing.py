import pytest
from one_extension import corpus_in
from one_training import Letters

from lococo.errors import DocumentError
from lococo.train.data import Corpus, Document
from lococo.train.packing import check_longest, packed_window

# A document is told by its letter; letters are tokens.
LONG = "".join(chr(97 + number % 26) for number in range(3000))


def windows(corpus, *, length=64, begin="random", count=12, seed=0):
    return [packed_window(corpus, seed, number, length=length, begin=begin) for number in range(count)]


def test_a_long_document_fills_a_window_alone(tmp_path):
    corpus = corpus_in(tmp_path, LONG)
    for [piece] in windows(corpus):
        assert "".join(map(chr, piece)) in LONG
        assert len(piece) == 64
    assert len({tuple(piece) for [piece] in windows(corpus)}) > 6


def test_windows_begin_with_documents_where_they_are_told_to(tmp_path):
    corpus = corpus_in(tmp_path, LONG)
    assert all("".join(map(chr, piece)) == LONG[:64] for [piece] in windows(corpus, begin="beginning"))


def test_short_documents_are_taken_whole_one_after_the_other(tmp_path):
    texts = ["a" * 25, "b" * 30]
    corpus = corpus_in(tmp_path, *texts)
    for pieces in windows(corpus):
        said = ["".join(map(chr, piece)) for piece in pieces]
        assert sum(map(len, said)) in (63, 64)
        assert all(text in texts for text in said[:-1])
        assert any(text.startswith(said[-1]) for text in texts)


def test_documents_that_fill_no_window_are_drawn_only_where_they_are_asked_for(tmp_path):
    corpus = corpus_in(tmp_path, LONG, *["a" * 90] * 200)
    assert all(len(pieces) == 1 for pieces in windows(corpus, length=128))
    # Bytes do not tell: a letter of two is a token, as well as one of one byte.
    corpus = corpus_in(tmp_path / "of two", LONG[:200], "\u00c1" * 140, "\u00c2" * 100)
    drawn = [pieces for pieces in windows(corpus, length=128, count=40) if len(pieces) == 1]
    assert len(drawn) == 40
    assert {chr(pieces[0][0]) for pieces in drawn} & {"A", "B"} == {"A"}  # as which they are told here
    corpus = corpus_in(tmp_path / "short", LONG, *["a" * 90] * 200)
    drawn = [packed_window(corpus, 0, n, length=128, begin="random", short=True) for n in range(12)]
    assert sum(len(pieces) > 1 for pieces in drawn) > 6


class Words(Letters):
    """Takes words for tokens, of however many bytes."""

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split() if len(word) == 12]}


def test_tokens_of_many_bytes_fill_a_window(tmp_path):
    words = range(10**11, 10**11 + 70)
    corpus = corpus_in(tmp_path, " ".join(map(str, words)))
    corpus.tokenizer = Words()
    check_longest(corpus, 70)
    with pytest.raises(DocumentError, match="the longest has 70"):
        check_longest(corpus, 71)
    drawn = windows(corpus)
    assert all(piece == list(range(piece[0], piece[0] + 64)) for [piece] in drawn)
    assert len({piece[0] for [piece] in drawn}) > 1
    assert corpus.window(0, 0, length=40, least=40)[0] in words


def test_a_single_token_is_left_over(tmp_path):
    pieces = packed_window(corpus_in(tmp_path, "a" * 21), 0, 0, length=64, begin="random")
    assert [len(piece) for piece in pieces] == [21, 21, 21]


def test_windows_are_the_same_for_the_same_seed_and_number(tmp_path):
    corpus = corpus_in(tmp_path, LONG, "short " * 5)
    assert windows(corpus) == windows(corpus)
    assert windows(corpus) != windows(corpus, seed=1)
    assert windows(corpus)[7] == packed_window(corpus, 0, 7, length=64, begin="random")


def test_domains_take_turns(tmp_path):
    documents = {}
    for name in ("one", "two"):
        (tmp_path / name).write_text(name[0] * 30)
        documents[name] = [Document(tmp_path / name, 0, 30)]
    corpus = Corpus(documents, Letters())
    letters = [{chr(token) for piece in pieces for token in piece} for pieces in windows(corpus, count=4)]
    assert letters == [{"o"}, {"t"}] * 2


def test_documents_that_are_all_but_empty(tmp_path):
    with pytest.raises(DocumentError, match="1000 of them left 64 to be filled"):
        packed_window(corpus_in(tmp_path, "a"), 0, 0, length=64, begin="random")


def test_the_longest_document(tmp_path):
    corpus = corpus_in(tmp_path, "a" * 70, "b" * 99)
    check_longest(corpus, 99)
    with pytest.raises(DocumentError, match="at least 100 tokens, the longest has 99"):
        check_longest(corpus, 100)
