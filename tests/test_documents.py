"""Documents come as exact pieces of text, and their token ids are those of the whole text at once."""

import io
import sys
from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from lococo.documents import PIECE_BYTES, demo_text, read_text
from lococo.errors import DocumentError


def text_of(source) -> str:
    return "".join(read_text(source))


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def pdf_with(text: str) -> PdfWriter:
    writer = PdfWriter()
    page = writer.add_blank_page(200, 200)
    font = {"/Type": "/Font", "/Subtype": "/Type1", "/BaseFont": "/Helvetica"}
    fonts = DictionaryObject(
        {NameObject("/F1"): DictionaryObject({NameObject(k): NameObject(v) for k, v in font.items()})}
    )
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(stream)
    return writer


def saved(writer: PdfWriter, path: Path) -> Path:
    with path.open("wb") as file:
        writer.write(file)
    return path


def test_text_is_exact_with_newlines_translated_and_bom_removed(tmp_path):
    path = written(tmp_path, "a.py", b"\xef\xbb\xbfdef f():\r\n    return '\xc3\xa9'\r\x0c\n")
    assert text_of(path) == "def f():\n    return 'é'\n\x0c\n"
    assert text_of(str(path)) == text_of(path)


@pytest.mark.parametrize("shift", range(5))
def test_characters_and_newlines_survive_on_a_piece_boundary(tmp_path, shift):
    content = "x" * (PIECE_BYTES - shift) + "😀\r\n😀"
    path = written(tmp_path, "a.txt", content.encode())
    pieces = list(read_text(path))
    assert "".join(pieces) == content.replace("\r\n", "\n")
    assert len(pieces) == 2
    assert all(pieces)


def test_file_is_read_piece_by_piece(tmp_path):
    path = written(tmp_path, "a.txt", b"y" * (3 * PIECE_BYTES) + b"\xff")
    pieces = read_text(path)
    assert [len(next(pieces)) for _ in range(3)] == [PIECE_BYTES] * 3
    with pytest.raises(DocumentError, match=rf"0xff at offset {3 * PIECE_BYTES}; .*iconv -f .* -t utf-8"):
        next(pieces)


def test_html_gives_visible_text(tmp_path):
    page = b"""<!DOCTYPE html><html><head><title>T</title><style>p {color: red}</style></head><body><!-- no -->
    <script>var x = 1;</script><h1>Head</h1><p>One <b>bo</b>ld
    line &amp; more</p><ul><li>a</li><li>b</li></ul><pre>  def f():
    return  1</pre><table><tr><td>1</td><td>2</td></tr></table></body></html>"""
    expected = "T\nHead\nOne bold line & more\na\nb\n  def f():\n    return  1\n1 2\n"
    assert text_of(written(tmp_path, "a.html", page)) == expected
    assert text_of(written(tmp_path, "a.HTM", page)) == expected


def test_pdf_gives_text_of_its_pages(tmp_path):
    writer = pdf_with("Hello page one")
    writer.append(io.BytesIO(saved(pdf_with("and two"), tmp_path / "2.pdf").read_bytes()))
    assert list(read_text(saved(writer, tmp_path / "a.pdf"))) == ["Hello page one\n", "and two\n"]


def test_encrypted_pdf_is_refused(tmp_path):
    writer = pdf_with("secret")
    writer.encrypt("password", algorithm="RC4-128")
    with pytest.raises(DocumentError, match=r"encrypted PDF; save it without a password"):
        text_of(saved(writer, tmp_path / "a.pdf"))


def test_pdf_without_text_is_refused(tmp_path):
    writer = PdfWriter()
    writer.add_blank_page(200, 200)
    with pytest.raises(DocumentError, match=r"PDF without text .*OCR"):
        text_of(saved(writer, tmp_path / "a.pdf"))


def test_damaged_pdf_is_refused(tmp_path):
    with pytest.raises(DocumentError, match="no readable PDF"):
        text_of(written(tmp_path, "a.pdf", b"%PDF-1.4\nnonsense"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected some text"),
        (b" \n\t\r\n", "is empty but for white space"),
        (b" " * (2 * PIECE_BYTES), "is empty but for white space"),
        (b"text\0more", "binary .a NUL at byte 4"),
        (b"caf\xe9 au lait", "not UTF-8: byte 0xe9 at offset 3; .*iconv -f .* -t utf-8"),
        (b"cut off \xf0\x9f\x98", "byte 0xf0 at offset 8"),
        (b"x" * (PIECE_BYTES - 1) + b"\xc3" + b"z", f"byte 0xc3 at offset {PIECE_BYTES - 1}"),
        (b"\xff\xfeh\0i\0", "UTF-16"),
        (b"\x7fELF", "program"),
        (b"\x89PNG\r\n", "PNG"),
        (b"PK\x03\x04", "zip"),
        (b"\x1f\x8b", "gunzip"),
        (b"%PDF-1.4", "ends in .pdf"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, message):
    with pytest.raises(DocumentError, match=message) as caught:
        text_of(written(tmp_path, "a.txt", content))
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DocumentError, match=r"none\.txt: no such file"):
        next(read_text(tmp_path / "none.txt"))
    with pytest.raises(DocumentError, match="is a folder; expected a file"):
        next(read_text(tmp_path))


def test_permission_is_explained(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DocumentError, match="permission denied; allow it with `chmod"):
        next(read_text(tmp_path / "a.txt"))


def test_blank_start_is_held_back(tmp_path):
    path = written(tmp_path, "a.txt", b"\n" * PIECE_BYTES + b"x")
    assert list(read_text(path)) == ["\n" * PIECE_BYTES + "x"]


def test_standard_input_and_open_files(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeffdé\r\n".encode()), encoding="ascii"))
    assert text_of("-") == "dé\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("plain"))
    assert text_of("-") == "plain"
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(DocumentError, match="standard input is empty"):
        text_of("-")
    assert text_of(io.StringIO("\ufeffa\r\nb")) == "a\nb"
    with pytest.raises(DocumentError, match="byte 0xff at offset 1"):
        text_of(io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    with pytest.raises(DocumentError, match="not UTF-8"):
        text_of(io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8", errors="surrogateescape"))
    with pytest.raises(DocumentError, match="NUL"):
        text_of(io.StringIO("a\0"))


def test_demo_text_is_long_real_and_the_same_each_time():
    text = demo_text()
    assert text == demo_text()
    assert len(text) > 300_000
    assert text.startswith("assert\n\n")
    assert 'The simple form, "assert expression", is equivalent to' in text
    assert text.index("\nwith\n\n") > text.index("\nwhile\n\n")
