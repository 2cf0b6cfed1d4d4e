"""Killed with SIGKILL under load at random moments: what was acknowledged is there afterwards, and whole."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from commands import WORDS

KILLS = int(os.environ.get("LOCOCO_KILLS", 3))
TEXTS = [f"{number}: " + WORDS * (3 + number) for number in range(4)]


class Server:
    """A process that is started over and over."""

    def __init__(self, nursery: "subprocess.Popen[str]") -> None:
        self.nursery = nursery
        self.pid, self.url = 0, ""

    def start(self) -> None:
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write("\n")
        self.nursery.stdin.flush()
        pid, self.url = self.nursery.stdout.readline().split()
        self.pid = int(pid)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, trust_env=False)


@pytest.fixture
def server(tiny: str, tmp_path: Path) -> Iterator[Server]:
    command = [sys.executable, str(Path(__file__).parent / "server_to_kill.py"), tiny, str(tmp_path / "contexts")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        one = Server(nursery)
        try:
            one.start()
            yield one
        finally:
            if one.pid:
                one.kill()
            nursery.kill()


def ask(client: httpx.Client, context_id: str) -> list[float]:
    """Return how likely the words of the answer are, which no two texts share."""
    body = {"context_id": context_id, "messages": [{"role": "user", "content": "Who?"}], "logprobs": True}
    answer = client.post("/v1/chat/completions", json=body | {"temperature": 0, "max_tokens": 6})
    assert answer.status_code == 200, answer.text
    return [token["logprob"] for token in answer.json()["choices"][0]["logprobs"]["content"]]


def same(one: list[float], other: list[float]) -> bool:
    return one == pytest.approx(other, abs=1e-5)


class Load:
    """Clients that read, ask and forget until the server is gone; they remember what it acknowledged."""

    def __init__(self, seed: int) -> None:
        self.kept: dict[str, int] = {}
        self.unsure: set[str] = set()  # asked to be forgotten, and nobody knows
        self.faults: list[str] = []
        self.requests = 0
        self._draw = random.Random(seed)
        self._lock = threading.Lock()

    def run(self, server: Server, seconds: float) -> None:
        threads = [threading.Thread(target=self._work, args=(server, self._draw.random())) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        server.kill()
        for thread in threads:
            thread.join()

    def _work(self, server: Server, seed: float) -> None:
        draw = random.Random(seed)
        with server.client() as client:
            try:
                while True:
                    self._one(client, draw)
            except httpx.TransportError:
                return
            except Exception as error:
                self.faults.append(repr(error))

    def _one(self, client: httpx.Client, draw: random.Random) -> None:
        number = draw.randrange(len(TEXTS))
        files = {"file": ("a.txt", TEXTS[number].encode())}
        with self._lock:
            self.requests += 1
        if draw.random() < 0.5:
            made = client.post("/v1/contexts", files=files)
        else:
            made = client.post("/v1/contexts", json={"text": TEXTS[number]})
        assert made.status_code == 201, made.text
        with self._lock:
            self.kept[made.json()["id"]] = number
        if draw.random() < 0.4:
            ask(client, made.json()["id"])
        if draw.random() < 0.3:
            with self._lock:
                gone = draw.choice([one for one in self.kept if one not in self.unsure])
                self.unsure.add(gone)
            if client.delete(f"/v1/contexts/{gone}").status_code == 200:
                with self._lock:
                    self.unsure.remove(gone)
                    del self.kept[gone]


def test_what_was_acknowledged_outlives_kills(server: Server, tmp_path: Path) -> None:
    with server.client() as client:
        made = [client.post("/v1/contexts", json={"text": text}).json()["id"] for text in TEXTS]
        expected = [ask(client, one) for one in made]
    assert [same(one, other) for one in expected for other in expected].count(True) == len(TEXTS)
    draw = random.Random(KILLS)
    load = Load(KILLS)
    load.kept |= dict(zip(made, range(len(TEXTS)), strict=True))
    for kill in range(KILLS):
        load.run(server, draw.uniform(0.2, 1.5))
        assert load.faults == []
        server.start()
        with server.client() as client:
            listed = {one["id"] for one in client.get("/v1/contexts").json()["data"]}
            lost = load.kept.keys() - listed - load.unsure
            assert not lost, f"kill {kill}: {lost}"
            # The whole file is read and checked again, since this process has none in memory.
            for one in sorted(listed & load.kept.keys()):
                assert same(ask(client, one), expected[load.kept[one]]), f"kill {kill}: {one}"
            for one in listed - load.kept.keys():  # saved, and killed before it could be told
                assert any(same(ask(client, one), other) for other in expected)
            for one in sorted(load.kept.keys() | listed)[8:]:  # so that the next round is about new ones
                client.delete(f"/v1/contexts/{one}")
                load.kept.pop(one, None)
            load.unsure.clear()
            load.kept = {one: number for one, number in load.kept.items() if one in listed}
    assert load.requests > 3 * KILLS  # there was a load
    server.kill()
    with sqlite3.connect(tmp_path / "contexts" / "index.sqlite3") as index:
        assert index.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    index.close()
