import json
from pathlib import Path

import pytest
import torch
from commands import save_llama
from families import FAMILIES, tiny
from transformers import DynamicCache

from lococo import attach, cli
from lococo.bench.known import KNOWN
from lococo.bench.plan import device_of, known_config, plan, tokens_of
from lococo.cache import kv_nbytes
from lococo.cache_name import cache_name
from lococo.errors import ArgumentError
from lococo.reader import prefill
from lococo.state_layer import states_of

MEASURED = Path(__file__).parents[2] / "results" / "memory.jsonl"


def nbytes(cache):
    return kv_nbytes(cache) + sum(state.nbytes for layer in cache.layers for _, _, state in states_of(layer))


def planned(model, **settings):
    return plan(
        model.config, name="tiny", dtype=torch.float32, **{"context": 100, "num_slots": 20, "chunk_size": 16} | settings
    )


@pytest.mark.parametrize("compressor", ["mass-merge", "h2o", "streaming-llm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_slots_are_those_of_a_cache_that_has_read(family, compressor):
    model = tiny(family)
    with attach(model, compressor, num_slots=20, chunk_size=48) as slots, torch.no_grad():
        cache = slots.new_cache()
        prefill(model, torch.randint(5, 100, (3, 100)), cache)
    in_slots = [layer for layer in cache.slot_layers if layer.keys is not None]  # others share theirs
    others = nbytes(cache) - sum(layer.keys.nbytes + layer.values.nbytes for layer in in_slots)
    made = planned(model, chunk_size=48, batch=3, compressor=compressor)
    assert made.slots.cache == cache.nbytes + others


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_the_full_cache_are_those_of_one_that_has_read(family):
    model, cache = tiny(family), DynamicCache(config=tiny(family).config)
    with torch.no_grad():
        model(torch.randint(5, 100, (2, 100)), **{cache_name(model): cache})
    assert planned(model, batch=2).full.cache == nbytes(cache)


def test_a_model_that_reads_nothing_without_numbers_keeps_what_its_config_says(monkeypatch):
    model, read = tiny("qwen3"), planned(tiny("qwen3"))

    def forward(*args, **kwargs):
        raise AttributeError("get_usable_length")

    monkeypatch.setattr(type(model), "forward", forward)
    assert planned(model) == read


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family):
    model = tiny(family)
    made = planned(model)
    assert made.parameters == sum(each.numel() for each in model.parameters())
    assert made.weights >= 4 * made.parameters


# Billions, as their authors and the hub state them.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("meta-llama/Llama-2-7b-hf", 6.738),
        ("meta-llama/Llama-2-13b-hf", 13.016),
        ("meta-llama/Llama-3.1-8B", 8.030),
        ("meta-llama/Llama-3.1-70B", 70.554),
        ("zai-org/chatglm3-6b-32k", 6.244),
        ("Qwen/Qwen3-0.6B", 0.596),
        ("Qwen/Qwen3-8B", 8.191),
        ("Qwen/Qwen3-32B", 32.762),
    ],
)
def test_published_models_have_their_published_size(name, billions):
    made = plan(known_config(name), name=name, context=4096)
    assert made.parameters / 1e9 == pytest.approx(billions, abs=6e-4)


def test_llama_2_needs_what_is_known_of_it():
    # Half a MiB per token: 32 layers, keys and values, 4,096 numbers of two bytes.
    made = plan(known_config("llama-2-7b-hf"), name="", context=4096, batch=2)
    assert made.full.cache == 2 * 4096 * 2**19
    assert made.weights == pytest.approx(2 * made.parameters, rel=1e-6)


def test_the_largest_batch_is_the_last_that_fits():
    config = known_config("llama-3.1-8b")
    for which in (0, 1):
        batch = plan(config, name="", context=32768).batches["H100"][which]
        room = 0.9 * 80 * 2**30
        for count, fits in ((batch, True), (batch + 1, False)):
            made = plan(config, name="", context=32768, batch=count)
            need = (made.full, made.slots)[which]
            assert (made.weights + need.total <= room) == fits


def test_a_model_that_does_not_fit_has_no_batch():
    assert plan(known_config("llama-3.1-70b"), name="", context=1024).batches["H100"] == (0, 0)


@pytest.mark.parametrize("name", KNOWN)
def test_slots_need_as_much_for_any_length(name):
    needs = {plan(known_config(name), name=name, context=tokens).slots for tokens in (8192, 131072)}
    assert len(needs) == 1


@pytest.mark.real_model
def test_what_is_planned_is_what_was_measured(default_model):
    model, _ = default_model
    measured = [row for row in map(json.loads, MEASURED.read_text().splitlines()) if row["compressor"] != "full"]
    assert measured
    for row in measured:
        made = plan(model.config, name="", context=row["length"], num_slots=row["num_slots"], dtype=torch.float32)
        assert made.slots.total == pytest.approx(row["peak_memory_bytes"], rel=0.1)


@pytest.mark.parametrize(("said", "tokens"), [("4096", 4096), ("128k", 131072), ("1M", 1 << 20)])
def test_numbers_of_tokens(said, tokens):
    assert tokens_of(said) == tokens


@pytest.mark.parametrize("said", ["", "k", "0", "-4", "1.5k", "12q", "²k"])
def test_what_is_no_number_of_tokens(said):
    with pytest.raises(ArgumentError, match="4096, 128k or 1m"):
        tokens_of(said)


@pytest.mark.parametrize(
    ("said", "device"), [("h100", ("H100", 80)), ("rtx-4090", ("RTX 4090", 24)), ("11.5", ("11.5 GiB", 11.5))]
)
def test_devices(said, device):
    assert device_of(said) == device


@pytest.mark.parametrize("said", ["h1000", "-3", "nan", "inf", "0"])
def test_what_is_no_device(said):
    with pytest.raises(ArgumentError, match="L40S"):
        device_of(said)


def test_the_command_prints_json(capsys):
    words = ["plan", "--model", "Llama-3.1-8B", "--context", "32k", "--gpu", "a100-80gb", "--batch", "4", "--json"]
    assert cli.main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["context"], made["batch"], list(made["batches"])) == (32768, 4, ["A100 80GB"])
    assert made["full"]["cache"] == 4 * 32768 * 2**17


def test_the_command_prints_tables(capsys):
    assert cli.main(["plan", "--model", "Qwen3-8B", "--context", "128k"]) == 0
    said = capsys.readouterr().out
    assert "8.19 billion" in said
    assert "H200" in said
    assert "window of" in said
    assert "40,960" in said


@pytest.mark.parametrize("name", ["THUDM/chatglm3-6b-32k", "chatglm3-6b-32k", "zai-org/ChatGLM3-6B-32k"])
def test_chatglm3_is_known_by_both_its_names(name):
    config = known_config(name)
    assert (config.model_type, config.num_key_value_heads, config.max_position_embeddings) == ("glm", 2, 32768)


def test_a_folder_goes_before_a_known_name(capsys, tmp_path, monkeypatch):
    save_llama(tmp_path / "Qwen3-8B")
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(
            ["plan", "--model", "Qwen3-8B", "--context", "100", "--num-slots", "32", "--chunk-size", "16", "--json"]
        )
        == 0
    )
    made = json.loads(capsys.readouterr().out)
    assert made["parameters"] < 1e6
    assert made["window"] == 256


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--context", "long"], "expected a number of tokens such as 4096, 128k or 1m, got 'long'"),
        (["--gpu", "abacus"], "expected a device"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--compressor", "full"], "the full cache is always planned for"),
        (["--model", "./nowhere"], "no such file or folder"),
    ],
)
def test_the_command_refuses(capsys, words, message):
    assert cli.main(["plan", *words]) == 2
    assert message in capsys.readouterr().err
