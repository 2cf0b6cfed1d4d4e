import json

import pytest

from lococo.errors import DocumentError
from lococo.train.data import Document, corpus_of


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) for letter in text]}


def corpus_in(folder, **options):
    return corpus_of([str(folder)], Letters(), documents=1, seed=0, **options)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prose").mkdir()
    (tmp_path / "web").mkdir()
    for number in range(10):
        (tmp_path / "prose" / f"{number}.txt").write_text(" ".join(f"play {word}" for word in range(100)))
    lines = [json.dumps({"text": " ".join(f"é fox {word}" for word in range(100))}) for number in range(10)]
    (tmp_path / "web" / "pages.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    return tmp_path


def test_windows_are_the_same_for_the_same_seed_and_number(folder):
    corpus, _ = corpus_in(folder)
    windows = [corpus.window(3, number, length=50, least=20) for number in range(20)]
    assert windows == [corpus.window(3, number, length=50, least=20) for number in range(20)]
    assert windows != [corpus.window(4, number, length=50, least=20) for number in range(20)]
    assert all(20 <= len(window) <= 50 for window in windows)
    assert len({tuple(window) for window in windows}) > 10


def test_domains_take_turns(folder):
    corpus, _ = corpus_in(folder)
    texts = ["".join(map(chr, corpus.window(0, number, length=60, least=20))) for number in range(8)]
    assert ["fox" in text for text in texts] == [False, True] * 4


def test_documents_are_kept_apart(folder):
    train, held_out = corpus_in(folder, held_out=0.2)
    for domain in ("prose", "web"):
        inside, apart = set(train.domains[domain]), set(held_out.domains[domain])
        assert len(apart) == 2
        assert len(inside) == 8
        assert not inside & apart


def test_what_is_for_validation_is_never_trained_on(folder):
    for part in ("train", "val"):
        (folder / "split" / part).mkdir(parents=True)
        (folder / "split" / part / "a.txt").write_text(part * 100)
    (folder / "other").mkdir()
    (folder / "other" / "val.jsonl").write_text(json.dumps({"text": "val " * 100}))
    train, held_out = corpus_in(folder)
    files = {d.file for corpus in (train, held_out) for group in corpus.domains.values() for d in group}
    assert folder / "split" / "train" / "a.txt" in files
    assert not [file for file in files if "val" in str(file.relative_to(folder))]


def test_a_part_of_a_file_is_read_as_text(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("é" * 100, "utf-8")
    assert Document(file, 0, 200).read(1, 11) == "é" * 5


def test_a_folder_without_text(tmp_path):
    with pytest.raises(DocumentError, match="expected text to train on"):
        corpus_in(tmp_path)


def test_documents_shorter_than_a_window(folder):
    corpus, _ = corpus_in(folder)
    with pytest.raises(DocumentError, match="documents of at least 5000 tokens, found hardly any"):
        corpus.window(0, 0, length=6000, least=5000)


def test_lines_without_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "' + "x" * 500 + '"}\n')
    with pytest.raises(DocumentError, match="line 1: expected lines of JSON with a 'text' field"):
        corpus_in(tmp_path)


def test_a_line_without_text_among_others_is_found_before_training(tmp_path):
    good = json.dumps({"text": "word " * 100})
    (tmp_path / "a.jsonl").write_text(f"{good}\n\n{good}\n{{'text': 3}}\n{good}\n")
    with pytest.raises(DocumentError, match=r"a\.jsonl, line 4: expected lines of JSON"):
        corpus_in(tmp_path)


def test_one_long_document_among_many_short_ones_is_always_found(tmp_path):
    class Words:
        """A tokenizer of words, of ten letters each in the short documents."""

        def __call__(self, text, add_special_tokens=False):
            return {"input_ids": [len(word) for word in text.split()]}

    for number in range(300):
        (tmp_path / f"{number}.txt").write_text("tenletters " * 20)
    (tmp_path / "long.txt").write_text("one " * 60)
    corpus, _ = corpus_of([str(tmp_path)], Words(), documents=1, seed=0, held_out=0)
    windows = [corpus.window(0, number, length=40, least=30) for number in range(50)]
    assert all(set(window) <= {2, 3} and 30 <= len(window) <= 40 for window in windows)


def test_a_folder_named_twice_is_read_once(folder):
    once, twice = (corpus_of([str(folder)] * count, Letters(), documents=1, seed=0) for count in (1, 2))
    for part in (0, 1):
        assert once[part].fingerprint == twice[part].fingerprint
    for domain, documents in twice[0].domains.items():
        assert not set(documents) & set(twice[1].domains[domain])


def test_a_folder_that_is_split_itself_gives_its_training_part_alone(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "books" / part).mkdir(parents=True)
        (tmp_path / "books" / part / "a.txt").write_text(f"{part} " * 300)
        (tmp_path / "web").mkdir(exist_ok=True)
        (tmp_path / "web" / f"{part}.jsonl").write_text(json.dumps({"text": f"{part} " * 300}))
    for domain in ("books", "web"):
        corpus, held_out = corpus_in(tmp_path / domain)
        for read in (corpus, held_out):
            for number in range(5):
                text = "".join(map(chr, read.window(0, number, length=60, least=20)))
                assert "train" in text
                assert "val" not in text


def test_half_a_surrogate_pair_is_no_reason_to_stop(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "half \\ud83d " * 100 + '"}')
    corpus, _ = corpus_in(tmp_path)
    "".join(map(chr, corpus.window(0, 0, length=60, least=20))).encode()
