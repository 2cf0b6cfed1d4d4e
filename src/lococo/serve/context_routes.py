"""Routes of contexts: /v1/contexts."""

import io
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Query, Request
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response, StreamingResponse

from lococo.documents import read_text
from lococo.errors import LococoError
from lococo.serve.alive import kept_alive
from lococo.serve.answer_routes import NO_STORE
from lococo.serve.apart import read_apart
from lococo.serve.contexts import Record
from lococo.serve.failures import ApiError, internal
from lococo.serve.feed import Feed
from lococo.serve.jobs import Held, Progress
from lococo.serve.pending import ClientGone, Pending
from lococo.serve.replies import Context, Contexts, Deleted, Slots, done, told
from lococo.serve.schema import ContextRequest
from lococo.serve.shapes import DONE, event
from lococo.serve.state import State, note, state_of, tenant_of
from lococo.serve.wording import Wording
from lococo.tokenization import encode_stream

router = APIRouter(prefix="/v1/contexts")
SUFFIXES = {".html", ".htm", ".pdf"}  # others are read as text
LONGEST_NAME = 200
YES_OR_NO = {"true": True, "1": True, "false": False, "0": False, "": False}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": ContextRequest.model_json_schema()},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}, "stream": {"type": "boolean"}},
                }
            },
        },
    }
}

PLACE = {"Location": {"description": "Where the context is shown", "schema": {"type": "string"}}}


@dataclass(frozen=True)
class Document:
    """What a client wants to be read.

    Attributes:
        name: For people.
        pieces: Opens it, and yields its text; is told how to find out whether anybody wants it.
        stream: Whether to tell how far the reading has come.
        discard: Deletes what was put aside for it.
    """

    name: str
    pieces: Callable[[Callable[[], bool]], Iterator[str]]
    stream: bool
    discard: Callable[[], None] = lambda: None


@router.post(
    "",
    status_code=201,
    summary="Read a document",
    openapi_extra=BODY,
    responses=done(Context, status=201, streams=True, headers=PLACE) | told(415, 503, 504, 507),
)
async def create(request: Request) -> Response:
    """Read a document into slots, and keep them to be asked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        document = await _from_json(request)
    elif kind == "multipart/form-data":
        document = await _from_form(request)
    else:
        raise ApiError(415, "expected a JSON object with `text`, or a form with `file`", code="bad_content_type")
    state, feed = state_of(request), Feed()
    how = {"timeout": state.options.timeout, "max_tokens_read": state.options.max_prompt_tokens}
    try:
        pending = Pending(state.engine, request, feed, **how)
    except ApiError:
        document.discard()
        raise
    threading.Thread(target=_encode, args=(state, document, feed), name="lococo-reader", daemon=True).start()
    if document.stream:
        pieces = kept_alive(_progress(request, pending, document.name))
        return StreamingResponse(pieces, media_type="text/event-stream", headers=NO_STORE)
    async for record in _read(request, pending, document.name):
        if isinstance(record, Record):
            headers = {"Location": f"/v1/contexts/{record.id}"}
            return JSONResponse(record.to_dict(), 201, headers)
    raise internal()  # events end with Held or an exception


@router.get("", summary="List the documents that were read", responses=done(Contexts) | told(503))
async def listed(request: Request) -> dict[str, Any]:
    """Return all contexts of this key, the latest first."""
    records = await run_in_threadpool(state_of(request).store.all_of, tenant_of(request))
    return {"object": "list", "data": [record.to_dict() for record in records]}


@router.get("/{context_id}", summary="Show one", responses=done(Context) | told(404, 503))
async def one(request: Request, context_id: str) -> dict[str, Any]:
    """Return what the index says about a context."""
    record = await run_in_threadpool(state_of(request).store.get, tenant_of(request), context_id)
    return record.to_dict()


@router.delete("/{context_id}", summary="Forget one", responses=done(Deleted) | told(404, 503))
async def delete(request: Request, context_id: str) -> dict[str, Any]:
    """Delete a context and its file."""
    await run_in_threadpool(state_of(request).store.delete, tenant_of(request), context_id)
    return {"id": context_id, "object": "context.deleted", "deleted": True}


@router.get(
    "/{context_id}/slots",
    summary="Show which tokens survive, layer by layer",
    responses=done(Slots) | told(404, 410, 503),
)
async def slots(request: Request, context_id: str, bins: int = Query(100, ge=1, le=1000)) -> dict[str, Any]:
    """Return the token that each slot is, per layer and head, and the share kept of each part of the text."""
    record, kept = await run_in_threadpool(state_of(request).store.kept, tenant_of(request), context_id)
    return {
        "object": "context.slots",
        "id": record.id,
        "tokens": record.tokens,
        "layers": [
            {
                "layer": layer.layer,
                "slots": len(layer.token_index[0]),
                "waiting": layer.waiting,
                "token_index": layer.token_index,
                "log_mass": layer.log_mass,
                "shares": layer.shares(record.tokens, min(bins, record.tokens)),
            }
            for layer in kept
        ],
    }


async def _from_json(request: Request) -> Document:
    try:
        body = ContextRequest.model_validate_json(await request.body())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"])) or None
        raise ApiError(400, f"{place or 'the body'}: {first['msg']}", code="invalid_body", param=place) from None
    return Document(body.name, lambda wanted: read_text(io.StringIO(body.text)), bool(body.stream))


async def _from_form(request: Request) -> Document:
    async with request.form(max_files=1, max_fields=8) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise ApiError(400, "the form has no file; expected one in the field `file`", code="no_file", param="file")
        stream = YES_OR_NO.get(str(form.get("stream", "")).lower())
        if stream is None:
            raise ApiError(400, "stream is either true or false", code="invalid_body", param="stream")
        name = Path((file.filename or "file").replace("\\", "/")).name[:LONGEST_NAME] or "file"
        path = await run_in_threadpool(_copied, file, Path(name).suffix.lower())
        return Document(
            name,
            lambda wanted: _uploaded(path, name, wanted),
            stream,
            lambda: shutil.rmtree(path.parent, ignore_errors=True),
        )


def _copied(file: UploadFile, suffix: str) -> Path:
    """Copy an upload to a file whose name has no part of the client's but a known suffix."""
    folder = Path(tempfile.mkdtemp(prefix="lococo-upload-"))
    path = folder / ("document" + (suffix if suffix in SUFFIXES else ".txt"))
    try:
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return path


def _uploaded(path: Path, name: str, wanted: Callable[[], bool]) -> Iterator[str]:
    """Yield the text of an upload; in errors it has the name that the client gave it."""
    try:
        yield from read_apart(path, wanted) if path.suffix in SUFFIXES else read_text(path)
    except LococoError as error:
        raise type(error)(str(error).replace(str(path), name)) from None


def _encode(state: State, document: Document, feed: Feed) -> None:
    """Make ids of a document as fast as they are read; in a thread of its own, since a page may take a second."""
    try:
        wording = Wording.of(state.session)
        feed.put(wording.prompt.opening_ids())
        for ids in encode_stream(wording.tokenizer, document.pieces(lambda: not feed.closed)):
            if not feed.put(ids):
                return
        feed.close()
    except Exception as error:  # the engine tells the client
        feed.close(error)
    finally:
        document.discard()


async def _read(request: Request, pending: Pending, name: str) -> AsyncIterator[Progress | Record]:
    """Yield how far the reading has come, and the saved context at its end."""
    state = state_of(request)
    async for happened in pending.events():
        if isinstance(happened, Progress):
            yield happened
        if isinstance(happened, Held):
            record = await run_in_threadpool(
                state.store.add, tenant_of(request), name, happened.cache, happened.token_ids
            )
            note(request, prompt_tokens=record.tokens, nbytes=record.nbytes)
            yield record


async def _progress(request: Request, pending: Pending, name: str) -> AsyncIterator[str]:
    try:
        async for happened in _read(request, pending, name):
            if isinstance(happened, Progress):
                yield event({"object": "context.progress", "tokens": happened.tokens})
            else:
                yield event(happened.to_dict())
        yield DONE
    except ApiError as error:
        note(request, error=error.code)
        yield event(error.body())
    except ClientGone:
        note(request, error="client_gone")
