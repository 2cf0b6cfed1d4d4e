"""Text as a stream of token ids, the same as those of the whole text at once.

No more than a few windows of the text are held, however long it is; only a tokenizer without character offsets gets
it in one go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["anchor_of", "encode_stream"]

# Overlap between two windows of `encode_stream`, and the part of a window's end where no cut is made, in characters. A
# pre-tokenizer looks one character ahead; a word or two settle a merge. The next window checks each cut anyway.
OVERLAP_CHARS: Final = 128
MARGIN_CHARS: Final = 64
CHECKED_TOKENS: Final = 16
# Characters that no tokenizer we know joins with what follows all of them.
ANCHORS: Final = ("\n", "\x02", "~")
# A window this long without a word's end is cut inside the word (base64, or Chinese without a pre-tokenizer).
LONGEST_WORD_CHARS: Final = 1 << 20


def encode_stream(
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterable[str],
    *,
    block_chars: int = 1 << 16,
    continues: bool = False,
) -> Iterator[list[int]]:
    """Yield the token ids of a text of any length; joined they equal those of the whole text at once.

    No special token is added, and one that is spelled out inside a document is plain text: a file that contains
    "<|im_end|>" must not end the turn it is quoted in.

    The text is encoded in windows that overlap. A window is cut at the end of a word, and its ids are given out once
    the next window, with other text around, has come to the same tokens before the cut. If it has not, the two windows
    are encoded as one. A word longer than a window makes the window double, so that the work stays linear.

    Args:
        tokenizer: A fast tokenizer. Any other one gets the whole text at once.
        pieces: The text, cut anywhere.
        block_chars: New characters in each window.
        continues: Encode what goes on from other text: without the space that some tokenizers put before a beginning.

    Yields:
        Lists of token ids, never empty.
    """
    if continues:
        yield from _continuing(tokenizer, pieces, block_chars)
        return
    if not tokenizer.is_fast:
        if text := "".join(pieces):
            yield _plain_ids(tokenizer, text)
        return
    windows = _Windows(tokenizer, block_chars)
    unread: list[str] = []
    wanted = block_chars
    for piece in pieces:
        for start in range(0, len(piece), block_chars):
            unread.append(piece[start : start + block_chars])
            wanted -= len(unread[-1])
            if wanted <= 0:
                sure, wanted = windows.read("".join(unread))
                unread.clear()
                if sure:
                    yield sure
    if rest := windows.finish("".join(unread)):
        yield rest


def anchor_of(encode: Callable[[str], list[int]], text: str) -> tuple[str, int]:
    """Find what to put before a text so that it is encoded as the continuation of another.

    Args:
        encode: Turns a text into ids.
        text: Its beginning will do.

    Returns:
        A character, and how many ids it takes, which belong to the text no more; ("", 0) for tokenizers that encode a
        beginning like everything else.
    """
    for anchor in ANCHORS:
        head = encode(anchor)
        if encode(f"{anchor}x") == head + encode("x"):
            break
        if encode(anchor + text)[: len(head)] == head:
            return anchor, len(head)
    return "", 0


def _continuing(tokenizer: PreTrainedTokenizerBase, pieces: Iterable[str], block_chars: int) -> Iterator[list[int]]:
    rest = iter(pieces)
    first = ""
    while len(first) < OVERLAP_CHARS and (piece := next(rest, None)) is not None:
        first += piece
    anchor, alien = anchor_of(lambda text: _plain_ids(tokenizer, text), first[:OVERLAP_CHARS])
    for ids in encode_stream(tokenizer, chain([anchor + first] if first else [], rest), block_chars=block_chars):
        own = ids[alien:]
        alien -= len(ids) - len(own)
        if own:
            yield own


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


class _Tokens(NamedTuple):
    """The tokens of a window: ids, half-open spans of characters, and the words of the pre-tokenizer they are in."""

    ids: list[int]
    spans: list[tuple[int, int]]
    words: list[int | None]


class _Lead(NamedTuple):
    """Tokens just before a cut, which the window that starts before them must come to as well."""

    ids: list[int]
    spans: list[tuple[int, int]]


class _Windows:
    """Two windows of text: `held` ids of the former, which are sure once the latter has reproduced its end."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, block_chars: int) -> None:
        self.tokenizer = tokenizer
        self.block_chars = block_chars
        self.text = ""
        self.lead = _Lead([], [])
        self.held: list[int] = []
        self.former_text = ""  # up to where `text` starts
        self.former_lead = _Lead([], [])

    def read(self, text: str) -> tuple[list[int], int]:
        """Append text; return the ids that are sure by now, and how many characters to come back with."""
        self.text += text
        tokens, first = self._encode()
        found = self._cut(tokens, first)
        if found is None:
            return [], len(self.text)
        cut, start = found
        sure, self.held = self.held, tokens.ids[first:cut]
        self._start_at(start, tokens, first, cut)
        return sure, self.block_chars

    def finish(self, text: str) -> list[int]:
        """Append the last text and return all ids that are left."""
        self.text += text
        if not self.text:
            return []
        tokens, first = self._encode()
        return self.held + tokens.ids[first:]

    def _encode(self) -> tuple[_Tokens, int]:
        """Return the window's tokens and the index of the first new one; take the cut back if they contradict it."""
        tokens = _encode(self.tokenizer, self.text)
        first = _after(tokens, self.lead)
        if first is None and self.former_text:
            self.text, self.lead = self.former_text + self.text, self.former_lead
            self.held, self.former_text = [], ""
            tokens = _encode(self.tokenizer, self.text)
            first = _after(tokens, self.lead)
        if first is None:
            # What came before is given out already, so only the place can decide.
            first = sum(end <= self.lead.spans[-1][1] for _, end in tokens.spans)
        return tokens, first

    def _start_at(self, start: int, tokens: _Tokens, first: int, cut: int) -> None:
        """Begin the next window at the character `start`, to be checked against the tokens before `cut`."""
        near = tokens.spans[cut - 1][1] - OVERLAP_CHARS // 2
        begin = max(first, cut - CHECKED_TOKENS)
        while begin < cut - 1 and tokens.spans[begin][0] < near:
            begin += 1
        self.former_text, self.former_lead = self.text[:start], self.lead
        spans = [(left - start, right - start) for left, right in tokens.spans[begin:cut]]
        self.lead = _Lead(tokens.ids[begin:cut], spans)
        self.text = self.text[start:]

    def _cut(self, tokens: _Tokens, first: int) -> tuple[int, int] | None:
        """Choose where the windows part, or None when this one must grow first.

        Returns:
            The index of the first token that the next window decides, and the character where that window starts.
        """
        if cut := self._cut_at(self._ends_word, tokens, first):
            return cut
        if len(self.text) >= max(LONGEST_WORD_CHARS, 16 * self.block_chars):
            return self._cut_at(_ends_token, tokens, first)
        return None

    def _cut_at(self, ends: Callable[[_Tokens, int], bool], tokens: _Tokens, first: int) -> tuple[int, int] | None:
        limit = len(self.text) - MARGIN_CHARS
        for cut in range(len(tokens.ids) - 1, first, -1):
            if tokens.spans[cut - 1][1] <= limit and ends(tokens, cut):
                limit = tokens.spans[cut - 1][1] - OVERLAP_CHARS
                starts = (tokens.spans[i - 1][1] for i in range(cut - 1, 0, -1) if ends(tokens, i))
                return cut, next((start for start in starts if start <= limit), 0)
        return None

    def _ends_word(self, tokens: _Tokens, i: int) -> bool:
        """Tell whether a word ends before token i, and no run of spaces does: that may go on beyond the window."""
        end = tokens.spans[i - 1][1]
        if not _ends_token(tokens, i) or end == 0 or self.text[end - 1].isspace():
            return False
        if tokens.words[0] != tokens.words[-1]:
            return tokens.words[i - 1] != tokens.words[i]
        # Sentencepiece without a pre-tokenizer: the whole window counts as one word, and no token has a space inside.
        return self.text[end : end + 1].isspace()


def _ends_token(tokens: _Tokens, i: int) -> bool:
    # A character of several byte-level tokens has the same span in all of them.
    return tokens.spans[i - 1][1] <= tokens.spans[i][0]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> _Tokens:
    coded = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    return _Tokens(list(coded["input_ids"]), list(coded["offset_mapping"]), coded.word_ids(0))


def _after(tokens: _Tokens, lead: _Lead) -> int | None:
    """Return the index of the first token after `lead`, or None when the tokens do not contain it."""
    if not lead.ids:
        return 0
    size, cut = len(lead.ids), lead.spans[-1][1]
    for i, (start, end) in enumerate(tokens.spans, 1):
        if start > cut:
            break
        same = end == cut and tokens.ids[i - size : i] == lead.ids and tokens.spans[i - size : i] == lead.spans
        if same and i >= size and (i == len(tokens.ids) or _ends_token(tokens, i)):
            return i
    return None
