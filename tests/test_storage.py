import copy
import json
import struct

import pytest
import safetensors.torch
import torch
from families import heads_for, left_padded, tiny, tokenizer, tokens

import lococo
from lococo.errors import DocumentError, FileFormatError


def attached(family="llama", compressor="mass-merge", **options):
    return lococo.attach(tiny(family), compressor, **{"num_slots": 40, "chunk_size": 16, **options})


@torch.no_grad()
def saved(path, ids, family="llama", compressor="mass-merge", mask=None):
    with attached(family, compressor) as slots:
        cache = slots.new_cache()
        tiny(family)(ids, attention_mask=mask, past_key_values=cache)
    lococo.save_context(path, cache, model=tiny(family), tokenizer=tokenizer(), token_ids=ids[0].tolist())
    return cache


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "phi3"])
@pytest.mark.parametrize("compressor", ["mass-merge", "h2o", "lococo-paper"])
@torch.no_grad()
def test_a_loaded_context_goes_on_as_if_never_saved(family, compressor, tmp_path):
    path, ids = tmp_path / "a.safetensors", tokens(1, 150)
    cache = saved(path, ids, family, compressor)
    more = tokens(1, 60, seed=2)
    with attached(family, compressor) as slots:
        context = lococo.load_context(path, slots, tokenizer())
        again = tiny(family)(more, past_key_values=context.cache).logits
        expected = tiny(family)(more, past_key_values=cache).logits
    assert torch.equal(again, expected)
    assert context.token_ids.tolist() == ids[0].tolist()
    assert context.cache.seen == 210


@torch.no_grad()
def test_what_was_remembered_goes_on_too(tmp_path):
    model, path, ids, more = tiny(), tmp_path / "a.safetensors", tokens(1, 150), tokens(1, 60, seed=2)
    forgetful, heads = (heads_for(model, scale=0.1, memory=memory) for memory in (0.0, 0.5))
    with lococo.attach(model, heads, num_slots=40, chunk_size=16) as slots:
        cache = slots.new_cache()
        model(ids, past_key_values=cache)
        lococo.save_context(path, cache, model=model, tokenizer=tokenizer(), token_ids=ids[0].tolist())
        context = lococo.load_context(path, slots, tokenizer())
        assert torch.equal(model(more, past_key_values=context.cache).logits, model(more, past_key_values=cache).logits)
    with (
        lococo.attach(model, forgetful, num_slots=40, chunk_size=16) as slots,
        pytest.raises(FileFormatError, match=r"heads: \w+ in the file, \w+ here"),
    ):
        lococo.load_context(path, slots, tokenizer())


@torch.no_grad()
def test_a_padded_batch_is_saved_too(tmp_path):
    path = tmp_path / "a.safetensors"
    ids, mask = left_padded(tokens(3, 150), [0, 30, 140])
    cache = saved(path, ids, mask=mask)
    more = tokens(3, 60, seed=2)
    with attached() as slots:
        again = tiny()(more, past_key_values=lococo.load_context(path, slots, tokenizer()).cache).logits
        assert torch.equal(again, tiny()(more, past_key_values=cache).logits)


def test_the_header_is_read_without_weights(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, tokens(1, 150))
    info = lococo.describe_context(path)
    assert (info.compressor, info.slots_per_layer, info.chunk_size, info.positions) == (
        "mass-merge",
        [40] * 4,
        16,
        "packed",
    )
    assert info.tokens == 150
    assert info.nbytes == path.stat().st_size
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_another_model_tokenizer_or_setting_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, tokens(1, 150))
    with pytest.raises(FileFormatError, match=r"num_key_value_heads 2.*num_key_value_heads 4"):
        lococo.load_context(path, attached("gpt-neox"), tokenizer())
    with pytest.raises(FileFormatError, match="another tokenizer"):
        lococo.load_context(path, attached(), tokenizer(129))
    with pytest.raises(FileFormatError, match="chunk_size: 16 in the file, 32 here"):
        lococo.load_context(path, attached(chunk_size=32), tokenizer())
    with pytest.raises(FileFormatError, match="compressor: mass-merge in the file, h2o here"):
        lococo.load_context(path, attached(compressor="h2o"), tokenizer())
    with pytest.raises(FileFormatError, match="compressor: mass-merge in the file, full here"):
        lococo.load_context(path, attached(compressor="full"), tokenizer())


def rewrite_header(path, change):
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    own = json.loads(header["__metadata__"]["lococo_context"])
    change(own)
    header["__metadata__"]["lococo_context"] = json.dumps(own)
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + length :])


HEADERS = {
    "version": lambda header: header.update(format_version=7),
    "no rows": lambda header: header.pop("rows"),
    "short rows": lambda header: header["rows"].pop("room"),
    "no slots": lambda header: header.update(slots_per_layer=None),
    "odd compressor": lambda header: header.update(compressor=5),
    "no facts": lambda header: header.update(facts={}),
    "null facts": lambda header: header.update(facts=None),
    "no row": lambda header: header["rows"].update(tokens=[]),
    "too fresh": lambda header: header["rows"].update(fresh=[99]),
    "negative room": lambda header: header["rows"].update(room=[-4]),
    "room of text": lambda header: header["rows"].update(room=["a"]),
    "never seen": lambda header: header["rows"].update(seen=-3),
    "room that does not add up": lambda header: header["rows"].update(room=[1], fresh=[1]),
    "no layers": lambda header: header.update(layers=[{}, {}]),
    "empty layers": lambda header: header["layers"][0].update(held=[0]),
    "too many held": lambda header: header["layers"][0].update(held=[41]),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_headers_are_refused(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, tokens(1, 150))
    rewrite_header(path, HEADERS[damage])
    if damage == "no facts":
        with pytest.raises(FileFormatError, match="wrong about facts"):
            lococo.describe_context(path)
    with pytest.raises(FileFormatError, match=str(path)):
        lococo.load_context(path, attached(), tokenizer())


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "foreign", "nan", "half", "evil", "no queries"])
def test_damaged_files_are_refused(damage, tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, tokens(1, 150))
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "text":
        path.write_text("not a context")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "foreign":
        safetensors.torch.save_file({"a": torch.zeros(3)}, path)
    else:
        if damage == "nan":
            tensors["2.keys"][0, 0, 3, 3] = torch.nan
        elif damage == "half":
            tensors["1.values"] = tensors["1.values"][:, :, :20].clone()
        elif damage == "evil":
            tensors["0.evil"] = torch.zeros(1)
        else:
            del tensors["3.queries"]
        safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(FileFormatError, match=str(path)):
        lococo.load_context(path, attached(), tokenizer())


def test_other_weights_of_the_same_shape_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, tokens(1, 150))
    changed = copy.deepcopy(tiny())
    torch.nn.init.normal_(changed.model.layers[2].mlp.up_proj.weight)
    with pytest.raises(FileFormatError, match="other weights"):
        lococo.load_context(path, lococo.attach(changed, "mass-merge", num_slots=40, chunk_size=16), tokenizer())


@torch.no_grad()
def test_a_context_can_be_asked_in_another_floating_point_type(tmp_path):
    path = tmp_path / "a.safetensors"
    cache = saved(path, tokens(1, 50))
    half = copy.deepcopy(tiny()).to(torch.bfloat16)
    more = tokens(1, 5, seed=2)
    with attached():
        expected = tiny()(more, past_key_values=cache).logits
    with lococo.attach(half, "mass-merge", num_slots=40, chunk_size=16) as slots:
        logits = half(more, past_key_values=lococo.load_context(path, slots, tokenizer()).cache).logits
    assert torch.nn.functional.cosine_similarity(logits.float(), expected, -1).min() > 0.99


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(DocumentError, match="no such file"):
        lococo.describe_context(tmp_path / "none.safetensors")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    saved(path, tokens(1, 150))
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        saved(path, tokens(1, 90))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
