"""Predictions by place in the text: how well the model foresees tokens far beyond its window, with slots alone.

The full cache has no say where it cannot read, so nothing is held against it: each way of reading is measured by itself
on the same documents, from their beginning on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import Attachment, attach, window_of
from lococo.cache import Positions
from lococo.corpora import domains, texts_of
from lococo.errors import ArgumentError, DocumentError
from lococo.eval.labels import check_labels, label
from lococo.eval.perplexity import interval
from lococo.models import model_id
from lococo.reader import score
from lococo.results import Results, Row, key_of
from lococo.tokenization import encode_stream

# Rows that are alike in these are of documents that are put together.
SAME = ("task", "model", "domain", "compressor", "num_slots", "chunk_size", "positions")


@dataclass(frozen=True)
class Document:
    """What is read of one text.

    Attributes:
        domain: Where it is from.
        number: Its place among the documents of its domain.
        ids: Its first tokens, as many as the largest length that it has.
    """

    domain: str
    number: int
    ids: list[int]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: Path | Mapping[str, Sequence[Path]],
    compressors: Sequence[str],
    num_slots: int = 512,
    chunk_size: int = 256,
    lengths: Sequence[int],
    max_documents: int = 4,
    batch: int = 1,
    positions: Positions = "packed",
    results: Results | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Score documents from their beginning on.

    Every token but a document's first counts.

    Args:
        model: Not attached.
        tokenizer: The model's.
        data: One subfolder per domain, see `corpora.domains`; or the files of each domain.
        compressors: Names; "full" reads no further than the model's window.
        num_slots: Mean over the layers.
        chunk_size: Tokens per forward pass.
        lengths: Where parts of a text end, in tokens. A part counts in documents that are at least as long as it ends.
        max_documents: Per domain, those first that come first.
        batch: Documents of the same length that are read side by side, which is faster on a GPU.
        positions: See `attach`.
        results: Where rows go as they are done; those that it holds already are not measured again.
        progress: Called with tokens read and all there are.

    Returns:
        One row per document and compressor: task, model, domain, document (its number in the domain), compressor,
        num_slots (None for "full"), chunk_size, positions, and parts, each with begin and length (tokens begin to
        length count), tokens, and nll (nats per token); and run, see `results`. `summary` puts documents together.

    Raises:
        ArgumentError: If a length or name is out of range.
        DocumentError: If no document has the largest length.
    """
    ends = sorted(set(lengths))
    if not ends or ends[0] < 2:
        raise ArgumentError(f"expected lengths of at least 2 tokens, got {list(lengths)}; raise --lengths")
    check_labels(compressors)
    attached = {
        name: attach(model, name, num_slots=num_slots, chunk_size=chunk_size, positions=positions)
        for name in dict.fromkeys(compressors)
    }
    corpus = documents_of(tokenizer, data, ends, max_documents)
    results, window = Results() if results is None else results, window_of(model)
    total, done = sum(len(document.ids) for document in corpus) * len(attached), 0
    rows: list[Row] = []
    for together in _side_by_side(corpus, batch):
        for name, attachment in attached.items():
            unread = attachment.compressor is None or positions == "original"
            most = window if unread and window is not None else len(together[0].ids)
            parts = [end for end in ends if end <= min(most, len(together[0].ids))]
            done += sum(len(document.ids) for document in together)
            if not parts:
                continue
            reading = _Reading(model, attachment, together, parts)
            for row, document in enumerate(together):
                settings = {
                    "task": "positions",
                    "model": model_id(model),
                    "domain": document.domain,
                    "document": document.number,
                    "compressor": label(name),
                    "num_slots": None if attachment.compressor is None else num_slots,
                    "chunk_size": chunk_size,
                    "positions": positions,
                }
                key = attachment.fingerprint() + key_of({"ends": parts, "ids": document.ids[: parts[-1]]})
                rows.append(results.measured(settings, partial(reading.of, row), of=key))
            if progress is not None:
                progress(done, total)
    return rows


def documents_of(
    tokenizer: PreTrainedTokenizerBase,
    data: Path | Mapping[str, Sequence[Path]],
    ends: Sequence[int],
    max_documents: int,
) -> list[Document]:
    """Return the beginnings of the first documents of each domain that are as long as the largest length, or nearly.

    Where a domain has fewer that long, those follow that have the next smaller length, and so on.

    Raises:
        DocumentError: If no document of any domain has the largest length.
    """
    found: list[Document] = []
    longest = 0
    for domain, files in (domains(data) if isinstance(data, Path) else data).items():
        beginnings: list[list[int]] = []
        for text in (text for file in files for text in texts_of(file)):
            ids = list(islice(chain.from_iterable(encode_stream(tokenizer, text)), ends[-1]))
            longest = max(longest, len(ids))
            if len(ids) >= ends[0]:
                beginnings.append(ids[: max(end for end in ends if end <= len(ids))])
            if sum(len(ids) == ends[-1] for ids in beginnings) == max_documents:
                break
        beginnings.sort(key=len, reverse=True)  # stable: of equal ones the first comes first
        found += [Document(domain, number, ids) for number, ids in enumerate(beginnings[:max_documents])]
    if longest < ends[-1]:
        raise DocumentError(
            f"expected a document of at least {ends[-1]} tokens, the longest has {longest}; lower --lengths or name "
            "longer documents"
        )
    return found


def _side_by_side(corpus: Sequence[Document], batch: int) -> Iterator[list[Document]]:
    """Yield documents of the same length together, at most so many, in their order."""
    by_length: dict[int, list[Document]] = {}
    for document in corpus:
        by_length.setdefault(len(document.ids), []).append(document)
    for same in by_length.values():
        for start in range(0, len(same), batch):
            yield same[start : start + batch]


class _Reading:
    """Documents read side by side as far as the last end, once one of them is asked for."""

    def __init__(
        self, model: PreTrainedModel, attachment: Attachment, documents: Sequence[Document], ends: list[int]
    ) -> None:
        self.model, self.attachment, self.ends = model, attachment, ends
        self.ids = [document.ids[: ends[-1]] for document in documents]
        self.scores: Tensor | None = None

    def of(self, row: int) -> Row:
        """Return the parts of one document."""
        if self.scores is None:
            with self.attachment:
                self.scores = score(self.model, torch.tensor(self.ids), self.attachment.new_cache()).cpu().double()
        parts = []
        for begin, end in pairwise([0, *self.ends]):
            # Score n is of token n + 1, since the first token is not foreseen.
            own = self.scores[row, max(0, begin - 1) : end - 1]
            parts.append({"begin": begin, "length": end, "tokens": len(own), "nll": -own.mean().item()})
        return {"parts": parts}


def summary(rows: Sequence[Row]) -> list[Row]:
    """Put the documents of each domain together.

    Args:
        rows: Of `evaluate`.

    Returns:
        One row per domain, model, compressor, number of slots and part: these, begin, length, documents, tokens, nll
        with its 95 % interval low and high (bootstrap over documents), and nll_so_far, of all tokens up to length of
        the same documents.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SAME), []).append(row)
    made = []
    for key, same in groups.items():
        for length in sorted({part["length"] for row in same for part in row["parts"]}):
            read = [[part for part in row["parts"] if part["length"] <= length] for row in same]
            read = [parts for parts in read if parts and parts[-1]["length"] == length]
            made.append(dict(zip(SAME, key, strict=True)) | _together(read))
    return made


def _together(read: list[list[Row]]) -> Row:
    """Sum up the last part of each document's, and all of them."""
    last = [parts[-1] for parts in read]
    counts = [part["tokens"] for part in last]
    sums = [part["nll"] * part["tokens"] for part in last]
    low, high = interval(sums, counts)
    every = [part for parts in read for part in parts]
    return {
        "begin": last[0]["begin"],
        "length": last[0]["length"],
        "documents": len(read),
        "tokens": sum(counts),
        "nll": sum(sums) / sum(counts),
        "low": low,
        "high": high,
        "nll_so_far": sum(p["nll"] * p["tokens"] for p in every) / sum(p["tokens"] for p in every),
    }
