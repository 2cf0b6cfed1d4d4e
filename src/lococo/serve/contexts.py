"""Documents that were read: one file of slots each, an index of them, and those in use in memory."""

import contextlib
import re
import secrets
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lococo.cache import SlotCache
from lococo.errors import FileFormatError, LococoError
from lococo.inspect_context import Kept, kept_of
from lococo.serve.failures import ApiError, index_busy
from lococo.session import Session
from lococo.storage import load_context, save_context

ID = re.compile(r"ctx_[0-9a-f]{32}")
SUFFIX = ".safetensors"
# A file without a line in the index is what a killed process left, unless it is being written just now.
STALE_SECONDS = 3600.0
LOCK_SECONDS = 20.0  # to wait for another process that writes to the index
SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (
    id TEXT PRIMARY KEY, tenant TEXT NOT NULL, name TEXT NOT NULL, fingerprint TEXT NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL, tokens INTEGER NOT NULL, nbytes INTEGER NOT NULL
)
"""


@dataclass(frozen=True)
class Record:
    """A line of the index.

    Attributes:
        id: Random, `ctx_` and 32 hexadecimal digits.
        name: What the client called the document.
        created: Seconds since 1970.
        used: The same, of the last question.
        tokens: Of the document.
        nbytes: Of its file.
    """

    id: str
    name: str
    created: float
    used: float
    tokens: int
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return it as clients see it."""
        shown = asdict(self) | {"created": int(self.created), "used": int(self.used)}
        return {"object": "context"} | shown


class ContextStore:
    """Contexts of all tenants; every method may be called from any thread.

    Args:
        folder: Holds their files and the index; made if it is missing.
        session: Reads and asks them; those of other models or settings stay on disk, unseen.
        budget: Bytes that all files may take; those unused for longest go first.
        memory: Bytes of contexts that are kept ready.
        shared: Other servers use the folder as well.
    """

    def __init__(self, folder: Path, session: Session, *, budget: int, memory: int, shared: bool = False) -> None:
        self.folder = folder
        self.session = session
        self.budget = budget
        self.memory = memory
        self._lock = threading.RLock()
        self._ready: OrderedDict[str, SlotCache] = OrderedDict()
        self._fingerprint = session.slots.fingerprint()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._index = _opened(folder / "index.sqlite3", shared=shared)
        self._sweep()

    def close(self) -> None:
        """Close the index."""
        with self._lock:
            self._index.close()

    def add(self, tenant: str, name: str, cache: SlotCache, token_ids: Sequence[int]) -> Record:
        """Save a document that was read, and make room for it.

        Raises:
            ApiError: If it does not fit, or cannot be written.
        """
        record_id = f"ctx_{secrets.token_hex(16)}"
        path = self._path(record_id)
        try:
            save_context(path, cache, model=self.session.model, tokenizer=self.session.tokenizer, token_ids=token_ids)
            nbytes = path.stat().st_size
            now = time.time()
            record = Record(record_id, name, now, now, len(token_ids), nbytes)
            with self._lock:
                self._make_room(nbytes)
                row = (record_id, tenant, name, self._fingerprint, now, now, record.tokens, nbytes)
                self._index.execute("INSERT INTO contexts VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
                self._keep_ready(record_id, cache)
        except (OSError, sqlite3.Error) as error:
            path.unlink(missing_ok=True)
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                raise index_busy() from error
            raise ApiError(507, "the context could not be written; free some space", code="storage_full") from error
        except ApiError:
            path.unlink(missing_ok=True)
            raise
        return record

    def all_of(self, tenant: str) -> list[Record]:
        """Return a tenant's contexts, the latest first."""
        with self._lock:
            rows = self._index.execute(
                f"SELECT {FIELDS} FROM contexts WHERE tenant = ? AND fingerprint = ? ORDER BY created DESC",
                (tenant, self._fingerprint),
            ).fetchall()
        return [Record(*row) for row in rows]

    def get(self, tenant: str, context_id: str) -> Record:
        """Return one of a tenant's contexts.

        Raises:
            ApiError: 404 if the tenant has none of that id.
        """
        row = None
        if ID.fullmatch(context_id):
            with self._lock:
                row = self._index.execute(
                    f"SELECT {FIELDS} FROM contexts WHERE id = ? AND tenant = ? AND fingerprint = ?",
                    (context_id, tenant, self._fingerprint),
                ).fetchone()
        if row is None:
            raise ApiError(404, "no such context; list those there are with GET /v1/contexts", code="context_not_found")
        return Record(*row)

    def delete(self, tenant: str, context_id: str) -> None:
        """Forget a context; raises what `get` does."""
        with self._lock:
            self.get(tenant, context_id)
            self._remove(context_id)

    def load(self, tenant: str, context_id: str) -> SlotCache:
        """Return a context's slots, which are shared: fork them before reading on. Raises what `get` does."""
        with self._lock:
            self.get(tenant, context_id)
            self._index.execute("UPDATE contexts SET used = ? WHERE id = ?", (time.time(), context_id))
            if (cache := self._ready.get(context_id)) is None:
                cache = self._loaded(context_id)
            self._keep_ready(context_id, cache)
        return cache

    def kept(self, tenant: str, context_id: str) -> tuple[Record, list[Kept]]:
        """Return which tokens a context keeps; raises what `get` does."""
        record = self.get(tenant, context_id)
        return record, kept_of(self.load(tenant, context_id))

    def totals(self) -> tuple[int, int]:
        """Return how many contexts there are, and their bytes on disk."""
        with self._lock:
            count, nbytes = self._index.execute("SELECT count(*), coalesce(sum(nbytes), 0) FROM contexts").fetchone()
        return int(count), int(nbytes)

    def ready_nbytes(self) -> int:
        """Return the bytes of contexts in memory."""
        with self._lock:
            return sum(cache.nbytes for cache in self._ready.values())

    def _path(self, context_id: str) -> Path:
        assert ID.fullmatch(context_id)  # nothing else may become part of a path
        return self.folder / (context_id + SUFFIX)

    def _loaded(self, context_id: str) -> SlotCache:
        try:
            return load_context(self._path(context_id), self.session.slots, self.session.tokenizer).cache
        except LococoError as error:
            self._remove(context_id)
            raise ApiError(
                410, "the context's file is missing or damaged; read the document again", code="context_damaged"
            ) from error

    def _keep_ready(self, context_id: str, cache: SlotCache) -> None:
        self._ready[context_id] = cache
        self._ready.move_to_end(context_id)
        while self._ready and self.ready_nbytes() > self.memory:
            self._ready.popitem(last=False)

    def _make_room(self, nbytes: int) -> None:
        if nbytes > self.budget:
            raise ApiError(
                507, f"a context takes {nbytes:,} bytes, more than the server keeps in all", code="storage_full"
            )
        _, held = self.totals()
        for context_id, size in self._index.execute("SELECT id, nbytes FROM contexts ORDER BY used").fetchall():
            if held + nbytes <= self.budget:
                return
            self._remove(context_id)
            held -= size

    def _remove(self, context_id: str) -> None:
        self._index.execute("DELETE FROM contexts WHERE id = ?", (context_id,))
        self._ready.pop(context_id, None)
        self._path(context_id).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove lines without a file, and old files without a line."""
        known = {row[0] for row in self._index.execute("SELECT id FROM contexts")}
        there = {path.name.removesuffix(SUFFIX) for path in self._files() if not path.name.startswith(".")}
        for context_id in known - there:
            self._index.execute("DELETE FROM contexts WHERE id = ?", (context_id,))
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                old = time.time() - path.stat().st_mtime > STALE_SECONDS
                if old and path.name.removesuffix(SUFFIX) not in known:
                    path.unlink()

    def _files(self) -> Iterator[Path]:
        """Yield what `add` wrote, and what it left when it was killed; files of others stay out of it."""
        for path in self.folder.iterdir():
            if ID.match(path.name.lstrip(".")):
                yield path


def _opened(path: Path, *, shared: bool) -> sqlite3.Connection:
    """Open an index, or begin one."""
    index = sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False, isolation_level=None)
    try:
        # A write-ahead log wants memory that all processes share, which those on several machines do not.
        index.execute(f"PRAGMA journal_mode={'DELETE' if shared else 'WAL'}")
        index.execute(SCHEMA)
    except sqlite3.Error as error:
        index.close()
        raise FileFormatError(f"{path} cannot be used ({error}); name another folder with --contexts") from error
    return index


FIELDS = "id, name, created, used, tokens, nbytes"
