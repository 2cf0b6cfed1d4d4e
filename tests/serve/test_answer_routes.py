"""Answers over HTTP, mostly with OpenAI's own client, held against the reader's."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
import torch
from commands import WORDS
from servers import Running, events_of

from lococo.prompts import text_stream
from lococo.reader import score, stream


@pytest.fixture
def ai(served: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0, http_client=httpx.Client(trust_env=False)
    ) as client:
        yield client


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def alone(served: Running, text: str, count: int, **how: float) -> str:
    """What the reader answers, one request at a time."""
    session = served.session
    ids = session.prompt.question_ids(text, after="opening")
    tokens = stream(session.model, ids, session.slots.new_cache(), max_new_tokens=count, **how)
    return "".join(text_stream(session.tokenizer, tokens))


def test_the_model_is_listed(ai: openai.OpenAI) -> None:
    models = ai.models.list().data
    assert [model.id for model in models] == ["tiny"]
    assert ai.models.retrieve("tiny").slots == 32
    with pytest.raises(openai.NotFoundError, match="no such model"):
        ai.models.retrieve("other")


def test_an_answer_is_that_of_the_reader(served: Running, ai: openai.OpenAI) -> None:
    text = WORDS * 3
    answer = ai.chat.completions.create(model="tiny", messages=asked(text), temperature=0, max_tokens=40)
    assert answer.choices[0].message.content == alone(served, text, 40)
    assert answer.choices[0].finish_reason == "length"
    prompt = served.session.prompt.question_ids(text, after="opening").shape[1]
    assert answer.usage.prompt_tokens == prompt > 48
    assert answer.usage.completion_tokens == 40
    assert answer.usage.total_tokens == prompt + 40
    assert answer.usage.seen == prompt + 39  # nobody has read the last token
    assert answer.usage.slots == 32
    # 2 layers, keys and values, 2 heads of 8 floats, 32 + 16 entries
    assert answer.usage.kv_nbytes == 2 * 2 * 2 * 8 * 4 * 48
    assert answer.usage.full_kv_nbytes == 2 * 2 * 2 * 8 * 4 * (prompt + 39)


def test_a_stream_is_the_answer_in_pieces(ai: openai.OpenAI, client: httpx.Client) -> None:
    how = {"model": "tiny", "messages": asked("Who?"), "temperature": 0, "max_tokens": 20}
    whole = ai.chat.completions.create(**how)
    pieces = list(ai.chat.completions.create(**how, stream=True, stream_options={"include_usage": True}))
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(one.choices[0].delta.content or "" for one in pieces if one.choices) == (
        whole.choices[0].message.content
    )
    assert len(pieces) > 10
    assert [one.choices[0].finish_reason for one in pieces if one.choices][-2:] == [None, "length"]
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == 20
    assert len({one.id for one in pieces}) == 1
    raw = client.post("/v1/chat/completions", json=how | {"stream": True})
    assert raw.headers["content-type"].startswith("text/event-stream")
    assert all(event["object"] == "chat.completion.chunk" for event in events_of(raw.text))


def test_sixteen_at_a_time_answer_as_each_alone(served: Running, ai: openai.OpenAI) -> None:
    texts = [f"{number} " + WORDS * (number % 6) for number in range(16)]

    def answer(number: int) -> str:
        how = {"temperature": 0, "max_tokens": 30 + 2 * number}
        said = ai.chat.completions.create(model="tiny", messages=asked(texts[number]), **how)
        return str(said.choices[0].message.content)

    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(answer, range(16)))
    assert served.state.engine.counts.largest_batch >= 8
    for number, text in enumerate(texts):
        assert together[number] == alone(served, text, 30 + 2 * number), number


def test_sampled_answers_have_random_numbers_of_their_own(served: Running, ai: openai.OpenAI) -> None:
    def answer(seed: int) -> str:
        how = {"temperature": 1.5, "top_p": 0.9, "max_tokens": 20, "seed": seed}
        return str(ai.chat.completions.create(model="tiny", messages=asked("Who?"), **how).choices[0].message.content)

    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(answer, [1, 2, 1, 3]))
    assert together[0] == together[2] == alone(served, "Who?", 20, temperature=1.5, top_p=0.9, seed=1)
    assert len(set(together)) == 3
    assert answer(-(1 << 40)) == answer(-(1 << 40))


@pytest.mark.parametrize("stream_it", [False, True])
def test_an_answer_ends_before_a_stop_string(stream_it: bool, served: Running, client: httpx.Client) -> None:
    whole = alone(served, "Who?", 40)
    stop = whole[len(whole) // 2 :][:3]
    body = {"messages": asked("Who?"), "temperature": 0, "max_tokens": 40, "stop": ["never said", stop]}
    answer = client.post("/v1/chat/completions", json=body | {"stream": stream_it})
    if stream_it:
        choices = [event["choices"][0] for event in events_of(answer.text)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
    else:
        choices = answer.json()["choices"]
        text = choices[0]["message"]["content"]
    assert text == whole[: whole.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"


def test_likelihoods_are_those_of_the_reader(served: Running, ai: openai.OpenAI) -> None:
    how = {"temperature": 0, "max_tokens": 25, "logprobs": True, "top_logprobs": 3}
    answer = ai.chat.completions.create(model="tiny", messages=asked(WORDS), **how)
    content = answer.choices[0].logprobs.content
    session = served.session
    prompt = session.prompt.question_ids(WORDS, after="opening")
    tokens = list(stream(session.model, prompt, session.slots.new_cache(), max_new_tokens=25))
    read = torch.cat([prompt, torch.tensor([tokens])], 1)
    expected = score(session.model, read, session.slots.new_cache())[0, prompt.shape[1] - 1 :]
    assert [one.logprob for one in content] == pytest.approx(expected.tolist(), abs=2e-4)
    assert [one.token for one in content] == [session.tokenizer.decode([token]) for token in tokens]
    for one in content:
        likelihoods = [other.logprob for other in one.top_logprobs]
        assert len(likelihoods) == 3
        assert likelihoods == sorted(likelihoods, reverse=True)
        assert one.top_logprobs[0].token == one.token


def test_completions_go_on_from_text_or_ids(served: Running, ai: openai.OpenAI) -> None:
    session = served.session
    ids = session.tokenizer(WORDS, return_tensors="pt")["input_ids"]
    tokens = list(stream(session.model, ids, session.slots.new_cache(), max_new_tokens=12))
    expected = "".join(text_stream(session.tokenizer, tokens))
    how = {"model": "tiny", "temperature": 0, "max_tokens": 12}
    for prompt in (WORDS, [WORDS], ids[0].tolist(), ids.tolist()):
        assert ai.completions.create(prompt=prompt, **how).choices[0].text == expected
    pieces = list(ai.completions.create(prompt=WORDS, stream=True, logprobs=2, **how))
    assert "".join(piece.choices[0].text for piece in pieces) == expected
    told = [piece.choices[0].logprobs for piece in pieces if piece.choices[0].logprobs]
    assert [token for one in told for token in one.tokens] == [session.tokenizer.decode([token]) for token in tokens]
    assert all(len(best) <= 2 for one in told for best in one.top_logprobs)
    assert ai.completions.create(model="tiny", prompt="x").usage.completion_tokens == 16


def test_a_conversation_goes_on_from_its_slots(served: Running, ai: openai.OpenAI) -> None:
    session, counts = served.session, served.state.engine.counts
    how = {"model": "tiny", "temperature": 0, "max_tokens": 9}
    questions = ["First: " + WORDS * 2, "Second?", "Third, " + WORDS]
    messages: list[dict[str, str]] = []
    cache, after = session.slots.new_cache(), "opening"
    for turn, question in enumerate(questions):
        before = counts.prompt_tokens
        messages += asked(question)
        answer = ai.chat.completions.create(messages=messages, **how)
        # The same conversation as `lococo chat` has it: what was said stays in the slots.
        ids = session.prompt.question_ids(question, after=after)
        said = "".join(text_stream(session.tokenizer, stream(session.model, ids, cache, max_new_tokens=9)))
        assert answer.choices[0].message.content == said
        unread = 1 if turn else 0  # the last token of the answer before, which was cut off there
        assert counts.prompt_tokens - before == ids.shape[1] + unread
        cached = answer.usage.prompt_tokens_details.cached_tokens
        assert cached == answer.usage.prompt_tokens - ids.shape[1] - unread
        messages.append({"role": "assistant", "content": said})
        after = "answer"
    assert cached > 100


def test_a_conversation_is_told_apart_by_its_tenant_and_what_was_said(served: Running, ai: openai.OpenAI) -> None:
    how = {"model": "tiny", "temperature": 0, "max_tokens": 4}
    said = ai.chat.completions.create(messages=asked("Tell!"), **how).choices[0].message.content
    for answer, hits in ((said, True), (f"{said}!", False)):
        messages = [*asked("Tell!"), {"role": "assistant", "content": answer}, *asked("More!")]
        usage = ai.chat.completions.create(messages=messages, **how).usage
        assert (usage.prompt_tokens_details.cached_tokens > 0) is hits


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"messages": []}, 400, "messages"),
        ({"messages": "Hello"}, 400, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, 400, None),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"temperature": 2.1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 1.5}, 400, "max_tokens"),
        ({"max_tokens": True}, 400, "max_tokens"),
        ({"max_tokens": 10**6}, 400, "max_tokens"),
        ({"n": 2}, 400, "n"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stop": ""}, 400, None),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"model": "gpt-5"}, 404, "model"),
        ({"context_id": "ctx_" + "0" * 32}, 404, None),
    ],
)
def test_a_mistake_is_told_in_openais_shape(
    change: dict[str, Any], status: int, param: str | None, client: httpx.Client
) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": asked("Who?"), "max_tokens": 3} | change)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
    assert param is None or error["param"] == param


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(number: str, client: httpx.Client) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "Who?"}}], "max_tokens": 3, "temperature": {number}}}'
    answer = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in ("temperature", None)


def test_unknown_fields_and_those_that_ask_for_nothing_are_let_through(client: httpx.Client) -> None:
    body = {"messages": asked("Who?"), "max_tokens": 2, "user": "me", "metadata": {"a": [1]}, "tools": [], "n": 1}
    body |= {"presence_penalty": 0, "response_format": {"type": "text"}, "stream_options": None, "stop": None}
    assert client.post("/v1/chat/completions", json=body).status_code == 200


def test_a_prompt_of_nothing_or_of_foreign_tokens_is_refused(client: httpx.Client) -> None:
    for prompt in ("", [], [[]], [10**9], [-1], ["a", "b"]):
        answer = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2})
        assert answer.status_code == 400, prompt
