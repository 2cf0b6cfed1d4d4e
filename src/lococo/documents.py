r"""Read documents as a stream of text.

Nothing here holds a whole document, so a file may be larger than memory. One exception gets it in one go: the HTML
parser.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, Final, TextIO

from lococo.errors import DocumentError

if TYPE_CHECKING:
    pass

__all__ = ["demo_text", "read_text"]

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
