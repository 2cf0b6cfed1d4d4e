"""Health, figures, logs, pages, and the server's end."""

import base64
import hashlib
import io
import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import WORDS, refused
from prometheus_client.parser import text_string_to_metric_families
from servers import Running, events_of, running

from lococo.serve.journal import JsonLines
from lococo.serve.options import ServerOptions, is_loopback
from lococo.session import Session

CHAT = {"messages": [{"role": "user", "content": "Who?"}], "temperature": 0, "max_tokens": 12}


def figures(client: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        sample.name + "".join(sorted(sample.labels.values())): sample.value
        for family in families
        for sample in family.samples
    }


def test_figures_count_what_was_done(client: httpx.Client, served: Running) -> None:
    before = figures(client)
    usage = client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": WORDS * 2}]})
    prompt = usage.json()["usage"]["prompt_tokens"]
    after = figures(client)
    more = {name: after[name] - before.get(name, 0) for name in after}
    assert more["lococo_prompt_tokens_total"] == prompt
    assert more["lococo_completion_tokens_total"] == 12
    assert more["lococo_steps_total"] == 11
    assert more["lococo_compressions_total"] == (prompt + 11 - 1 - 32) // 16
    assert more["lococo_requests_total/v1/chat/completions200"] == 1
    assert more["lococo_request_seconds_count/v1/chat/completions"] == 1
    assert after["lococo_batch_size"] == after["lococo_queue_length"] == after["lococo_kv_bytes"] == 0
    assert after["lococo_resident_bytes"] > 1 << 20
    assert more["lococo_conversations"] == 1


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
        monkeypatch.setattr("lococo.serve.engine.prefill", lambda *args: {}["A secret!"])
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


class TestEnd:
    def test_what_was_accepted_is_finished(self, attached: Session, tmp_path: Path) -> None:
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

    def test_a_client_that_goes_away_is_not_answered(self, served: Running) -> None:
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

    def test_too_many_are_told_to_come_back(self, attached: Session, tmp_path: Path) -> None:
        with running(attached, tmp_path, max_batch=1, max_queue=1) as one:
            body = CHAT | {"max_tokens": 300}
            with ThreadPoolExecutor(6) as threads, one.client() as client:
                answers = list(threads.map(lambda _: client.post("/v1/chat/completions", json=body), range(6)))
            busy = [answer for answer in answers if answer.status_code == 429]
            assert {answer.status_code for answer in answers} == {200, 429}
            assert all(int(answer.headers["retry-after"]) >= 1 for answer in busy)
            assert busy[0].json()["error"]["type"] == "rate_limit_error"

    def test_the_command_serves_and_ends_on_a_signal(self, tiny: str, tmp_path: Path) -> None:
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


class TestPages:
    def test_a_page_loads_nothing_from_elsewhere(self, client: httpx.Client) -> None:
        for path in ("/", "/docs"):
            answer = client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert not re.search(r"(src|href)=\"(https?:)?//|@import|url\(", answer.text)
            for tag in ("script", "style"):
                for text in re.findall(rf"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL):
                    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                    assert f"'sha256-{digest}'" in policy
            assert not re.search(r" (on\w+|style)=", answer.text)

    def test_everything_on_the_page_has_a_name(self, client: httpx.Client) -> None:
        text = client.get("/").text
        tags: list[tuple[str, dict[str, str | None]]] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))  # type: ignore[method-assign]
        parser.feed(text)
        ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        labelled = {attributes["for"] for tag, attributes in tags if tag == "label"}
        fields = {attributes["id"] for tag, attributes in tags if tag in ("input", "textarea", "select", "meter")}
        assert fields == labelled
        # What the script looks for is there, and what it listens to can be reached with a keyboard.
        assert set(re.findall(r'\$\("([\w-]+)"\)', text)) <= set(ids)
        assert {
            tag for tag, attributes in tags if attributes.get("id") in {"read", "ask", "stop", "anew", "forget"}
        } == {"button"}
        assert 'name="viewport"' in text
        assert "prefers-color-scheme: dark" in text
        assert "<html lang=" in text

    @pytest.mark.skipif(shutil.which("node") is None, reason="no node, which parses the page's script")
    def test_the_script_parses(self, client: httpx.Client, tmp_path: Path) -> None:
        (tmp_path / "page.js").write_text(re.search(r"<script>(.*?)</script>", client.get("/").text, re.DOTALL)[1])
        assert subprocess.run(["node", "--check", str(tmp_path / "page.js")], timeout=30, check=False).returncode == 0

    @pytest.mark.skipif(
        not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")),
        reason="no Chromium, in which the page would be opened",
    )
    def test_the_page_runs_in_a_browser(self, served: Running, tmp_path: Path) -> None:
        browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        command += ["--virtual-time-budget=5000", "--dump-dom", f"{served.url}/"]
        page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        assert "tiny, 32 slots per layer (mass-merge)" in page

    def test_the_api_describes_itself(self, client: httpx.Client) -> None:
        schema = client.get("/openapi.json").json()
        assert {
            "/v1/models",
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/contexts",
            "/v1/contexts/{context_id}",
            "/v1/contexts/{context_id}/slots",
            "/health",
            "/metrics",
        } <= set(schema["paths"])
        assert set(schema["paths"]["/v1/contexts"]["post"]["requestBody"]["content"]) == {
            "application/json",
            "multipart/form-data",
        }
        page = client.get("/docs").text
        assert all(f"POST {path}" in page for path in ("/v1/chat/completions", "/v1/contexts"))


class TestFlags:
    @pytest.mark.parametrize(
        ("flags", "line"),
        [
            (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by other machines"),
            (["--host", "::"], "add --api-keys FILE, or listen on 127.0.0.1"),
            (["--host", "example.org"], "--host example.org can be reached"),
            (["--port", "70000"], "--port must be from 0 to 65535, got 70000"),
            (["--max-batch", "0"], "--max-batch must be at least 1, got 0"),
            (["--timeout", "0"], "--timeout must be a number of seconds above 0"),
            (["--memory-mib", "-1"], "--memory-mib must be at least 0"),
            (["--compressor", "full"], "compressor 'full' grows with every token and cannot be served"),
        ],
    )
    def test_a_mistake_is_told_in_one_line(
        self, flags: list[str], line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert line in refused(["serve", *flags], capsys)

    def test_keys_that_are_missing_are_told_in_one_line(
        self, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        flags = ["--model", tiny, "--num-slots", "32", "--chunk-size", "16", "--contexts", str(tmp_path / "c")]
        assert "expected one API key per line" in refused(["serve", *flags, "--api-keys", str(tmp_path / "no")], capsys)

    def test_names_of_this_machine(self) -> None:
        assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"]))
        assert not any(
            map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "", "localhost.example.org", "127.0.0.1.example"])
        )
        assert ServerOptions(host="0.0.0.0", api_keys="keys").host == "0.0.0.0"
