import json
import sys
from types import SimpleNamespace

import pytest

from lococo.errors import ArgumentError, DocumentError
from lococo.train import hub
from lococo.train.data import Corpus, corpus_of


class Stream(list):
    def shuffle(self, seed, buffer_size):
        assert buffer_size == hub.SHUFFLE_BUFFER
        return Stream(self[seed:] + self[:seed])


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Replace `datasets` by one that holds six documents, and return what it was asked for."""
    calls = []

    def load_dataset(name, subset, *, split, streaming, revision):
        calls.append((name, subset, split, streaming, revision))
        if name == "old/script" and revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found script.py")
        if name == "no/such":
            raise FileNotFoundError("no/such is not on the hub")
        field = "content" if name == "other/field" else "text"
        return Stream({field: f"document {number} " + "words " * 200} for number in range(6))

    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_data_set_is_fetched_once_for_the_same_seed_and_number(asked):
    folder = hub.fetch("hf:owner/name:part@v1", documents=4, seed=1)
    assert hub.fetch("hf:owner/name:part@v1", documents=4, seed=1) == folder
    assert asked == [("owner/name", "part", "train", True, "v1")]
    lines = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line[:10] for line in lines] == ["document 1", "document 2", "document 3", "document 4"]
    assert hub.fetch("hf:owner/name:part@v1", documents=4, seed=2) != folder


def test_documents_can_be_kept_apart_from_those_for_training(asked):
    folder = hub.fetch("hf:owner/name", documents=2, seed=0, skip=3)
    lines = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line[:10] for line in lines] == ["document 3", "document 4"]
    assert folder != hub.fetch("hf:owner/name", documents=2, seed=0)


def test_a_data_set_that_is_a_script_is_read_from_its_parquet_copy(asked):
    hub.fetch("hf:old/script", documents=2, seed=0)
    assert [call[4] for call in asked] == [None, "refs/convert/parquet"]


def test_what_cannot_be_fetched_leaves_nothing_behind(asked, tmp_path):
    with pytest.raises(DocumentError, match="no/such is not on the hub"):
        hub.fetch("hf:no/such", documents=2, seed=0)
    with pytest.raises(DocumentError, match="a field 'text', found content"):
        hub.fetch("hf:other/field", documents=2, seed=0)
    with pytest.raises(ArgumentError, match="such as hf:owner/name"):
        hub.fetch("hf:", documents=2, seed=0)
    assert list((tmp_path / "cache").iterdir()) == []


def test_datasets_is_asked_for_where_it_is_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArgumentError, match=r"needs datasets; install `lococo\[train\]`"):
        hub.fetch("hf:owner/name", documents=1, seed=0)


def test_the_library_itself_streams_and_shuffles_what_it_opens(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "set").mkdir()
    texts = [f"document {number}" for number in range(50)]
    lines = "".join(json.dumps({"text": text, "source": "web"}) + "\n" for text in texts)
    (tmp_path / "set" / "train.jsonl").write_text(lines)
    drawn = [
        list(hub._texts(hub._stream(str(tmp_path / "set"), None, None, seed, "hf:set"), 40, "hf:set"))
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 40
    assert set(drawn[0]) < set(texts)
    with pytest.raises(DocumentError, match=r"hf:none could not be opened: .*look for its name"):
        hub._stream(str(tmp_path / "none"), None, None, 0, "hf:none")


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) for letter in text]}


def test_folders_and_data_sets_take_turns(asked, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("mine " * 300)
    corpus, held_out = corpus_of(["hf:owner/name", str(tmp_path / "mine")], Letters(), documents=6, seed=0)
    assert isinstance(held_out, Corpus)
    texts = ["".join(map(chr, corpus.window(0, number, length=60, least=20))) for number in range(4)]
    assert ["mine" in text for text in texts] in ([True, False] * 2, [False, True] * 2)
