import random

import pytest
import torch
from families import tiny

import lococo
from lococo.errors import ArgumentError, WindowError

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM

from lococo.eval import harness
from lococo.eval.harness import SlotLM


def words(length, seed):
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(2, 128)}" for _ in range(length))


def instances(kind, arguments):
    return [Instance(kind, {}, argument, number) for number, argument in enumerate(arguments)]


@pytest.fixture
def choices():
    """Three questions of four answers each after the same examples, two after others, and one without a context."""
    examples, other = words(90, 0), words(70, 1)
    contexts = [f"{examples} {words(40, seed)}" for seed in (2, 3)] + [f"{examples} {words(9, 4)}"]
    contexts += [f"{other} {words(5, 5)}", f"{other} {words(45, 6)}"]
    pairs = [(context, " " + words(1 + choice % 3, 10 * choice)) for context in contexts for choice in range(4)]
    return [*pairs, ("", words(20, 7)), (words(1, 8), " " + words(60, 9))]


@pytest.fixture
def tokenizer(tokenizer):
    # No other word begins with it, as a stop string.
    tokenizer.eos_token = tokenizer.pad_token = "w0"
    return tokenizer


def close(one, other):
    assert [hit for _, hit in one] == [hit for _, hit in other]
    assert [score for score, _ in one] == pytest.approx([score for score, _ in other], abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_full_cache_scores_as_the_harness_own_class(tokenizer, choices, batch_size):
    requests = instances("loglikelihood", choices)
    theirs = HFLM(tiny(), tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", batch_size=batch_size)
    close(slots.loglikelihood(requests, disable_tqdm=True), theirs)
    assert len({score for score, _ in theirs}) > 20


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_full_cache_writes_as_the_harness_own_class(tokenizer, choices, batch_size):
    how = {"until": ["w5", "w77 w8"], "max_gen_toks": 9}
    requests = instances("generate_until", [(context, how) for context, _ in choices[::4] if context])
    requests += instances("generate_until", [(choices[0][0], {"until": [], "max_gen_toks": 3})])
    theirs = HFLM(tiny(), tokenizer=tokenizer, batch_size=1).generate_until(requests, disable_tqdm=True)
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", batch_size=batch_size)
    assert slots.generate_until(requests, disable_tqdm=True) == theirs
    assert len(set(theirs)) > 3


def test_rolling_scores_as_the_harness_own_class(tokenizer):
    requests = instances("loglikelihood_rolling", [(words(80, 0),), (words(30, 1),)])
    theirs = HFLM(tiny(), tokenizer=tokenizer, max_length=64).loglikelihood_rolling(requests, disable_tqdm=True)
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", max_length=64)
    mine = slots.loglikelihood_rolling(requests, disable_tqdm=True)
    assert mine == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4])
@torch.no_grad()
def test_slots_score_every_request_as_if_it_came_alone(tokenizer, choices, batch_size):
    options = {"num_slots": 40, "chunk_size": 16}
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="mass-merge", batch_size=batch_size, **options)
    scores = slots.loglikelihood(instances("loglikelihood", choices), disable_tqdm=True)
    expected = []
    for context, continuation in choices[:20]:
        context, ids = (tokenizer.encode(text) for text in (context, context + continuation))
        with lococo.attach(tiny(), "mass-merge", **options) as attached:
            cache = attached.new_cache()
            logits = tiny()(torch.tensor([ids[:-1]]), past_key_values=cache).logits[0].log_softmax(-1)
        targets = torch.tensor(ids[len(context) :])
        own = logits[len(context) - 1 :]
        hit = bool((own.argmax(-1) == targets).all())
        expected.append((own.gather(1, targets[:, None]).sum().item(), hit))
    close(scores[:20], expected)
    full = SlotLM(tiny(), tokenizer=tokenizer, compressor="full").loglikelihood(instances("loglikelihood", choices))
    assert any(abs(mine[0] - theirs[0]) > 1e-2 for mine, theirs in zip(scores, full, strict=True))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_slots_write_after_every_context_as_if_it_came_alone(tokenizer, choices, batch_size):
    how = {"until": [], "max_gen_toks": 30}
    requests = instances("generate_until", [(context, how) for context, _ in choices[:20:4]])
    options = {"compressor": "mass-merge", "num_slots": 40, "chunk_size": 16}
    together = SlotLM(tiny(), tokenizer=tokenizer, batch_size=batch_size, **options)
    written = together.generate_until(requests, disable_tqdm=True)
    alone = [together.generate_until([request], disable_tqdm=True)[0] for request in requests]
    assert written == alone
    assert len(set(written)) == 5


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_layers_with_a_sliding_window_see_what_was_shared(family, tokenizer, choices):
    how = {"until": [], "max_gen_toks": 9}
    requests = instances("generate_until", [(context, how) for context, _ in choices[:20:4]])
    theirs = HFLM(tiny(family), tokenizer=tokenizer, batch_size=1).generate_until(requests, disable_tqdm=True)
    slots = SlotLM(tiny(family), tokenizer=tokenizer, compressor="full", batch_size=4)
    assert slots.generate_until(requests, disable_tqdm=True) == theirs
    scored = instances("loglikelihood", choices)
    theirs = HFLM(tiny(family), tokenizer=tokenizer).loglikelihood(scored, disable_tqdm=True)
    close(slots.loglikelihood(scored, disable_tqdm=True), theirs)


def test_beams_start_from_what_was_shared(tokenizer, choices):
    how = {"until": [], "max_gen_toks": 5, "num_beams": 3}
    requests = instances("generate_until", [(context, how) for context, _ in choices[:20:4]])
    theirs = HFLM(tiny(), tokenizer=tokenizer, batch_size=1).generate_until(requests, disable_tqdm=True)
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", batch_size=1)
    assert slots.generate_until(requests, disable_tqdm=True) == theirs


def test_odd_requests(tokenizer, choices):
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", max_length=64)
    assert slots.loglikelihood([]) == slots.generate_until([]) == []
    twice = slots.loglikelihood(instances("loglikelihood", [choices[16], (" ", "w7 w8"), choices[16]]))
    assert twice[0] == twice[2] == pytest.approx(slots.loglikelihood(instances("loglikelihood", [choices[16]]))[0])
    assert twice[1] == pytest.approx(slots.loglikelihood(instances("loglikelihood", [("", "w7 w8")]))[0])
    assert len(slots.generate_until(instances("generate_until", [("", {"until": [], "max_gen_toks": 3})]))) == 1
    for answer, count, error in (("", 0, ArgumentError), (" " + words(65, 0), 65, WindowError)):
        with pytest.raises(error, match=f"answer of 1 to 64 tokens to score, got {count}"):
            slots.loglikelihood(instances("loglikelihood", [choices[16], ("w3", answer)]))


def test_a_prompt_beyond_the_window_is_counted_or_refused(tokenizer, caplog):
    requests = instances("loglikelihood", [(words(90, 0), " w7"), (words(20, 1), " w7")])
    slots = SlotLM(tiny(), tokenizer=tokenizer, num_slots=40, chunk_size=16, max_length=64)
    slots.loglikelihood(requests, disable_tqdm=True)
    assert slots.truncated == slots.get_model_info()["truncated"] == 1
    assert "1 requests were longer than the window" in caplog.text
    strict = SlotLM(tiny(), tokenizer=tokenizer, num_slots=40, chunk_size=16, max_length=64, too_long="refuse")
    with pytest.raises(WindowError, match="prompt of 91 tokens, where 65 fit a window of 64"):
        strict.loglikelihood(requests, disable_tqdm=True)
    with pytest.raises(ArgumentError, match="one of truncate, middle, refuse"):
        SlotLM(tiny(), tokenizer=tokenizer, too_long="cut")
    with pytest.raises(WindowError, match="no room in a window of 64"):
        strict.generate_until(instances("generate_until", [("w3", {"until": [], "max_gen_toks": 64})]))


def test_a_prompt_that_is_cut_in_its_middle_keeps_both_ends(tokenizer):
    context, answers = words(90, 0), [" w7", " w8 w9 w10"]
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", max_length=64, too_long="middle")
    scores = slots.loglikelihood(instances("loglikelihood", [(context, answer) for answer in answers]))
    assert slots.truncated == 2
    # Both answers follow the same text, cut for the longer of the two.
    kept = context.split()[:31] + context.split()[-31:]
    whole = SlotLM(tiny(), tokenizer=tokenizer, compressor="full")
    close(scores, whole.loglikelihood(instances("loglikelihood", [(" ".join(kept), answer) for answer in answers])))


def test_what_would_be_ignored_is_refused(tokenizer):
    for options, line in (
        ({"peft": "adapter"}, "takes no peft; expected add_bos_token, "),
        ({"num_slot": 64}, "takes no num_slot"),
        ({"batch_size": "auto"}, "whole number, got 'auto'"),
        ({"think_end_token": 7}, "must be text, got 7"),
        ({"tokenizer": None}, "without its tokenizer"),
    ):
        with pytest.raises(ArgumentError, match=line):
            SlotLM(tiny(), **{"tokenizer": tokenizer} | options)


def test_the_command_line_of_the_harness_finds_it_by_name(tiny, tokenizer):
    made = get_model("lococo").create_from_arg_string(
        f"pretrained={tiny},compressor=mass-merge,num_slots=40,chunk_size=16", {"batch_size": 2, "device": "cuda:0"}
    )
    assert made.attachment.slots_per_layer == [40, 40]
    info = made.get_model_info()
    assert [info[name] for name in ("compressor", "num_slots", "positions")] == ["mass-merge", 40, "packed"]


def test_what_is_cut_for_one_of_several_answers_counts_as_cut(tokenizer, caplog):
    context = words(63, 0)
    pairs = [(context, answer) for answer in (" w7 w8 w9 w10", " w7")]
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", max_length=64)
    slots.loglikelihood(instances("loglikelihood", pairs))
    assert slots.prompts == {context: (63, 61)}
    assert "lost their beginning" in caplog.text


def test_the_warning_says_what_was_cut(tokenizer, caplog):
    slots = SlotLM(tiny(), tokenizer=tokenizer, compressor="full", max_length=64, too_long="middle")
    slots.loglikelihood(instances("loglikelihood", [(words(90, 0), " w7")]))
    assert "1 requests were longer than the window and lost their middle" in caplog.text


def test_its_command_line_refuses_in_one_line(tiny, monkeypatch, capsys):
    given = ["--model_args", f"pretrained={tiny},compressor=h2", "--tasks", "arc_easy"]
    monkeypatch.setattr("sys.argv", ["lm_eval", "--model", "lococo", *given])
    assert harness.main() == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lococo: unknown compressor 'h2'; expected one of full, ")
    assert last.endswith("did you mean 'h2o'?")
