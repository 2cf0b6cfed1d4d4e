import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
from one_extension import RECIPE, WORDS, Letters, corpus_in, tuning, whole

from lococo.errors import ArgumentError, DocumentError
from lococo.train.data import Corpus
from lococo.train.extend import _check_domains
from lococo.train.extension import Extension
from lococo.train.packing import packed_window
from lococo.tuned import ADAPTER, RECORD


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of a text and of what one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    corpus_in(folder / "text", WORDS, WORDS[7:])
    whole(folder / "text", folder / "1")
    return folder


@pytest.mark.parametrize("weights", ["whole", "shard"])
def test_two_processes_that_are_killed_and_go_on_tune_as_one_with_accumulation(tmp_path, alone, weights):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    script = str(Path(__file__).with_name("one_extension.py"))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for killed_after in (2, 0):
        arguments = [str(alone / "text"), str(tmp_path / "2"), str(killed_after), weights]
        command = [sys.executable, *launch, script, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode != 0) == (killed_after > 0), done.stderr
    ended = []
    for folder in (alone / "1", tmp_path / "2"):
        files = {name: safetensors.torch.load_file(folder / name) for name in (ADAPTER, "heads/model.safetensors")}
        losses = [float(line) for line in folder.with_suffix(".losses").read_text().split()]
        record = json.loads((folder / RECORD).read_text())["training"]
        ended.append((losses, {f"{file}:{n}": t for file, some in files.items() for n, t in some.items()}, record))
    (losses, one, record), (others, two, other) = ended
    assert losses == pytest.approx(others, rel=1e-5)
    assert record["held_out"] == pytest.approx(other["held_out"], rel=1e-5)
    assert record["tokens"] == other["tokens"] == 3 * 2 * 128
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        # Adam divides a gradient by its own size, so that rounding moves a weight whose gradient is nearly nought
        # further than others: tensors are compared, not weights. That bias is nothing else: a constant that is added
        # to all weights of a merge changes nothing.
        if not name.endswith("out.bias"):
            difference = tensor - two[name]
            assert difference.norm() < 5e-5 * tensor.norm(), name
            assert difference.abs().max() < 1e-2 * RECIPE["heads_learning_rate"], name  # of which a step is, at most


def test_shards_are_read_by_the_same_number_of_chunks_or_refused(tmp_path):
    short = corpus_in(tmp_path / "short", WORDS[:100]).domains[""]
    corpus = corpus_in(tmp_path / "long", WORDS, *[WORDS[i : i + 127] for i in range(20)])
    recipe = Extension(**RECIPE | {"shard": True})
    for number in range(20):
        assert [len(ids) for ids in packed_window(corpus, 0, number, length=128, begin="random", alone=True)] == [128]
    both = Corpus({"long": corpus.domains[""], "short": short}, Letters())
    with pytest.raises(DocumentError, match="domain 'short' has none of 128 tokens; lower length, or name longer"):
        _check_domains(both, corpus, recipe)
    with pytest.raises(DocumentError, match="or set held_out_windows to 0"):
        _check_domains(corpus, both, recipe)
    _check_domains(corpus, both, replace(recipe, held_out_windows=0))
    with pytest.raises(DocumentError, match="domain 'short' has none of 128 tokens"):
        _check_domains(both, both, replace(recipe, held_out_windows=0))  # few documents: all are used for both


def test_one_process_has_nobody_to_share_weights_with(tmp_path):
    with pytest.raises(ArgumentError, match="there is one; start several with torchrun"):
        tuning(tmp_path, shard=True)
