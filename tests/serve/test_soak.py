"""Many streaming clients for a while, in a few seconds."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from servers import Running, running

from lococo.bench import soak
from lococo.session import Session


@pytest.fixture(scope="module")
def wide(attached: Session, tmp_path_factory: pytest.TempPathFactory) -> Running:
    with running(attached, tmp_path_factory.mktemp("contexts"), max_batch=32, memory_mib=8) as one:
        yield one


def test_all_streams_are_those_of_one_client(wide: Running) -> None:
    before = wide.state.engine.counts.completion_tokens
    seen = soak.soak(wide.url, clients=32, seconds=4, prompts=6, characters=40, tokens=24)
    assert (seen.errors, seen.wrong, seen.told) == (0, 0, [])
    assert seen.answers >= 32
    alone = sum(24 - n % 4 * (24 // 5) for n in range(6))
    # Not a token more or less than was written.
    assert seen.tokens + alone == wide.state.engine.counts.completion_tokens - before
    assert wide.state.engine.counts.largest_batch >= 8
    assert seen.tokens_per_s == pytest.approx(seen.tokens / seen.seconds)
    assert seen.speedup == pytest.approx(seen.tokens_per_s / seen.alone_tokens_per_s)
    assert len(seen.resident_bytes) >= 4
    assert abs(seen.growth) < 0.2
    assert 0 < seen.median_s <= seen.p95_s


def test_what_is_wrong_is_noticed() -> None:
    right = soak.Answer("one two", 2, "length", 1.0)
    seen = soak.Soak(1)
    for wrong in (
        soak.Answer("one twO", 2, "length", 1.0),
        soak.Answer("one two", 3, "length", 1.0),
        soak.Answer("one two", 2, "stop", 1.0),
        soak.Answer("one two two", 2, "length", 1.0),
    ):
        soak._count(seen, wrong, right)
    soak._count(seen, right, right)
    assert (seen.wrong, seen.answers, seen.tokens) == (4, 1, 2)
    assert seen.told[0] == "differs at character 6: 'O' for 'o'"


def test_a_server_that_dies_is_an_error_and_no_end(attached: Session, tmp_path: Path) -> None:
    seen = soak.Soak(2)
    with running(attached, tmp_path) as one:
        client = soak.Client(one.url)
        alone = [client.ask("Who?", 4)]
    begun = time.monotonic()
    assert soak._together(seen, client, [("Who?", 4)], alone, 0.5) == []
    assert time.monotonic() - begun < 10
    assert 2 < seen.errors < 20
    assert "ConnectionRefusedError" in seen.told[0]
    assert (seen.answers, seen.wrong, seen.resident_bytes) == (0, 0, [])


def test_the_command_prints_figures(wide: Running, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lococo.bench.soak", wide.url, "--clients", "3", "--seconds", "0.5"]
    command += ["--prompts", "2", "--characters", "9", "--tokens", "5", "--json", str(tmp_path / "a.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures == json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert figures["clients"] == 3
    assert figures["answers"] >= 3
    for bound in (["--speedup", "1e6"], ["--growth", "-1"]):
        assert subprocess.run([*command, *bound], capture_output=True, check=False).returncode == 1
    wide.state.engine.drain(lambda: None)  # refuses everything from now on
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "status 503" in refused.stderr + refused.stdout
