"""Answers over HTTP, mostly with OpenAI's own client, held against the reader's."""

from collections.abc import Iterator

import httpx
import openai
import pytest
from commands import WORDS
from servers import Running

from lococo.prompts import text_stream
from lococo.reader import stream


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
