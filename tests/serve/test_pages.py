"""The page for people, and the API's own description."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from servers import Running, running

from lococo.session import Session


def test_a_page_loads_nothing_from_elsewhere(client: httpx.Client) -> None:
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


@pytest.mark.parametrize("path", ["/", "/docs", "/health", "/openapi.json", "/v1/models"])
def test_head_is_get_without_the_body(path: str, client: httpx.Client) -> None:
    whole, head = client.get(path), client.head(path)
    assert head.status_code == whole.status_code == 200
    assert head.content == b""
    for name in ("content-type", "content-length", "content-security-policy"):
        assert head.headers.get(name) == whole.headers.get(name)
    assert client.head("/v1/completions").status_code == 405
    assert client.head("/nowhere").status_code == 404


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/health", "GET, HEAD"),
        ("/v1/completions", "POST"),
        ("/v1/contexts", "GET, HEAD, POST"),
        ("/v1/contexts/x", "DELETE, GET, HEAD"),
        ("/v1/models/a/b", "GET, HEAD"),
    ],
)
def test_a_method_that_is_none_is_told_the_others(path: str, allowed: str, client: httpx.Client) -> None:
    for method in ("TRACE", "PUT", "BREW"):
        answer = client.request(method, path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


def test_everything_on_the_page_has_a_name(client: httpx.Client) -> None:
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
    assert {tag for tag, attributes in tags if attributes.get("id") in {"read", "ask", "stop", "anew", "forget"}} == {
        "button"
    }
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "<html lang=" in text


@pytest.mark.skipif(shutil.which("node") is None, reason="no node, in which the page's script would be run")
def test_the_script_reads_asks_and_shows(attached: Session, tmp_path: Path) -> None:
    script = Path(__file__).parent / "page_in_node.js"
    with running(attached, tmp_path, max_new_tokens=200) as one:
        done = subprocess.run(["node", script, one.url], capture_output=True, text=True, timeout=60, check=False)
        left = one.state.store.totals()[0]
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["model"] == "tiny, 32 slots per layer (mass-merge)"
    assert re.fullmatch(r"[\d,]+ tokens read, [\d,]+ per second", seen["reading"])
    assert seen["contexts"][0] == "nothing: just talk"
    assert seen["contexts"][1].startswith("The quick brown fox jumps over the lazy (")
    tokens = int(re.search(r"\((\d+) tokens\)", seen["contexts"][1])[1])
    assert seen["map"] == f"2 layers keep 32 slots of {tokens} tokens"
    assert [kind for kind, _ in seen["talk"]] == ["asked", "answered"] * 2
    assert [text for kind, text in seen["talk"] if kind == "asked"] == ["Who?", "And then?"]
    assert all(len(text) > 100 for kind, text in seen["talk"] if kind == "answered")
    # The second question went on from the slots of the first answer.
    assert int(seen["cached"].replace(",", "")) > tokens + 190
    assert seen["slots"] == "32"
    assert seen["memory"].startswith("12 KiB, where a full cache would hold ")
    assert seen["share"] == pytest.approx((32 + 16) / int(seen["seen"].replace(",", "")))
    assert seen["stopped"] == "Stopped."
    assert seen["forgotten"] == "No document is chosen"
    assert left == 0


@pytest.mark.skipif(
    not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")),
    reason="no Chromium, in which the page would be opened",
)
def test_the_page_runs_in_a_browser(served: Running, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", f"{served.url}/"]
    page = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "tiny, 32 slots per layer (mass-merge)" in page


def test_the_api_describes_itself(client: httpx.Client) -> None:
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
