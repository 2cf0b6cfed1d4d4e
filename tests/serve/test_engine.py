"""The engine without HTTP: turns, limits, faults, and an end that loses no answer."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from commands import WORDS, save_llama, tokenizer_of
from families import FAMILIES
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from lococo.attachment import attach
from lococo.prompts import Prompt
from lococo.reader import stream
from lococo.serve import reading
from lococo.serve.engine import Engine
from lococo.serve.failures import ApiError
from lococo.serve.feed import Feed
from lococo.serve.jobs import Delta, Event, Failed, Finished, Held, Job, Layout, Progress, Sampling
from lococo.session import Session


class Asked:
    """A request and what came of it."""

    def __init__(self, engine: Engine, ids: list[int], count: int | None, **settings: Any) -> None:
        self.events: list[Event] = []
        self.times: list[float] = []
        self.over = threading.Event()
        self.ids = ids
        sampling = None if count is None else Sampling(max_tokens=count, temperature=0.0)
        settings = {"tenant": "t", "deadline": time.monotonic() + 60} | settings
        feed = settings.pop("feed", None) or Feed(list(ids), closed=True)
        self.job = Job(feed=feed, tell=self.tell, sampling=sampling, **settings)
        engine.submit(self.job)

    def tell(self, event: Event) -> None:
        self.events.append(event)
        self.times.append(time.monotonic())
        if isinstance(event, Finished | Failed | Held):
            self.over.set()

    def text(self) -> str:
        assert self.over.wait(20)
        assert isinstance(self.events[-1], Finished), self.events[-1]
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    def error(self) -> ApiError:
        assert self.over.wait(20)
        assert isinstance(self.events[-1], Failed)
        return self.events[-1].error


@pytest.fixture
def engine(attached: Session) -> Iterator[Engine]:
    one = Engine(attached, max_batch=4, max_queue=3, conversation_nbytes=1 << 30)
    yield one
    one.close()


def ids_of(session: Session, count: int, seed: int = 0) -> list[int]:
    torch.manual_seed(seed)
    return torch.randint(5, 250, (count,)).tolist()


def expected(session: Session, ids: list[int], count: int) -> str:
    tokens = stream(session.model, torch.tensor([ids]), session.slots.new_cache(), max_new_tokens=count)
    return session.tokenizer.decode(list(tokens), skip_special_tokens=True)


def slowly(engine: Engine, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every forward pass of the engine take longer."""
    fast = reading.prefill

    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return fast(*args)

    monkeypatch.setattr("lococo.serve.reading.prefill", slow)
    monkeypatch.setattr("lococo.serve.batch.prefill", slow)


def test_a_long_document_does_not_keep_others_waiting(attached: Session, engine: Engine) -> None:
    document = Asked(engine, ids_of(attached, 3000), None)
    ids = ids_of(attached, 40, seed=1)
    short = Asked(engine, ids, 30)
    engine.start()
    assert short.text() == expected(attached, ids, 30)
    assert document.over.wait(20)
    read_before = sum(when < short.times[-1] for when in document.times)
    # 3 chunks of the prompt and 30 steps, by turns with chunks of the document
    assert 20 <= read_before <= 60
    progress = [event.tokens for event in document.events if isinstance(event, Progress)]
    assert len(progress) == len(range(16, 3001, 16)) + 1
    assert progress[-1] == 3000


def test_requests_join_and_leave_between_steps(attached: Session, engine: Engine) -> None:
    lengths = [(10, 60), (50, 5), (120, 33), (47, 1), (48, 20), (49, 44), (1, 50)]
    engine.max_queue = len(lengths)
    asked = [Asked(engine, ids_of(attached, n, seed=n), count) for n, count in lengths]
    engine.start()
    texts = [one.text() for one in asked]
    assert texts == [expected(attached, ids_of(attached, n, seed=n), count) for n, count in lengths]
    # One token of each comes from its prompt; apart they would take as many steps as there are others.
    assert engine.counts.steps < sum(count - 1 for _, count in lengths) * 0.75
    assert engine.counts.largest_batch == 4
    assert engine.counts.completion_tokens == sum(count for _, count in lengths)
    assert engine.counts.prompt_tokens == sum(n for n, _ in lengths)
    # After 32 + 16 tokens, and after every further 16; the last token of an answer is never read.
    full = [max(0, (n + count - 1 - 1 - 32) // 16) for n, count in lengths]
    assert engine.counts.compressions == sum(full)


def test_tenants_take_turns(attached: Session, engine: Engine) -> None:
    engine.max_batch, engine.max_queue = 1, 10
    many = [Asked(engine, [5, 6], 2, tenant="many") for _ in range(5)]
    few = Asked(engine, [5, 6], 2, tenant="few")
    engine.start()
    for one in [*many, few]:
        one.text()
    assert sum(one.times[-1] < few.times[-1] for one in many) <= 1


def test_too_many_are_told_to_come_back(attached: Session, engine: Engine) -> None:
    taken = [Asked(engine, [5, 6], 4) for _ in range(4 + 3)]
    with pytest.raises(ApiError) as refused:
        Asked(engine, [5, 6], 4)
    assert refused.value.status == 429
    assert int(refused.value.reply_headers()["Retry-After"]) >= 1
    other = Asked(engine, [5, 6], 4, tenant="another")
    with pytest.raises(ApiError, match="8 requests wait already"):
        Asked(engine, [5, 6], 4, tenant="another")
    engine.start()
    assert other.text() == taken[0].text()
    assert len({one.text() for one in taken}) == 1
    assert Asked(engine, [5, 6], 4).text() == taken[0].text()


def test_a_cancelled_request_leaves_the_batch(
    attached: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(engine, monkeypatch, 0.002)
    engine.start()
    gone, stays = Asked(engine, [5, 6], 10_000), Asked(engine, [7, 8], 200)
    reading = Asked(engine, ids_of(attached, 100_000), None)
    while len(gone.events) < 5 or len(reading.events) < 5:
        time.sleep(0.002)
    engine.cancel(gone.job)
    engine.cancel(reading.job)
    assert stays.text() == expected(attached, [7, 8], 200)
    counts = len(gone.events), len(reading.events)
    assert engine._active() == 0
    time.sleep(0.02)
    assert (len(gone.events), len(reading.events)) == counts
    assert not gone.over.is_set()


def test_a_request_that_takes_too_long_is_given_up(
    attached: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(engine, monkeypatch, 0.002)
    engine.start()
    soon = time.monotonic() + 0.2
    late = [Asked(engine, [5, 6], 10_000, deadline=soon), Asked(engine, [5], 5, feed=Feed(), deadline=soon)]
    assert {one.error().status for one in late} == {504}
    assert Asked(engine, [7, 8], 9).text() == expected(attached, [7, 8], 9)


def test_a_fault_in_one_request_does_not_end_the_others(
    attached: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.start()
    feed = Feed([5, 6, 7])
    bad = Asked(engine, [], 5, feed=feed)
    good = Asked(engine, [7, 8], 30)
    feed.close(ValueError("secret text"))
    error = bad.error()
    assert (error.status, error.code) == (500, "internal_error")
    assert "secret" not in error.message
    assert good.text() == expected(attached, [7, 8], 30)
    with monkeypatch.context() as patch:
        patch.setattr("lococo.serve.batch.prefill", lambda *args: 1 / 0)
        assert Asked(engine, [7, 8], 30).error().status == 500
    assert Asked(engine, [7, 8], 30).text() == good.text()


def test_an_answer_that_cannot_be_written_leaves_the_others_alone(attached: Session, engine: Engine) -> None:
    asked = [Asked(engine, [5 + n], 30 + n) for n in range(4)]
    engine.start()
    while len(engine.batch.answers) < 4:
        time.sleep(0.001)
    bad = next(answer for answer in engine.batch.answers if answer.job is asked[1].job)
    bad.take = lambda logits: 1 / 0  # type: ignore[assignment]
    assert asked[1].error().code == "internal_error"
    for n in (0, 2, 3):
        assert asked[n].text() == expected(attached, [5 + n], 30 + n)


def test_an_answer_whose_slots_cannot_be_kept_leaves_the_others_alone(
    attached: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.conversations, "keep", lambda *args: 1 / 0)
    bad = Asked(engine, [5, 6], 20, layout=Layout("t", [5, 6]))
    good = [Asked(engine, [7 + n], 40) for n in range(3)]
    engine.start()
    assert bad.error().code == "internal_error"
    assert [one.text() for one in good] == [expected(attached, [7 + n], 40) for n in range(3)]


@pytest.mark.parametrize("count", [None, 5])
def test_the_end_of_a_text_may_be_told_after_its_last_token(
    count: int | None, attached: Session, engine: Engine
) -> None:
    engine.start()
    ids = ids_of(attached, 32 + 16)
    feed = Feed(ids)
    one = Asked(engine, ids, count, feed=feed)
    while engine.counts.prompt_tokens != len(ids):
        time.sleep(0.002)
    assert not one.over.is_set()
    feed.close()
    assert one.over.wait(10)
    if count is None:
        assert isinstance(one.events[-1], Held)
        assert one.events[-1].token_ids.tolist() == ids
    else:
        assert one.text() == expected(attached, ids, count)
    empty = Asked(engine, [], count)
    assert empty.error().code == "empty_prompt"


def test_a_document_beyond_the_limit_is_given_up_on_the_way(attached: Session, engine: Engine) -> None:
    engine.start()
    one = Asked(engine, ids_of(attached, 500), None, max_tokens_read=100)
    assert one.error().code == "context_length_exceeded"
    assert engine.counts.prompt_tokens <= 100


def test_draining_finishes_what_was_accepted(
    attached: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(engine, monkeypatch, 0.001)
    engine.start()
    accepted = [Asked(engine, [5 + n], 40) for n in range(6)]
    idle = threading.Event()
    engine.drain(idle.set)
    with pytest.raises(ApiError) as refused:
        Asked(engine, [5], 4)
    assert refused.value.status == 503
    assert idle.wait(20)
    assert all(one.over.is_set() for one in accepted)
    assert [one.text() for one in accepted] == [expected(attached, [5 + n], 40) for n in range(6)]


def test_closing_tells_those_that_wait(attached: Session, engine: Engine) -> None:
    engine.start()
    reading = Asked(engine, [], 5, feed=Feed())
    engine.close()
    assert reading.error().status == 503


def test_nobody_waits_for_an_engine_that_has_stopped(
    attached: Session, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Asked(engine, [5, 6], 4)
    monkeypatch.setattr(engine, "_drop_given_up", lambda: 1 / 0)
    engine.start()
    assert waits.error().status == 503
    with pytest.raises(ApiError, match="shutting down"):
        Asked(engine, [5, 6], 4)
    engine.close()
    assert not engine.is_alive


def test_conversations_stay_within_their_memory(attached: Session) -> None:
    cache = attached.slots.new_cache()
    list(stream(attached.model, torch.tensor([[5]]), cache, max_new_tokens=2))
    engine = Engine(attached, max_batch=4, max_queue=9, conversation_nbytes=3 * cache.nbytes)
    engine.start()
    for n in range(5):
        Asked(engine, [5 + n], 4, layout=Layout("t", [5 + n])).text()
    engine.close()
    assert len(engine.conversations) == 3
    assert engine.conversations.nbytes == 3 * cache.nbytes


def test_models_with_sliding_layers_are_answered_row_by_row() -> None:
    tokenizer = tokenizer_of(WORDS)
    settings = FAMILIES["gemma3"].settings | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**settings)).eval()
    with attach(model, "h2o", num_slots=32, chunk_size=16) as slots:
        session = Session(model, tokenizer, slots, Prompt.of(tokenizer))
        engine = Engine(session, max_batch=4, max_queue=4, conversation_nbytes=1 << 30)
        asked = [Asked(engine, ids_of(session, n, seed=n), 30) for n in (5, 60, 90)]
        engine.start()
        for one in asked:
            assert one.text() == expected(session, one.ids, 30)
        engine.close()


def test_layers_may_have_different_numbers_of_slots(tmp_path_factory: pytest.TempPathFactory) -> None:
    from lococo.models import load_model

    model, tokenizer = load_model(save_llama(tmp_path_factory.mktemp("models") / "two", seed=3))
    with attach(model, "h2o+mass-merge", slots_per_layer=[20, 44], chunk_size=16) as slots:
        session = Session(model, tokenizer, slots, Prompt.of(tokenizer))
        engine = Engine(session, max_batch=4, max_queue=4, conversation_nbytes=0)
        asked = [Asked(engine, ids_of(session, n, seed=n), 40) for n in (5, 60, 90, 33)]
        engine.start()
        for one in asked:
            assert one.text() == expected(session, one.ids, 40)
        engine.close()
