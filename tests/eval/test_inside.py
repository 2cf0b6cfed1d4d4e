import json

import pytest
import torch
from commands import WORDS
from families import tiny as model_of

import lococo
from lococo import cli
from lococo.compressors.heads import save_heads
from lococo.compressors.learned import LearnedHeads
from lococo.compressors.nets import HeadSettings
from lococo.errors import ArgumentError
from lococo.eval import inside, plots
from lococo.facts import ModelFacts

SMALL = {"num_slots": 32, "chunk_size": 16}


@pytest.fixture(scope="module")
def ids():
    return torch.randint(2, 128, (220,), generator=torch.Generator().manual_seed(0)).tolist()


def rows_of(tokenizer, ids, *names, **more):
    return inside.evaluate(model_of(), tokenizer, ids, compressors=names, **(SMALL | more))


def test_every_compressor_is_looked_into(tokenizer, ids):
    rows = rows_of(tokenizer, ids, "h2o", "mass-merge", "streaming-llm")
    assert [row["compressor"] for row in rows] == ["h2o", "mass-merge", "streaming-llm"]
    for row in rows:
        assert row["attention_tokens"] <= 220
        assert (row["attention_tokens"] - 32) % 16 == 0
        for each in row["attention"]:
            assert 0 < each["overlap"] <= each["kept"] + 1e-6 <= 1 + 2e-6
            assert each["kl"] >= -1e-6
        assert [each["tokens"] for each in row["drift"]] == sorted(each["tokens"] for each in row["drift"])
        assert all(sum(each["parts"]) == pytest.approx(1) for each in row["drift"])
        assert all(each["slots"] == 32 for each in row["drift"])
        assert sum(each["slots"] for each in row["kinds"].values()) == pytest.approx(1)
        assert sum(each["text"] for each in row["kinds"].values()) == pytest.approx(1)


def test_with_room_for_everything_but_a_chunk_attention_hardly_changes(tokenizer, ids):
    [much] = rows_of(tokenizer, ids, "mass-merge", num_slots=128)
    [little] = rows_of(tokenizer, ids, "mass-merge", num_slots=16)

    def mean(row, name):
        return sum(each[name] for each in row["attention"]) / len(row["attention"])

    assert mean(much, "kept") > mean(little, "kept") + 0.2
    assert mean(much, "overlap") > mean(little, "overlap") + 0.2


def test_what_is_taken_down_is_what_the_cache_holds(tokenizer, ids):
    [row] = rows_of(tokenizer, ids[:80], "streaming-llm")
    # 32 slots of 48 + 16 tokens: the 4 first and the 28 latest before the last chunk.
    last = row["drift"][-1]
    assert (last["tokens"], last["entries"]) == (64, 48)
    kept = [0, 1, 2, 3, *range(36, 64)]
    assert last["age"] == pytest.approx(sum(64 - token for token in kept) / 32)
    assert last["of_the_first_chunk"] == 4 / 32
    assert sorted(each["token"] for each in row["favourites"]) == kept[:20]
    assert all(each["share_of_heads"] == 1 for each in row["favourites"])


def test_a_text_beyond_the_window_is_compared_inside_of_it(tokenizer):
    model = model_of()
    window = model.config.max_position_embeddings
    long = torch.randint(2, 128, (window + 100,)).tolist()
    [row] = inside.evaluate(model, tokenizer, long, compressors=["h2o"], **SMALL)
    assert row["attention_tokens"] <= window < row["drift"][-1]["tokens"]


def test_the_losses_are_those_of_the_reader(tokenizer, ids):
    [row] = rows_of(tokenizer, ids, "mass-merge")
    with lococo.attach(model_of(), "mass-merge", **SMALL) as slots:
        scores = lococo.reader.score(model_of(), torch.tensor([ids]), slots.new_cache())
    assert row["nll"] == pytest.approx([-scores.mean().item()], abs=1e-5)


def test_what_learned_heads_say_is_taken_down(tokenizer, ids, tmp_path):
    model = model_of()
    facts = ModelFacts.of(model)
    torch.manual_seed(0)
    heads = LearnedHeads(HeadSettings(range(model.config.num_hidden_layers), 2, facts.head_dim))
    for net in heads.mergers.values():
        torch.nn.init.constant_(net.out.bias, 0.25)  # both numbers of every entry
    save_heads(heads, tmp_path / "heads", facts)
    [row] = inside.evaluate(model, tokenizer, ids, compressors=[str(tmp_path / "heads")], **SMALL)
    assert row["compressor"] == "heads"
    for layer in row["layers"]:
        assert layer["weight"] == layer["gain"] == pytest.approx(0.25)
        assert layer["weight deviation"] == pytest.approx(0, abs=1e-3)
        assert layer["bonus"] == pytest.approx(0, abs=1e-6)


def test_pictures_are_drawn_of_rows_alone(tokenizer, ids, tmp_path):
    pytest.importorskip("matplotlib")
    rows = json.loads(json.dumps(rows_of(tokenizer, ids, "h2o", "mass-merge")))
    plots.save(plots.inside(rows), tmp_path / "inside.svg")
    assert "mass-merge: parts of the text in the slots" in (tmp_path / "inside.svg").read_text()


def test_too_short_a_text_and_the_full_cache_are_refused(tokenizer, ids):
    with pytest.raises(
        ArgumentError, match="text of 50 tokens is hardly compressed with 32 slots, which takes 64 or more"
    ):
        rows_of(tokenizer, ids[:50], "h2o")
    with pytest.raises(ArgumentError, match="no slots to look inside with the full cache"):
        rows_of(tokenizer, ids, "full")


def test_the_command_writes_rows_and_a_picture(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text(WORDS * 8)
    words = ["eval", "inside", str(text), "--model", tiny, "--num-slots", "32", "--chunk-size", "16"]
    words += ["--compressor", "h2o", "--tokens", "200", "--json", str(tmp_path / "a.jsonl")]
    assert cli.main([*words, "--plot", str(tmp_path / "a.svg")]) == 0
    assert json.loads((tmp_path / "a.jsonl").read_text())["compressor"] == "h2o"
    assert (tmp_path / "a.svg").exists()
