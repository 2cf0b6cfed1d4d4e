"""Requests as token ids: a conversation through the model's own chat template, a question about a context."""

import copy
import re
import secrets
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lococo.prompts import Prompt
from lococo.serve.failures import ApiError, too_long
from lococo.serve.jobs import Layout
from lococo.session import Session
from lococo.tokenization import encode_stream

LONG_CHARS = 1 << 18


@dataclass(frozen=True)
class Message:
    """One message of a conversation: "system", "user" or "assistant"."""

    role: str
    text: str


@dataclass(frozen=True)
class Part:
    """A piece of a prompt.

    Attributes:
        text: Its text.
        kind: "template" (special tokens count), or the role of whoever said it (they are plain text).
    """

    text: str
    kind: str


@dataclass(frozen=True)
class Wording:
    """Makes ids of text with a tokenizer of its own, since tokenizers carry state from call to call.

    Attributes:
        tokenizer: One call at a time.
        prompt: Its parts around what clients say.
        limit: Longest prompt, tokens; what is longer is not encoded to its end.
    """

    tokenizer: PreTrainedTokenizerBase
    prompt: Prompt
    limit: int = 1 << 62
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def of(session: Session, limit: int = 1 << 62) -> "Wording":
        """Take a session's tokenizer and prompt."""
        tokenizer = copy.deepcopy(session.tokenizer)
        return Wording(tokenizer, Prompt.of(tokenizer), limit)

    def chat(self, messages: Sequence[Message], owner: str) -> Layout:
        """Lay a conversation out as the model's chat template does.

        Raises:
            ApiError: If the template refuses it.
        """
        parts = self._templated(messages) if self.tokenizer.chat_template else self._plainly(messages)
        begin = self._begin(parts[0].text if parts[0].kind == "template" else "")
        return self._layout(begin, parts, owner)

    def about_context(self, messages: Sequence[Message], owner: str) -> Layout:
        """Lay a conversation about a context out, which goes on behind the document.

        What a system message says comes before the first question, because the turn was begun when the document was
        read.
        """
        turns = _alternating(messages)
        parts = []
        for number, message in enumerate(turns):
            if message.role == "assistant":
                parts += [Part(message.text, "assistant"), Part(self.prompt.turn, "template")]
                continue
            label = "" if number else self.prompt.label
            parts += [Part(label + message.text, "user"), Part(self.prompt.closing, "template")]
        return self._layout([], parts, owner)

    def raw(self, text: str) -> list[int]:
        """Return the ids of a prompt that is given as a whole; special tokens count."""
        if len(text) > LONG_CHARS:  # it would keep others waiting
            with self._lock:
                own = Wording(copy.deepcopy(self.tokenizer), self.prompt, self.limit)
            return own._begin(text) + own._template(text)
        return self._begin(text) + self._template(text)

    def plain(self, text: str) -> list[int]:
        """Return the ids of what somebody said; special tokens spelled out in it are plain text.

        Raises:
            ApiError: If they are too many.
        """
        ids: list[int] = []
        windows = encode_stream(self.tokenizer, [text])
        while True:
            with self._lock:  # for a window, so that a long text keeps nobody waiting
                more = next(windows, None)
            if more is None:
                return ids
            ids += more
            self._check(len(ids))

    def _layout(self, begin: list[int], parts: Iterable[Part], owner: str) -> Layout:
        ids, ends = list(begin), []
        for part in parts:
            ids += self._template(part.text) if part.kind == "template" else self.plain(part.text)
            self._check(len(ids))
            if part.kind == "assistant":
                ends.append(len(ids))
        return Layout(owner, ids, ends)

    def _check(self, tokens: int) -> None:
        if tokens > self.limit:
            raise too_long(self.limit)

    def _template(self, text: str) -> list[int]:
        if not text:
            return []
        with self._lock:
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _begin(self, text: str) -> list[int]:
        """Return the token that begins a text, if the tokenizer wants one and the text does not have it."""
        begin = self.tokenizer.bos_token
        with self._lock:
            wants = begin and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return [self.tokenizer.bos_token_id] if wants and not text.startswith(str(begin)) else []

    def _templated(self, messages: Sequence[Message]) -> list[Part]:
        """Put marks through the template, and what was said in their place afterwards: it cannot pose as template."""
        import jinja2

        mark = f"lococo-{secrets.token_hex(8)}-"
        marked = [{"role": one.role, "content": f"{mark}{n}-"} for n, one in enumerate(messages)]
        try:
            text = str(self.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", code="bad_messages", param="messages"
            ) from error
        pieces = re.split(f"{mark}(\\d+)-", text)
        parts = []
        for place, piece in enumerate(pieces):
            if place % 2:
                message = messages[int(piece)]
                parts.append(Part(message.text, message.role))
            else:
                parts.append(Part(piece, "template"))
        return parts

    def _plainly(self, messages: Sequence[Message]) -> list[Part]:
        """Lay a conversation out for a model without a template."""
        parts = []
        for number, message in enumerate(_alternating(messages)):
            if message.role == "assistant":
                parts.append(Part(message.text, "assistant"))
                continue
            label = self.prompt.turn if number else self.prompt.label.lstrip()
            parts += [Part(label, "template"), Part(message.text, "user"), Part(self.prompt.closing, "template")]
        return parts


def _alternating(messages: Sequence[Message]) -> list[Message]:
    """Join messages until users and assistants take turns, users first and last; system messages count as the user's.

    Raises:
        ApiError: If the assistant begins or ends.
    """
    turns: list[Message] = []
    for message in messages:
        role = "assistant" if message.role == "assistant" else "user"
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].text}\n\n{message.text}")
        else:
            turns.append(Message(role, message.text))
    if not turns or turns[0].role != "user" or turns[-1].role != "user":
        raise ApiError(400, "a conversation begins and ends with the user here", code="bad_messages", param="messages")
    return turns
