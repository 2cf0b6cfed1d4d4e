import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from families import tiny
from transformers import AutoModelForCausalLM

from lococo.bench import measure, peers
from lococo.bench.peers import PEERS
from lococo.bench.readers import Setting
from lococo.cache_name import cache_name
from lococo.errors import LococoError, ModelError
from lococo.models import gguf_file


def test_what_is_absent_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path))
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert PEERS["full"].absent() == PEERS["quantized-fp8"].absent() == ""
    assert PEERS["llama.cpp"].absent() == ("llama_cpp is not installed; install it with `python -m lococo.bench.peers`")
    assert PEERS["kvpress-snapkv"].absent().startswith("kvpress is not installed; install it with")
    python = peers.python_of("kvpress")
    python.parent.mkdir(parents=True)
    python.touch()
    # So it is left when an installation was interrupted.
    assert PEERS["kvpress-snapkv"].absent().startswith("kvpress is not installed")
    (peers.environment("kvpress") / "lib" / "python3.11" / "site-packages" / "kvpress").mkdir(parents=True)
    assert PEERS["kvpress-snapkv"].absent() == ""


def test_what_cannot_be_installed_does_not_keep_the_other_from_it(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path))
    asked = []

    def run(command, **options):
        asked.append(command[-1])
        return SimpleNamespace(returncode=int(command[-1] == "llama-cpp-python"))

    monkeypatch.setattr(peers.subprocess, "run", run)
    monkeypatch.setattr(peers.venv, "create", lambda *args, **options: None)
    assert peers.install() == 1
    assert asked == ["llama-cpp-python", "kvpress"]


def test_kvpress_runs_in_its_own_environment_with_files_that_transformers_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path))
    asked = {}

    def run(what, row, *, python, exact_memory):
        asked.update(row, python=python)
        raise LococoError("enough")

    monkeypatch.setattr(measure, "in_new_process", run)
    with pytest.raises(LococoError, match="measuring kvpress-snapkv at 5 tokens failed: enough"):
        measure.measure_in_new_process(Setting("kvpress-snapkv", 5, model=str(tmp_path)), [1] * 5)
    assert asked["python"] == peers.python_of("kvpress")
    assert asked["setting"]["model"] == str(tmp_path)


@contextmanager
def dropping(model, share):
    """Do what a press does to the cache: drop a share of its entries once the prompt is read."""

    def drop(module, args, kwargs, output):
        cache = kwargs[cache_name(model)]
        cache.crop(-round(cache.get_seq_length() * share))

    with model.register_forward_hook(drop, with_kwargs=True):
        yield


def test_kvpress_goes_on_after_the_prompt_and_not_after_the_entries_that_are_left(monkeypatch):
    model, places, asked = tiny(), [], []
    seen = model.register_forward_pre_hook(
        lambda module, args, kwargs: places.append(kwargs["position_ids"].tolist()), with_kwargs=True
    )
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **how: asked.append(how) or model)
    module = SimpleNamespace(SnapKVPress=lambda compression_ratio: lambda model: dropping(model, compression_ratio))
    monkeypatch.setitem(sys.modules, "kvpress", module)
    setting = Setting("kvpress-snapkv", 8, num_slots=2, model="a folder", dtype="bfloat16", trust_remote_code=True)
    with seen, PEERS["kvpress-snapkv"].opened(setting) as reader:
        for _ in range(2):
            follows = reader.read(list(range(8)))
            assert reader.cache.get_seq_length() == 2
            reader.step(reader.step(follows))
            assert reader.cache.get_seq_length() == 4
    assert places == 2 * [[list(range(8))], [[8]], [[9]]]
    assert asked == [{"dtype": torch.bfloat16, "trust_remote_code": True}]


class FakeLlama:
    """What of llama_cpp.Llama is called."""

    def __init__(self, path, **options):
        self.options, self.seen, self.closed = options, [], False
        FakeLlama.last = self

    def reset(self):
        self.seen.clear()

    def eval(self, ids):
        self.seen += ids

    def sample(self, temp):
        assert temp == 0
        return self.seen[-1] + 1

    def n_ctx(self):
        return self.options["n_ctx"]

    def close(self):
        self.closed = True


def test_llama_cpp_reads_from_nothing_and_counts_its_whole_context(monkeypatch, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(1000))
    module = SimpleNamespace(Llama=FakeLlama, GGML_TYPE_F16=1, GGML_TYPE_Q8_0=8)
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    shape = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, head_dim=None, hidden_size=32)
    shape.num_attention_heads = 4
    monkeypatch.setattr("lococo.models.load_config", lambda name: (shape, "model"))
    setting = Setting("llama.cpp-q8", 20, decode_tokens=11, model=str(file))
    with PEERS["llama.cpp-q8"].opened(setting) as reader:
        assert reader.read([1, 2, 3]) == 4
        assert reader.read([5, 6]) == 7
        assert reader.step(7) == 8
        assert reader.llama.seen == [5, 6, 7]
        # 65 tokens of two numbers in each of 3 layers, 2 heads and 8 places, 34 bytes for 32 of them.
        assert reader.kv_bytes() == 65 * 2 * 3 * 2 * 8 * 34 // 32
        assert reader.work(20).weight_bytes == 1000
    assert FakeLlama.last.closed
    assert FakeLlama.last.options["type_k"] == 8


def test_llama_cpp_needs_a_gguf_file(tmp_path):
    with pytest.raises(ModelError, match="is no GGUF file"):
        gguf_file(tmp_path)
