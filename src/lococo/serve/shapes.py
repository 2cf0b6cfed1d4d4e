"""Answers in OpenAI's shapes."""

import json
import secrets
import time
from dataclasses import asdict
from typing import Any

from lococo.serve.jobs import Delta, TokenLikelihood, Usage

DONE = "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def usage_of(usage: Usage) -> dict[str, Any]:
    """Return OpenAI's counts, and after them our own."""
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    own = {name: value for name, value in asdict(usage).items() if not name.endswith("_tokens")}
    return counts | own


class Shape:
    """An answer to one request, whole or in pieces.

    Args:
        kind: "chat" or "text".
        model: Its name.
    """

    def __init__(self, kind: str, model: str) -> None:
        self.chat = kind == "chat"
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.model = model
        self.created = int(time.time())
        self._offset = 0

    def whole(self, deltas: list[Delta], reason: str, usage: Usage) -> dict[str, Any]:
        """Return the answer as one object."""
        text = "".join(delta.text for delta in deltas)
        likelihoods = [one for delta in deltas for one in delta.likelihoods]
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        choice = {"index": 0} | said | {"logprobs": self._likelihoods(likelihoods), "finish_reason": reason}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": [choice], "usage": usage_of(usage)}

    def opening(self) -> dict[str, Any] | None:
        """Return what comes before the first piece."""
        return self._piece({"delta": {"role": "assistant", "content": ""}}, [], None) if self.chat else None

    def piece(self, delta: Delta) -> dict[str, Any]:
        """Return a piece of the answer."""
        said = {"delta": {"content": delta.text}} if self.chat else {"text": delta.text}
        return self._piece(said, delta.likelihoods, None)

    def closing(self, reason: str) -> dict[str, Any]:
        """Return what comes after the last piece."""
        return self._piece({"delta": {}} if self.chat else {"text": ""}, [], reason)

    def counted(self, usage: Usage) -> dict[str, Any]:
        """Return the counts as a piece of their own."""
        return self._head(self._piece_kind) | {"choices": [], "usage": usage_of(usage)}

    @property
    def _piece_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _piece(self, said: dict[str, Any], likelihoods: list[TokenLikelihood], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0} | said | {"logprobs": self._likelihoods(likelihoods), "finish_reason": reason}
        return self._head(self._piece_kind) | {"choices": [choice]}

    def _likelihoods(self, likelihoods: list[TokenLikelihood]) -> dict[str, Any] | None:
        if not likelihoods:
            return None
        if self.chat:
            return {"content": [_entry(one.text, one.logprob) | _others(one) for one in likelihoods], "refusal": None}
        offsets = []
        for one in likelihoods:
            offsets.append(self._offset)
            self._offset += len(one.text)
        return {
            "tokens": [one.text for one in likelihoods],
            "token_logprobs": [one.logprob for one in likelihoods],
            "top_logprobs": [dict(one.others) for one in likelihoods],
            "text_offset": offsets,
        }


def _entry(text: str, logprob: float) -> dict[str, Any]:
    # A token that is part of a character has no text, and so no bytes, of its own.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _others(one: TokenLikelihood) -> dict[str, Any]:
    return {"top_logprobs": [_entry(text, logprob) for text, logprob in one.others]}
