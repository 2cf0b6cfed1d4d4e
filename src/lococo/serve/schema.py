"""What clients send. Unknown fields are let through as OpenAI's server does, wrong types are not."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from lococo.serve.failures import ApiError
from lococo.serve.jobs import Sampling
from lococo.serve.wording import Message

MOST_STOPS = 4
MOST_LOGPROBS = 20


class Strict(BaseModel):
    """Numbers are numbers and never text; NaN and infinity are none."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class TextPart(Strict):
    """A piece of a message; pictures and sounds are refused."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def message(self) -> Message:
        """Return it as the prompt needs it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or [])
        return Message("system" if self.role == "developer" else self.role, text)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[
    Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None,
    BeforeValidator(_listed, json_schema_input_type=Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None),
]


class StreamOptions(Strict):
    """What a stream tells beside the answer."""

    include_usage: bool | None = False


class AnyAnswer(Strict):
    """What both kinds of requests for an answer share."""

    model: str | None = Field(None, description="The one that GET /v1/models lists")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Stops = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: int | None = 1
    presence_penalty: float | None = 0
    frequency_penalty: float | None = 0
    logit_bias: Any = None

    @model_validator(mode="before")
    @classmethod
    def whole_characters(cls, data: Any) -> Any:
        """Refuse halves of surrogate pairs: Python's JSON lets them through, and no tokenizer takes them."""
        if not isinstance(data, dict):
            return data  # it is refused for that
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a character (a lone surrogate)") from None
        return data

    def refused(self) -> dict[str, Any]:
        """Return the fields that would change the answer and are not supported, unless they ask for nothing."""
        return {
            "n": None if self.n == 1 else self.n,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
        }

    def check(self) -> None:
        """Refuse what would be ignored silently otherwise.

        Raises:
            ApiError: Names the field.
        """
        for name, value in self.refused().items():
            if value:
                raise ApiError(400, f"{name} is not supported; leave it out", code="unsupported_parameter", param=name)

    def sampling(self, *, limit: int, wanted: int | None, top_logprobs: int | None) -> Sampling:
        """Return how to answer.

        Args:
            limit: The longest answer that the server writes, tokens.
            wanted: The longest that the client wants.
            top_logprobs: See `Sampling`.

        Raises:
            ApiError: If the client wants more than the server's limit.
        """
        if wanted is not None and wanted > limit:
            raise ApiError(
                400,
                f"answers of up to {limit} tokens are written here, {wanted} were asked for",
                code="max_tokens_too_large",
                param="max_tokens",
            )
        return Sampling(
            max_tokens=wanted or limit,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=None if self.seed is None else self.seed % (1 << 63),
            stop=tuple(self.stop or ()),
            top_logprobs=top_logprobs,
        )


class ChatRequest(AnyAnswer):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    context_id: str | None = Field(None, description="A document that was read with POST /v1/contexts")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: Any = None
    functions: Any = None
    response_format: Any = None

    def refused(self) -> dict[str, Any]:
        """See `AnyAnswer`."""
        text = self.response_format == {"type": "text"}
        own = {"tools": self.tools, "functions": self.functions}
        return super().refused() | own | {"response_format": None if text else self.response_format}


class CompletionRequest(AnyAnswer):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = False
    suffix: str | None = None
    best_of: int | None = None

    def refused(self) -> dict[str, Any]:
        """See `AnyAnswer`."""
        best_of = None if self.best_of == 1 else self.best_of
        return super().refused() | {"echo": self.echo, "suffix": self.suffix, "best_of": best_of}

    def only_prompt(self) -> str | list[int]:
        """Return the prompt.

        Raises:
            ApiError: If there are several, or it is empty.
        """
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ApiError(400, "one prompt at a time, please", code="unsupported_parameter", param="prompt")
            prompt = prompt[0]
        if not prompt:
            raise ApiError(400, "the prompt is empty; expected a text", code="empty_prompt", param="prompt")
        return prompt  # type: ignore[no-any-return]


class ContextRequest(Strict):
    """Body of POST /v1/contexts, if it is JSON."""

    text: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(max_length=200)] = "text"
    stream: bool | None = False
