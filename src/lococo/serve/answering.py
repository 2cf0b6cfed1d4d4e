"""One answer as it is written: sampling, text, stop strings, likelihoods."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lococo.prompts import TextStream
from lococo.reader import Sampler
from lococo.serve.jobs import Delta, Job, Sampling, TokenLikelihood


class StopText:
    """Passes text on until a stop string comes, and holds back what may be the beginning of one."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.stopped = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take text; return what is certain to come before any stop string."""
        self._held += text
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            told, self._held = self._held[: min(places)], ""
            return told
        kept = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - kept
        told, self._held = self._held[:cut], self._held[cut:]
        return told

    def finish(self) -> str:
        """Return what was held back, at the end of the answer."""
        told, self._held = self._held, ""
        return told


def _overlap(text: str, stop: str) -> int:
    """Return how long an end of the text is that begins a stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Answer:
    """An answer that is being written.

    Attributes:
        job: What it answers.
        sampling: How.
        cached: Tokens of the prompt that were not read anew.
        prompt: Tokens of the prompt.
    """

    job: Job
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase
    ends: set[int]
    cached: int
    prompt: int

    def __post_init__(self) -> None:
        how = self.sampling
        device = torch.device("cpu")
        self.sampler = Sampler(device, temperature=how.temperature, top_p=how.top_p, seed=how.seed)
        self.stream = TextStream(self.tokenizer)
        self.stop = StopText(how.stop)
        self.tokens: list[int] = []
        self.said: list[str] = []
        self._likelihoods: list[TokenLikelihood] = []

    def take(self, logits: Tensor) -> str | None:
        """Choose the next token, given its logits (1 v), and tell its text; return why the answer ends, if it does."""
        logits = logits.float().cpu()
        token = self.sampler.pick(logits)
        if token in self.ends:
            self._tell(self.stop.push(self.stream.finish()) + self.stop.finish(), last=True)
            return "stop"
        self.tokens.append(token)
        if self.sampling.top_logprobs is not None:
            self._likelihoods.append(self._likelihood(token, logits[0], self.sampling.top_logprobs))
        text = self.stop.push(self.stream.push(token))
        full = len(self.tokens) >= self.sampling.max_tokens
        if full and not self.stop.stopped:
            text += self.stop.push(self.stream.finish())
            text += self.stop.finish()
        self._tell(text, last=full or self.stop.stopped)
        return "stop" if self.stop.stopped else "length" if full else None

    @property
    def unread(self) -> list[int]:
        """Tokens of the answer that the cache has not read, once it is finished."""
        return self.tokens[-1:] if len(self.tokens) >= self.sampling.max_tokens else []

    def _tell(self, text: str, *, last: bool) -> None:
        if not text and not (last and self._likelihoods):
            return
        self.said.append(text)
        self.job.tell(Delta(text, self._likelihoods))
        self._likelihoods = []

    def _likelihood(self, token: int, logits: Tensor, count: int) -> TokenLikelihood:
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(count, len(logprobs)))
        others = [(self._text(other), value) for other, value in zip(ids.tolist(), values.tolist(), strict=True)]
        return TokenLikelihood(self._text(token), float(logprobs[token]), others)

    def _text(self, token: int) -> str:
        return str(self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
