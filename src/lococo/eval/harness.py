"""lm-evaluation-harness with slots: every request is read chunk by chunk, so that compression really happens.

The class of transformers models that lm-eval brings along makes one forward pass per request without a cache. This one
takes its tokenisation, stop strings and chat templates, and reads what several requests begin with only once.
`python -m lococo.eval.harness` is lm-eval's own command line, which then knows `--model lococo`.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from transformers import Cache, DynamicCache, PreTrainedModel

from lococo.attachment import Attachment, attach, window_of
from lococo.budgets import slots_for
from lococo.cache import Positions, grows
from lococo.cache_name import cache_name
from lococo.errors import ArgumentError, LococoError, WindowError
from lococo.eval.sharing import Wanted, groups
from lococo.models import load_model
from lococo.progress import counting
from lococo.reader import read
from lococo.state_layer import has_state

logger = logging.getLogger(__name__)

# What may happen to a prompt that leaves the window.
TOO_LONG = ("truncate", "middle", "refuse")

# What else of lm-eval's `hf` model may be chosen; the rest is about other ways of loading and running it.
OPTIONS = frozenset(
    {
        "add_bos_token",
        "batch_size",
        "chat_template_args",
        "enable_thinking",
        "max_batch_size",
        "max_length",
        "prefix_token_id",
        "think_end_token",
    }
)


@register_model("lococo")
class SlotLM(HFLM):  # type: ignore[misc]  # a package without types
    """A model of transformers that reads in slots."""

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        *,
        tokenizer: Any = None,
        compressor: str = "auto",
        num_slots: int = 512,
        chunk_size: int = 256,
        positions: Positions = "packed",
        budget: str = "own",
        dtype: str = "float32",
        device: str | None = None,
        too_long: str = "truncate",
        trust_remote_code: bool = False,
        attachment: Attachment | None = None,
        **options: Any,
    ) -> None:
        """Load a model, unless it is given with its tokenizer, and attach a compressor.

        Args:
            pretrained: See `load_model`.
            tokenizer: Of a model that is given, or the name of another one than the model's own.
            compressor: See `attach`; "full" keeps every token.
            num_slots: Entries that survive a compression, mean over the layers.
            chunk_size: Tokens per forward pass.
            positions: See `attach`.
            budget: See `budgets.slots_for`.
            dtype: Of the model.
            device: Of the model; None: where it loads.
            too_long: What happens to a prompt beyond `max_length`, which is the model's window by default: "truncate"
                cuts its beginning off, as lm-eval does, "middle" its middle, as LongBench does, and both are counted
                in `truncated`; "refuse" stops.
            trust_remote_code: Let the model's repository run its own code.
            attachment: Of a model that is given, in place of `compressor` and what follows it up to `budget`.
            **options: Of lm-eval's `hf` model, those of OPTIONS.

        Raises:
            ArgumentError: If a name or number is out of range, or an option unknown.
        """
        if too_long not in TOO_LONG:
            raise ArgumentError(f"too_long must be one of {', '.join(TOO_LONG)}, got {too_long!r}")
        if unknown := options.keys() - OPTIONS:
            raise ArgumentError(
                f"--model lococo takes no {', '.join(sorted(unknown))}; expected {', '.join(sorted(OPTIONS))}"
            )
        if not str(options.get("batch_size") or 1).isdigit():
            raise ArgumentError(f"batch_size must be a whole number, got {options['batch_size']!r}")
        if not isinstance(options.get("think_end_token", ""), str):
            raise ArgumentError(f"think_end_token must be text, got {options['think_end_token']!r}")
        if device == "cuda:0" and not torch.cuda.is_available():
            device = None  # what lm-eval's command asks for where nobody has said a word
        if not isinstance(pretrained, PreTrainedModel):
            pretrained, own = load_model(pretrained, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            tokenizer = own if tokenizer is None else tokenizer
        elif tokenizer is None:
            raise ArgumentError("a model came without its tokenizer; give tokenizer=")
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **options)
        self.too_long = too_long
        self.truncated = self._said_truncated = 0
        # Tokens of every prompt, by its text: all there are, and those that are read.
        self.prompts: dict[str, tuple[int, int]] = {}
        if attachment is None:
            spread = slots_for(
                self.model, self.tokenizer, budget, compressor=compressor, num_slots=num_slots, chunk_size=chunk_size
            )
            attachment = attach(
                self.model,
                compressor,
                num_slots=num_slots,
                chunk_size=chunk_size,
                positions=positions,
                slots_per_layer=spread,
            )
        self.attachment = attachment
        self._counts = False

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return what `_loglikelihood_tokens` does for the strings of requests, without lm-eval's bar of tokenising."""
        self._counts = not disable_tqdm
        try:
            scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._counts = False
        return scored

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Return, per request, the log-likelihood of its continuation and whether it is the likeliest one.

        Args:
            requests: The strings (None for windows of a longer text), tokens of the context and of the continuation.
            disable_tqdm: Show no bar.
            override_bs: Batch size.
        """
        wanted, counts = [], []
        # Cut so that every answer to a question follows the same text.
        room = self.max_length + 1 - max((len(continuation) for _, _, continuation in requests), default=0)
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise (WindowError if continuation else ArgumentError)(
                    f"expected an answer of 1 to {self.max_length} tokens to score, got {len(continuation)}"
                )
            came = len(context)
            # A context of nothing but spaces has moved to the continuation.
            context = context or [self.prefix_token_id]
            if self.too_long == "middle":
                context = self._fitting(context, room)
            ids = self._fitting(context + continuation, self.max_length + 1)
            wanted.append(Wanted(ids[:-1], len(ids) - len(continuation) - 1))
            counts.append(len(continuation))
            if texts is not None:
                # What is left of a prompt before the longest of its answers.
                kept = min(came, len(ids) - len(continuation), self.prompts.get(texts[0], (0, came))[1])
                self.prompts[texts[0]] = (came, kept)
        self._say_truncated()
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        with self.attachment, _counting("answers scored", disable_tqdm and not self._counts) as progress:
            for cache, start, group in self._groups(wanted, override_bs):
                rows = [wanted[number].ids[start:] for number in group]
                targets = [[*row[1:], requests[number][2][-1]] for number, row in zip(group, rows, strict=True)]
                scores, likeliest = self._scored(cache, rows, targets)
                for number, row, score, hit in zip(group, rows, scores, likeliest, strict=True):
                    places = slice(len(row) - counts[number], len(row))
                    answers[number] = (score[places].sum().item(), bool(hit[places].all()))
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])
                done += len(group)
                progress(done, len(requests))
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each request's context, up to its stop strings."""
        answers = [""] * len(requests)
        kinds: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        prepared = [self._prepared([requests[number] for number in numbers], eos) for numbers in kinds.values()]
        self._say_truncated()
        done = 0
        with self.attachment, _counting("answers written", disable_tqdm) as progress:
            for numbers, (texts, until, how) in zip(kinds.values(), prepared, strict=True):
                wanted = [Wanted(ids, len(ids) - 1) for ids in texts]
                # In sliding layers padding between what is shared and the rest would push the former out of sight, and
                # recurrent ones take it for text.
                layers = DynamicCache(config=self.model.config).layers
                window = window_of(self.model)
                alone = any(not grows(layer, window) or has_state(layer) for layer in layers)
                for cache, start, group in self._groups(wanted, 1 if alone else None):
                    written = self._written(cache, start, [texts[place] for place in group], until, how)
                    for place, ids in zip(group, written, strict=True):
                        request = requests[numbers[place]]
                        text = postprocess_generated_text(self.tok_decode(ids), until, self.think_end_token)
                        answers[numbers[place]] = text
                        self.cache_hook.add_partial("generate_until", request.args, text)
                    done += len(group)
                    progress(done, len(requests))
        return answers

    def _prepared(self, requests: list[Any], eos: str) -> tuple[list[list[int]], list[str], dict[str, Any]]:
        """Return the tokens of requests that are answered alike, where answers stop, and how they are written."""
        how = normalize_gen_kwargs(requests[0].args[1], self.max_gen_toks)
        how.pop("max_length", None)  # of prompt and answer; max_gen_toks says it for the answer
        until = handle_stop_sequences(how.pop("until", None), eos=eos)
        room = self.max_length - how["max_gen_toks"]
        if room < 1:
            raise WindowError(
                f"answers of {how['max_gen_toks']} tokens leave no room in a window of {self.max_length}; "
                "lower max_gen_toks"
            )
        encoded = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        fitting = [self._fitting(ids, room) for ids in encoded]
        for request, ids, kept in zip(requests, encoded, fitting, strict=True):
            self.prompts[request.args[0]] = (len(ids), len(kept))
        return fitting, until, how

    def _fitting(self, ids: list[int], length: int) -> list[int]:
        """Return `length` tokens, if there may be more."""
        if len(ids) <= length:
            return ids
        if self.too_long == "refuse":
            raise WindowError(
                f"a prompt of {len(ids)} tokens, where {length} fit a window of {self.max_length}; take fewer "
                "examples, or too_long=truncate"
            )
        self.truncated += 1
        kept = length // 2 if self.too_long == "middle" else 0
        return ids[:kept] + ids[len(ids) - length + kept :]

    def _say_truncated(self) -> None:
        if self.truncated > self._said_truncated:
            lost = "middle" if self.too_long == "middle" else "beginning"
            logger.warning("%d requests were longer than the window and lost their %s", self.truncated, lost)
        self._said_truncated = self.truncated

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results: the model, how it is read, and how many prompts were cut."""
        slots = self.attachment
        name = "full" if slots.compressor is None else slots.compressor.name
        how = {"compressor": name, "num_slots": slots.num_slots, "chunk_size": slots.chunk_size}
        return {**super().get_model_info(), **how, "positions": slots.positions, "truncated": self.truncated}

    def _groups(
        self, wanted: Sequence[Wanted], batch_size: int | None = None
    ) -> Iterator[tuple[Cache, int, list[int]]]:
        size = batch_size or (self.batch_size if isinstance(self.batch_size, int) else 1)
        return groups(self.model, self.attachment.new_cache, wanted, size)

    @torch.no_grad()
    def _scored(
        self, cache: Cache, rows: list[list[int]], targets: list[list[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-likelihood of every target, (b n), and whether it is the likeliest token."""
        length = max(map(len, rows))
        # Padding on the right comes after everything that counts.
        ids, right = (torch.tensor([row + [0] * (length - len(row)) for row in part]) for part in (rows, targets))
        scores, hits, start = [], [], 0
        for piece in read(self.model, ids, cache, all_logits=True):
            own = right[:, start : start + piece.ids.shape[1]].to(piece.logits.device)
            likely = piece.logits.float().log_softmax(-1)
            scores.append(likely.gather(2, own[..., None])[..., 0])
            hits.append(likely.argmax(-1) == own)
            start += piece.ids.shape[1]
        return torch.cat(scores, 1), torch.cat(hits, 1)

    def _written(
        self, cache: Cache, start: int, texts: list[list[int]], until: list[str], how: dict[str, Any]
    ) -> list[list[int]]:
        """Return what is written after texts whose first `start` tokens the cache holds."""
        if (beams := max(how.get("num_beams", 1), how.get("num_return_sequences", 1))) > 1 and start:
            cache.batch_repeat_interleave(beams)
        longest = max(map(len, texts))
        pad = self.tokenizer.pad_token_id
        padded = [text[:start] + [pad] * (longest - len(text)) + text[start:] for text in texts]
        mask = [[1] * start + [0] * (longest - len(text)) + [1] * (len(text) - start) for text in texts]
        tokens, real = (torch.tensor(part, device=self.model.device) for part in (padded, mask))
        length = longest + how["max_gen_toks"]
        options = {name: value for name, value in how.items() if name != "max_gen_toks"}
        options |= {"attention_mask": real, cache_name(self.model): cache}
        written = self._model_generate(tokens, length, until, **options)
        rest: list[list[int]] = written[:, longest:].tolist()
        return rest


def _counting(what: str, disable: bool) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, total: None) if disable else counting(what)


def main() -> int:
    """Run lm-eval's command line; what lococo refuses is said in one line, as by its own commands."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except LococoError as error:
        print(f"lococo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
