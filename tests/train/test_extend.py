import itertools
import json
from copy import deepcopy

import pytest
import safetensors.torch
import torch
from families import tiny
from one_extension import RECIPE, WORDS, Letters, corpus_in, llama, tuning
from transformers import DynamicCache

import lococo
from lococo.errors import ArgumentError, DocumentError, FileFormatError, TrainingError
from lococo.train import loop
from lococo.train.extend import extend
from lococo.train.extension import Extension
from lococo.train.long_lessons import side_by_side
from lococo.train.packing import packed_window
from lococo.train.run import CHECKPOINT
from lococo.tuned import ADAPTER, RECORD


def weights(training):
    return {name: master.detach().clone() for name, master in training.trained.masters.items()}


def kind(name):
    """heads, lora, norms or embeddings: what a name in a checkpoint belongs to."""
    if not name.startswith("model:"):
        return "heads"
    return "lora" if ".lora_" in name else "embeddings" if "embed" in name else "norms"


@pytest.mark.parametrize("compressor", ["fresh", "lococo-paper"])
def test_tuning_lowers_the_loss_and_moves_every_part(tmp_path, compressor):
    training, _ = tuning(tmp_path, steps=8, compressor=compressor, embeddings_learning_rate=1e-3, mix=0.5)
    before, loss = weights(training), training.evaluate(training.lessons, 4)["24"]
    frozen = {
        name: p.clone()
        for name, p in training.lessons.model.named_parameters()
        if "model:" + name not in training.trained.parameters
    }
    training.run(lambda row: None)
    assert training.evaluate(training.lessons, 4)["24"] < loss - 0.1
    moved = {kind(name) for name, tensor in weights(training).items() if not torch.equal(tensor, before[name])}
    assert moved == {"heads", "lora", "norms", "embeddings"}
    after = dict(training.lessons.model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert any("mlp" in name for name in frozen)


@pytest.mark.parametrize("part", ["heads", "lora", "norms", "embeddings"])
def test_a_part_without_a_learning_rate_stays(tmp_path, part):
    rates = {f"{each}_learning_rate": 1e-3 for each in ("heads", "lora", "norms", "embeddings")}
    training, _ = tuning(tmp_path, **rates | {f"{part}_learning_rate": 0.0})
    assert {kind(name) for name in training.trained.masters} == {"heads", "lora", "norms", "embeddings"} - {part}


@torch.no_grad()
def nll(logits, ids):
    return -logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def test_every_token_counts_those_at_chunk_boundaries_and_the_first_included(tmp_path):
    training, tuned = tuning(tmp_path)
    model = training.lessons.model
    with training.lessons.lesson(0, 0, 24) as lesson:
        losses = [(loss.item(), count) for loss, count in lesson.losses]
        assert lesson.counted == 127
    # Full for the first time after 24 + 16 tokens, then with every 16; after the last token nothing follows.
    assert [count for _, count in losses] == [16, 16, 8, *[16] * 5, 7]
    [piece] = packed_window(training.lessons.corpus, 0, 0, length=128, begin="random")
    ids = torch.tensor([piece])
    with lococo.attach(model, tuned.compressor, num_slots=24, chunk_size=16) as slots, torch.no_grad():
        expected = nll(model(ids, past_key_values=slots.new_cache()).logits, ids)
    assert sum(loss for loss, _ in losses) == pytest.approx(expected.sum().item(), rel=1e-5)
    assert losses[0][0] == pytest.approx(expected[:16].sum().item(), rel=1e-5)


def test_nothing_is_attended_to_across_documents(tmp_path):
    corpus = corpus_in(tmp_path, WORDS[:40], WORDS[500:570])
    training, tuned = tuning(tmp_path, corpus=corpus, short_documents=True)
    pieces = packed_window(corpus, 0, 0, length=128, begin="random", short=True)
    assert len(pieces) > 1
    alone = 0.0
    for piece in pieces:
        ids = torch.tensor([piece])
        attached = lococo.attach(training.lessons.model, tuned.compressor, num_slots=24, chunk_size=16)
        with attached as slots, torch.no_grad():
            alone += nll(training.lessons.model(ids, past_key_values=slots.new_cache()).logits, ids).sum().item()
    with training.lessons.lesson(0, 0, 24) as lesson:
        assert lesson.counted == 128 - len(pieces)
        assert sum(loss.item() for loss, _ in lesson.losses) == pytest.approx(alone, rel=1e-5)


class Saved:
    """Counts the bytes that autograd holds on to, and the most there ever were."""

    def __init__(self):
        self.now = self.peak = 0

    def pack(self, tensor):
        held = Held(self, tensor)
        self.now += held.nbytes
        self.peak = max(self.peak, self.now)
        return held


class Held:
    def __init__(self, counter, tensor):
        self.counter, self.tensor, self.nbytes = counter, tensor, tensor.numel() * tensor.element_size()

    def __del__(self):
        self.counter.now -= self.nbytes


def saved_bytes(folder, **options):
    training, _ = tuning(folder, accumulate=1, steps=1, **options)
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda held: held.tensor):
        training.run(lambda row: None)
    return saved.peak


def test_memory_does_not_grow_with_the_length(tmp_path):
    peaks = [saved_bytes(tmp_path, length=length) for length in (128, 1024)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
    # With the gradient through the whole window it does, as the counter must be able to see.
    whole = [saved_bytes(tmp_path, length=length, compressions=0) for length in (128, 256)]
    assert whole[1] > 1.8 * whole[0] > 1.8 * peaks[0]
    assert saved_bytes(tmp_path, length=256, compressions=2) < 2.5 * peaks[0]


def test_memory_does_not_grow_with_the_length_where_heads_alone_learn(tmp_path):
    # Chunks before the first compression have no gradient then.
    alone = {"lora_learning_rate": 0.0, "norms_learning_rate": 0.0}
    for compressions in (1, 2):
        peaks = [saved_bytes(tmp_path, length=n, compressions=compressions, **alone) for n in (128, 1024)]
        assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


def test_the_gradient_is_cut_after_as_many_chunks_as_the_recipe_says(tmp_path):
    after = {}
    for compressions in (0, 9, 8, 1):
        training, _ = tuning(tmp_path, compressions=compressions, steps=1)
        training.run(lambda row: None)
        after[compressions] = weights(training)
    # 128 tokens are read in nine chunks: a gradient that reaches nine back is the whole one.
    same = {n for n in (9, 8, 1) if all(torch.equal(after[n][name], tensor) for name, tensor in after[0].items())}
    assert same == {9}
    assert any(not torch.equal(after[8][name], tensor) for name, tensor in after[1].items())


def test_the_full_cache_has_the_exact_gradient(tmp_path):
    training, _ = tuning(tmp_path, compressor="full", steps=1, accumulate=1)
    model = training.lessons.model
    ids = torch.tensor(packed_window(training.lessons.corpus, 0, 0, length=128, begin="random"))
    with training.lessons.lesson(0, 0, 24) as lesson:
        loss = sum(loss for loss, _ in lesson.losses)
        loss.backward()
    chunked = {name: p.grad.clone() for name, p in training.trained.parameters.items()}
    training.trained.forget()
    logits = model(ids, past_key_values=DynamicCache(config=model.config)).logits
    once = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    once.backward()
    assert loss.item() == pytest.approx(once.item(), rel=1e-5)
    for name, parameter in training.trained.parameters.items():
        torch.testing.assert_close(chunked[name], parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("texts", [(WORDS,), (WORDS[:300], WORDS[500:570])], ids=["alike", "of documents that differ"])
@pytest.mark.parametrize("compressor", ["fresh", "h2o", "full"])
def test_windows_side_by_side_teach_what_they_teach_one_after_the_other(tmp_path, compressor, texts):
    seen = {}
    for options in ({"batch": 4, "accumulate": 1}, {"batch": 1, "accumulate": 4}):
        corpus = corpus_in(tmp_path, *texts)
        options |= {"compressor": compressor, "steps": 1, "short_documents": len(texts) > 1}
        training, _ = tuning(tmp_path, corpus=corpus, **options)
        rows = []
        training.run(rows.append)
        seen[options["batch"]] = rows[0], weights(training)
    (together, after_together), (alone, after_alone) = seen[4], seen[1]
    assert together["tokens"] == alone["tokens"] == 4 * 128
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    if len(texts) == 1:  # else windows have fewer tokens that count, and each counts the same only where it is alone
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        # Adam's first step is of the same size whatever the gradient's, so one of almost nothing may turn around.
        moved = [(after_together[name] - tensor).abs() > 1e-4 for name, tensor in after_alone.items()]
        assert sum(part.sum().item() for part in moved) < 0.001 * sum(part.numel() for part in moved)


def test_windows_are_side_by_side_where_their_documents_end_at_the_same_places():
    a, b, c, d = [[1, 2, 3]], [[1], [2, 3]], [[4, 5, 6]], [[7], [8, 9]]
    assert side_by_side([a, b, c, d]) == [[[1, 2, 3], [4, 5, 6]], [[1], [7]], [[2, 3], [8, 9]]]


def test_a_step_is_taken_after_each_stretch_of_a_window(tmp_path):
    # Of 127 predictions 64, 64 - 1 follow: the second chunk of stretch two ends where the window does.
    training, _ = tuning(tmp_path, steps=4, stretches=2, compressions=1)
    rows, after = [], []
    training.run(lambda row: (rows.append(row), after.append(weights(training))))
    assert [row["tokens"] for row in rows] == [64] * 4
    assert all(row["loss"] > 0 for row in rows)
    for one, other in itertools.pairwise(after):
        assert any(not torch.equal(other[name], tensor) for name, tensor in one.items())
    # The first step is that of the first half alone, and the second half goes on from its slots.
    again, tuned = tuning(tmp_path, steps=4, stretches=2, compressions=1)
    [piece] = packed_window(again.lessons.corpus, 0, 0, length=128, begin="random")
    attached = lococo.attach(again.lessons.model, tuned.compressor, num_slots=24, chunk_size=16)
    ids = torch.tensor([piece])
    with attached as slots, torch.no_grad():
        expected = nll(again.lessons.model(ids, past_key_values=slots.new_cache()).logits, ids)
    assert rows[0]["loss"] == pytest.approx(expected[:72].sum().item() / 63.5, rel=1e-5)
    assert rows[1]["loss"] == pytest.approx(expected[72:].sum().item() / 63.5, rel=0.05)
    assert rows[1]["loss"] != pytest.approx(expected[72:].sum().item() / 63.5, rel=1e-5)


def test_a_tuning_in_stretches_goes_on_at_the_end_of_a_window(tmp_path):
    recipe = Extension(**RECIPE | {"steps": 6, "stretches": 2, "held_out_windows": 1})
    source = tmp_path / "text"
    corpus_in(source, WORDS, WORDS[::-1])

    def run(target, after_step):
        options = {"data": [str(source)], "save_every": 1, "say": lambda line: None, "after_step": after_step}
        extend(llama(), Letters(), recipe, target, base=None, **options)
        return safetensors.torch.load_file(target / ADAPTER)

    def kill(row):
        if row["step"] == 5:
            raise KilledError

    whole_run = run(tmp_path / "whole", lambda row: None)
    with pytest.raises(KilledError):
        run(tmp_path / "killed", kill)
    steps = []
    resumed = run(tmp_path / "killed", lambda row: steps.append(row["step"]))
    assert steps == [5, 6]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole_run.items())


def test_what_cannot_be_read_in_stretches(tmp_path):
    with pytest.raises(ArgumentError, match="multiple of the 3 stretches"):
        Extension(**RECIPE | {"stretches": 3})
    for options in ({"compressor": "full"}, {"compressions": 0}):
        with pytest.raises(ArgumentError, match="in one stretch, got 2"):
            Extension(**RECIPE | {"stretches": 2} | options)
    with pytest.raises(ArgumentError, match="raise batch instead"):
        tuning(tmp_path, stretches=2, accumulate=2)


@pytest.mark.parametrize("compressor", ["h2o", "streaming-llm", "mass-merge", "full"])
def test_models_are_tuned_without_heads_in_the_same_loop(tmp_path, compressor):
    training, tuned = tuning(tmp_path, compressor=compressor, steps=4)
    assert tuned.heads is None
    loss = training.evaluate(training.lessons, 2)["24"]
    training.run(lambda row: None)
    assert training.evaluate(training.lessons, 2)["24"] < loss
    assert {kind(name) for name in training.trained.masters} == {"lora", "norms"}


def test_weights_in_half_precision_are_moved_in_float32(tmp_path):
    training, _ = tuning(tmp_path, model=llama().bfloat16(), norms_learning_rate=1e-4, steps=3)
    name, norm = next((n, p) for n, p in training.trained.parameters.items() if kind(n) == "norms")
    training.run(lambda row: None)
    master = training.trained.masters[name]
    assert (norm.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    # Steps of 1e-4 are lost in bfloat16, where the next number above 1 is 1.008.
    assert 0 < (master - 1).abs().max() < 1e-3
    assert torch.equal(norm, master.to(torch.bfloat16))


def test_gradients_of_many_chunks_are_added_up_in_float32(tmp_path, monkeypatch):
    training, _ = tuning(tmp_path, model=llama().bfloat16(), length=512, steps=1)
    parts, gradients = {}, training.trained.gradients
    for name, parameter in training.trained.parameters.items():
        if kind(name) == "norms":
            parameter.register_hook(lambda gradient, name=name: parts.setdefault(name, []).append(gradient.double()))
    summed = {}

    def seen():
        all_of_them = gradients()
        summed.update({name: training.trained.masters[name].grad.double() for name in parts})
        return all_of_them

    monkeypatch.setattr(training.trained, "gradients", seen)
    training.run(lambda row: None)
    assert parts
    for name, added in parts.items():
        assert len(added) > 20
        exact, half = sum(added), added[0].bfloat16()
        for part in added[1:]:
            half = half + part.bfloat16()
        assert (summed[name] - exact).norm() < 1e-5 * exact.norm() < (half.double() - exact).norm()


class KilledError(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_tuning_ends_with_the_same_weights(tmp_path, dtype):
    unbroken, _ = tuning(tmp_path, model=llama().to(dtype))
    unbroken.run(lambda row: None)
    killed, _ = tuning(tmp_path, model=llama().to(dtype))

    def kill(row):
        if row["step"] == 2:
            killed.save(tmp_path / "checkpoint.safetensors")
        if row["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        killed.run(kill)
    resumed, _ = tuning(tmp_path, model=llama().to(dtype))
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert resumed.step == 2
    resumed.run(lambda row: None)
    ends = weights(unbroken), weights(resumed)
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    for name, parameter in unbroken.trained.parameters.items():
        assert torch.equal(parameter, resumed.trained.parameters[name])


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(tmp_path):
    training, _ = tuning(tmp_path)
    file = tmp_path / "checkpoint.safetensors"

    def spoil(row):
        if row["step"] == 2:
            with torch.no_grad():
                training.lessons.model.lm_head.weight[0, 0] = torch.nan

    with pytest.raises(TrainingError, match="the loss of step 3 is not finite"):
        training.run_saving(file, training.lessons, 0, save_every=1, after_step=spoil)
    kept, good = safetensors.torch.load_file(file), weights(training)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert all(torch.equal(kept[f"tuned.{name}"], good[name]) for name in good if name.startswith("model:"))
    again, _ = tuning(tmp_path)
    again.load(file)
    assert again.step == 2


def test_a_whole_tuning_goes_on_and_leaves_a_folder(tmp_path):
    corpus = corpus_in(tmp_path / "text", WORDS, WORDS[7:])
    recipe = Extension(**RECIPE)
    said = []

    def run(folder, after_step=lambda row: None):
        return extend(
            llama(),
            corpus.tokenizer,
            recipe,
            folder,
            base="somewhere",
            data=[str(tmp_path / "text")],
            save_every=2,
            say=said.append,
            after_step=after_step,
        )

    def kill(row):
        if row["step"] == 3:
            raise KilledError

    with pytest.raises(KilledError):
        run(tmp_path / "out", kill)
    assert (tmp_path / "out" / CHECKPOINT).exists()
    figures = run(tmp_path / "out")
    assert said == ["going on after step 2 of 4"]
    run(tmp_path / "unbroken")
    for name in (ADAPTER, "heads/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert files == adapter | {"heads/config.json", "heads/model.safetensors", RECORD}
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["training"]["held_out"] == figures["held_out"]
    assert figures["held_out"]["24"] < figures["held_out_before"]["24"]
    assert figures["tokens"] == 4 * 128
    assert figures["data"] == ["text"]


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path):
    training, _ = tuning(tmp_path)
    training.save(tmp_path / "checkpoint.safetensors")
    other, _ = tuning(tmp_path, compressions=2)
    with pytest.raises(FileFormatError, match="made with another recipe, model or text"):
        other.load(tmp_path / "checkpoint.safetensors")
    # One that ran away goes on with lower rates.
    lower, _ = tuning(tmp_path, heads_learning_rate=1e-4)
    lower.load(tmp_path / "checkpoint.safetensors")
    # What is not trained any more would be lost, and what is trained from here on is not in it.
    without, _ = tuning(tmp_path, norms_learning_rate=0.0)
    with pytest.raises(FileFormatError, match=r"\(norms_learning_rate above 0 True\) than this one \(norms_"):
        without.load(tmp_path / "checkpoint.safetensors")


def test_processes_that_stand_at_different_steps_do_not_start(tmp_path, monkeypatch):
    training, _ = tuning(tmp_path)
    for theirs, message in (
        ((4, training._made_with), r"go on after different steps \(0, 4\); put the output folder where all"),
        ((0, "{}"), "different recipes, models or texts"),
    ):
        monkeypatch.setattr(loop, "gather_object", lambda mine, theirs=theirs: [*mine, theirs])
        with pytest.raises(TrainingError, match=message):
            training.run(lambda row: None)


def test_no_document_as_long_as_a_window(tmp_path):
    corpus = corpus_in(tmp_path / "text", WORDS[:100], WORDS[:90])
    options = {"data": [str(tmp_path / "text")], "base": None}
    with pytest.raises(DocumentError, match=r"at least 128 tokens, the longest has 100; .* --short-documents"):
        extend(llama(), corpus.tokenizer, Extension(**RECIPE), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_recipes_that_cannot_be():
    with pytest.raises(ArgumentError, match="multiple of the chunk_size of 16, got 100; use 96 or 112"):
        Extension(**RECIPE | {"length": 100})
    with pytest.raises(ArgumentError, match="raise length to 64 or more"):
        Extension(**RECIPE | {"length": 48})
    with pytest.raises(ArgumentError, match="expected lora_learning_rate to be at least 0"):
        Extension(lora_learning_rate=-1.0)
    with pytest.raises(ArgumentError, match="at least one name in lora_targets"):
        Extension(lora_targets=())
    for options in ({"short_documents": True}, {"calibration_windows": 1}):
        with pytest.raises(ArgumentError, match="shard reads windows of one document each"):
            Extension(shard=True, **options)
    for name, value, message in (
        ("lora_learning_rate", float("nan"), "a finite number such as 0.001, got nan"),
        ("seed", 1 << 80, "expected seed to be a number of 64 bits"),
        ("rope", "dynamic", "expected rope to be one of none, linear, yarn, got dynamic"),
        ("begin", "start", "expected begin to be one of random, beginning, got start"),
        ("memory", 1.0, "expected memory to be from 0 to less than 1, or -1, got 1.0"),
        ("calibration_windows", -1, "expected calibration_windows to be at least 0, got -1"),
        ("lora_targets", (1, 2), r"expected lora_targets to be names, got \(1, 2\)"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Extension(**{name: value})


def test_a_tuning_of_nothing(tmp_path):
    rates = {f"{each}_learning_rate": 0.0 for each in ("heads", "lora", "norms")}
    with pytest.raises(ArgumentError, match="every learning rate is 0"):
        tuning(tmp_path, **rates)


def test_lora_for_layers_that_the_model_lacks(tmp_path):
    with pytest.raises(ArgumentError, match=r"no layers named query for LoRA; .* among down_proj, .*k_proj, o_proj"):
        tuning(tmp_path, lora_targets=("query", "v_proj"))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_another_architecture_is_tuned_by_the_same_recipe(tmp_path, family):
    training, _ = tuning(tmp_path, model=deepcopy(tiny(family)), steps=4)
    loss = training.evaluate(training.lessons, 2)["24"]
    training.run(lambda row: None)
    assert training.evaluate(training.lessons, 2)["24"] < loss
