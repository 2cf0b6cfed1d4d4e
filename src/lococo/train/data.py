"""Windows of text to train on: drawn at random from files, the same ones for the same seed.

Any window can be drawn without reading what comes before it, so a training that resumes needs no state beyond the
number of its next window, and no more than one window's text is held at a time.
"""

import hashlib
import heapq
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lococo.corpora import DESCRIPTIONS, domains, files_of, is_split
from lococo.errors import DocumentError
from lococo.train import hub

SUFFIXES = (".txt", ".jsonl")

# Bytes of text that a token stands for, at most, in nearly all text: how much is read for a window at first.
BYTES_PER_TOKEN = 6

# Documents that a window is looked for in when drawing has found none.
LONGEST = 20


@dataclass(frozen=True)
class Document:
    """Where a document lies.

    Attributes:
        file: That holds it.
        start: Its first byte.
        nbytes: Its length; of a line of JSON, quotes and escapes included.
    """

    file: Path
    start: int
    nbytes: int

    def read(self, start: int, nbytes: int) -> str:
        """Return about so many bytes of its text from a place within it."""
        with self.file.open("rb") as file:
            if self.file.suffix == ".jsonl":
                file.seek(self.start)
                text = _field(file.read(self.nbytes), self.file)
                share = start / self.nbytes
                return text[int(share * len(text)) :][:nbytes]
            file.seek(self.start + start)
            return file.read(min(nbytes, self.nbytes - start)).decode("utf-8", "ignore")


class Corpus:
    """Documents by domain."""

    def __init__(self, domains: dict[str, list[Document]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.domains = {name: documents for name, documents in sorted(domains.items()) if documents}
        self.tokenizer = tokenizer
        if not self.domains:
            raise DocumentError(f"expected text to train on, found no {' or '.join(SUFFIXES)} file with any")

    @property
    def fingerprint(self) -> str:
        """A hash of which documents there are, by name, place and length."""
        known = [(name, d.file.name, d.start, d.nbytes) for name, all_of in self.domains.items() for d in all_of]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]

    def joined(self, other: "Corpus") -> "Corpus":
        """Return both corpora as one."""
        names = self.domains.keys() | other.domains.keys()
        together = {name: {*self.domains.get(name, []), *other.domains.get(name, [])} for name in names}
        by_place = {name: sorted(all_of, key=lambda d: (d.file, d.start)) for name, all_of in together.items()}
        return Corpus(by_place, self.tokenizer)

    def window(self, seed: int, number: int, *, length: int, least: int) -> list[int]:
        """Draw a window.

        Args:
            seed: Of the drawing.
            number: Which window; they take turns through the domains.
            length: Tokens it has at most.
            least: Tokens it has at least.

        Returns:
            Token ids.

        Raises:
            DocumentError: If hardly any document has as many tokens.
        """
        draw = random.Random(f"{seed}/{number}")
        names = list(self.domains)
        for attempt in range(20 * len(names)):
            # Domains that hold no window this long give their turn to the next.
            documents = self.domains[names[(number + attempt // 20) % len(names)]]
            weights = [max(0, document.nbytes - 2 * least) for document in documents]
            if not any(weights):
                continue
            document = draw.choices(documents, weights)[0]
            start = int(draw.random() * max(1, document.nbytes - 3 * length))
            ids = self.tokens(document, start, length, cut=True)
            if len(ids) >= least:
                return ids
        # By chance none was long enough: a training that has begun must not end here.
        for document in draw.sample(longest := self._longest(), len(longest)):
            ids = self.tokens(document, 0, length, cut=False)
            if len(ids) >= least:
                return ids
        raise DocumentError(
            f"expected documents of at least {least} tokens, found hardly any; "
            "train with fewer slots, a smaller chunk_size or longer documents"
        )

    def tokens(self, document: Document, start: int, most: int, *, cut: bool) -> list[int]:
        """Return up to so many tokens of a document, all there are from a place on; short of them only at its end.

        Args:
            document: One of these.
            start: The first byte.
            most: Tokens at most.
            cut: The first word may have been cut; begin with the one after it.
        """
        nbytes = most * BYTES_PER_TOKEN
        while True:
            text = document.read(start, nbytes)
            if cut:
                text = text.partition(" ")[2] or text
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"][:most]
            if len(ids) == most or start + nbytes >= document.nbytes:
                return list(ids)
            nbytes *= 2

    def _longest(self) -> list[Document]:
        return heapq.nlargest(LONGEST, chain.from_iterable(self.domains.values()), key=lambda d: d.nbytes)


def corpus_of(
    sources: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, documents: int, seed: int, held_out: float = 0.05
) -> tuple[Corpus, Corpus]:
    """Find the documents of folders and of data sets of the hub.

    Args:
        sources: Folders, see `local_documents`, and data sets, see `hub.fetch`.
        tokenizer: Of the model.
        documents: Of each data set, at most.
        seed: Of their choice.
        held_out: Share of each domain's documents kept apart.

    Returns:
        What to train on, and what was kept apart.

    Raises:
        DocumentError: If there is no text, or a line of JSON has none.
    """
    found: dict[str, list[Document]] = {}
    for source in sources:
        if source.startswith(hub.PREFIX):
            fetched = hub.fetch(source, documents=documents, seed=seed)
            found.setdefault(source, []).extend(_documents(fetched.glob("*")))
        else:
            for name, more in local_documents(Path(source).expanduser()).items():
                found.setdefault(name, []).extend(more)
    return split(found, tokenizer, held_out=held_out)


def local_documents(folder: Path) -> dict[str, list[Document]]:
    """Find the documents of a folder, by domain.

    Its subfolders are domains, see `corpora.domains`; where one is split into parts, only "train" is read. Files
    directly in it are one more domain. A folder that is split itself is one domain.
    """
    if is_split(folder):
        return {folder.resolve().name: list(_documents(files_of(folder, "train")))}
    try:
        files = domains(folder, "train")
    except DocumentError:
        files = {}
    found = {name: list(_documents(paths)) for name, paths in files.items()}
    found[""] = list(_documents(folder.glob("*")))
    return found


def split(
    domains: dict[str, list[Document]], tokenizer: PreTrainedTokenizerBase, *, held_out: float
) -> tuple[Corpus, Corpus]:
    """Keep a share of each domain's documents apart, at least one where there are two."""
    apart: dict[str, list[Document]] = {}
    rest: dict[str, list[Document]] = {}
    for name, documents in domains.items():
        # A folder that is named twice must not be on both sides.
        shuffled = sorted(dict.fromkeys(documents), key=lambda d: (d.file.name, d.start))
        random.Random(name).shuffle(shuffled)
        count = max(1, round(held_out * len(shuffled))) if len(shuffled) > 1 else 0
        apart[name], rest[name] = shuffled[:count], shuffled[count:]
    if not any(apart.values()):
        apart = rest
    return Corpus(rest, tokenizer), Corpus(apart, tokenizer)


def _documents(paths: Iterable[Path]) -> Iterable[Document]:
    for path in sorted(paths):
        if path.suffix not in SUFFIXES or path.stem in DESCRIPTIONS or not path.is_file():
            continue
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif (nbytes := path.stat().st_size) > 0:
            yield Document(path, 0, nbytes)


def _lines(path: Path) -> Iterable[Document]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                # Now, not when it is drawn after hours of training.
                _field(line, path, f", line {number}")
                yield Document(path, start, len(line))
            start += len(line)


def _field(line: bytes, file: Path, place: str = "") -> str:
    try:
        text = json.loads(line)["text"]
        if isinstance(text, str):
            # JSON can spell half a surrogate pair, which no tokenizer takes.
            return text.encode("utf-8", "replace").decode()
    except (ValueError, KeyError, TypeError):
        pass
    raise DocumentError(f"{file}{place}: expected lines of JSON with a 'text' field, got {line[:60]!r}")
