"""The API's own description: answers are as it says, and schemathesis finds no fault with them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import WORDS
from servers import Running, running

from lococo.serve import replies
from lococo.session import Session

KEY = "a-key-of-this-server"
# Per operation; with the variable set, every corner of the schema is looked into beside, which takes half a minute.
EXAMPLES = os.environ.get("LOCOCO_SCHEMATHESIS_EXAMPLES")
PHASES = "fuzzing,stateful" if EXAMPLES is None else "coverage,fuzzing,stateful"
# A schema cannot say that a conversation ends with the user, or that an answer fits the server's limits.
LEFT_OUT = "positive_data_acceptance"
ASKED = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 3, "temperature": 0}


@pytest.fixture
def locked(attached: Session, tmp_path: Path) -> Any:
    (tmp_path / "keys").write_text(KEY)
    with running(attached, tmp_path / "contexts", api_keys=str(tmp_path / "keys"), max_new_tokens=8) as one:
        yield one


def test_answers_are_what_the_description_says(client: httpx.Client) -> None:
    made = client.post("/v1/contexts", json={"text": WORDS * 5})
    place = made.headers["location"]
    likely = {"logprobs": True, "top_logprobs": 2}
    for reply, answer in (
        (replies.Context, made),
        (replies.Health, client.get("/health")),
        (replies.Models, client.get("/v1/models")),
        (replies.Model, client.get("/v1/models/tiny")),
        (replies.ChatCompletion, client.post("/v1/chat/completions", json=ASKED)),
        (replies.ChatCompletion, client.post("/v1/chat/completions", json=ASKED | likely)),
        (replies.TextCompletion, client.post("/v1/completions", json={"prompt": "Who?", "logprobs": 2})),
        (replies.Contexts, client.get("/v1/contexts")),
        (replies.Context, client.get(place)),
        (replies.Slots, client.get(f"{place}/slots")),
        (replies.Deleted, client.delete(place)),
        (replies.ErrorReply, client.get(place)),
        (replies.ErrorReply, client.put(place)),
    ):
        reply.model_validate_json(answer.content)


def test_the_description_names_what_is_answered(client: httpx.Client, locked: Running) -> None:
    schema = client.get("/openapi.json").json()
    operations = [one for methods in schema["paths"].values() for one in methods.values()]
    assert len(operations) == 11
    for one in operations:
        assert "422" not in one["responses"]
        assert {"400", "401", "413", "429", "500"} <= set(one["responses"])
    answers = schema["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(answers) == {"application/json", "text/event-stream"}
    assert "security" not in schema
    with locked.client() as nobody:
        schema = nobody.get("/openapi.json").json()
    assert schema["security"] == [{"key": []}]
    assert schema["paths"]["/health"]["get"]["security"] == []


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="no schemathesis, which looks for faults")
def test_schemathesis_finds_no_fault(locked: Running, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
    command += [f"{locked.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}", "--seed", "0"]
    command += [
        "--max-examples",
        EXAMPLES or "5",
        "--phases",
        PHASES,
        "--exclude-checks",
        LEFT_OUT,
        "--request-timeout",
        "20",
    ]
    command += ["--no-shrink", "--continue-on-failure", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Tested: 11" in done.stdout
    with locked.client() as client:
        assert client.get("/health").json()["status"] == "ok"
