"""What is sent to do harm: requests within requests, bodies that drip, bombs."""

import contextlib
import io
import random
import socket
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator

import httpx
import psutil
import pytest
from commands import WORDS
from servers import Running

from lococo.serve import apart, connection, gate

BODY = b'{"text": "one two three"}'
HEAD = b"POST /v1/contexts HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
HIDDEN = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
CHUNKED = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def talked(served: Running, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Send bytes as they are; return all that comes until the server closes the connection."""
    host, port = served.url.removeprefix("http://").split(":")
    got = []

    def listen() -> None:
        with contextlib.suppress(ConnectionError):
            while more := line.recv(1 << 16):
                got.append(more)

    with socket.create_connection((host, int(port)), timeout=10) as line:
        ear = threading.Thread(target=listen)
        ear.start()
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                line.sendall(piece)
                time.sleep(pause)
        ear.join()
    return b"".join(got)


@pytest.fixture
def told(served: Running) -> Iterator[None]:
    """Nothing that a test sends is read as a document, nor fails the server."""
    text = served.state.metrics.text()
    count = served.state.store.totals()[0]
    yield
    assert served.state.store.totals()[0] == count
    assert text.count(b'status="500"') == served.state.metrics.text().count(b'status="500"')


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 25\r\nContent-Length: 3",
        b"Content-Length: 25, 3",
        b"Content-Length: +25",
        b"Content-Length: -1",
        b"Content-Length: 2 5",
        b"Content-Length: 0x19",
        b"Content-Length : 25",
        b"Content-Length: 25\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 3",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: identity, chunked",
        b"Transfer-Encoding: gzip, chunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding : chunked",
        b"Transfer-Encoding: \x0bchunked",
        b"Content-Length: 25\r\nHost: elsewhere.example",
        b"Content-Length: 25\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b",
        b"Content-Length: 25\r\nX: a\x00b",
        b"Content-Length: 25\r\n\x0b: a",
        b"Content-Length: 25\r\nX: " + b"a" * (1 << 17),
    ],
)
@pytest.mark.parametrize("body", [BODY, CHUNKED], ids=["plain", "chunked"])
def test_a_request_with_two_meanings_is_refused(headers: bytes, body: bytes, served: Running, told: None) -> None:
    got = talked(served, HEAD + headers + b"\r\n\r\n" + body + HIDDEN)
    # One refusal and an end: what hides behind it is not read as a request.
    assert got.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 501 ")), got
    assert got.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in got.lower()


@pytest.mark.parametrize("path", ["chat/completions", "completions", "contexts"])
def test_a_body_that_never_ends_to_open_is_refused(path: str, client: httpx.Client, told: None) -> None:
    for body in (b"[" * 200_000, b'{"messages": ' * 200_000, b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}"):
        answer = client.post(f"/v1/{path}", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text


@pytest.mark.parametrize("size", [b"-1", b"0x5", b"5;" + b"a" * (1 << 17), b"fffffffffffffffffffff", b"", b"1_0"])
def test_a_piece_of_no_length_is_refused(size: bytes, served: Running, told: None) -> None:
    got = talked(served, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\n" + BODY + b"\r\n" + HIDDEN)
    assert got.startswith(b"HTTP/1.1 400 "), got
    assert got.count(b"HTTP/1.1 ") == 1


def test_a_client_that_goes_away_within_its_body_is_no_fault(served: Running, told: None) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(HEAD + b"Content-Length: 25\r\n\r\n" + BODY[:9])
        served.until(lambda: any(one.cycle for one in served.server.server_state.connections))
    served.until(lambda: b'status="499"' in served.state.metrics.text())


def test_a_body_that_drips_is_given_up(served: Running, told: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    monkeypatch.setattr(connection, "SECONDS", 0.3)
    begun = time.monotonic()
    got = talked(served, HEAD + b"Content-Length: 99\r\n\r\n", *[b" "] * 40, pause=0.05)
    assert got.startswith(b"HTTP/1.1 408 "), got
    assert time.monotonic() - begun < 5


def test_a_large_body_that_comes_fast_enough_is_waited_for(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.4)
    text = b'{"text": "' + WORDS.encode() + b'", "x": "' + b"a" * 60_000 + b'"}'
    pieces = [text[start : start + 4096] for start in range(0, len(text), 4096)]
    head = HEAD + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(text)
    got = talked(served, head, *pieces, pause=0.05)
    assert got.startswith(b"HTTP/1.1 201 "), got


def test_headers_that_never_end_are_not_waited_for(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "SECONDS", 0.3)
    for begun in ([], [b"GET / HTTP/1.1\r\n", *[b"X: y\r\n"] * 20]):
        start = time.monotonic()
        assert talked(served, *begun, pause=0.02) == b""
        assert 0.2 < time.monotonic() - start < 5
    # The same after a request that was answered.
    got = talked(served, HIDDEN, b"GET / HTTP/1.1\r\n", pause=0.1)
    assert got.count(b"HTTP/1.1 200 ") == 1


def flate(data: bytes, times: int = 1) -> bytes:
    for _ in range(times):
        data = zlib.compress(data, 9)
    return data


def pdf(content: bytes, filters: str = "/FlateDecode", pages: str = "[3 0 R]") -> bytes:
    """Return a PDF of one page whose content is as given."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Kids {pages}/Count 1>>".encode(),
        b"<</Type/Page/Parent 2 0 R/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>/MediaBox[0 0 9 9]>>",
        f"<</Length {len(content)}/Filter {filters}>>stream\n".encode() + content + b"\nendstream",
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    text, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(text))
        text += f"{number} 0 obj\n".encode() + one + b"\nendobj\n"
    table = b"".join(f"{place:010} 00000 n \n".encode() for place in places)
    end = (
        f"xref\n0 6\n0000000000 65535 f \n{table.decode()}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(text)}\n%%EOF"
    )
    return text + end.encode()


def zip_of(name: str) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"0" * (10 << 20))
    return packed.getvalue()


GOOD = flate(b"BT /F 9 Tf (" + b"one two three " * 9 + b") Tj ET")
MANY = b"(aaaaaaaaaa) Tj\n" * 3_000_000


def test_the_pdf_of_these_tests_is_one(client: httpx.Client) -> None:
    answer = client.post("/v1/contexts", files={"file": ("a.pdf", pdf(GOOD))})
    assert (answer.status_code, answer.json().get("tokens", 0) > 20) == (201, True), answer.text


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("a.pdf", pdf(flate(bytes(300 << 20)))),
        ("a.pdf", pdf(flate(bytes(300 << 20), 2), "[/FlateDecode /FlateDecode]")),
        ("a.pdf", pdf(GOOD, pages="[2 0 R]")),
        ("a.pdf", pdf(GOOD, pages="[" * 20_000 + "]" * 20_000)),
        ("a.pdf", pdf(b"0", "[" + "/ASCIIHexDecode " * 50_000 + "]")),
        ("a.pdf", pdf(GOOD)[:-200]),
        ("a.txt", zip_of("a.txt")),
        ("a.html", zip_of("a.html")),
        ("a.pdf", zip_of("a.pdf")),
        ("a.txt", b"\x1f\x8b" + flate(bytes(10 << 20))),
    ],
    ids=[
        "flate",
        "flate twice",
        "kids in a ring",
        "deep",
        "filters",
        "torn",
        "zip",
        "zip as html",
        "zip as pdf",
        "gzip",
    ],
)
def test_bombs_do_not_go_off(name: str, body: bytes, client: httpx.Client, served: Running, told: None) -> None:
    assert len(body) < 2 << 20
    begun = time.monotonic()
    answer = client.post("/v1/contexts", files={"file": (name, body)})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["code"] == "unreadable"
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("body", ["<div>" * 200_000 + "x", "<a " * 200_000], ids=["deep", "begun"])
def test_what_takes_too_long_to_take_apart_is_refused(
    body: str, client: httpx.Client, served: Running, told: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "CPU_SECONDS", 1)
    begun = time.monotonic()
    answer = client.post("/v1/contexts", files={"file": ("a.html", body.encode())})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("a.html takes more time or memory to read than")
    assert time.monotonic() - begun < 20


def test_what_nobody_waits_for_is_not_taken_apart(served: Running, told: None) -> None:
    body = b"<div>" * 200_000
    with served.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/contexts", files={"file": ("a.html", body)}, timeout=2)
    served.until(lambda: not any(thread.name == "lococo-reader" for thread in threading.enumerate()))
    assert psutil.Process().children() == []


def test_invalid_utf8_is_refused_wherever_it_is(client: httpx.Client, told: None) -> None:
    draw = random.Random(0)
    for _ in range(30):
        bad = draw.choice([b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80"])
        answers = [
            client.post(
                "/v1/contexts", content=b'{"text": "' + bad + b'x"}', headers={"Content-Type": "application/json"}
            ),
            client.post("/v1/contexts", files={"file": ("a.txt", b"one " + bad + b" two")}),
            client.post(
                "/v1/chat/completions",
                content=b'{"messages": [{"role": "user", "content": "' + bad + b'y"}]}',
                headers={"Content-Type": "application/json"},
            ),
        ]
        assert [answer.status_code for answer in answers] == [400] * 3, bad
