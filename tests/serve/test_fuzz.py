"""Hundreds of odd requests: whatever comes, it is the client's mistake and never the server's."""

import json
import random
from typing import Any

import httpx
import pytest

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e300, 10**30, "", "x", "NaN", "\u0000", "\ud800", "狐狸" * 20, [], [[]],
    [None], ["a", 1], {}, {"a": None}, {"role": "user"}, [{"role": "user", "content": "Hi"}],
]  # fmt: skip
FIELDS = [
    "messages", "prompt", "model", "stream", "stream_options", "temperature", "top_p", "seed", "stop", "max_tokens",
    "max_completion_tokens", "n", "logprobs", "top_logprobs", "context_id", "tools", "response_format", "echo",
    "suffix", "best_of", "presence_penalty", "logit_bias", "text", "name", "unknown",
]  # fmt: skip
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/contexts"]


def odd(draw: random.Random, depth: int = 0) -> Any:
    if depth < 3 and draw.random() < 0.2:
        return [odd(draw, depth + 1) for _ in range(draw.randrange(4))]
    if depth < 3 and draw.random() < 0.2:
        return {
            draw.choice([*FIELDS, "role", "content", "type"]): odd(draw, depth + 1) for _ in range(draw.randrange(4))
        }
    return draw.choice(ODD)


def body(draw: random.Random, path: str) -> bytes:
    """Return a sound request of which a few fields are replaced, or anything at all."""
    sound = {"messages": [{"role": "user", "content": "Who?"}], "prompt": "Who?", "text": "Who?", "max_tokens": 2}
    made: Any = sound | {draw.choice(FIELDS): odd(draw) for _ in range(draw.randrange(1, 4))}
    made.setdefault("max_tokens", 2)
    if draw.random() < 0.1:
        made = odd(draw)
    text = json.dumps(made, ensure_ascii=True).encode()
    if draw.random() < 0.15:
        place = draw.randrange(len(text) + 1)
        text = text[:place] + draw.randbytes(draw.randrange(4)) + text[place + draw.randrange(5) :]
    return text


@pytest.mark.parametrize("seed", range(4))
def test_odd_bodies_never_fail_the_server(seed: int, client: httpx.Client) -> None:
    draw = random.Random(seed)
    statuses = []
    for _ in range(100):
        path = draw.choice(PATHS)
        content = body(draw, path)
        answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500, (path, content)
        if answer.status_code >= 400:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}, (path, content)
        statuses.append(answer.status_code)
    # Enough of them get through the checks to mean something.
    assert sum(status < 300 for status in statuses) > 10
    assert sum(status >= 400 for status in statuses) > 10


def test_odd_paths_and_methods_never_fail_the_server(client: httpx.Client) -> None:
    draw = random.Random(5)
    for _ in range(150):
        parts = draw.choices(
            ["v1", "contexts", "models", "..", "%2e%2e", "ctx_", "%00", "slots", "%ff", "a" * 300, ""], k=4
        )
        method = draw.choice(["GET", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "HEAD", "BREW"])
        answer = client.request(
            method, "/" + "/".join(parts), headers={"Content-Type": draw.choice(["a", "text/html"])}
        )
        assert answer.status_code < 500, (method, parts)
        if answer.status_code >= 400 and method != "HEAD":
            assert answer.json()["error"]["message"]


def test_the_server_still_answers(client: httpx.Client) -> None:
    assert client.get("/health").json()["status"] == "ok"
