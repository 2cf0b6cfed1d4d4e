"""The merges of a byte-pair encoding, found again from its pieces."""

from collections.abc import Iterable, Mapping


def merges_of(pieces: Iterable[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Return the pairs that make pieces, those that are merged first in front.

    Args:
        pieces: In the order in which they may be made.
        ids: Of the pieces that a piece may be made of.
    """
    merges: list[tuple[str, str]] = []
    for piece in pieces:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        # Where several pairs make a piece, the one whose halves are made earlier comes first.
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges
