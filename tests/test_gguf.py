"""A GGUF file is converted to the same logits, once, whole or not at all."""

import os

import gguf
import pytest
import torch
from saved_models import logits, tiny, write_gguf
from transformers import (
    LlamaConfig,
    Qwen3Config,
)

import lococo.gguf
from lococo.errors import ModelError
from lococo.models import load_model, model_id, tokenizer_fingerprint

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    ("architecture", "family", "tied"),
    [("llama", LlamaConfig, True), ("llama", LlamaConfig, False), ("qwen3", Qwen3Config, True)],
)
def test_gguf_converts_to_the_same_logits(tmp_path, cache, architecture, family, tied):
    original, tokenizer = tiny(family, tie_word_embeddings=tied)
    if tied:
        state = original.state_dict
        original.state_dict = lambda: {key: value for key, value in state().items() if key != "lm_head.weight"}
    path = write_gguf(tmp_path / "tiny.F32.gguf", architecture, original, tokenizer)
    model, converted = load_model(path)
    assert torch.equal(logits(model), logits(original))
    assert model_id(model) == "tiny.F32"
    assert converted("x  5 12")["input_ids"] == converted("x  5 12", add_special_tokens=False)["input_ids"]
    assert (converted.bos_token, converted.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer_fingerprint(converted) == tokenizer_fingerprint(load_model(path)[1])
    assert len(list(cache.iterdir())) == 1


def test_gguf_digits_are_split_as_the_model_was_trained(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", *tiny(tie_word_embeddings=False))
    _, tokenizer = load_model(path)
    words = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x  512")
    assert [word for word, _ in words] == ["x", "ĠĠ", "5", "1", "2"]
    text = "def f():\n\treturn  12  # é 😀\r\n\n   end"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_gguf_is_converted_once_and_again_when_it_changes(tmp_path, cache, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", *tiny(tie_word_embeddings=False))
    calls, convert = [], lococo.gguf._convert
    monkeypatch.setattr(lococo.gguf, "_convert", lambda *given: (calls.append(given), convert(*given)))
    load_model(path)
    load_model(path)
    assert len(calls) == 1
    os.utime(path, ns=(1, 1))
    load_model(path)
    assert len(calls) == 2
    assert len(list(cache.iterdir())) == 2


def test_gguf_with_unknown_or_missing_tensors_is_refused(tmp_path, cache):
    model, tokenizer = tiny(tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"does not know the tensor rope_freqs\.weight"):
        load_model(write_gguf(tmp_path / "a.gguf", "llama", model, tokenizer, extra="rope_freqs.weight"))
    state = {key: value for key, value in model.state_dict().items() if "layers.1.mlp.up" not in key}
    model.state_dict = lambda: state
    with pytest.raises(ModelError, match=r"misses the tensor blk\.1\.ffn_up\.weight"):
        load_model(write_gguf(tmp_path / "b.gguf", "llama", model, tokenizer))
    assert list(cache.iterdir()) == []


def test_gguf_with_scaled_rope_is_refused(tmp_path, monkeypatch):
    head = gguf.GGUFWriter.add_rope_freq_base

    def scaled(writer, base):
        head(writer, base)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)

    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", scaled)
    with pytest.raises(ModelError, match=r"scales its rope .yarn."):
        load_model(write_gguf(tmp_path / "a.gguf", "llama", *tiny(tie_word_embeddings=False)))


def test_gguf_with_other_shapes_is_refused(tmp_path):
    model, tokenizer = tiny(tie_word_embeddings=False)
    model.config.intermediate_size = 48
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_gate\.weight has the shape .64, 32.; expected .48, 32."):
        load_model(write_gguf(tmp_path / "a.gguf", "llama", model, tokenizer))


def test_damaged_gguf_is_refused(tmp_path, cache):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF but not really, or is it? " * 4)
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be loaded"):
        load_model(path)
    assert list(cache.iterdir()) == []
