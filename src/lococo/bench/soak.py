"""Many clients stream answers from a running server for a while, and every answer is held against the one alone.

    lococo serve --max-batch 32
    python -m lococo.bench.soak http://127.0.0.1:8000 --clients 32 --seconds 600 --json soak.json --speedup 3

One client asks every prompt first, which gives the answers that are expected and the speed to compare with. Figures
come as JSON; the exit status is 1 where anything was wrong, too slow, or grew. A key is taken from the variable
OPENAI_API_KEY.
"""

import http.client
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from lococo.atomic import write_atomically
from lococo.documents import demo_text
from lococo.errors import LococoError
from lococo.files import output_file

SAMPLE_SECONDS = 1.0
TIMEOUT = 600.0
MOST_TOLD = 5
PAUSE_SECONDS = 0.2  # after an error, which may come at once and again and again


FAULTS = (OSError, ValueError, KeyError, http.client.HTTPException, LococoError)


@dataclass(frozen=True)
class Answer:
    """What came of a stream.

    Attributes:
        text: All of it.
        tokens: As the server counts them.
        finished: Why it ended.
        seconds: Until its end.
    """

    text: str
    tokens: int
    finished: str
    seconds: float


@dataclass
class Soak:
    """What was seen; the fields are the figures of the JSON.

    Attributes:
        clients: At a time.
        seconds: They went on for.
        answers: Finished and right.
        tokens: Of these.
        wrong: Answers that differ from the one alone.
        errors: Requests without an answer.
        told: The first of what was wrong.
        alone_tokens_per_s: One client, one request at a time.
        tokens_per_s: All clients together.
        speedup: The latter by the former.
        median_s: A request took.
        p95_s: All but one of twenty took no longer than this.
        resident_bytes: The server's memory, once per second.
        growth: Share by which its last quarter lies above its second one.
    """

    clients: int
    seconds: float = 0.0
    answers: int = 0
    tokens: int = 0
    wrong: int = 0
    errors: int = 0
    told: list[str] = field(default_factory=list)
    alone_tokens_per_s: float = 0.0
    tokens_per_s: float = 0.0
    speedup: float = 0.0
    median_s: float = 0.0
    p95_s: float = 0.0
    resident_bytes: list[int] = field(default_factory=list)
    growth: float = 0.0

    def fail(self, error: Exception) -> None:
        """Count an error."""
        self.errors += 1
        self.tell(f"{type(error).__name__}: {error}")

    def tell(self, what: str) -> None:
        """Keep what was wrong, if it is among the first."""
        self.told = [*self.told, what][:MOST_TOLD]


class Client:
    """Asks a server, with nothing but Python's own library.

    Args:
        url: Of the server.
    """

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url).netloc
        key = os.environ.get("OPENAI_API_KEY")
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def resident(self) -> int:
        """Return the memory that the server holds."""
        found = re.search(r"^lococo_resident_bytes (\S+)", self._sent("GET", "/metrics").read().decode(), re.MULTILINE)
        return int(float(found[1])) if found else 0

    def ask(self, prompt: str, tokens: int) -> Answer:
        """Stream a greedy answer.

        Raises:
            LococoError: If the stream is not what it should be.
        """
        begun = time.monotonic()
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text, counted, finished = [], -1, ""
        for event in _events(self._sent("POST", "/v1/chat/completions", json.dumps(body))):
            if "error" in event:
                raise LococoError(f"the stream broke: {event['error']['message']}")
            for choice in event["choices"]:
                text.append(choice["delta"].get("content") or "")
                finished = choice["finish_reason"] or finished
            if "usage" in event:
                counted = event["usage"]["completion_tokens"]
        return Answer("".join(text), counted, finished, time.monotonic() - begun)

    def _sent(self, method: str, path: str, body: str | None = None) -> http.client.HTTPResponse:
        line = http.client.HTTPConnection(self.address, timeout=TIMEOUT)
        line.request(method, path, body, self.headers | {"Connection": "close"})
        answer = line.getresponse()
        if answer.status != 200:
            raise LococoError(f"{method} {path}: status {answer.status}: {answer.read(300).decode(errors='replace')}")
        return answer


def _events(answer: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream, which must end with [DONE]."""
    for line in answer:
        data = line.decode().strip()
        if data == "data: [DONE]":
            return
        if data.startswith("data: "):
            yield json.loads(data.removeprefix("data: "))
    raise LococoError("the stream ended before [DONE]")


def prompts_of(count: int, characters: int) -> list[str]:
    """Return questions about real prose, of eight lengths."""
    text = demo_text()
    return [f"{text[n * 5000 : n * 5000 + characters * (n % 8 + 1) // 8]}\n\nWhat is this about?" for n in range(count)]


def soak(url: str, *, clients: int, seconds: float, prompts: int, characters: int, tokens: int) -> Soak:
    """Ask a server for a while.

    Args:
        url: Of the server.
        clients: At a time.
        seconds: To go on for; answers that are begun are waited for.
        prompts: Different ones.
        characters: Of the longest.
        tokens: The longest answer; they are of four lengths.
    """
    seen = Soak(clients)
    client = Client(url)
    asked = [(prompt, tokens - n % 4 * (tokens // 5)) for n, prompt in enumerate(prompts_of(prompts, characters))]
    begun = time.monotonic()
    alone = [client.ask(*one) for one in asked]
    seen.alone_tokens_per_s = sum(one.tokens for one in alone) / (time.monotonic() - begun)
    took = _together(seen, client, asked, alone, seconds)
    seen.tokens_per_s = seen.tokens / seen.seconds
    seen.speedup = seen.tokens_per_s / seen.alone_tokens_per_s
    if took:
        seen.median_s, seen.p95_s = median(took), sorted(took)[int(0.95 * (len(took) - 1))]
    quarter = len(seen.resident_bytes) // 4
    if quarter:  # the first one fills what is kept ready
        seen.growth = median(seen.resident_bytes[-quarter:]) / median(seen.resident_bytes[quarter : 2 * quarter]) - 1
    return seen


def _together(
    seen: Soak, client: Client, asked: list[tuple[str, int]], alone: list[Answer], seconds: float
) -> list[float]:
    """Let all clients ask until the time is over; return how long each answer took."""
    took: list[float] = []
    lock = threading.Lock()
    begun = time.monotonic()
    over = begun + seconds

    def work(number: int) -> None:
        turn = number
        while time.monotonic() < over:
            which = turn % len(asked)
            turn += 1
            try:
                answer = client.ask(*asked[which])
            except FAULTS as error:
                with lock:
                    seen.fail(error)
                time.sleep(PAUSE_SECONDS)
                continue
            with lock:
                took.append(answer.seconds)
                _count(seen, answer, alone[which])

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(seen.clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        try:
            seen.resident_bytes.append(client.resident())
        except FAULTS as error:
            with lock:
                seen.fail(error)
        time.sleep(min(SAMPLE_SECONDS, seconds / 8))
    seen.seconds = time.monotonic() - begun
    return took


def _count(seen: Soak, answer: Answer, expected: Answer) -> None:
    same = (answer.text, answer.tokens, answer.finished) == (expected.text, expected.tokens, expected.finished)
    if same:
        seen.answers += 1
        seen.tokens += answer.tokens
        return
    seen.wrong += 1
    pairs = zip(answer.text, expected.text, strict=False)
    place = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(answer.text), len(expected.text)))
    said = (
        f"differs at character {place}: {answer.text[place : place + 40]!r} for {expected.text[place : place + 40]!r}"
    )
    seen.tell(said)


def main(
    url: str,
    clients: int = 32,
    seconds: float = 600.0,
    prompts: int = 16,
    characters: int = 800,
    tokens: int = 64,
    speedup: float = 0.0,
    growth: float = 0.1,
    json: str | None = None,
) -> int:
    """Ask a running server for a while, and print what was seen as JSON.

    Args:
        url: Of the server.
        clients: At a time.
        seconds: To go on for.
        prompts: Different ones.
        characters: Of the longest.
        tokens: The longest answer.
        speedup: The least that is right, of all clients together over one.
        growth: The most that is right, of the memory as a share.
        json: File for the figures; they are printed in any case.
    """
    target = None if json is None else output_file(json)
    seen = soak(url, clients=clients, seconds=seconds, prompts=prompts, characters=characters, tokens=tokens)
    text = _dumped(seen)
    print(text)
    if target is not None:
        write_atomically(target, f"{text}\n".encode())
    sound = seen.answers and not seen.errors and not seen.wrong
    return 0 if sound and seen.speedup >= speedup and seen.growth <= growth else 1


def _dumped(seen: Soak) -> str:
    return json.dumps(asdict(seen), ensure_ascii=False)


if __name__ == "__main__":
    from jsonargparse import auto_cli

    sys.exit(auto_cli(main))
