"""Routes of answers: /v1/chat/completions, /v1/completions and /v1/models."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse

from lococo.serve.alive import kept_alive
from lococo.serve.failures import ApiError, internal
from lococo.serve.jobs import Delta, Finished, Layout
from lococo.serve.pending import ClientGone, Pending, answering
from lococo.serve.replies import ChatCompletion, Model, Models, TextCompletion, done, told
from lococo.serve.schema import AnyAnswer, ChatRequest, CompletionRequest
from lococo.serve.shapes import DONE, Shape, event
from lococo.serve.state import State, note, state_of, tenant_of

router = APIRouter(prefix="/v1")
ANSWERS = told(404, 503, 504)
NO_STORE = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@router.get("/models", summary="List the model", responses=done(Models) | told())
async def models(request: Request) -> dict[str, Any]:
    """Return the one model there is."""
    return {"object": "list", "data": [_model(state_of(request))]}


@router.get("/models/{model:path}", summary="Show the model", responses=done(Model) | told(404))
async def model(request: Request, model: str) -> dict[str, Any]:
    """Return the model, if that is its name."""
    _check_model(state_of(request), model)
    return _model(state_of(request))


@router.post(
    "/chat/completions",
    summary="Answer a conversation",
    responses=done(ChatCompletion, streams=True) | ANSWERS | told(410),
)
async def chat(request: Request, body: ChatRequest) -> Response:
    """Answer the last message, about a context if one is named."""
    state, tenant = state_of(request), tenant_of(request)
    _check(state, body)
    messages = [message.message() for message in body.messages]
    owner = f"{tenant}\n{body.context_id or ''}"
    base = None
    if body.context_id is None:
        layout = await run_in_threadpool(state.wording.chat, messages, owner)
    else:
        base = await run_in_threadpool(state.store.load, tenant, body.context_id)
        layout = await run_in_threadpool(state.wording.about_context, messages, owner)
    sampling = body.sampling(
        limit=state.options.max_new_tokens,
        wanted=body.max_completion_tokens or body.max_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    pending = answering(
        state.engine,
        request,
        layout,
        sampling,
        timeout=state.options.timeout,
        limit=state.options.max_prompt_tokens,
        goes_on=True,
        base=base,
    )
    return await _answered(request, body, pending, Shape("chat", state.model))


@router.post("/completions", summary="Go on from a prompt", responses=done(TextCompletion, streams=True) | ANSWERS)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Write what follows a prompt."""
    state = state_of(request)
    _check(state, body)
    prompt = body.only_prompt()
    ids = await run_in_threadpool(state.wording.raw, prompt) if isinstance(prompt, str) else prompt
    vocabulary = state.session.model.config.get_text_config(decoder=True).vocab_size
    if not all(0 <= token < vocabulary for token in ids):
        raise ApiError(400, f"token ids are from 0 to {vocabulary - 1}", code="bad_token", param="prompt")
    sampling = body.sampling(
        limit=state.options.max_new_tokens, wanted=body.max_tokens or 16, top_logprobs=body.logprobs
    )
    pending = answering(
        state.engine,
        request,
        Layout(tenant_of(request), ids),
        sampling,
        timeout=state.options.timeout,
        limit=state.options.max_prompt_tokens,
        goes_on=False,
    )
    return await _answered(request, body, pending, Shape("text", state.model))


async def _answered(request: Request, body: AnyAnswer, pending: Pending, shape: Shape) -> Response:
    if body.stream:
        counted = bool(body.stream_options and body.stream_options.include_usage)
        stream = _Streamed(request, pending, shape, counted)
        return StreamingResponse(kept_alive(stream.pieces()), media_type="text/event-stream", headers=NO_STORE)
    deltas: list[Delta] = []
    async for one in pending.events():
        if isinstance(one, Delta):
            deltas.append(one)
        if isinstance(one, Finished):
            _note(request, one)
            return JSONResponse(shape.whole(deltas, one.reason, one.usage))
    raise internal()  # events end with Finished or an exception


@dataclass(frozen=True)
class _Streamed:
    """An answer in server-sent events."""

    request: Request
    pending: Pending
    shape: Shape
    counted: bool

    async def pieces(self) -> AsyncIterator[str]:
        """Yield events until the answer is finished, or an error in OpenAI's shape."""
        try:
            async for one in self._events():
                yield event(one)
            yield DONE
        except ApiError as error:
            note(self.request, error=error.code)
            yield event(error.body())
        except ClientGone:
            note(self.request, error="client_gone")

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        if (opening := self.shape.opening()) is not None:
            yield opening
        async for one in self.pending.events():
            if isinstance(one, Delta):
                yield self.shape.piece(one)
            if isinstance(one, Finished):
                _note(self.request, one)
                yield self.shape.closing(one.reason)
                if self.counted:
                    yield self.shape.counted(one.usage)


def _note(request: Request, finished: Finished) -> None:
    usage = finished.usage
    note(
        request,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        finish_reason=finished.reason,
    )


def _check(state: State, body: AnyAnswer) -> None:
    body.check()
    if body.model is not None:
        _check_model(state, body.model)


def _check_model(state: State, name: str) -> None:
    if name != state.model:
        raise ApiError(
            404,
            "no such model; this server has the one that GET /v1/models lists",
            code="model_not_found",
            param="model",
        )


def _model(state: State) -> dict[str, Any]:
    return {
        "id": state.model,
        "object": "model",
        "created": 0,
        "owned_by": "lococo",
        "slots": state.session.slots.num_slots,
        "chunk_size": state.session.slots.chunk_size,
        "max_new_tokens": state.options.max_new_tokens,
        "compressor": getattr(state.session.slots.compressor, "name", "full"),
    }
