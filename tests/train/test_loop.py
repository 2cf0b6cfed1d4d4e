import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import tiny
from one_training import CORPUS, RECIPE, figures_of, training
from test_facts import quantised

import lococo
from lococo.compressors.heads import load_heads
from lococo.errors import ArgumentError, DocumentError, FileFormatError, TrainingError
from lococo.facts import weights_fingerprint
from lococo.train.data import Corpus, Document
from lococo.train.lessons import HeadLessons
from lococo.train.recipe import Recipe
from lococo.train.run import CHECKPOINT, HELD_OUT_WINDOWS, train
from lococo.train.trained import heads_in


def weights(trained):
    return {name: tensor.clone() for name, tensor in trained.trained.heads.state_dict().items()}


def test_training_lowers_the_loss_and_leaves_the_model_alone(tmp_path):
    trained = training(tmp_path, steps=12)
    before = {name: tensor.clone() for name, tensor in trained.lessons.model.state_dict().items()}
    losses = trained.evaluate(trained.lessons, 4)
    trained.run(lambda row: None)
    better = trained.evaluate(trained.lessons, 4)
    for num_slots in ("24", "40"):
        assert better[num_slots] < losses[num_slots]
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.lessons.model.state_dict().items())


@pytest.mark.parametrize("stopped_after", [1, 4])
def test_a_resumed_training_ends_with_the_same_weights(tmp_path, stopped_after):
    unbroken = training(tmp_path, steps=6)
    unbroken.run(lambda row: None)

    class KilledError(Exception):
        pass

    killed = training(tmp_path, steps=6)

    def kill(row):
        if row["step"] == stopped_after:
            killed.save(tmp_path / "checkpoint.safetensors")
        if row["step"] == stopped_after + 1:
            raise KilledError

    with pytest.raises(KilledError):
        killed.run(kill)
    resumed = training(tmp_path, steps=6, resumed=heads_in(tmp_path / "checkpoint.safetensors"))
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert resumed.step == stopped_after
    resumed.run(lambda row: None)
    ends = weights(unbroken), weights(resumed)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_step_that_is_not_finite_keeps_the_heads(tmp_path):
    trained = training(tmp_path, steps=3)
    rows = []
    trained.run(lambda row: rows.append(row) if row["step"] < 2 else None)
    good = weights(trained)
    trained.step = 2
    with torch.no_grad():
        trained.lessons.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="the loss of step 3 is not finite"):
        trained.run(lambda row: None)
    after = weights(trained)
    assert all(torch.equal(good[name], after[name]) for name in good)


@pytest.mark.parametrize("objective", ["distillation", "next-token"])
@pytest.mark.parametrize("compressions", [0, 1, 2])
def test_every_objective_reaches_every_part(tmp_path, objective, compressions):
    trained = training(tmp_path, steps=3, objective=objective, compressions=compressions)
    before = weights(trained)
    trained.run(lambda row: None)
    moved = {name.split(".")[0] for name, tensor in weights(trained).items() if not torch.equal(tensor, before[name])}
    assert all(loss > 0 for loss in trained.evaluate(trained.lessons, 1).values())
    assert moved == {"mergers", "norms"}  # scores are fitted apart


def test_attention_matching_lowers_its_error_and_leaves_norms_alone(tmp_path):
    trained = training(tmp_path, steps=12, objective="attention", learning_rate=1e-2)
    losses = trained.evaluate(trained.lessons, 4)
    trained.run(lambda row: None)
    better = trained.evaluate(trained.lessons, 4)
    assert all(better[num_slots] < losses[num_slots] for num_slots in ("24", "40"))
    assert not trained.trained.heads.norms.delta.any()


PAPER = {"heads": "lococo-paper", "objective": "next-token", "num_slots": (24,), "compressions": 1, "warm_up": 0}
PAPER |= {"learned_scores": False}


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_the_papers_heads_train_in_the_same_loop(tmp_path, mix):
    trained = training(tmp_path, steps=3, mix=mix, learning_rate=5e-2, **PAPER)
    before = weights(trained)
    trained.run(lambda row: None)
    trained.save(tmp_path / "checkpoint.safetensors")
    after = weights(trained)
    assert all(after[f"mix.{layer}"] != before[f"mix.{layer}"] for layer in range(4))
    again = heads_in(tmp_path / "checkpoint.safetensors")
    assert again.settings == trained.trained.heads.settings


def test_the_papers_heads_start_as_eviction(tmp_path):
    trained = training(tmp_path, steps=1, **PAPER)
    with lococo.attach(trained.lessons.model, "chunk-mass", num_slots=24, chunk_size=16) as slots:
        ids = trained.lessons.ids(0, 0, 24)
        with torch.no_grad():
            evicted = trained.lessons.model(ids, past_key_values=slots.new_cache()).logits
    with (
        lococo.attach(trained.lessons.model, trained.lessons.compressor, num_slots=24, chunk_size=16) as slots,
        torch.no_grad(),
    ):
        assert torch.equal(trained.lessons.model(ids, past_key_values=slots.new_cache()).logits, evicted)


# Gemma's layers with slots lose so little here (0.009) that with a cut gradient what 40 slots learn outweighs 24.
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen3", {"compressions": 1}),
        ("gemma3", {}),
        ("gemma3", {"compressions": 1, "num_slots": (24,)}),
    ],
)
def test_another_architecture_trains_by_the_same_recipe(tmp_path, family, options):
    trained = training(tmp_path, steps=6, model=deepcopy(tiny(family)), **options)
    before = trained.evaluate(trained.lessons, 4)
    trained.run(lambda row: None)
    after = trained.evaluate(trained.lessons, 4)
    assert all(after[num_slots] < before[num_slots] for num_slots in before)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_a_gradient_that_is_cut_is_the_whole_one_up_to_the_first_cut(tmp_path, family):
    after = []
    for length, compressions in ((56, 0), (56, 1), (120, 0), (120, 1)):
        options = {"num_slots": (24,), "length": length, "compressions": compressions}
        trained = training(tmp_path, steps=3, model=deepcopy(tiny(family)), **options)
        trained.run(lambda row: None)
        after.append(weights(trained))
    # 24 slots and chunks of 16: 56 tokens are compressed once, 120 five times.
    assert all(torch.equal(after[1][name], tensor) for name, tensor in after[0].items())
    assert any(not torch.equal(after[3][name], tensor) for name, tensor in after[2].items())


def test_two_processes_train_as_one_with_accumulation(tmp_path):
    (tmp_path / "text.txt").write_text(CORPUS)
    script = Path(__file__).with_name("one_training.py")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launch, str(script), str(tmp_path), str(tmp_path / "2.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = figures_of(training(tmp_path)), json.loads((tmp_path / "2.json").read_text())
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one["losses"] == pytest.approx(two["losses"], rel=1e-5)
    assert one["sum"] == pytest.approx(two["sum"], rel=1e-5)


def test_a_whole_training_gives_heads_that_load(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(CORPUS)
    (tmp_path / "text" / "b.txt").write_text(CORPUS[5:])
    trained = training(tmp_path, steps=2)
    recipe = Recipe(**RECIPE | {"steps": 4, "calibrate_at": (24,), "score_windows": 4, "learned_scores": True})
    said = []
    arguments = {"data": [str(tmp_path / "text")], "say": said.append}

    class KilledError(Exception):
        pass

    def kill(row):
        if row["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        train(
            trained.lessons.model,
            trained.lessons.corpus.tokenizer,
            recipe,
            tmp_path / "heads",
            save_every=2,
            after_step=kill,
            **arguments,
        )
    assert (tmp_path / "heads" / CHECKPOINT).exists()
    figures = train(
        trained.lessons.model, trained.lessons.corpus.tokenizer, recipe, tmp_path / "heads", save_every=2, **arguments
    )
    assert said[0] == "measuring the layers' shares of 24 slots"
    assert said[1:7] == [f"{n} of 6 texts read with each group of layers compressed alone" for n in range(1, 7)]
    again = said.index("going on after step 2 of 4")
    assert [line.partition(":")[0] for line in said[7:again]] == [f"layer {n}" for n in range(4)]
    assert said[again + 1] == "reading 4 windows to fit scores to"
    assert "looked ahead and asked for, held out: " in said[again + 2]
    assert sorted(path.name for path in (tmp_path / "heads").iterdir()) == ["config.json", "model.safetensors"]
    _, heads = load_heads(tmp_path / "heads", dict.fromkeys(range(4), 24), 12)
    assert sum(heads.slots_per_layer(24)) == 96
    assert figures["held_out"].keys() == figures["held_out_before"].keys() == {"24", "40"}
    assert figures["tokens"] == 4 * 2 * 120
    assert figures["seconds"] > 0
    assert figures["data"] == ["text"]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    trained = training(tmp_path, steps=3)
    trained.save(tmp_path / "checkpoint.safetensors")
    other = training(tmp_path, steps=3, compare_every=2)
    # What differs alone is named.
    with pytest.raises(FileFormatError, match=r"recipe, model or text \(compare_every 1\) than this one \(compare_ev"):
        other.load(tmp_path / "checkpoint.safetensors")
    # A training that ran away goes on with lower rates.
    training(tmp_path, steps=3, learning_rate=1e-4).load(tmp_path / "checkpoint.safetensors")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"no such thing")
    with pytest.raises(FileFormatError, match="not a readable checkpoint"):
        trained.load(tmp_path / "checkpoint.safetensors")


def test_a_checkpoint_is_kept_where_the_disk_is_full(tmp_path, monkeypatch):
    trained = training(tmp_path, steps=3)
    file = tmp_path / "checkpoint.safetensors"
    trained.save(file)
    before = file.read_bytes()
    safetensors.torch.load(before)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trained.save(file)
    assert file.read_bytes() == before
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_last_step_that_runs_away_is_not_written(tmp_path):
    trained = training(tmp_path, steps=1)
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(CORPUS[ord(name) :])

    def run(rate):
        recipe = Recipe(**RECIPE | {"steps": 1, "learned_scores": False, "learning_rate": rate})
        folder, said = tmp_path / "heads", []
        arguments = {"data": [str(tmp_path / "text")], "save_every": 20, "say": said.append}
        return train(trained.lessons.model, trained.lessons.corpus.tokenizer, recipe, folder, **arguments), said

    # Far from any step at which a checkpoint is due.
    with pytest.raises(TrainingError, match="held-out text is not finite; the last checkpoint is from before"):
        run(1e30)
    assert [path.name for path in (tmp_path / "heads").iterdir()] == [CHECKPOINT]
    figures, said = run(1e-3)
    assert said == ["going on after step 0 of 1"]
    assert all(0 < loss < 10 for loss in figures["held_out"].values())


def test_what_is_measured_at_the_end_is_what_is_loaded(tmp_path):
    trained = training(tmp_path, steps=1)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(CORPUS)
    recipe = Recipe(**RECIPE | {"steps": 2, "learned_scores": False, "learning_rate": 0.3})
    tokenizer, folder = trained.lessons.corpus.tokenizer, tmp_path / "heads"
    model = trained.lessons.model
    figures = train(model, tokenizer, recipe, folder, data=[str(tmp_path / "text")], say=lambda line: None)
    _, heads = load_heads(folder, dict.fromkeys(range(4), 24), 12)
    again = training(tmp_path / "text", model=model, resumed=heads, **{"steps": 2, "learned_scores": False})
    whole = {"": [Document(tmp_path / "text" / "a.txt", 0, len(CORPUS))]}
    lessons = HeadLessons(model, heads, Corpus(whole, tokenizer), recipe)
    assert figures["held_out"] == again.evaluate(lessons, HELD_OUT_WINDOWS)


def test_recipes_that_cannot_be():
    with pytest.raises(ArgumentError, match="raise length to 1024 or more"):
        Recipe(length=500)
    with pytest.raises(ArgumentError, match="an odd kernel_size"):
        Recipe(kernel_size=4)
    with pytest.raises(ArgumentError, match="nothing is left to train"):
        Recipe(objective="attention", learned_merge=False)
    for wrong in ({"compare_every": 0}, {"score_windows": 0}, {"learning_rate": -1.0}, {"kernel_size": -1}):
        with pytest.raises(ArgumentError, match=f"expected {next(iter(wrong))} to be at least"):
            Recipe(**wrong)
    with pytest.raises(ArgumentError, match="expected objective to be one of distillation, next-token, attention"):
        Recipe(objective="next_token")
    for wrong in ({"steps": 1.5}, {"learned_scores": "no"}, {"num_slots": 24}, {"learning_rate": float("nan")}):
        with pytest.raises(ArgumentError, match=f"expected {next(iter(wrong))} to be .*, got"):
            Recipe(**wrong)
    with pytest.raises(ArgumentError, match="expected seed to be a number of 64 bits"):
        Recipe(seed=1 << 70)
    with pytest.raises(ArgumentError, match="expected heavy_share to be from 0 to less than 1"):
        Recipe(heavy_share=1.0)
    with pytest.raises(ArgumentError, match="one number in num_slots"):
        Recipe(heads="lococo-paper")


def test_windows_beyond_the_models_own_are_refused(tmp_path):
    trained = training(tmp_path, steps=1)
    recipe = Recipe(**RECIPE | {"length": 1025})
    with pytest.raises(ArgumentError, match="leave the model's own of 1024"):
        train(trained.lessons.model, trained.lessons.corpus.tokenizer, recipe, tmp_path / "out", data=[str(tmp_path)])


def test_one_document_is_trained_on_and_measured_on_and_says_so(tmp_path):
    trained = training(tmp_path, steps=1)
    said = []
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(CORPUS)
    (tmp_path / "text" / "note.txt").write_text("short")
    recipe = Recipe(**RECIPE | {"steps": 1, "learned_scores": False})
    figures = train(
        trained.lessons.model,
        trained.lessons.corpus.tokenizer,
        recipe,
        tmp_path / "out",
        data=[str(tmp_path / "text")],
        say=said.append,
    )
    assert not figures["held_out_was_kept_apart"]
    assert any("too few long documents" in line for line in said)


def test_a_corpus_without_windows(tmp_path):
    tokenizer = training(tmp_path, steps=1).lessons.corpus.tokenizer
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("few words")
    with pytest.raises(DocumentError, match="hardly any"):
        train(tiny(), tokenizer, Recipe(**RECIPE), tmp_path / "out", data=[str(tmp_path / "short")])


@pytest.mark.parametrize("kind", ["buffers", "wrapped"])
def test_heads_are_trained_for_quantised_weights(tmp_path, kind):
    model = quantised(kind)
    before = weights_fingerprint(model)
    trained = training(tmp_path, model=model, steps=3)
    start, rows = weights(trained), []
    trained.run(rows.append)
    assert all(row["loss"] > 0 for row in rows)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in weights(trained).items())
    assert weights_fingerprint(model) == before
