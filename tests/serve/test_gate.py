"""Who may come in, from where, and with how much."""

import hmac
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import WORDS
from servers import Running, running

from lococo.errors import ArgumentError, DocumentError
from lococo.serve.failures import ApiError
from lococo.serve.gate import SPARE, Gate
from lococo.serve.keys import Keys
from lococo.session import Session

KEY = "a-key-of-this-server"
CHAT = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(attached: Session, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(KEY)
    with running(attached, folder / "contexts", api_keys=str(folder / "keys"), max_body_mib=1) as one:
        yield one


@pytest.mark.parametrize("header", ["", "Bearer", f"Basic {KEY}", f"Bearer {KEY}x", KEY, "Bearer é"])
def test_without_a_key_nothing_is_answered(header: str, locked: Running) -> None:
    with locked.client() as client:
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/v1/contexts"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/nowhere"),
        ):
            answer = client.request(method, path, headers={"Authorization": header.encode()}, json=CHAT)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["code"] == "invalid_api_key"


def test_with_a_key_all_is_answered(locked: Running) -> None:
    with locked.client(KEY) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    with locked.client() as client:
        assert [client.get(path).status_code for path in ("/", "/health", "/docs", "/openapi.json")] == [200] * 4


def test_all_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    whole = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append(a), whole(a, b))[1])
    keys = Keys(["first", "second", "third"])
    tenants = {keys.tenant(f"Bearer {key}") for key in ("first", "second", "third")}
    assert len(tenants) == 3
    with pytest.raises(ApiError, match="expected the header"):
        keys.tenant("Bearer fourth")
    assert len(compared) == 4 * 3
    assert not any("first" in tenant for tenant in tenants)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(DocumentError, match="no such file"):
        Keys.read(path)
    for text, said in (("\n# none\n", "has no API keys"), ("a" * 16 + "\nshort\n", "key 2 has fewer than 16")):
        path.write_text(text)
        with pytest.raises(ArgumentError, match=said):
            Keys.read(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(DocumentError, match="not UTF-8"):
        Keys.read(path)


def test_pages_of_other_sites_are_refused(client: httpx.Client, served: Running) -> None:
    for origin in ("https://elsewhere.example", "null", f"{served.url}.elsewhere.example"):
        answer = client.post("/v1/chat/completions", json=CHAT, headers={"Origin": origin})
        assert answer.json()["error"]["code"] == "foreign_origin"
    assert client.post("/v1/chat/completions", json=CHAT, headers={"Origin": served.url}).status_code == 200
    for host in ("elsewhere.example", "127.0.0.1.elsewhere.example:80", "", "[2001:db8::1]:80"):
        answer = client.get("/v1/models", headers={"Host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_host")
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("path", ["/v1/contexts", "/v1/chat/completions"])
def test_a_body_that_is_too_large(path: str, told: bool, locked: Running) -> None:
    body = b'{"text": "' + b"a" * (1 << 20) + b'"}'
    headers = {"Content-Type": "application/json"}
    content = body if told else iter([body[: 1 << 19], body[1 << 19 :]])  # an iterator is sent without its length
    with locked.client(KEY) as client:
        answer = client.post(path, content=content, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        fits = client.post("/v1/contexts", json={"text": WORDS})
        assert fits.status_code == 201


def test_an_upload_that_is_too_large(locked: Running) -> None:
    with locked.client(KEY) as client:
        answer = client.post("/v1/contexts", files={"file": ("a.txt", b"a" * (1 << 20))})
        assert answer.status_code == 413


def test_a_body_that_never_comes_is_not_waited_for(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lococo.serve.gate.BODY_SECONDS", 0.05)
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            "Content-Length: 99\r\n\r\n{".encode()
        )
        assert b" 408 " in line.recv(1 << 16).splitlines()[0]


def test_there_is_room_for_so_many() -> None:
    full = Gate(app=None, keys=None, max_body=1, max_requests=3)  # type: ignore[arg-type]
    full.inside = 3 + SPARE
    with pytest.raises(ApiError) as refused:
        full._check_room("/v1/models")
    assert refused.value.status == 429
    full._check_room("/health")
    full.inside -= 1
    full._check_room("/v1/models")
