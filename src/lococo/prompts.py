r"""How a document and a question about it are laid out for a chat model, and token ids back to text as they come.

A user's turn is split around the document, so that what comes before a question is the same for every question and can
be read once:

    opening  <|im_start|>user\n           kept in a context, with the document
    document
    question \n\n + question
    closing  <|im_end|>\n<|im_start|>assistant\n
    turn     <|im_end|>\n<|im_start|>user\n   ends an answer and begins the next question

The parts are found by putting markers through the tokenizer's own chat template.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lococo.tokenization import anchor_of, encode_stream

DOCUMENT, QUESTION, ANSWER = "lococo-document-mark", "lococo-question-mark", "lococo-answer-mark"


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt around what the user gives; special tokens are spelled out in them.

    Attributes:
        tokenizer: Turns the parts into ids.
        opening: Before the document, or before the first question where there is none.
        label: Between document and question.
        closing: Between question and answer.
        turn: Between an answer and the next question.
    """

    tokenizer: PreTrainedTokenizerBase
    opening: str
    label: str
    closing: str
    turn: str

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> "Prompt":
        """Take the parts from the tokenizer's chat template, or plain ones where it has none that can be split."""
        return _from_template(tokenizer) or Prompt(tokenizer, "", "\n\nQuestion: ", "\nAnswer:", "\n\nQuestion: ")

    def opening_ids(self) -> list[int]:
        """Return the ids before the document, with the token that begins a text if the tokenizer wants one."""
        begin = self.tokenizer.bos_token or ""
        wants = bool(begin) and self.tokenizer("")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return self._ids(begin + self.opening if wants and not self.opening.startswith(begin) else self.opening)

    def question_ids(self, question: str, *, after: str) -> Tensor:
        """Return the ids from the end of what was read to the beginning of the answer, (1 n).

        Args:
            question: In the user's words; special tokens spelled out in it are plain text.
            after: "document", "opening" (nothing was read yet), or "answer".
        """
        if after == "document":
            start, question, continues = [], self.label + question, True
        else:
            start = self.opening_ids() if after == "opening" else self._ids(self.turn, continues=True)
            continues = self.continues(start)
        words = [token for ids in encode_stream(self.tokenizer, [question], continues=continues) for token in ids]
        return torch.tensor([start + words + self._ids(self.closing, continues=True)])

    def continues(self, ids: list[int]) -> bool:
        """Tell whether what follows these ids goes on in a text, or begins one as far as the tokenizer is concerned."""
        return bool(ids) and ids[-1] not in self.tokenizer.all_special_ids

    def _ids(self, text: str, *, continues: bool = False) -> list[int]:
        anchor, alien = anchor_of(self._encode, text) if continues else ("", 0)
        return self._encode(anchor + text)[alien:] if text else []

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _from_template(tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    if not tokenizer.chat_template:
        return None
    import jinja2

    label = "\n\n"
    user = {"role": "user", "content": f"{DOCUMENT}{label}{QUESTION}"}
    more = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": DOCUMENT}]
    try:
        first, talk = (
            str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
            for messages in ([user], [user, *more])
        )
    # A template for something other than a conversation; it is a program and may fail in any of these ways.
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RuntimeError):
        return None
    if first.count(DOCUMENT + label + QUESTION) != 1 or talk.count(ANSWER) != 1:
        return None
    opening, _, closing = first.partition(DOCUMENT + label + QUESTION)
    turn, _, _ = talk.partition(ANSWER)[2].partition(DOCUMENT)
    return Prompt(tokenizer, opening, label, closing, turn)


class TextStream:
    """Token ids in, text out as soon as it is certain.

    A character may take several tokens, and what a token reads as depends on the one before it. So each step decodes a
    few tokens with and without the new one, and waits while the text ends in half a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._told: list[int] = []  # given out already, and decoded again for its influence on what follows
        self._new: list[int] = []

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain by now, often none."""
        self._new.append(token)
        text = self._rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self._told, self._new = self._new, []
        return text

    def finish(self) -> str:
        """Return what is left at the end, be it half a character."""
        return self._rest()

    def _rest(self) -> str:
        return self._decode(self._told + self._new)[len(self._decode(self._told)) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def text_stream(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of token ids as soon as it is certain; joined it is the text of them all."""
    stream = TextStream(tokenizer)
    for token in ids:
        if text := stream.push(token):
            yield text
    if rest := stream.finish():
        yield rest
