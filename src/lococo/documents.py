r"""Read documents as a stream of text, and text as a stream of token ids.

Nothing here holds a whole document, so a file may be larger than memory. Two exceptions get theirs in one go: the HTML
parser, and a tokenizer without character offsets.

Newlines are translated: \r\n and \r become \n, as `open` does it. Models saw \n in training, and a document means
the same whichever system wrote it.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final, NamedTuple, TextIO

from lococo.errors import DocumentError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["demo_text", "encode_stream", "read_text"]

PIECE_BYTES: Final = 1 << 20
MAGIC: Final = {
    b"%PDF-": "a PDF; give the file a name that ends in .pdf",
    b"\x7fELF": "a program (ELF); expected text",
    b"\x89PNG": "an image (PNG); expected text",
    b"\xff\xd8\xff": "an image (JPEG); expected text",
    b"GIF8": "an image (GIF); expected text",
    b"PK\x03\x04": "a zip archive (or .docx, .epub, .odt); unpack it or export it as text",
    b"\x1f\x8b": "compressed with gzip; unpack it with gunzip",
    b"BZh": "compressed with bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "compressed with xz; unpack it with unxz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it with unzstd",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"\xff\xfe": "UTF-16; convert it with `iconv -f UTF-16 -t utf-8`",
    b"\xfe\xff": "UTF-16; convert it with `iconv -f UTF-16 -t utf-8`",
}

HIDDEN: Final = ["script", "style", "noscript", "template", "svg"]
BLOCKS: Final = re.compile(
    r"^(address|article|aside|blockquote|body|br|caption|d[dlt]|details|dialog|div|fieldset|figcaption|figure|footer|form"
    r"|h[1-6r]|header|legend|li|main|nav|ol|option|p|pre|section|summary|table|title|tr|ul)$"
)

# Overlap between two windows of `encode_stream`, and the part of a window's end where no cut is made, in characters. A
# pre-tokenizer looks one character ahead; a word or two settle a merge. The next window checks each cut anyway.
OVERLAP_CHARS: Final = 128
MARGIN_CHARS: Final = 64
CHECKED_TOKENS: Final = 16
# Characters that no tokenizer we know joins with what follows all of them.
ANCHORS: Final = ("\n", "\x02", "~")
# A window this long without a word's end is cut inside the word (base64, or Chinese without a pre-tokenizer).
LONGEST_WORD_CHARS: Final = 1 << 20


def read_text(source: str | os.PathLike[str] | TextIO) -> Iterator[str]:
    r"""Yield the text of a document in pieces of about one MiB.

    Example:
        >>> for piece in read_text("book.txt"):
        ...     print(len(piece))

    Args:
        source: A path, "-" for standard input, or an open text file. A path's suffix decides: .html and .htm give the
            visible text, .pdf the text of its pages, anything else (Markdown, source code, ...) is UTF-8 text. A byte
            order mark is dropped, \r\n and \r become \n.

    Yields:
        Pieces of text, never empty; the first one that is blank is held back until some text follows.

    Raises:
        DocumentError: The document is missing, a folder, empty or blank, binary, not UTF-8, not permitted, an encrypted
            PDF or one without text. Raised when the first piece is asked for, or where the bad byte is met.
    """
    if not isinstance(source, str | os.PathLike):
        name = str(getattr(source, "name", "the open file"))
        return _not_blank(_checked_strings(source, name), name)
    name = os.fspath(source)
    if name == "-":
        return _not_blank(_standard_input(), "standard input")
    read = {".html": _html, ".htm": _html, ".pdf": _pdf}.get(Path(name).suffix.lower(), _utf8)
    return _not_blank(_opened(name, read), name)


def demo_text() -> str:
    """Return real prose that every machine has: the language reference inside Python's own `help()`.

    Returns:
        About half a million characters, the topics in alphabetical order, each under its name. The text is the same on
        every machine with the same version of Python.
    """
    from pydoc_data.topics import topics

    return "\n".join(f"{name}\n\n{topics[name].strip()}\n" for name in sorted(topics))


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


def _not_blank(pieces: Iterator[str], name: str) -> Iterator[str]:
    """Pass pieces on from the first that is more than white space."""
    blank: list[str] = []
    for piece in pieces:
        blank.append(piece)
        if piece.strip():
            break
    else:
        raise DocumentError(f"{name} is empty{' but for white space' if any(blank) else ''}; expected some text")
    yield "".join(blank)
    for piece in pieces:
        if piece:
            yield piece


def _opened(name: str, read: Callable[[BinaryIO, str], Iterator[str]]) -> Iterator[str]:
    path = Path(name).expanduser()
    try:
        with path.open("rb") as file:
            yield from read(file, name)
    except FileNotFoundError:
        raise DocumentError(f"{name}: no such file; check the path, or use - for standard input") from None
    except IsADirectoryError:
        raise DocumentError(f"{name} is a folder; expected a file (join several with `cat`, and use -)") from None
    except PermissionError:
        raise DocumentError(f"{name} cannot be read: permission denied; allow it with `chmod +r`") from None
    except OSError as error:
        raise DocumentError(f"{name} cannot be read: {error.strerror or error}") from error


def _standard_input() -> Iterator[str]:
    binary = getattr(sys.stdin, "buffer", None)
    yield from _utf8(binary, "standard input") if binary else _checked_strings(sys.stdin, "standard input")


def _utf8(file: BinaryIO, name: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0  # of the next byte that the decoder has not seen
    while True:
        data = file.read(PIECE_BYTES)
        if offset == 0:
            _check_magic(data, name)
        if (nul := data.find(b"\0")) >= 0:
            raise DocumentError(f"{name} is binary (a NUL at byte {offset + nul}); expected text in UTF-8, HTML or PDF")
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, offset - waiting + error.start, error.object[error.start]) from None
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += len(data)
        yield newlines.decode(text, final=not data)
        if not data:
            return


def _not_utf8(name: str, offset: int, byte: int) -> DocumentError:
    return DocumentError(
        f"{name} is not UTF-8: byte 0x{byte:02x} at offset {offset}; "
        f"convert it with `iconv -f ISO-8859-1 -t utf-8`, naming the encoding it is really in"
    )


def _check_magic(data: bytes, name: str) -> None:
    for magic, kind in MAGIC.items():
        if data.startswith(magic):
            raise DocumentError(f"{name} is {kind}")


def _checked_strings(file: TextIO | IO[str], name: str) -> Iterator[str]:
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    first = True
    while True:
        try:
            text = file.read(PIECE_BYTES)
            text.encode()  # a stream opened with surrogateescape hides its bad bytes as surrogates
        except UnicodeDecodeError as error:
            raise _not_utf8(name, error.start, error.object[error.start]) from None
        except UnicodeEncodeError:
            raise DocumentError(f"{name} is not UTF-8; convert it with `iconv -f ISO-8859-1 -t utf-8`") from None
        if "\0" in text:
            raise DocumentError(f"{name} is binary (it has a NUL); expected text in UTF-8")
        yield newlines.decode(text.removeprefix("\ufeff") if first else text, final=not text)
        if not text:
            return
        first = False


def _html(file: BinaryIO, name: str) -> Iterator[str]:
    from bs4 import BeautifulSoup

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # bs4 wonders whether XHTML is XML, and whether a short page is a file name
        soup = BeautifulSoup("".join(_utf8(file, name)), "html.parser")
    for tag in soup.find_all(HIDDEN):
        tag.decompose()
    # Line breaks and the spaces of preformatted text pass through the squeezing of white space as control characters.
    kept = {id(string) for tag in soup.find_all(["pre", "textarea"]) for string in tag.strings}
    for string in soup.find_all(string=True):
        if id(string) in kept:
            string.replace_with(string.replace(" ", "\1").replace("\n", "\2"))
    for tag in soup.find_all(BLOCKS):
        tag.insert_before("\0")
        tag.insert_after("\0")
    for cell in soup.find_all(["td", "th"]):
        cell.insert_after(" ")
    text = re.sub(r"[ \t\n\f]+", " ", soup.get_text())
    yield re.sub(r" ?\0[\0 ]*", "\n", text).translate({1: " ", 2: "\n"}).strip("\n") + "\n"


def _pdf(file: BinaryIO, name: str) -> Iterator[str]:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, PyPdfError

    # pypdf reports each repair of a slightly broken file; without a handler Python would print them to stderr.
    logging.getLogger("pypdf").addHandler(logging.NullHandler())
    found = False
    try:
        reader = PdfReader(file)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DocumentError(f"{name} is an encrypted PDF; save it without a password first")
        for page in reader.pages:
            text = page.extract_text().replace("\0", "")
            found = found or bool(text.strip())
            # Broken fonts map glyphs to halves of surrogate pairs, which no tokenizer takes.
            yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") + "\n"
    except DependencyError:
        raise DocumentError(f"{name} is an encrypted PDF; save it without a password first") from None
    except (PyPdfError, ValueError, KeyError, RecursionError) as error:
        raise DocumentError(
            f"{name} is no readable PDF ({error}); open and save it again, or export it as text"
        ) from error
    if not found:
        raise DocumentError(f"{name} is a PDF without text (a scan?); run it through OCR first")
