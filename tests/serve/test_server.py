"""The server's end, clients that go away, and the command itself."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import WORDS
from servers import Running, events_of, running

from lococo.serve import batch
from lococo.session import Session

CHAT = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "max_tokens": 12}


def test_what_was_accepted_is_finished(attached: Session, tmp_path: Path) -> None:
    with running(attached, tmp_path) as one, one.client() as client:
        answers: dict[str, Any] = {}

        def ask(count: int) -> None:
            with one.client() as own:
                answers[str(count)] = own.post(
                    "/v1/chat/completions", json=CHAT | {"max_tokens": count, "stream": count > 1}
                )

        thread = threading.Thread(target=ask, args=(600,))
        thread.start()
        one.until(lambda: len(one.state.engine.batch.answers) == 1)
        client.get("/health")  # keeps a connection open
        one.server.handle_exit(signal.SIGTERM, None)
        late = client.post("/v1/chat/completions", json=CHAT)
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert int(late.headers["retry-after"]) > 0
        assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "draining")
        thread.join()
        assert events_of(answers["600"].text)[-1]["choices"][0]["finish_reason"] == "length"
        one.until(lambda: one.server.should_exit)


def test_a_client_that_goes_away_is_not_answered(served: Running) -> None:
    engine = served.state.engine
    body = CHAT | {"max_tokens": 4000}
    with (
        served.client() as client,
        client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as it,
    ):
        lines = it.iter_lines()
        next(lines)
        served.until(lambda: len(engine.batch.answers) == 1)
    served.until(lambda: not engine.batch.answers)
    with served.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=body, timeout=0.3)
    served.until(lambda: not engine.batch.answers)
    assert engine.counts.completion_tokens < 4000


def test_a_request_that_takes_too_long_is_given_up(
    attached: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = batch.prefill
    monkeypatch.setattr(batch, "prefill", lambda *args: (time.sleep(0.01), fast(*args))[1])
    with running(attached, tmp_path, timeout=0.3) as one, one.client() as client:
        body = CHAT | {"max_tokens": 4000}
        answer = client.post("/v1/chat/completions", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        # A stream has begun with 200; it ends with the error instead of [DONE].
        stream = client.post("/v1/chat/completions", json=body | {"stream": True})
        assert stream.status_code == 200
        *pieces, last = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line]
        assert last["error"]["code"] == "timeout"
        assert sum(bool(piece["choices"][0]["delta"].get("content")) for piece in pieces) > 3


def test_too_many_are_told_to_come_back(attached: Session, tmp_path: Path) -> None:
    with running(attached, tmp_path, max_batch=1, max_queue=1) as one:
        body = CHAT | {"max_tokens": 300}
        with ThreadPoolExecutor(6) as threads, one.client() as client:
            answers = list(threads.map(lambda _: client.post("/v1/chat/completions", json=body), range(6)))
        busy = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in busy)
        assert busy[0].json()["error"]["type"] == "rate_limit_error"


def test_the_command_serves_and_ends_on_a_signal(tiny: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lococo", "serve", "--model", tiny, "--port", "0", "--num-slots", "32"]
    command += ["--chunk-size", "16", "--contexts", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            url = next(found[0] for line in lines if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
                made = client.post("/v1/contexts", json={"text": WORDS * 5}).json()
                answer = client.post("/v1/chat/completions", json=CHAT | {"context_id": made["id"]})
                assert answer.json()["usage"]["completion_tokens"] == 12
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    assert (tmp_path / f"{made['id']}.safetensors").is_file()
