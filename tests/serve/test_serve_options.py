"""Flags of `lococo serve`."""

import socket
from pathlib import Path

import pytest
from commands import refused

from lococo.serve.options import ServerOptions, is_loopback
from lococo.serve.server import bound, url_of


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
def test_a_mistake_is_told_in_one_line(flags: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert line in refused(["serve", *flags], capsys)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--api-keys", "none.txt"], "none.txt: no such file; expected one API key per line"),
        (["--host", "no.such.host.invalid", "--api-keys", "keys.txt"], "no.such.host.invalid, port 8000, cannot be"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(
    flags: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("keys.txt").write_text("k" * 32)
    assert line in refused(["serve", "--model", "/no/model", *flags], capsys)


def test_an_address_that_is_taken_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refused(["serve", "--model", "/no/model", "--port", port], capsys)
    assert f"127.0.0.1, port {port}, cannot be listened on (Address already in use); choose others" in said


def test_a_folder_that_holds_no_contexts_is_told_in_one_line(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.sqlite3").write_bytes(b"not a database at all" * 99)
    flags = ["--model", tiny, "--num-slots", "32", "--chunk-size", "16", "--port", "0", "--contexts", str(tmp_path)]
    capsys.readouterr()
    assert "index.sqlite3 cannot be used (file is not a database); name another folder" in refused(
        ["serve", *flags], capsys
    )


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_addresses_as_urls() -> None:
    with bound(ServerOptions(port=0)) as line:
        assert url_of(line) == f"http://127.0.0.1:{line.getsockname()[1]}"
    with bound(ServerOptions(host="[::1]", port=0)) as line:
        assert url_of(line) == f"http://[::1]:{line.getsockname()[1]}"


def test_names_of_this_machine() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "", "localhost.example.org", "127.0.0.1.example"]))
    assert ServerOptions(host="0.0.0.0", api_keys="keys").host == "0.0.0.0"
