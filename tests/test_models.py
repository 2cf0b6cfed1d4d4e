"""Models load from a name or a folder, and what cannot be loaded is refused in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saved_models import SIZES, byte_tokenizer, logits, save_tiny, tiny
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
)

from lococo import models
from lococo.errors import ArgumentError, ModelError, UnsupportedModelError
from lococo.models import load_model, model_id, tokenizer_fingerprint

pytestmark = pytest.mark.usefixtures("cache")


def test_folder_loads_with_the_weights_that_were_saved(tmp_path):
    folder = save_tiny(tmp_path / "my model")
    model, tokenizer = load_model(folder)
    assert torch.equal(logits(model), logits(tiny()[0]))
    assert model.dtype == torch.float32
    assert not model.training
    assert all(weight.requires_grad for weight in model.parameters())
    assert model_id(model) == "my model"
    assert tokenizer.decode(tokenizer("the fox").input_ids) == "the fox"


def test_dtype_and_device_are_applied(tmp_path):
    folder = save_tiny(tmp_path / "m")
    assert load_model(folder, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert load_model(str(folder), dtype=torch.float16)[0].dtype == torch.float16
    assert load_model(folder, dtype="auto")[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float", "int8", "tensor", torch.int64, "four"])
def test_odd_dtypes_are_refused(dtype):
    if dtype == "float":  # torch's own other name for float32
        assert models._floating_type(dtype) is torch.float32
        return
    with pytest.raises(ArgumentError, match="expected float32, bfloat16, float16 or auto"):
        load_model("anything", dtype=dtype)


@pytest.mark.parametrize("device", ["nonsense", "xpu", "meta"])
def test_absent_devices_are_refused(device):
    with pytest.raises(ArgumentError, match=f"device is '{device}'"):
        load_model("anything", device=device)


@pytest.mark.parametrize(
    "name", ["./none", "/none/at/all", "~/none-such", "none.gguf", "some/where/x.GGUF", Path("none")]
)
def test_missing_files_are_refused(name):
    with pytest.raises(ModelError, match="no such file or folder; expected"):
        load_model(name)


def test_plain_file_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.touch()
    with pytest.raises(ModelError, match=r"weights\.bin is a file; expected a folder"):
        load_model(path)


def test_folder_without_a_model_is_refused_in_one_line(tmp_path):
    with pytest.raises(ModelError, match=r"cannot be loaded: .*; check the name") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused(tmp_path):
    folder = save_tiny(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(ModelError, match="m cannot be loaded"):
        load_model(folder)


def test_hub_out_of_reach_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unreachable)
    with pytest.raises(ModelError, match=r"a/b cannot be loaded: We couldn't connect to the hub; check the name and"):
        load_model("a/b")


def test_encoder_decoder_is_refused(tmp_path):
    T5Config(d_model=32, num_layers=1, num_heads=2, vocab_size=50).save_pretrained(tmp_path / "t5")
    with pytest.raises(UnsupportedModelError, match="t5 is an encoder-decoder model"):
        load_model(tmp_path / "t5")


def test_masked_model_is_refused(tmp_path):
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(UnsupportedModelError, match=r"bert .bert. has no causal language-modelling head"):
        load_model(tmp_path / "bert")


def test_random_head_is_refused(tmp_path):
    LlamaForSequenceClassification(LlamaConfig(vocab_size=50, pad_token_id=0, **SIZES)).save_pretrained(tmp_path / "c")
    with pytest.raises(UnsupportedModelError, match=r"lacks 1 of the weights .*lm_head\.weight"):
        load_model(tmp_path / "c")


def test_model_id_of_a_hub_model_and_of_one_never_loaded():
    model, _ = tiny()
    assert model_id(model) == "llama"
    model.config._name_or_path = "owner/name"
    assert model_id(model) == "owner/name"


def test_fingerprint_follows_vocabulary_and_special_tokens_only():
    first, again = byte_tokenizer(), byte_tokenizer()
    again.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(again)
    assert len(tokenizer_fingerprint(first)) == 16
    again.eos_token = "the"
    again.bos_token = "<|im_end|>"
    others = {tokenizer_fingerprint(other) for other in (first, again, byte_tokenizer(("<s>", "</s>")))}
    assert len(others) == 3


def test_verbosity_is_restored(tmp_path):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(save_tiny(tmp_path / "m"))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_import_leaves_torch_alone():
    script = "import sys, lococo.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(models.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0
