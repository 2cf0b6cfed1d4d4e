"""Predictions by place in the text: how well the model foresees tokens far beyond its window, with slots alone.

The full cache has no say where it cannot read, so nothing is held against it: each way of reading is measured by itself
on the same documents, from their beginning on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lococo.attachment import Attachment, attach, window_of
from lococo.cache import Positions
from lococo.corpora import domains, texts_of
from lococo.documents import encode_stream
from lococo.errors import ArgumentError, DocumentError
from lococo.eval.perplexity import interval
from lococo.models import model_id
from lococo.progress import Counted, beyond
from lococo.reader import score
from lococo.results import Results, Row, key_of

FULL = "full"


@dataclass(frozen=True)
class Document:
    """What is read of one text.

    Attributes:
        domain: Where it is from.
        ids: Its first tokens, as many as the largest length that it has.
    """

    domain: str
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
    positions: Positions = "packed",
    results: Results | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Score documents from their beginning on, and sum up by place.

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
        positions: See `attach`.
        results: Where rows go as they are done; those that it holds already are not measured again.
        progress: Called with tokens read and all there are.

    Returns:
        One row per domain, compressor and length: task, model, domain, compressor, num_slots (None for "full"),
        chunk_size, positions, begin and length (tokens begin to length count), documents, tokens, nll (nats per token)
        with its 95 % interval low and high (bootstrap over documents), nll_so_far (of all tokens up to length, of the
        same documents), document_nll; and run, see `results`.

    Raises:
        ArgumentError: If a length or name is out of range.
        DocumentError: If no document has the largest length.
    """
    ends = sorted(set(lengths))
    if not ends or ends[0] < 2:
        raise ArgumentError(f"expected lengths of at least 2 tokens, got {list(lengths)}; raise --lengths")
    attached = {
        name: attach(model, name, num_slots=num_slots, chunk_size=chunk_size, positions=positions)
        for name in dict.fromkeys(compressors)
    }
    corpus = documents_of(tokenizer, data, ends, max_documents)
    results, window = Results() if results is None else results, window_of(model)
    total, done = sum(len(document.ids) for document in corpus) * len(attached), 0
    rows: list[Row] = []
    for domain in dict.fromkeys(document.domain for document in corpus):
        same = [document.ids for document in corpus if document.domain == domain]
        for name, attachment in attached.items():
            unread = attachment.compressor is None or positions == "original"
            most = window if unread and window is not None else max(map(len, same))
            parts = [end for end in ends if end <= min(most, max(map(len, same)))]
            settings = {
                "task": "positions",
                "model": model_id(model),
                "domain": domain,
                "compressor": Path(name).name,  # of a folder of heads
                "num_slots": None if attachment.compressor is None else num_slots,
                "chunk_size": chunk_size,
                "positions": positions,
            }
            measure = partial(_measured, model, attachment, same, parts, settings, beyond(progress, done, total))
            key = key_of(settings | {"ends": parts, "of": attachment.fingerprint(), "texts": same})
            before = len(results.rows)
            results.together(key, len(parts), measure)
            rows += results.rows[before:]
            done += sum(map(len, same))
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
        found += [Document(domain, ids) for ids in beginnings[:max_documents]]
    if longest < ends[-1]:
        raise DocumentError(
            f"expected a document of at least {ends[-1]} tokens, the longest has {longest}; lower --lengths or name "
            "longer documents"
        )
    return found


def _measured(
    model: PreTrainedModel,
    attachment: Attachment,
    documents: list[list[int]],
    ends: list[int],
    settings: Row,
    counted: Counted,
) -> list[Row]:
    """Read documents as far as the last end, and return a row per part."""
    nll, read = [], 0
    with attachment:
        for ids in documents:
            length = max((end for end in ends if end <= len(ids)), default=0)
            if length:
                scores = score(model, torch.tensor([ids[:length]]), attachment.new_cache())
                nll.append(-scores[0].double())
            read += len(ids)
            counted(read)
    # The first token is not foreseen, so the first part has one less.
    return [settings | _part(nll, max(0, begin - 1), end - 1) for begin, end in pairwise([0, *ends])]


def _part(nll: list[torch.Tensor], first: int, stop: int) -> Row:
    """Sum up the tokens that `first` to `stop` of the scores are of, over the documents that have them all."""
    there = [document for document in nll if len(document) >= stop]
    sums = [document[first:stop].sum().item() for document in there]
    counts = [stop - first] * len(there)
    low, high = interval(sums, counts)
    return {
        "begin": first + 1 if first else 0,
        "length": stop + 1,
        "documents": len(there),
        "tokens": sum(counts),
        "nll": sum(sums) / sum(counts),
        "low": low,
        "high": high,
        "nll_so_far": sum(document[:stop].mean().item() for document in there) / len(there),
        "document_nll": [total / count for total, count in zip(sums, counts, strict=True)],
    }
