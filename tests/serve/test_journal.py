"""What the log says, and what it never does."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
from servers import running

from lococo.serve.journal import JsonLines
from lococo.session import Session

CHAT = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "max_tokens": 12}


def test_the_log_tells_how_it_went_and_not_what_was_said(
    attached: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("lococo.serve")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logger.level)  # put back at the end
    logger.setLevel(logging.INFO)
    key = "a-secret-key-of-somebody"
    (tmp_path / "keys").write_text(key)
    with running(attached, tmp_path / "contexts", api_keys=str(tmp_path / "keys")) as one, one.client(key) as client:
        said = client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "A secret!"}]})
        made = client.post("/v1/contexts", json={"text": "A secret!", "name": "secret"})
        client.get("/v1/contexts/a-secret")
        monkeypatch.setattr("lococo.serve.reading.prefill", lambda *args: {}["A secret!"])
        assert client.post("/v1/completions", json={"prompt": "A secret!"}).status_code == 500
    text = written.getvalue()
    lines = [json.loads(line) for line in text.splitlines()]
    assert "secret" not in text.lower()
    assert said.json()["choices"][0]["message"]["content"] not in text
    chat = next(line for line in lines if line.get("route") == "/v1/chat/completions")
    assert chat["request"] == said.headers["x-request-id"]
    assert (chat["status"], chat["completion_tokens"], chat["finish_reason"]) == (200, 12, "length")
    assert re.fullmatch("[0-9a-f]{16}", chat["tenant"])
    assert [line["route"] for line in lines if line["event"] == "request"][1:3] == [
        "/v1/contexts",
        "/v1/contexts/{context_id}",
    ]
    fault = next(line for line in lines if line["event"] == "a request failed")
    assert fault["exception"] == "KeyError"
    assert made.json()["id"] not in text
