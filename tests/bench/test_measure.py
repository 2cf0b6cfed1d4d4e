import io
import subprocess
import sys

import pytest
import torch
from families import SMALL, tiny
from rich.console import Console

from lococo.bench import measure
from lococo.errors import LococoError


def test_settings_take_turns_and_medians_are_reported(monkeypatch):
    order, values = [], iter([1, 10, 5, 30, 3, 20])

    def measured(setting):
        order.append(setting.compressor)
        return dict.fromkeys(measure.FIGURES, next(values))

    monkeypatch.setattr(measure, "measure_in_new_process", measured)
    counted = []
    rows = measure.bench(
        [measure.Setting("full", 100), measure.Setting("h2o", 100)], repeats=3, progress=counted.append
    )
    assert order == ["full", "h2o"] * 3
    assert counted == [1, 2, 3, 4, 5, 6]
    assert [row["prefill_tokens_per_s"] for row in rows] == [3, 20]
    assert rows[1]["spread"]["kv_bytes"] == [10, 30]
    assert {"compressor", "length", "num_slots", "dtype"} <= rows[0].keys()
    console = Console(record=True, width=150, file=io.StringIO())
    console.print(measure.table(rows))
    assert "20.0 (6.67x)" in console.export_text()


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


@pytest.mark.parametrize("compressor", ["full", "mass-merge"])
def test_one_measurement(folder, compressor):
    setting = measure.Setting(compressor, 300, num_slots=40, chunk_size=16, model=str(folder), decode_tokens=3)
    row = measure.measure(setting)
    assert set(row) == set(measure.FIGURES)
    entry = 2 * SMALL["num_hidden_layers"] * SMALL["num_key_value_heads"] * SMALL["head_dim"] * 4
    assert row["kv_bytes"] == entry * (56 if compressor == "mass-merge" else 303)
    assert row["prefill_tokens_per_s"] == pytest.approx(300 / row["time_to_first_token_s"])
    assert row["decode_tokens_per_s"] > 0


def test_a_fresh_process_gives_the_figures_or_its_last_word(folder):
    setting = measure.Setting("h2o", 100, num_slots=40, chunk_size=16, model=str(folder), decode_tokens=1)
    assert set(measure.measure_in_new_process(setting)) == set(measure.FIGURES)
    with pytest.raises(LococoError, match=r"measuring nothing at 100 tokens failed: .*unknown compressor"):
        measure.measure_in_new_process(measure.Setting("nothing", 100, model=str(folder)))


def test_exact_memory_reaches_the_allocator(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(options["env"].get("MALLOC_MMAP_THRESHOLD_"))
        return subprocess.CompletedProcess(command, 0, stdout="{}", stderr="")

    monkeypatch.setattr(measure.subprocess, "run", run)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    measure.measure_in_new_process(measure.Setting("full", 10))
    measure.measure_in_new_process(measure.Setting("full", 10, exact_memory=True))
    assert asked == [None, "131072"]


def test_the_peak_is_of_what_came_after_the_reset():
    if not sys.platform.startswith("linux"):
        pytest.skip("peaks are reset through Linux's /proc")
    device = torch.device("cpu")
    before = measure._reset_peak(device)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert 60 << 20 < measure._peak(device) - before < 100 << 20
