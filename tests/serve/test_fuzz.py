"""Hundreds of odd requests, or thousands: whatever comes, it is the client's mistake and never the server's."""

import json
import os
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import Running, running

from lococo.session import Session

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 3, 0.5, -0.0, 1e300, 10**30, "", "x", "NaN", "\u0000", "\ud800", "狐狸" * 20, [], [[]],
    [None], ["a", 1], {}, {"a": None}, {"role": "user"}, [{"role": "user", "content": "Hi"}],
]  # fmt: skip
FIELDS = [
    "messages", "prompt", "model", "stream", "stream_options", "temperature", "top_p", "seed", "stop", "max_tokens",
    "max_completion_tokens", "n", "logprobs", "top_logprobs", "context_id", "tools", "response_format", "echo",
    "suffix", "best_of", "presence_penalty", "logit_bias", "text", "name", "unknown",
]  # fmt: skip
BODIES = int(os.environ.get("LOCOCO_FUZZED_BODIES", 400))
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/contexts"]


@pytest.fixture(scope="module")
def terse(attached: Session, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose longest answers are short, since some of these requests ask for the longest."""
    with running(attached, tmp_path_factory.mktemp("contexts"), max_new_tokens=16) as one:
        yield one


@pytest.fixture
def client(terse: Running) -> Iterator[httpx.Client]:
    with terse.client() as one:
        yield one


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


def form(draw: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a form as httpx sends it: files and fields, some of them odd."""
    names = ["a.txt", "a.html", "a.PDF", "", "../a", "a\\b.txt", "狐.md", "a" * 300, "\r\nX: y"]
    contents = [b"", b"one two", b"\0", b"\xff\xfe", b"%PDF-1.4", b"<p>one</p>", b"PK\3\4", draw.randbytes(40)]
    file = (draw.choice(names), draw.choice(contents), draw.choice(["text/plain", "", "multipart/form-data"]))
    field = draw.choice(["file", "file", "file", "files", ""])
    fields = {draw.choice(["stream", "name", "file", ""]): draw.choice(["true", "", "NaN", "x" * 99, "狐"])}
    return {field: file}, fields if draw.random() < 0.5 else {}


def answered(client: httpx.Client, draw: random.Random) -> int:
    """Send something odd; return the status, once the answer was found to be the client's fault or none."""
    path = draw.choice(PATHS)
    kind = "application/json" if draw.random() < 0.95 else draw.choice(["text/plain", "application/json; charset=x"])
    sent: dict[str, Any] = {"content": body(draw, path), "headers": {"Content-Type": kind}}
    if draw.random() < 0.1:
        files, fields = form(draw)
        sent = {"files": files, "data": fields}
    answer = client.post(path, **sent, timeout=20)
    assert answer.status_code < 500, (path, sent)
    if answer.status_code >= 400:
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}, (path, sent)
    if answer.headers["content-type"].startswith("text/event-stream"):
        last = [line for line in answer.text.split("\n\n") if line][-1].removeprefix("data: ")
        assert last == "[DONE]" or json.loads(last)["error"]["type"] != "server_error", (path, sent)
    return answer.status_code


@pytest.mark.parametrize("seed", range(BODIES // 100))
def test_odd_bodies_never_fail_the_server(seed: int, client: httpx.Client) -> None:
    draw = random.Random(seed)
    statuses = [answered(client, draw) for _ in range(100)]
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
