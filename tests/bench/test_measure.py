import gc
import io
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from commands import save_llama
from families import SMALL, tiny
from rich.console import Console

from lococo import cli
from lococo.bench import measure
from lococo.bench.peers import Peer
from lococo.bench.readers import Setting, Transformers, Work, with_slots
from lococo.cache import SlotCache
from lococo.errors import LococoError
from lococo.eval import plots, sections


def test_settings_take_turns_and_medians_are_reported(monkeypatch):
    order, values = [], iter([1, 10, 5, 30, 3, 20])

    def measured(setting, ids):
        assert ids == [8 - len(order) // 4 % 2] * (setting.length + setting.scored_tokens)
        order.append(setting.compressor)
        figures = dict.fromkeys(measure.FIGURES, next(values))
        return figures | {
            "nll": None if setting.compressor == "full" else len(order) / 10,
            "kv_bytes": 2e9,
            "weight_bytes": 8e9,
            "operations": 2e12,
        }

    def machine(what, asked):
        order.append(what)
        return {"bytes_per_s": next(bandwidths), "operations_per_s": 1e12}

    bandwidths = iter([1e9, 50e9, 1e9, 20e9, 1e9, 40e9])
    monkeypatch.setattr(measure, "measure_in_new_process", measured)
    monkeypatch.setattr(measure, "in_new_process", machine)
    counted, so_far = [], []
    settings = [Setting("full", 80), Setting("h2o", 100, scored_tokens=5)]
    rows = measure.bench(settings, [[8] * 105, [7] * 105], repeats=3, progress=counted.append, each_round=so_far.append)
    assert [each[1]["prefill_tokens_per_s"] for each in so_far] == [10, 20, 20]
    assert [each[1]["repeats"] for each in so_far] == [1, 2, 3]
    assert so_far[-1] == rows
    assert [row["nll"] for row in rows] == [None, pytest.approx(0.7)]
    assert rows[1]["spread"]["nll"] == [0.3, 1.1]
    assert order == ["full", "machine", "h2o", "machine"] * 3
    assert counted == [1, 2, 3, 4, 5, 6]
    assert [row["prefill_tokens_per_s"] for row in rows] == [3, 20]
    assert rows[1]["spread"]["prefill_tokens_per_s"] == [10, 30]
    # 40 GB/s over 10 GB a token, and 100 tokens for 2e12 of 1e12 operations a second.
    assert rows[1]["roofline"]["decode_tokens_per_s"] == 4
    assert rows[1]["roofline"]["prefill_tokens_per_s"] == 50
    # Each measurement against the machine of its own minute: 10 of 5 tokens a second, 30 of 2, 20 of 4.
    assert rows[1]["roofline"]["decode_share"] == 5
    assert rows[1]["roofline"]["prefill_share"] == 0.4
    assert {"compressor", "length", "num_slots", "dtype"} <= rows[0].keys()
    console = Console(record=True, width=170, file=io.StringIO())
    console.print(measure.table([row | {"length": 100} for row in rows]))
    said = console.export_text()
    assert "20.0 (6.67x)" in said
    assert "0.700" in said
    assert "40%" in said


def test_a_setting_that_fails_is_told_and_the_others_go_on(monkeypatch):
    tried = []

    def measured(setting, ids):
        tried.append(setting.compressor)
        if setting.compressor == "full" or (setting.compressor == "tova" and tried.count("tova") == 2):
            raise LococoError("exit status -9")
        return dict.fromkeys((*measure.FIGURES, "weight_bytes", "operations"), 2.0) | {"nll": None}

    monkeypatch.setattr(measure, "measure_in_new_process", measured)
    limits = {"bytes_per_s": 1.0, "operations_per_s": 1.0}
    monkeypatch.setattr(measure, "in_new_process", lambda what, asked: limits)
    settings = [Setting(name, 100) for name in ("full", "h2o", "tova")]
    rows = measure.bench(settings, [[8] * 100], repeats=3)
    assert tried == ["full", "h2o", "tova", "h2o", "tova", "h2o"]
    assert [row.get("failed") for row in rows] == ["exit status -9", None, "exit status -9"]
    # What was measured before is not lost.
    assert [row["prefill_tokens_per_s"] for row in rows] == [None, 2.0, 2.0]
    assert rows[2]["repeats"] == 1
    assert (rows[1]["weight_bytes"], rows[1]["operations"], rows[1]["repeats"]) == (2.0, 2.0, 3)
    console = Console(record=True, width=170, file=io.StringIO())
    console.print(measure.table(rows))
    assert "exit status -9" in console.export_text()
    plots.bench(rows)
    [section] = sections.sections(rows)
    assert [line[6].text for line in section.sheets[0].lines] == ["failed", *["2.0 (2.0 to 2.0)"] * 2]
    with pytest.raises(LococoError, match="exit status -9"):
        measure.bench(settings[:1], [[8] * 100])


def test_experts_that_take_turns_have_no_roofline(monkeypatch):
    reader = Transformers(tiny("mixtral"), lambda: None)
    assert reader.work(100) == Work(None, None)
    assert measure._roofline({"operations": None, "weight_bytes": None}, Setting("h2o", 100), {"bytes_per_s": 1.0}) == {
        "prefill_tokens_per_s": None,
        "decode_tokens_per_s": None,
        "prefill_share": None,
        "decode_share": None,
        "bytes_per_s": 1.0,
    }
    sliding = Transformers(tiny("gemma3"), lambda: None).work(100)
    assert sliding.operations is None
    assert sliding.weight_bytes > 0


def test_what_is_taken_when_a_reader_opens_counts_as_peak(monkeypatch, folder):
    @contextmanager
    def opened(setting):
        with measure.with_slots(setting) as reader:
            reader.taken_at_once, reader.kv_bytes = True, lambda: 1 << 40
            yield reader

    monkeypatch.setitem(measure.PEERS, "greedy", Peer(opened))
    setting = Setting("greedy", 50, num_slots=20, chunk_size=10, model=str(folder), decode_tokens=1)
    with monkeypatch.context() as patched:
        patched.setattr(measure, "with_slots", lambda setting: with_slots(replace(setting, compressor="h2o")))
        assert measure.measure(setting, [1] * 50)["peak_memory_bytes"] >= 1 << 40


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, 3), (1e9, 12)])
def test_fast_steps_are_decoded_for_a_while(seconds, steps, monkeypatch, folder):
    counted = []

    @contextmanager
    def opened(setting):
        with with_slots(replace(setting, compressor="h2o")) as reader:
            step = reader.step
            reader.step = lambda token: counted.append(token) or step(token)
            yield reader

    monkeypatch.setitem(measure.PEERS, "counting", Peer(opened))
    monkeypatch.setattr(measure, "DECODE_SECONDS", seconds)
    setting = Setting("counting", 50, num_slots=20, chunk_size=10, model=str(folder), decode_tokens=3)
    measure.measure(setting, [1] * 50)
    assert len(counted) == 1 + steps  # one to warm up


@pytest.fixture
def folder(tmp_path):
    """A tiny model with a tokenizer of its own, as `load_model` reads it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("compressor", ["full", "full-chunked", "mass-merge"])
def test_one_measurement(folder, compressor):
    setting = Setting(compressor, 300, num_slots=40, chunk_size=16, model=str(folder), decode_tokens=3)
    row = measure.measure(setting, measure.prompt(str(folder), 300))
    assert set(row) == {*measure.FIGURES, "nll", "weight_bytes", "operations"}
    assert row["nll"] is None
    entry = 2 * SMALL["num_hidden_layers"] * SMALL["num_key_value_heads"] * SMALL["head_dim"] * 4
    assert row["kv_bytes"] == entry * (56 if compressor == "mass-merge" else 300)
    assert row["prefill_tokens_per_s"] == pytest.approx(300 / row["time_to_first_token_s"])
    assert row["decode_tokens_per_s"] > 0


def test_what_the_warm_up_read_is_given_back_before_memory_is_counted(folder, monkeypatch):
    reset, held = measure.reset_peak, []

    def counted(device_type):
        held.extend(each for each in gc.get_objects() if type(each) is SlotCache)
        return reset(device_type)

    gc.collect()
    before = [each for each in gc.get_objects() if type(each) is SlotCache]
    monkeypatch.setattr(measure, "reset_peak", counted)
    measure.measure(Setting("h2o", 100, num_slots=40, chunk_size=16, model=str(folder), decode_tokens=1), [1] * 100)
    assert len(held) <= len(before)


def test_a_fresh_process_gives_the_figures_or_its_last_word(folder):
    setting = Setting("h2o", 100, num_slots=40, chunk_size=16, model=str(folder), decode_tokens=1)
    assert set(measure.measure_in_new_process(setting, [1] * 100)) > set(measure.FIGURES)
    with pytest.raises(LococoError, match=r"measuring nothing at 100 tokens failed: .*unknown compressor"):
        measure.measure_in_new_process(Setting("nothing", 100, model=str(folder)), [1] * 100)


def test_exact_memory_reaches_the_allocator(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(options["env"].get("MALLOC_MMAP_THRESHOLD_"))
        return subprocess.CompletedProcess(command, 0, stdout="{}", stderr="")

    monkeypatch.setattr(measure.subprocess, "run", run)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    measure.measure_in_new_process(Setting("full", 10), [1] * 10)
    measure.measure_in_new_process(Setting("full", 10, exact_memory=True), [1] * 10)
    assert asked == [None, "131072"]


def test_a_process_that_was_killed_is_not_explained_by_what_it_said_last(monkeypatch):
    killed = subprocess.CompletedProcess([], -9, stdout="", stderr="UserWarning: something else\n")
    monkeypatch.setattr(measure.subprocess, "run", lambda command, **options: killed)
    with pytest.raises(LococoError, match="killed by signal 9"):
        measure.measure_in_new_process(Setting("full", 10), [1] * 10)


def test_the_peak_is_of_what_came_after_the_reset():
    if not sys.platform.startswith("linux"):
        pytest.skip("peaks are reset through Linux's /proc")
    before = measure.reset_peak("cpu")
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert 60 << 20 < measure.peak_memory("cpu") - before < 100 << 20


def test_the_verb_leaves_out_what_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LOCOCO_CACHE", str(tmp_path / "cache"))
    model, target, picture = save_llama(tmp_path / "model"), tmp_path / "out.jsonl", tmp_path / "out.svg"
    words = ["bench", "--lengths", "60", "--compressor", "full", "kvpress-snapkv", "h2o", "--num-slots", "32"]
    words += ["--chunk-size", "16", "--repeats", "1", "--decode-tokens", "2", "--json", str(target)]
    assert cli.main([*words, "--plot", str(picture), "--model", model]) == 0
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [(row["compressor"], row["length"]) for row in rows] == [("full", 60), ("h2o", 60)]
    for row in rows:
        assert row["prefill_tokens_per_s"] == pytest.approx(row["length"] / row["time_to_first_token_s"])
        assert row["roofline"]["decode_tokens_per_s"] > 0
    assert "kvpress-snapkv is left out: kvpress is not installed; install it with" in capsys.readouterr().err
    assert "<svg" in picture.read_text()
    asked = ["bench", "--lengths", "60", "--compressor", "kvpress-snapkv", "--json", str(target), "--model", model]
    assert cli.main(asked) != 0
    assert "nothing that was named can be measured here" in capsys.readouterr().err


def test_a_limit_keeps_a_compressor_from_longer_prompts(tmp_path, monkeypatch, capsys):
    target, asked = tmp_path / "out.jsonl", []

    def bench(settings, ids, **options):
        asked.extend((each.compressor, each.length) for each in settings)
        raise LococoError("stopped")

    monkeypatch.setattr(measure, "bench", bench)
    words = ["bench", "--json", str(target), "--model", save_llama(tmp_path / "model"), "--lengths", "60", "90"]
    assert cli.main([*words, "--compressor", "full:60", "h2o"]) != 0
    assert asked == [("full", 60), ("h2o", 60), ("h2o", 90)]
    assert not target.exists()
    asked.clear()
    monkeypatch.setitem(measure.PEERS, "llama.cpp", Peer(measure.with_slots, batches=False))
    assert cli.main([*words, "--compressor", "llama.cpp", "full:60", "--batch", "1", "8"]) != 0
    assert asked == [("llama.cpp", 60), ("full", 60), ("full", 60), ("llama.cpp", 90)]
    for more, message in (
        (["--compressor", "mas-merge"], "unknown compressor 'mas-merge'"),
        (["--compressor", "h2o", "--dtype", "auto"], "expected --dtype float32, bfloat16 or float16"),
    ):
        assert cli.main([*words, *more]) != 0
        assert message in capsys.readouterr().err
    for limit in ("", "0", "many"):
        assert cli.main([*words, "--compressor", f"full:{limit}"]) != 0
        assert f"expected a number of tokens behind full:, got '{limit}'" in capsys.readouterr().err
    assert cli.main([*words, "--compressor", "full:50"]) != 0
    assert "raise the limits (full:50)" in capsys.readouterr().err
