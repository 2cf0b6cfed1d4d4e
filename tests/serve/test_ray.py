"""Replicas under Ray Serve: one is killed, another answers about its contexts."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from commands import WORDS

ray = pytest.importorskip("ray", reason="no ray, under which replicas would run")
pytest.importorskip("ray.serve", reason="no ray[serve], under which replicas would run")

QUESTION = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "max_tokens": 8}
# Ray leaves sockets and files of its own behind, and speaks of its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def url(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    from lococo.serve.ray import Arguments, app

    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        port = line.getsockname()[1]
    folder = str(tmp_path_factory.mktemp("shared") / "contexts")
    ray.init(num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        how = {"compressor": "mass-merge", "num_slots": 32, "chunk_size": 16, "max_new_tokens": 100, "timeout": 20}
        serve.run(app(Arguments(contexts=folder, model=tiny, min_replicas=2, cpus=0.5, **how)))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as one:
        yield one


def ask(client: httpx.Client, context_id: str, **how: Any) -> httpx.Response:
    return client.post("/v1/chat/completions", json=QUESTION | {"context_id": context_id}, **how)


def test_replicas_share_contexts_and_outlive_each_other(client: httpx.Client) -> None:
    made = client.post("/v1/contexts", json={"text": WORDS * 5})
    assert made.status_code == 201, made.text
    one = made.json()["id"]
    answers = [ask(client, one) for _ in range(30)]
    assert {answer.status_code for answer in answers} == {200}
    # Without a session any replica answers, and all say the same.
    assert len({answer.headers["x-replica"] for answer in answers}) == 2
    said = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert len(said) == 1
    # With one it is the same replica every time.
    session = {"x-session-id": one}
    holders = {ask(client, one, headers=session).headers["x-replica"] for _ in range(10)}
    assert len(holders) == 1
    holder = holders.pop()
    ray.kill(ray.get_actor(holder, namespace="serve"))
    killed = time.monotonic()
    while True:
        try:
            answer = ask(client, one, headers=session)
        except httpx.TransportError:
            continue
        if answer.status_code == 200:
            break
        assert time.monotonic() - killed < 10, answer.text
        time.sleep(0.05)
    assert time.monotonic() - killed < 10
    assert answer.headers["x-replica"] != holder
    assert {answer.json()["choices"][0]["message"]["content"]} == said
    assert [entry["id"] for entry in client.get("/v1/contexts").json()["data"]] == [one]


def test_streams_and_refusals_pass_through(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json=QUESTION | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert len(lines) > 5
    assert client.post("/v1/chat/completions", json={"messages": []}).json()["error"]["param"] == "messages"
    assert client.get("/v1/models", headers={"Host": "elsewhere.example"}).status_code == 403
    assert client.head("/").status_code == 200
