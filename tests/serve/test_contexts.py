"""Documents over HTTP: read once, asked often, kept on disk, told apart by tenant."""

import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from commands import WORDS
from servers import Running, events_of, running

from lococo import cli
from lococo.inspect_context import kept_of
from lococo.serve.contexts import STALE_SECONDS, ContextStore
from lococo.serve.failures import ApiError
from lococo.session import Session
from lococo.storage import describe_context

QUESTION = [{"role": "user", "content": "Who?"}]
KEYS = ["first-tenants-key-0001", "second-tenants-key-002"]


def read(client: httpx.Client, text: str = WORDS * 5, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/contexts", json={"text": text} | fields)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def ask(client: httpx.Client, context_id: str, messages: list[dict[str, str]] = QUESTION) -> httpx.Response:
    body = {"context_id": context_id, "messages": messages, "temperature": 0, "max_tokens": 8}
    return client.post("/v1/chat/completions", json=body)


def said(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


def test_asking_a_context_is_asking_the_document(
    client: httpx.Client, tiny: str, book: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = read(client, name="book")
    words = ["run", str(book), "--ask", "Who?", "--model", tiny, "--num-slots", "32", "--chunk-size", "16"]
    # A model is attached once; so the command line loads one of its own.
    assert cli.main([*words, "--max-new-tokens", "8", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert made["tokens"] == expected["tokens"]
    answers = [ask(client, made["id"]) for _ in range(2)]
    assert [said(answer) for answer in answers] == [expected["answer"]] * 2
    usage = answers[0].json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == made["tokens"]
    assert usage["prompt_tokens"] > made["tokens"]


def test_a_conversation_about_a_context_goes_on(client: httpx.Client, served: Running) -> None:
    made = read(client)
    first = said(ask(client, made["id"]))
    before = served.state.engine.counts.prompt_tokens
    more = [*QUESTION, {"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    usage = ask(client, made["id"], more).json()["usage"]
    new = served.session.prompt.question_ids("And then?", after="answer").shape[1] + 1
    assert served.state.engine.counts.prompt_tokens - before == new
    assert usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"] == new
    # Nobody's question is left in the context.
    assert said(ask(client, made["id"])) == first


@pytest.mark.parametrize(("name", "body"), [("a.txt", WORDS * 5), ("a.html", f"<p>{WORDS * 5}</p><script>x</script>")])
def test_an_upload_is_read_as_the_file_would_be(name: str, body: str, client: httpx.Client, tmp_path: Path) -> None:
    from lococo.documents import read_text

    (tmp_path / name).write_text(body, "utf-8")
    answer = client.post("/v1/contexts", files={"file": (name, body.encode())})
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/v1/contexts/{answer.json()['id']}"
    assert answer.json()["name"] == name
    assert answer.json()["tokens"] == read(client, "".join(read_text(tmp_path / name)))["tokens"]


@pytest.mark.parametrize("kind", ["json", "form"])
def test_progress_is_told_as_it_is_made(kind: str, client: httpx.Client) -> None:
    if kind == "json":
        answer = client.post("/v1/contexts", json={"text": WORDS * 5, "stream": True})
    else:
        answer = client.post("/v1/contexts", files={"file": ("a.md", WORDS * 5)}, data={"stream": "true"})
    *progress, made = events_of(answer.text)
    tokens = [event["tokens"] for event in progress]
    assert {event["object"] for event in progress} == {"context.progress"}
    assert tokens[0] <= 32 + 16
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == made["tokens"] > 100
    assert made["object"] == "context"


def test_documents_that_cannot_be_read_are_refused(client: httpx.Client) -> None:
    for name, body, part in (
        ("a.txt", b"one \xfa", "a.txt is not UTF-8: byte 0xfa at offset 4"),
        ("a.txt", b"one\0two", "a.txt is binary"),
        ("a.txt", b"  \n", "a.txt is empty"),
        ("a.pdf", b"%PDF-1.4 nothing", "a.pdf is no readable PDF"),
        ("../../etc/passwd", b"\0", "passwd is binary"),
    ):
        answer = client.post("/v1/contexts", files={"file": (name, body)})
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert message.startswith(part)
        assert "lococo-upload" not in message


def test_a_form_says_clearly_whether_to_stream(client: httpx.Client) -> None:
    for said, status in (("true", 200), ("1", 200), ("false", 201), ("", 201), ("yes, please", 400), ("{}", 400)):
        answer = client.post("/v1/contexts", files={"file": ("a.md", WORDS)}, data={"stream": said})
        assert answer.status_code == status, said


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{}", "application/json", 400),
        (b'{"text": ""}', "application/json", 400),
        (b'{"text": "\xff"}', "application/json", 400),
        (b'{"text": "\\ud800"}', "application/json", 400),
        (b'{"text": 3}', "application/json", 400),
        (b'{"text": "x", "stream": "yes"}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"x", "text/plain", 415),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
    ],
)
def test_bodies_that_are_none_are_refused(content: bytes, kind: str, status: int, client: httpx.Client) -> None:
    answer = client.post("/v1/contexts", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_contexts_are_listed_and_forgotten(client: httpx.Client, served: Running) -> None:
    first, second = read(client, name="one"), read(client, name="two")
    listed = client.get("/v1/contexts").json()["data"]
    assert [one["id"] for one in listed][:2] == [second["id"], first["id"]]
    assert client.get(f"/v1/contexts/{first['id']}").json() == first
    path = served.state.store.folder / f"{first['id']}.safetensors"
    assert path.stat().st_size == first["nbytes"]
    assert client.delete(f"/v1/contexts/{first['id']}").json()["deleted"] is True
    assert not path.exists()
    for answer in (client.get(f"/v1/contexts/{first['id']}"), client.delete(f"/v1/contexts/{first['id']}")):
        assert answer.status_code == 404
    assert ask(client, first["id"]).status_code == 404


@pytest.mark.parametrize(
    "name",
    ["..", "../index", "..%2f..%2fetc%2fpasswd", "ctx_" + "A" * 32, "ctx_" + "0" * 31 + "%0a", "index.sqlite3", "%00"],
)
def test_ids_lead_nowhere_else(name: str, client: httpx.Client, served: Running) -> None:
    before = sorted(served.state.store.folder.iterdir())
    for answer in (
        client.get(f"/v1/contexts/{name}/slots"),
        client.delete(f"/v1/contexts/{name}"),
        ask(client, name),
    ):
        assert answer.status_code in (404, 405)
    assert sorted(served.state.store.folder.iterdir()) == before


def test_the_slots_of_a_context_are_shown(client: httpx.Client, served: Running) -> None:
    made = read(client)
    shown = client.get(f"/v1/contexts/{made['id']}/slots", params={"bins": 10}).json()
    kept = kept_of(served.state.store.load("local", made["id"]))
    assert shown["tokens"] == made["tokens"]
    for layer, expected in zip(shown["layers"], kept, strict=True):
        assert layer["token_index"] == expected.token_index
        assert layer["slots"] == 32
        assert layer["shares"] == expected.shares(made["tokens"], 10)
    assert client.get(f"/v1/contexts/{made['id']}/slots", params={"bins": 0}).status_code == 400


def test_contexts_outlive_the_server(attached: Session, tmp_path: Path) -> None:
    with running(attached, tmp_path) as one, one.client() as client:
        made = read(client, name="book")
        first = said(ask(client, made["id"]))
    assert describe_context(tmp_path / f"{made['id']}.safetensors").tokens == made["tokens"]
    with running(attached, tmp_path, memory_mib=0) as one, one.client() as client:
        assert client.get("/v1/contexts").json()["data"][0] == made | {
            "used": client.get(f"/v1/contexts/{made['id']}").json()["used"]
        }
        assert said(ask(client, made["id"])) == first
        (tmp_path / f"{made['id']}.safetensors").write_bytes(b"noise")
        damaged = ask(client, made["id"])
        assert damaged.status_code == 410
        assert str(tmp_path) not in damaged.text
        assert client.get("/v1/contexts").json()["data"] == []


def test_a_tenant_sees_nothing_of_another(attached: Session, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# two\n" + "\n".join(KEYS))
    with running(attached, tmp_path / "contexts", api_keys=str(keys)) as one:
        with one.client(KEYS[0]) as first, one.client(KEYS[1]) as second, one.client() as nobody:
            made = read(first)
            place = f"/v1/contexts/{made['id']}"
            assert [len(client.get("/v1/contexts").json()["data"]) for client in (first, second)] == [1, 0]
            for answer in (
                second.get(place),
                second.get(f"{place}/slots"),
                second.delete(place),
                ask(second, made["id"]),
            ):
                assert answer.status_code == 404
            for answer in (nobody.get(place), nobody.get("/metrics"), ask(nobody, made["id"])):
                assert answer.status_code == 401
            answer = said(ask(first, made["id"]))
            more = [*QUESTION, {"role": "assistant", "content": answer}, *QUESTION]
            # What the first one said, the second one's prompts do not go on from.
            plain = [
                client.post("/v1/chat/completions", json={"messages": QUESTION, "temperature": 0, "max_tokens": 4})
                for client in (first, second)
            ]
            assert said(plain[0]) == said(plain[1])
            more[1]["content"] = said(plain[0])
            counts = []
            for client in (first, second):
                body = {"messages": more, "temperature": 0, "max_tokens": 1}
                client.delete(place) if client is second else None
                counts.append(
                    client.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens_details"][
                        "cached_tokens"
                    ]
                )
            assert counts[0] == counts[1] > 0  # each from its own
        assert not any(
            key in path.read_bytes().decode("latin-1") for key in KEYS for path in (tmp_path / "contexts").iterdir()
        )


def test_an_index_that_others_lock_is_waited_for(
    attached: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lococo.serve.contexts.LOCK_SECONDS", 0.5)
    with running(attached, tmp_path, shared=True) as one, one.client() as client:
        made = read(client)
        other = sqlite3.connect(tmp_path / "index.sqlite3", check_same_thread=False, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        for answer in (
            client.get("/v1/contexts"),
            ask(client, made["id"]),
            client.delete(f"/v1/contexts/{made['id']}"),
            client.post("/v1/contexts", json={"text": WORDS}),
        ):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "index_busy")
            assert answer.headers["retry-after"] == "1"
        threading.Timer(0.2, other.close).start()
        assert client.get("/v1/contexts").json()["data"][0]["id"] == made["id"]
        assert len(list(tmp_path.glob("*.safetensors"))) == 1


class TestStore:
    """Without a server around it."""

    @pytest.fixture(autouse=True)
    def opened(self) -> Iterator[None]:
        self.stores: list[ContextStore] = []
        yield
        for store in self.stores:
            store.close()

    def store(self, session: Session, folder: Path, **how: Any) -> ContextStore:
        self.stores.append(ContextStore(folder, session, budget=1 << 30, memory=1 << 30, **how))
        return self.stores[-1]

    def add(self, store: ContextStore, tenant: str = "t") -> str:
        cache = store.session.slots.new_cache()
        ids = list(range(2, 90))
        from lococo.reader import prefill

        prefill(store.session.model, [ids], cache)
        return store.add(tenant, "x", cache, ids).id

    def test_those_unused_for_longest_make_room(self, attached: Session, tmp_path: Path) -> None:
        store = self.store(attached, tmp_path)
        ids = [self.add(store)]
        size = store.totals()[1]
        store.budget = 3 * size + 100
        ids += [self.add(store, "u"), self.add(store)]
        store.load("t", ids[0])
        ids.append(self.add(store))
        assert store.totals() == (3, 3 * size)
        assert {one.id for one in store.all_of("t")} == {ids[0], ids[2], ids[3]}
        assert {path.stem for path in tmp_path.glob("*.safetensors")} == {ids[0], ids[2], ids[3]}
        store.budget = size - 1
        with pytest.raises(ApiError) as refused:
            self.add(store)
        assert refused.value.status == 507
        assert len(list(tmp_path.glob("*.safetensors"))) == 3

    def test_what_a_killed_process_left_is_swept_up(self, attached: Session, tmp_path: Path) -> None:
        store = self.store(attached, tmp_path)
        kept, lost = self.add(store), self.add(store)
        (tmp_path / f"{lost}.safetensors").unlink()
        old, fresh, foreign = f"ctx_{'a' * 32}.safetensors", f".ctx_{'b' * 32}.safetensors.x1", "mine.txt"
        for name in (old, fresh, foreign):
            (tmp_path / name).write_bytes(b"x")
        for name in (old, foreign):
            os.utime(tmp_path / name, (1, 1))
        again = self.store(attached, tmp_path)
        assert [one.id for one in again.all_of("t")] == [kept]
        assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("index")} == {
            f"{kept}.safetensors",
            fresh,
            foreign,
        }
        os.utime(tmp_path / fresh, (0, 0))
        assert STALE_SECONDS > 60
        self.store(attached, tmp_path)
        assert not (tmp_path / fresh).exists()

    def test_a_full_disk_leaves_nothing(
        self, attached: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self.store(attached, tmp_path)
        monkeypatch.setattr(os, "fsync", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(ApiError, match="free some space"):
            self.add(store)
        assert store.totals() == (0, 0)
        assert [path for path in tmp_path.iterdir() if not path.name.startswith("index")] == []

    def test_servers_share_a_folder(self, attached: Session, tmp_path: Path) -> None:
        stores = [self.store(attached, tmp_path, shared=True) for _ in range(3)]

        def work(number: int) -> list[str]:
            ids = [self.add(stores[number]) for _ in range(8)]
            for one in ids[::2]:
                stores[(number + 1) % 3].load("t", one)
                stores[(number + 2) % 3].delete("t", one)
            return ids[1::2]

        with ThreadPoolExecutor(3) as threads:
            kept = {one for ids in threads.map(work, range(3)) for one in ids}
        assert [{one.id for one in store.all_of("t")} for store in stores] == [kept] * 3
        assert len(list(tmp_path.glob("*.safetensors"))) == len(kept) == 12
        # What one has forgotten, another does not answer from memory.
        gone = kept.pop()
        stores[0].load("t", gone)
        stores[1].delete("t", gone)
        with pytest.raises(ApiError, match="no such context"):
            stores[0].load("t", gone)
        assert not list(tmp_path.glob("index*-wal"))

    def test_ids_are_random(self, attached: Session, tmp_path: Path) -> None:
        store = self.store(attached, tmp_path)
        ids = {self.add(store) for _ in range(5)}
        assert len(ids) == 5
        assert all(re.fullmatch("ctx_[0-9a-f]{32}", one) for one in ids)

    def test_contexts_of_other_settings_stay_unseen(
        self, attached: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = self.add(self.store(attached, tmp_path))
        with monkeypatch.context() as patch:
            patch.setattr(attached.slots, "chunk_size", 8)
            assert self.store(attached, tmp_path).all_of("t") == []
        assert [one.id for one in self.store(attached, tmp_path).all_of("t")] == [made]
