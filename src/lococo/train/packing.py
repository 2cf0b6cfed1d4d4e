"""Long windows: a document, or several one after the other, up to an exact number of tokens.

A window is a list of pieces, each of one document; whoever reads them begins anew with each. Like `Corpus.window`, any
of them can be drawn without those before it.
"""

import random

from lococo.errors import DocumentError
from lococo.train.data import BYTES_PER_TOKEN, Corpus, Document
from lococo.train.extension import Begin

# A piece of one token foretells nothing.
LEAST = 2

# Documents that are tried one after the other before a corpus counts as empty.
ATTEMPTS = 1000

# Documents that fill no window are drawn so often in vain before they are packed.
REDRAWN = 100

# Documents, the largest first, of which one must be as long as a window.
TRIED = 8


def packed_window(
    corpus: Corpus, seed: int, number: int, *, length: int, begin: Begin, short: bool = False, alone: bool = False
) -> list[list[int]]:
    """Draw a window of one domain; domains take turns.

    Args:
        corpus: To draw from.
        seed: Of the drawing.
        number: Which window.
        length: Tokens in all; one less where a single one is left over.
        begin: Where in a document a piece begins. Those that are shorter than what is missing are taken whole.
        short: Take documents that are shorter than a window as well; else only where none is found that is as long.
        alone: Take one document that fills the window, or none.

    Returns:
        Token ids of each piece, in order.

    Raises:
        DocumentError: If the documents of the domain are all but empty.
    """
    draw = random.Random(f"{seed}/{number}/packed")
    names = list(corpus.domains)
    documents = corpus.domains[names[number % len(names)]]
    weights = [document.nbytes for document in documents]
    if not short:  # a token is a byte at least
        enough = [nbytes if nbytes >= length else 0 for nbytes in weights]
        weights = enough if any(enough) else weights
    pieces: list[list[int]] = []
    missing = length
    for attempt in range(ATTEMPTS):
        document = draw.choices(documents, weights)[0]
        ids = _piece(corpus, document, draw.random() if begin == "random" else 0.0, missing)
        if not short and len(ids) < missing and (alone or attempt < REDRAWN):
            continue
        if len(ids) >= LEAST:
            pieces.append(ids)
            missing -= len(ids)
        if missing < LEAST:
            return pieces
    raise DocumentError(
        f"expected documents that make up {length} tokens, {ATTEMPTS} of them left {missing} to be filled; "
        "lower length, or train on longer documents"
    )


def check_longest(corpus: Corpus, length: int) -> None:
    """Refuse a corpus of which no document is as long as a window: nothing far back could be learned from it.

    Raises:
        DocumentError: Says how long the longest is.
    """
    every = [document for documents in corpus.domains.values() for document in documents]
    longest = 0
    for document in sorted(every, key=lambda d: -d.nbytes)[:TRIED]:
        longest = max(longest, len(_piece(corpus, document, 0.0, length)))
        if longest >= length:
            return
    raise DocumentError(
        f"expected a document of at least {length} tokens, the longest has {longest}; lower length, name longer "
        "documents with --data, or pack short ones with --short-documents"
    )


def _piece(corpus: Corpus, document: Document, place: float, most: int) -> list[int]:
    """Return so many tokens of a document, or all it has, from a place (0 to 1) that leaves as many behind it."""
    start = int(place * max(0, document.nbytes - BYTES_PER_TOKEN * most))
    while True:
        ids = corpus.tokens(document, start, most, cut=start > 0)
        if len(ids) == most or start == 0:
            return ids
        start = max(0, 2 * start - document.nbytes)  # with twice as many bytes behind it
