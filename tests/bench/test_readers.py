import pytest
import torch
from families import SMALL, tiny, tokens

import lococo
from lococo.bench import readers
from lococo.bench.readers import Setting, Slots, Transformers


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(readers, "_loaded", lambda setting: tiny())
    return tiny()


IDS = tokens(1, 150)[0].tolist()
SHAPE = {"num_slots": 40, "chunk_size": 16}
ENTRY = 2 * SMALL["num_hidden_layers"] * SMALL["num_key_value_heads"] * SMALL["head_dim"]


@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_the_full_cache_goes_on_as_the_model_does(model, chunked):
    with readers.with_full_cache(Setting("full", 150, **SHAPE), chunked=chunked) as reader:
        follows = reader.read(IDS)
        then = reader.step(follows)
        assert follows == model(torch.tensor([IDS])).logits[0, -1].argmax()
        assert then == model(torch.tensor([[*IDS, follows]])).logits[0, -1].argmax()
        assert reader.kv_bytes() == 151 * ENTRY * 4
        assert reader.read(IDS) == follows  # from nothing, not after what was read
        reader.forget()
        assert reader.cache is None


@pytest.mark.parametrize("piece", [48, 1000])
@torch.no_grad()
def test_slots_go_on_as_the_model_does_with_slots(model, monkeypatch, piece):
    monkeypatch.setattr(readers, "PIECE", piece)  # which a prompt is handed over in
    with readers.with_slots(Setting("mass-merge", 150, **SHAPE)) as reader:
        follows = reader.read(IDS)
        assert reader.kv_bytes() == 56 * ENTRY * 4
    with lococo.attach(model, "mass-merge", **SHAPE) as slots:
        assert follows == lococo.prefill(model, torch.tensor([IDS]), slots.new_cache())[0].argmax()


@torch.no_grad()
def test_what_follows_a_prompt_is_scored(model):
    expected = torch.nn.functional.cross_entropy(model(torch.tensor([IDS])).logits[0, 49:-1], torch.tensor(IDS[50:]))
    with readers.with_full_cache(Setting("full", 50, **SHAPE)) as reader:
        reader.read(IDS[:50])
        assert reader.score(IDS[50:]) == pytest.approx(expected.item(), abs=1e-5)
    with lococo.attach(model, "mass-merge", **SHAPE) as slots:
        cache = slots.new_cache()
        previous = lococo.prefill(model, torch.tensor([IDS[:50]]), cache)
        expected = -lococo.score(model, torch.tensor([IDS[50:]]), cache, previous=previous).mean()
    with readers.with_slots(Setting("mass-merge", 50, **SHAPE)) as reader:
        reader.read(IDS[:50])
        assert reader.score(IDS[50:]) == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("opened", [readers.with_full_cache, readers.with_slots])
@torch.no_grad()
def test_a_batch_reads_the_same_prompt_in_every_row(model, opened):
    kind = "full" if opened is readers.with_full_cache else "mass-merge"
    told = []
    for rows in (1, 3):
        with opened(Setting(kind, 150, batch=rows, **SHAPE)) as reader:
            follows = reader.read(IDS)
            work = reader.work(150)
            told.append(
                (follows, reader.step(follows), work.weight_bytes, reader.kv_bytes() / rows, work.operations / rows)
            )
    assert told[0] == told[1]


def test_a_quantised_cache_takes_a_byte_per_number(model):
    with readers.with_quantized_cache(Setting("quantized-fp8", 150), backend="fp8") as reader:
        reader.read(IDS)
        layers = SMALL["num_hidden_layers"]
        assert reader.kv_bytes() == 150 * ENTRY + layers * 2 * 4  # and a scale for all keys or values of a layer


def test_what_has_to_be_read_and_computed_is_counted(model):
    config = model.config
    layers, vocabulary, inner = config.num_hidden_layers, config.vocab_size, SMALL["head_dim"]
    d, h, heads = config.hidden_size, config.num_key_value_heads, config.num_attention_heads
    per_layer = 2 * d * heads * inner + 2 * d * h * inner + 3 * d * config.intermediate_size
    matrices, norms = layers * per_layer, (2 * layers + 1) * d
    full = Transformers(model, lambda: None)
    work = full.work(99)
    assert work.weight_bytes == 4 * (matrices + norms + vocabulary * d)
    attention = 4 * layers * heads * inner * 50
    assert work.operations == 99 * (2 * matrices + attention) + 2 * vocabulary * d
    with lococo.attach(model, "h2o", **SHAPE) as attached:
        slots = Slots(model, attached.new_cache)
        slots.cache = attached.new_cache()
        assert slots.work(1000).operations < full.work(1000).operations
        assert slots.attended(1000) == 48
        assert slots.attended(9) == full.attended(9) == 5
