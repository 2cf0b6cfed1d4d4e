"""How far each row of a batch has come, and how the columns of a forward pass fall on the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Chunk:
    """How the columns of one forward pass fall on the rows of the batch.

    Attributes:
        length: Columns, at most `chunk_size`.
        counts: Real tokens per row.
        real: Which columns are tokens and not padding, (b q); None where all are.
        ordinal: Number of each column among the chunk's real tokens of its row, from 1, (b q) or (1 q).
        token_index: The same among all tokens of the row, from 0, (b q).
        position_ids: Positions for RoPE, (b q) or (1 q).
        recorded: Whether it may be taken back, see `past`.
    """

    length: int
    counts: list[int]
    real: Tensor | None
    ordinal: Tensor
    token_index: Tensor
    position_ids: Tensor
    recorded: bool = False
    # Attention biases by how much more each row holds than the first, as wide as any layer so far needed.
    biases: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def first(self, length: int) -> "Chunk":
        """Return its first columns."""
        real = None if self.real is None else self.real[:, :length]
        return Chunk(
            length,
            [length] * len(self.counts) if real is None else real.sum(1).tolist(),
            real,
            self.ordinal[:, :length],
            self.token_index[:, :length],
            self.position_ids[:, :length],
            self.recorded,
        )


# What `Rows` counts of each.
PER_ROW = ("tokens", "fresh", "room", "next_position", "shifted")


class Rows:
    """What the layers share: how far each row of the batch has come.

    Attributes:
        seen: Columns read, padding included; what transformers calls the sequence length.
        tokens: Real tokens read, per row.
        fresh: Tokens since the row's last compression.
        room: Tokens that still fit before the row has to be compressed.
        next_position: Position of the row's next token.
        shifted: How far the row's positions were moved back so far.
    """

    def __init__(self, first_room: int, chunk_size: int) -> None:
        self.first_room = first_room
        self.chunk_size = chunk_size
        self.clear()

    def clear(self) -> None:
        """Forget every row."""
        self.seen = 0
        self.tokens: list[int] = []
        self.fresh: list[int] = []
        self.room: list[int] = []
        self.next_position: list[int] = []
        self.shifted: list[int] = []

    def start(self, batch: int) -> None:
        """Begin with this many rows."""
        self.tokens, self.fresh, self.next_position = [0] * batch, [0] * batch, [0] * batch
        self.room, self.shifted = [self.first_room] * batch, [0] * batch

    def advance(self, chunk: Chunk) -> None:
        """Count a chunk as read."""
        self.seen += chunk.length
        last = chunk.position_ids[:, -1].tolist()
        for row, count in enumerate(chunk.counts):
            self.tokens[row] += count
            self.fresh[row] += count
            self.room[row] -= count
            if count:
                self.next_position[row] = int(last[row % len(last)]) + 1

    def compressed(self, row: int, shift: int) -> None:
        """Note that a row was compressed and its positions moved back by `shift`."""
        self.fresh[row] = 0
        self.room[row] = self.chunk_size
        self.next_position[row] -= shift
        self.shifted[row] += shift

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        for name in PER_ROW:
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])

    def append(self, others: "Rows") -> None:
        """Count other rows as well, behind these."""
        self.seen = max(self.seen, others.seen)
        for name in PER_ROW:
            setattr(self, name, getattr(self, name) + getattr(others, name))

    def remove(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        for name in PER_ROW:
            values = getattr(self, name)
            values[row] = values[-1]
            values.pop()
