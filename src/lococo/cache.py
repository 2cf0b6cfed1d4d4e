"""A transformers cache that holds a fixed number of entries per layer, however much is read.

Every layer owns one buffer of `num_slots + chunk_size` entries, written in place. A row of the batch fills it, and when
it is full and another token comes, the compressor makes `num_slots` slots of it: after `num_slots + chunk_size` tokens,
and then after every further `chunk_size`. That moment depends on nothing but the row's own number of tokens, so
left padding, batching, the way a text is cut into calls, and prefill against decode all give the same slots.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from lococo.compressors.base import Compressor
from lococo.entries import Entries, attention_mass
from lococo.errors import ArgumentError, LococoError
from lococo.rope import LayerRotary, Rotary

Positions = Literal["original", "packed"]


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
    """

    length: int
    counts: list[int]
    real: Tensor | None
    ordinal: Tensor
    token_index: Tensor
    position_ids: Tensor
    # Attention biases, shared by layers that hold the same number of entries.
    biases: dict[object, Tensor] = field(default_factory=dict)


class Rows:
    """What the layers share: how far each row of the batch has come.

    Attributes:
        seen: Columns read, padding included; what transformers calls the sequence length.
        tokens: Real tokens read, per row.
        fresh: Tokens since the row's last compression.
        room: Tokens that still fit before the row has to be compressed.
        next_position: Position of the row's next token.
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

    def start(self, batch: int) -> None:
        """Begin with this many rows."""
        self.tokens, self.fresh, self.next_position = [0] * batch, [0] * batch, [0] * batch
        self.room = [self.first_room] * batch

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

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        for name in ("tokens", "fresh", "room", "next_position"):
            values = getattr(self, name)
            setattr(self, name, [values[row] for row in rows])


class SlotLayer(CacheLayerMixin):
    """One layer's buffer: (b h num_slots + chunk_size d) keys and values, and what belongs to each entry."""

    is_sliding = False
    # Tensors with one row per sequence of the batch; None before the first token or where nothing observes them.
    row_tensors: ClassVar = ("keys", "values", "positions", "log_mass", "token_index", "mass", "queries")

    keys: Tensor  # None before the first token, when nothing asks for it
    values: Tensor
    positions: Tensor
    log_mass: Tensor
    token_index: Tensor
    mass: Tensor | None
    queries: Tensor | None

    def __init__(
        self, layer_idx: int, num_slots: int, chunk_size: int, compressor: Compressor, rows: Rows, rotary: LayerRotary
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer_idx = layer_idx
        self.num_slots = num_slots
        self.chunk_size = chunk_size
        self.compressor = compressor
        self.rows = rows
        self.rotary = rotary
        self.chunk: Chunk | None = None
        self.chunk_mass: Tensor | None = None
        self.scaling = 1.0
        self.softcap: float | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read."""
        self.is_initialized = False
        self.carries_mass = False
        self.held: list[int] = []
        for name in self.row_tensors:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffer for keys and values shaped like these, (b h q d)."""
        b, h, _, d = key_states.shape
        width = self.num_slots + self.chunk_size
        self.keys = key_states.new_zeros(b, h, width, d)
        self.values = value_states.new_zeros(b, h, width, value_states.shape[-1])
        self.positions = key_states.new_zeros(b, h, width, dtype=torch.float32)
        self.log_mass = torch.zeros_like(self.positions)
        self.token_index = torch.zeros_like(self.positions, dtype=torch.int64)
        if "mass" in self.compressor.observes:
            self.mass = torch.zeros_like(self.positions)
        self.held = [0] * b
        self.is_initialized = True

    @property
    def filled(self) -> list[int]:
        """Entries held per row."""
        return [held + fresh for held, fresh in zip(self.held, self.rows.fresh, strict=True)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a chunk's keys and values, (b h q d); return all that the chunk attends to, (b h s d)."""
        if self.chunk is None:
            raise LococoError(
                "a SlotCache was given to a model that is not attached; call the model inside `with lococo.attach(...)`"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        chunk, filled = self.chunk, self.filled
        batch = len(filled)
        self._write("keys", key_states, filled)
        self._write("values", value_states, filled)
        self._write("positions", chunk.position_ids.to(torch.float32).expand(batch, -1)[:, None], filled)
        self._write("token_index", chunk.token_index.expand(batch, -1)[:, None], filled)
        for name in ("log_mass", "mass"):
            if getattr(self, name) is not None:
                self._write(name, self.positions.new_zeros(1).expand(batch, 1, chunk.length), filled)
        width = self._width(filled)
        return self.keys[:, :, :width], self.values[:, :, :width]

    def _width(self, filled: list[int]) -> int:
        assert self.chunk is not None
        return max(1, *(held + count for held, count in zip(filled, self.chunk.counts, strict=True)))

    def _write(self, name: str, new: Tensor, filled: list[int]) -> None:
        """Write a chunk's (b h q ...) behind the entries of each row."""
        assert self.chunk is not None
        buffer = getattr(self, name)
        if buffer.requires_grad or new.requires_grad:
            # Earlier steps of the graph have saved views of the buffer: leave them as they are.
            buffer = buffer.clone()
            setattr(self, name, buffer)
        if self.chunk.real is None and len(set(filled)) == 1:
            buffer[:, :, filled[0] : filled[0] + self.chunk.length] = new
            return
        row, column = self._real_columns()
        target = torch.tensor(filled, device=new.device)[row] + self.chunk.ordinal.expand(len(filled), -1)[row, column]
        buffer[row, :, target - 1] = new[row, :, column]

    def _real_columns(self) -> tuple[Tensor, Tensor]:
        assert self.chunk is not None
        real = self.chunk.real
        if real is None:
            real = torch.ones(len(self.held), self.chunk.length, dtype=torch.bool, device=self.keys.device)
        row, column = real.nonzero(as_tuple=True)
        return row, column

    def visible(self) -> Tensor:
        """Return how many leading entries each query of the chunk sees, (b q) or (1 q); at least 1, for padding."""
        assert self.chunk is not None
        filled = self.filled
        if len(set(filled)) == 1:
            return (self.chunk.ordinal + filled[0]).clamp(min=1)
        return (self.chunk.ordinal + torch.tensor(filled, device=self.keys.device)[:, None]).clamp(min=1)

    def attention_bias(self, query: Tensor) -> Tensor | None:
        """Return what is added to the attention logits of a chunk's queries.

        Args:
            query: (b h*g q d).

        Returns:
            Causality within the chunk, padding and log_mass, (b|1 h*g|1 q s) in the dtype of `query`; None where every
            query sees every entry alike.
        """
        assert self.chunk is not None
        filled = self.filled
        width = self._width(filled)
        uniform = self.chunk.real is None and len(set(filled)) == 1
        if uniform and self.chunk.length == 1 and not self.carries_mass:
            return None
        key = (tuple(filled), width)
        bias = self.chunk.biases.get(key)
        if bias is None:
            hidden = torch.arange(width, device=query.device) >= self.visible()[..., None]
            bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            bias = bias.masked_fill_(hidden, torch.finfo(query.dtype).min)[:, None]
            self.chunk.biases[key] = bias
        if not self.carries_mass:
            return bias
        groups = query.shape[1] // self.keys.shape[1]
        log_mass = self.log_mass[:, :, :width].to(query.dtype).repeat_interleave(groups, 1)
        return bias + log_mass[:, :, None]

    @torch.no_grad()
    def observe(self, query: Tensor, scaling: float, softcap: float | None) -> None:
        """Take down what the compressor asked for from a chunk's queries, (b h*g q d)."""
        assert self.chunk is not None
        self.scaling, self.softcap = scaling, softcap
        b, heads, q, d = query.shape
        h = self.keys.shape[1]
        queries = query.view(b, h, heads // h, q, d)
        if "queries" in self.compressor.observes:
            if self.queries is None:
                self.queries = queries.new_zeros(b, h, heads // h, self.chunk_size, d)
            # A ring: the query of a row's n-th token lies at n modulo chunk_size.
            place = self.chunk.token_index % self.chunk_size
            if self.chunk.real is None and len(set(self.rows.tokens)) == 1:
                self.queries[:, :, :, place[0]] = queries
            else:
                row, column = self._real_columns()
                self.queries[row, :, :, place.expand(b, -1)[row, column]] = queries[row, :, :, column]
        if self.mass is not None:
            width = self._width(self.filled)
            # Added once the whole chunk is read: one that is interrupted must leave no trace.
            self.chunk_mass = attention_mass(
                self.keys[:, :, :width],
                self.log_mass[:, :, :width],
                queries,
                scaling=scaling,
                softcap=softcap,
                visible=self.visible(),
                weight=None if self.chunk.real is None else self.chunk.real.float(),
            )

    def chunk_read(self) -> None:
        """Keep what was observed of a chunk, now that every layer has read it."""
        if self.mass is not None and self.chunk_mass is not None:
            self.mass[:, :, : self.chunk_mass.shape[2]] += self.chunk_mass

    def compress(self, rows: list[int], shift: dict[int, int]) -> None:
        """Make slots of the entries of these rows.

        Args:
            rows: Rows whose buffer is full.
            shift: Per row how many positions its entries move towards 0, where they stop.
        """
        filled = self.filled
        groups: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            groups[filled[row]].append(row)
        for count, group in groups.items():
            entries = self.entries(group, count)
            if count > self.num_slots:
                entries = self.compressor.compress(entries, self.num_slots, self.layer_idx)
                self.carries_mass = self.carries_mass or bool(entries.log_mass.any())
            if any(shift[row] for row in group):
                entries = _moved_back(entries, [shift[row] for row in group])
            self._store(group, entries)
            for row in group:
                self.held[row] = len(entries)

    def entries(self, rows: list[int], count: int) -> Entries:
        """Return the first `count` entries of rows that hold as many."""
        index = self._row_index(rows)
        queries = None
        if self.queries is not None:
            order = torch.arange(self.chunk_size) + torch.tensor([[self.rows.tokens[row]] for row in rows])
            order = (order % self.chunk_size).to(self.keys.device)
            ring = self.queries[index]
            queries = ring.gather(3, order[:, None, None, :, None].expand_as(ring))
        return Entries(
            keys=self.keys[index][:, :, :count],
            values=self.values[index][:, :, :count],
            positions=self.positions[index][:, :, :count],
            log_mass=self.log_mass[index][:, :, :count],
            token_index=self.token_index[index][:, :, :count],
            mass=None if self.mass is None else self.mass[index][:, :, :count],
            queries=queries,
            rotary=self.rotary,
            scaling=self.scaling,
            softcap=self.softcap,
        )

    def _store(self, rows: list[int], entries: Entries) -> None:
        index = self._row_index(rows)
        for name in ("keys", "values", "positions", "log_mass", "token_index", "mass"):
            new = getattr(entries, name)
            if new is None:
                continue
            buffer = getattr(self, name)
            if buffer.requires_grad or new.requires_grad:
                buffer = buffer.clone()
                setattr(self, name, buffer)
            buffer[index, :, : len(entries)] = new

    def _row_index(self, rows: list[int]) -> Tensor | slice:
        return slice(None) if len(rows) == len(self.held) else torch.tensor(rows, device=self.keys.device)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may be taken more than once."""
        if not self.is_initialized:
            return
        for name in self.row_tensors:
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))
        self.held = [self.held[row] for row in rows.tolist()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams of a beam search."""
        self.select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self.select_rows(torch.arange(len(self.held)).repeat_interleave(repeats))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of transformers' mask: of the chunk alone, since slots are visible to every query."""
        return query_length, self.rows.seen

    def get_seq_length(self) -> int:
        """Return the columns read so far."""
        return self.rows.seen

    def get_max_length(self) -> int:
        """Return -1: any number of tokens can be read."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: what was compressed cannot be taken back."""
        if tokens_to_remove:
            raise LococoError(
                "a SlotCache cannot forget its last tokens, which assisted decoding and prompt lookup ask for; "
                "generate without an assistant, or with compressor 'full'"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of everything the layer holds."""
        tensors = (getattr(self, name) for name in self.row_tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


class SlotCache(Cache):
    """A fixed number of slots per layer as `past_key_values`; made by `Attachment.new_cache`.

    Example:
        >>> with lococo.attach(model, "mass-merge", num_slots=256) as slots:
        ...     model.generate(**inputs, past_key_values=slots.new_cache())
    """

    def __init__(
        self,
        layers: Sequence[Any],
        compressor: Compressor,
        slots_per_layer: Sequence[int],
        chunk_size: int,
        positions: Positions,
        rotary: Rotary,
        window: int | None,
    ) -> None:
        """Put slot layers where `layers` (of an empty DynamicCache) has layers that grow.

        Args:
            layers: One layer per decoder layer; sliding ones stay transformers' own.
            compressor: Makes slots of entries.
            slots_per_layer: Number of slots of each layer that grows, in order.
            chunk_size: Tokens per forward pass.
            positions: "original" keeps every entry's own position. "packed" does so within the model's window, and
                beyond it moves the slots back at every compression, so that no position ever leaves the window: a slot
                keeps its distance up to the window's size, and older ones share the largest.
            rotary: Rotates the model's keys.
            window: Positions the model was trained for; None: it says nothing, and positions stay original.
        """
        self.compressor = compressor
        self.chunk_size = chunk_size
        self.positions = positions
        self.window = window
        self.rotary = rotary
        self.rows = Rows(min(slots_per_layer) + chunk_size, chunk_size)
        self.incomplete = False
        budgets = iter(slots_per_layer)
        super().__init__(
            layers=[
                SlotLayer(i, next(budgets), chunk_size, compressor, self.rows, rotary.of_layer(i))
                if grows(layer)
                else layer
                for i, layer in enumerate(layers)
            ]
        )

    @property
    def slot_layers(self) -> list[SlotLayer]:
        """The layers that hold slots."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def slots_per_layer(self) -> list[int]:
        """Number of slots of each layer that holds slots."""
        return [layer.num_slots for layer in self.slot_layers]

    @property
    def num_slots(self) -> float:
        """Mean number of slots per layer."""
        return sum(self.slots_per_layer) / len(self.slots_per_layer)

    @property
    def seen(self) -> int:
        """Tokens of the longest row read so far."""
        return max(self.rows.tokens, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all slot layers, observations included."""
        return sum(layer.nbytes for layer in self.slot_layers)

    @property
    def kv_nbytes(self) -> int:
        """Bytes of keys and values alone."""
        return kv_nbytes(self)

    def room(self) -> int:
        """Return how many tokens the next forward pass best takes: what fits before the next compression."""
        rooms = [room or self.chunk_size for room in self.rows.room] or [self.rows.first_room]
        return min(self.chunk_size, *rooms)

    @contextmanager
    def chunk(
        self, batch: int, columns: int, real: Tensor | None, position_ids: Tensor | None, device: torch.device
    ) -> Iterator[Chunk]:
        """Take the next chunk of a call: compress the rows that are full, and hold the chunk while the model reads it.

        Args:
            batch: Rows.
            columns: Columns left to read.
            real: Which of them are tokens and not padding, (b columns); None: all.
            position_ids: Their positions, (b columns) or (1 columns); None: the cache counts.
            device: Of the model's input.

        Yields:
            The chunk, at most `chunk_size` and at most `columns` long. It counts as read when the block ends well.

        Raises:
            ArgumentError: If the batch is not the one that was read so far.
        """
        if not self.rows.tokens:
            self.rows.start(batch)
        if len(self.rows.tokens) != batch:
            raise ArgumentError(
                f"this cache has read a batch of {len(self.rows.tokens)}, now a batch of {batch} came; "
                "use a new cache, or `batch_repeat_interleave`"
            )
        waiting = [True] * batch if real is None else real.any(1).tolist()
        self.compress([row for row in range(batch) if waiting[row] and self.rows.room[row] == 0])
        chunk = self._next_chunk(batch, columns, real, position_ids, device)
        try:
            for layer in self.slot_layers:
                layer.chunk = chunk
            yield chunk
            for layer in self.slot_layers:
                layer.chunk_read()
            self.rows.advance(chunk)
        finally:
            for layer in self.slot_layers:
                layer.chunk = layer.chunk_mass = None

    def _next_chunk(
        self, batch: int, columns: int, real: Tensor | None, position_ids: Tensor | None, device: torch.device
    ) -> Chunk:
        length = min(columns, self.chunk_size)
        if real is None:
            length = min(length, *self.rows.room)
            counts = [length] * batch
        else:
            room = torch.tensor(self.rows.room, device=real.device)
            length = min(length, int((real.cumsum(1) <= room[:, None]).sum(1).min()))
            real = real[:, :length]
            counts = real.sum(1).tolist()
            if min(counts) == length:
                real = None
        ordinal = torch.arange(1, length + 1, device=device)[None] if real is None else real.cumsum(1)
        if position_ids is None or self.positions == "packed":
            start = torch.tensor(self.rows.next_position, device=device)[:, None]
            position_ids = (start + ordinal - 1).clamp(min=0)
        token_index = torch.tensor(self.rows.tokens, device=device)[:, None] + ordinal - 1
        return Chunk(length, counts, real, ordinal, token_index, position_ids[:, :length])

    def compress(self, rows: list[int]) -> None:
        """Make slots of everything that these rows hold, in every layer."""
        if not rows:
            return
        if self.incomplete:
            raise LococoError("a compression of this cache was interrupted halfway; reset() it and read again")
        self.incomplete = True
        shift = {row: self._shift(row) for row in rows}
        for layer in self.slot_layers:
            layer.compress(rows, shift)
        if any(shift.values()):
            self._shift_other_layers(shift)
        for row in rows:
            self.rows.compressed(row, shift[row])
        self.incomplete = False

    def _shift(self, row: int) -> int:
        """Return how far a row's positions must move back for the next chunk to end inside the window."""
        if self.positions == "original" or self.window is None:
            return 0
        return max(0, self.rows.next_position[row] + self.chunk_size - self.window)

    def _shift_other_layers(self, shift: dict[int, int]) -> None:
        """Move the keys of layers without slots (sliding windows) along with the positions of their rows."""
        for layer_idx, layer in enumerate(self.layers):
            if isinstance(layer, SlotLayer) or getattr(layer, "keys", None) is None:
                continue
            assert isinstance(layer, CacheLayerMixin)
            assert layer.keys is not None
            delta = torch.zeros(layer.keys.shape[0], 1, 1, device=layer.keys.device)
            for row, distance in shift.items():
                delta[row] = -distance
            layer.keys = self.rotary.of_layer(layer_idx).rotate(layer.keys, delta)

    def reset(self) -> None:
        """Forget everything that was read."""
        super().reset()  # type: ignore[no-untyped-call]
        self.incomplete = False
        self.rows.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams of a beam search."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        super().batch_select_indices(indices)
        self.rows.select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.rows.select([row for row in range(len(self.rows.tokens)) for _ in range(repeats)])


def kv_nbytes(cache: Cache) -> int:
    """Return the bytes of keys and values that a cache of transformers holds."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def grows(layer: object) -> bool:
    """Tell whether a layer of transformers' DynamicCache keeps every token, so that slots can take its place."""
    return type(layer) is DynamicLayer


def _moved_back(entries: Entries, shift: list[int]) -> Entries:
    """Rotate entries by `shift` positions (one per row) towards 0; what would fall below stays at 0."""
    distance = torch.tensor(shift, dtype=torch.float32, device=entries.keys.device)[:, None, None]
    positions = (entries.positions - distance).clamp(min=0)
    return replace(
        entries, keys=entries.rotary.rotate(entries.keys, positions - entries.positions), positions=positions
    )
