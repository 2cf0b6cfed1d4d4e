"""What the server answers, for the API's description. Nothing is made from these; tests hold answers against them."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field


class Reply(BaseModel):
    """What is described is all there is."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Error(Reply):
    """Why a request was not answered."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Any answer other than the one asked for, in OpenAI's shape."""

    error: Error


class Health(Reply):
    """Whether requests are taken."""

    status: Literal["ok", "draining", "failed"]
    version: str


class Model(Reply):
    """The model, and how it is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    slots: int | None
    chunk_size: int
    max_new_tokens: int
    compressor: str


class Models(Reply):
    """The one model there is."""

    object: Literal["list"]
    data: list[Model]


class CachedTokens(Reply):
    """Of the prompt, not read anew."""

    cached_tokens: int


class Counts(Reply):
    """OpenAI's counts, and what the slots hold."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    seen: int
    slots: int
    kv_nbytes: int
    full_kv_nbytes: int


class Token(Reply):
    """A token and its likelihood."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenToken(Token):
    """One of the answer, and what else it might have been."""

    top_logprobs: list[Token]


class ChatLikelihoods(Reply):
    """Of all tokens of an answer."""

    content: list[ChosenToken]
    refusal: None


class ChatReply(Reply):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Reply):
    """An answer in a conversation."""

    index: Literal[0]
    message: ChatReply
    logprobs: ChatLikelihoods | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(Reply):
    """Answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice] = Field(min_length=1, max_length=1)
    usage: Counts


class TextLikelihoods(Reply):
    """Of all tokens of a text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Reply):
    """What follows a prompt."""

    index: Literal[0]
    text: str
    logprobs: TextLikelihoods | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(Reply):
    """Answer of POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice] = Field(min_length=1, max_length=1)
    usage: Counts


class Context(Reply):
    """A document that was read."""

    object: Literal["context"]
    id: str = Field(pattern="^ctx_[0-9a-f]{32}$")
    name: str
    created: int
    used: int
    tokens: int
    nbytes: int


class Contexts(Reply):
    """All of one key, the latest first."""

    object: Literal["list"]
    data: list[Context]


class Deleted(Reply):
    """A document that was forgotten."""

    id: str
    object: Literal["context.deleted"]
    deleted: Literal[True]


class Layer(Reply):
    """Which token each slot of a layer is, per head, and the share kept of each part of the text."""

    layer: int
    slots: int
    waiting: int
    token_index: list[list[int]]
    log_mass: list[list[float]]
    shares: list[float]


class Slots(Reply):
    """Which tokens survive, layer by layer."""

    object: Literal["context.slots"]
    id: str
    tokens: int
    layers: list[Layer]


MEANT = {
    400: "Something in the request is wrong, or not supported",
    401: "A key is missing or unknown",
    403: "The request is from a page of another site, or names a foreign host",
    404: "There is no such thing",
    408: "The body came too slowly",
    410: "The context's file is damaged",
    413: "The body is too large",
    415: "The body is neither JSON nor a form",
    429: "Too many requests; see Retry-After",
    500: "The server failed",
    503: "The server is shutting down, or its index of contexts is in use",
    504: "It took too long",
    507: "No room is left for contexts",
}
EVERYWHERE = (400, 401, 403, 408, 413, 429, 500)
Described = dict[int | str, dict[str, Any]]


def told(*statuses: int) -> Described:
    """Describe the errors of a route: those of all routes, and these."""
    return {status: {"model": ErrorReply, "description": MEANT[status]} for status in (*EVERYWHERE, *statuses)}


def done(reply: type[Reply], *, status: int = 200, streams: bool = False, **more: Any) -> Described:
    """Describe the success of a route.

    Args:
        reply: Its body.
        status: Of HTTP.
        streams: Whether it comes as events, with status 200, where a client asks for that.
        **more: Other parts of the description.
    """
    found: Described = {status: {"model": reply, "description": "Done", **more}}
    if streams:
        found.setdefault(200, {"description": "Done, event by event"})["content"] = {"text/event-stream": {}}
    return found


def described(app: FastAPI, *, locked: bool) -> dict[str, Any]:
    """Return the OpenAPI description of an application.

    Args:
        app: Has the routes.
        locked: Whether it asks for keys.
    """
    found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    # FastAPI describes faults in a request as it would answer them; here they are 400, in OpenAI's shape.
    for methods in found["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
    parts: dict[str, Any] = found["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    if locked:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
