"""Flags of `lococo serve`."""

from pathlib import Path

import pytest
from commands import refused

from lococo.serve.options import ServerOptions, is_loopback


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


def test_keys_that_are_missing_are_told_in_one_line(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", tiny, "--num-slots", "32", "--chunk-size", "16", "--contexts", str(tmp_path / "c")]
    assert "expected one API key per line" in refused(["serve", *flags, "--api-keys", str(tmp_path / "no")], capsys)


def test_names_of_this_machine() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "", "localhost.example.org", "127.0.0.1.example"]))
    assert ServerOptions(host="0.0.0.0", api_keys="keys").host == "0.0.0.0"
