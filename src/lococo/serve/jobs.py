"""What the engine is asked for, and what it tells about it."""

import hashlib
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lococo.cache import SlotCache
from lococo.serve.failures import ApiError
from lococo.serve.feed import Feed


@dataclass(frozen=True)
class Sampling:
    """How an answer is written.

    Attributes:
        max_tokens: Where it stops at the latest.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens of this total probability.
        seed: Makes it repeatable.
        stop: Texts it stops before.
        top_logprobs: Tell the likelihood of each token, and of this many others; None: of none.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Layout:
    """A prompt's ids, and the places where an earlier answer ended.

    Attributes:
        owner: Whose conversation it is, and what was read before it.
        ids: To read.
        ends: Lengths of the prompt up to the end of each answer in it.
    """

    owner: str
    ids: Sequence[int]
    ends: Sequence[int] = ()

    def keys(self) -> list[tuple[int, str]]:
        """Return the places with a hash of everything before, the last first."""
        digest = hashlib.sha256(self.owner.encode() + b"\0")
        found, start = [], 0
        for end in self.ends:
            digest.update(array("q", self.ids[start:end]).tobytes())
            found.append((end, digest.copy().hexdigest()))
            start = end
        return found[::-1]

    def followed_by(self, answer: Sequence[int]) -> str:
        """Return the hash of the prompt and an answer to it."""
        ids = [*self.ids, *answer]
        return Layout(self.owner, ids, [len(ids)]).keys()[0][1]


@dataclass(frozen=True)
class TokenLikelihood:
    """One token of an answer, and what else it might have been.

    Attributes:
        text: Of the token alone.
        logprob: Natural logarithm of its probability.
        others: The likeliest tokens there, likeliest first.
    """

    text: str
    logprob: float
    others: list[tuple[str, float]]


@dataclass(frozen=True)
class Usage:
    """What a request took.

    Attributes:
        prompt_tokens: Of the prompt, and of what was read before it.
        completion_tokens: Of the answer.
        cached_tokens: Of the prompt, not read anew.
        seen: Tokens in the slots at the end.
        slots: Per layer and key/value head, mean over the layers.
        kv_nbytes: Keys and values held.
        full_kv_nbytes: What a full cache would hold.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    seen: int
    slots: int
    kv_nbytes: int
    full_kv_nbytes: int


@dataclass(frozen=True)
class Progress:
    """So many tokens of a prompt or document were read so far."""

    tokens: int


@dataclass(frozen=True)
class Delta:
    """More of the answer."""

    text: str
    likelihoods: list[TokenLikelihood]


@dataclass(frozen=True)
class Finished:
    """The end of an answer: "stop" or "length"."""

    reason: str
    usage: Usage


@dataclass(frozen=True)
class Held:
    """A document was read: the slots that hold it, which nobody else has."""

    cache: SlotCache
    token_ids: "array[int]"


@dataclass(frozen=True)
class Failed:
    """The end of a request that could not be answered."""

    error: ApiError


Event = Progress | Delta | Finished | Held | Failed


@dataclass(eq=False)
class Job:
    """One request to the engine.

    Attributes:
        tenant: Whose it is.
        feed: What is to be read.
        tell: Takes the events; called from the engine's thread.
        deadline: When it is given up, on the clock of `time.monotonic`.
        max_tokens_read: The longest document, tokens.
        sampling: How to answer; None: only read.
        layout: The prompt, if the conversation may go on later.
        base: What was read before; shared, and left as it is.
    """

    tenant: str
    feed: Feed
    tell: Callable[[Event], None]
    deadline: float
    max_tokens_read: int = 1 << 62
    sampling: Sampling | None = None
    layout: Layout | None = None
    base: SlotCache | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: float = field(default_factory=time.monotonic)
