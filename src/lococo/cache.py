"""A transformers cache that holds a fixed number of entries per layer, however much is read.

Every layer owns one buffer of `num_slots + chunk_size` entries, written in place. A row of the batch fills it, and when
it is full and another token comes, the compressor makes `num_slots` slots of it: after `num_slots + chunk_size` tokens,
and then after every further `chunk_size`. That moment depends on nothing but the row's own number of tokens, so
left padding, batching, the way a text is cut into calls, and prefill against decode all give the same slots.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
)

from lococo import parallel
from lococo.compressors.base import Compressor
from lococo.errors import ArgumentError, LococoError
from lococo.latent_layer import LatentSlotLayer
from lococo.norms import norms_of
from lococo.past import Past, Step, is_windowed
from lococo.rope import Rotary
from lococo.rows import Chunk, Rows
from lococo.slot_layer import SlotLayer
from lococo.state_layer import StateLayer, StateSlotLayer, has_state, is_state, map_states, states_of_readers

Positions = Literal["original", "packed"]


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
            positions: "original" keeps every entry's own position. "packed" does so within the model's window; a text
                that leaves it has its slots moved back at every compression, so that it ends at three quarters of the
                window: a slot keeps its distance up to there, and older ones stand in a row, one position each.
            rotary: Rotates the model's keys.
            window: Positions the model was trained for; None: it says nothing, and positions stay original.
        """
        self.compressor = compressor
        self.chunk_size = chunk_size
        self.positions = positions
        self.window = window
        # Where texts that have left the window end. Models find little at distances near their window's size
        # (docs/log.md), and the slots of every layer must have positions of their own before the next chunk.
        self.packed_end = None if window is None else max(window * 3 // 4, max(slots_per_layer) + chunk_size)
        self.rotary = rotary
        self.rows = Rows(min(slots_per_layer) + chunk_size, chunk_size)
        self.incomplete = False
        # How compiled steps see it, see `steps`; made by the first of them.
        self.step: Any = None
        self.past: Past | None = None
        budgets = iter(slots_per_layer)

        def made(i: int, layer: Any) -> Any:
            if not grows(layer, window):
                return StateLayer(layer.number_of_states) if is_state(layer) else layer
            kind = LatentSlotLayer if i in rotary.latent else StateSlotLayer if has_state(layer) else SlotLayer
            return kind(i, next(budgets), chunk_size, compressor, self.rows, rotary.of_layer(i))

        super().__init__(layers=[made(i, layer) for i, layer in enumerate(layers)])

    @property
    def slot_layers(self) -> list[SlotLayer]:
        """The layers that hold slots."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    @property
    def holds_slots_alone(self) -> bool:
        """Whether every layer holds slots and nothing beside, so that each row is counted by itself."""
        return all(type(layer) in (SlotLayer, LatentSlotLayer) for layer in self.layers)

    def attended(self, layer_idx: int, key: Tensor) -> SlotLayer | None:
        """Return the slot layer whose keys these are: a layer's own, or another's that it shares; None: neither."""
        layer = self.layers[layer_idx]
        if isinstance(layer, DummyLayer):
            layer = next((each for each in self.slot_layers if each.keys.data_ptr() == key.data_ptr()), layer)
        return layer if isinstance(layer, SlotLayer) else None

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

    def is_like(self, other: "SlotCache") -> bool:
        """Tell whether both read in the same way: with one compressor, as many slots, chunks and positions."""
        names = ("compressor", "slots_per_layer", "chunk_size", "positions", "window")
        return all(getattr(self, name) == getattr(other, name) for name in names)

    def norms_holding(self, *, always: bool = False) -> AbstractContextManager[None]:
        """Let the compressor's changes of norms hold, for rows that hold slots, until the block ends.

        Args:
            always: Have factors at hand where no row holds slots, too: those of 1.
        """
        norms = norms_of(self.compressor)
        if norms is None:
            return nullcontext()
        return norms.holding([held > 0 for held in self.slot_layers[0].held], self.num_slots, always=always)

    def detach(self) -> None:
        """Cut the gradient off here: what follows does not reach what was read so far."""
        for layer in self.layers:
            if has_state(layer):
                map_states(layer, Tensor.detach)
            if isinstance(layer, SlotLayer):
                layer.detach()
            elif isinstance(layer, CacheLayerMixin) and layer.keys is not None and layer.values is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

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
        if batch < 1:
            raise ArgumentError("expected at least one row to read, got an empty batch")
        if not self.rows.tokens:
            self.rows.start(batch)
        if len(self.rows.tokens) != batch:
            raise ArgumentError(
                f"this cache has read a batch of {len(self.rows.tokens)}, now a batch of {batch} came; "
                "use a new cache, or `batch_repeat_interleave`"
            )
        if self.incomplete:
            raise LococoError("reading into this cache was interrupted halfway; reset() it and read again")
        before = self._recorded()
        waiting = [True] * batch if real is None else real.any(1).tolist()
        self.compress([row for row in range(batch) if waiting[row] and self.rows.room[row] == 0])
        chunk = self._next_chunk(batch, columns, real, position_ids, device)
        chunk.recorded = before is not None
        rows = copy.deepcopy(self.rows) if chunk.recorded else self.rows
        try:
            for layer in self.slot_layers:
                layer.chunk = chunk
            with states_of_readers([layer for layer in self.layers if has_state(layer)], chunk.counts):
                yield chunk
            for layer in self.slot_layers:
                layer.chunk_read()
            self.rows.advance(chunk)
            if self.past is not None and before is not None:
                self.past.add(Step(before, chunk, rows))
        except BaseException:
            # Slot layers take a chunk back by not counting it; transformers' own layers cannot.
            self.incomplete = not self.holds_slots_alone
            raise
        finally:
            for layer in self.slot_layers:
                layer.chunk = layer.pending_mass = None

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
        if position_ids is None:
            position_ids = torch.tensor(self.rows.next_position, device=device)[:, None] + ordinal - 1
        elif any(self.rows.shifted):
            position_ids = position_ids - torch.tensor(self.rows.shifted, device=device)[:, None]
        position_ids = position_ids.clamp(min=0)
        token_index = torch.tensor(self.rows.tokens, device=device)[:, None] + ordinal - 1
        return Chunk(length, counts, real, ordinal, token_index, position_ids[:, :length])

    def compress(self, rows: list[int]) -> None:
        """Make slots of everything that these rows hold, in every layer."""
        if not rows:
            return
        self.incomplete = True
        shift = {row: self._shift(row) for row in rows}
        layers = self.slot_layers
        parallel.each(
            [partial(layer.compress, rows, shift) for layer in layers], {layer.keys.device for layer in layers}
        )
        if any(shift.values()):
            self._shift_other_layers(shift)
        for row in rows:
            self.rows.compressed(row, shift[row])
        self.incomplete = False

    def _shift(self, row: int) -> int:
        """Return how far a row's positions must move back for the next chunk to end where it should."""
        if self.positions == "original" or self.window is None or self.packed_end is None:
            return 0
        end = self.rows.next_position[row] + self.chunk_size
        return 0 if end <= self.window and not self.rows.shifted[row] else max(0, end - self.packed_end)

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

    def _attending(self) -> list[Any]:
        """Return the layers that are more than a state, which transformers can neither select nor repeat."""
        return [layer for layer in self.layers if not is_state(layer)]

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can forget tokens, which transformers asks before it lets an assistant guess."""
        return self.past is not None

    def activate_past_recording(self) -> None:
        """Take down from here on what `crop` needs; transformers calls it before an assistant guesses tokens."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.past = Past()

    def _recorded(self) -> "SlotCache | None":
        """Return a copy to come back to, if the next chunk may be taken back."""
        if self.past is None:
            return None
        before = cast(SlotCache, fork(self))
        for layer in self.layers:
            if is_windowed(layer):
                layer.crop(0)  # the copy holds what it lets go here
        return before

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row, and keep for good what comes before them.

        Args:
            tokens_to_remove: Their number, negative; 0 only keeps.

        Raises:
            ArgumentError: If it is positive.
            LococoError: If they are more than was taken down since `activate_past_recording` or the last `crop`.
        """
        if tokens_to_remove > 0:
            raise ArgumentError(f"expected the negative number of tokens to forget, got {tokens_to_remove}")
        if self.past is not None:
            self.past.forget(self, -tokens_to_remove)
        elif tokens_to_remove:
            raise LococoError(
                "a SlotCache cannot forget tokens that it has not taken down; "
                "call activate_past_recording() before they are read"
            )

    def reset(self) -> None:
        """Forget everything that was read."""
        super().reset()  # type: ignore[no-untyped-call]
        self._settle()
        self.incomplete = False
        self.step = None  # which holds on to buffers
        self.rows.clear()

    def _settle(self) -> None:
        """Keep what was read for good: rows are no longer where recorded chunks had them."""
        if self.past is not None:
            self.past.steps.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams of a beam search."""
        self._settle()
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.rows.select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        self._settle()
        for layer in filter(has_state, self.layers):
            map_states(layer, lambda state: state.index_select(0, indices.to(state.device)))
        for layer in self._attending():
            layer.batch_select_indices(indices)
        self.rows.select(indices.tolist())

    def append(self, other: "SlotCache") -> None:
        """Hold the rows of another cache as well, behind these; they may have come to any other place.

        Rows that are held are left where they are as long as there is room behind them, so that requests can join
        others that are being answered.

        Args:
            other: Made by the same attachment, and has read something; it is left as it is.

        Raises:
            ArgumentError: If it differs in its settings, or holds sliding layers or states, whose rows must have come
                equally far.
        """
        if not self.holds_slots_alone:
            raise ArgumentError(
                "rows of a cache with sliding layers or recurrent states cannot join others; read them one by one"
            )
        if not self.is_like(other):
            raise ArgumentError("only caches of one attachment can be joined; make them with one `new_cache`")
        if not self.rows.tokens or not other.rows.tokens:
            raise ArgumentError("an empty cache cannot be joined; read something into it first")
        self._settle()
        self.step = None
        self.incomplete = self.incomplete or other.incomplete
        self.rows.append(other.rows)
        for layer, others in zip(self.slot_layers, other.slot_layers, strict=True):
            layer.append_rows(others)

    def remove(self, row: int) -> None:
        """Let a row of several go; the last one takes its place, and no other is moved."""
        assert self.holds_slots_alone
        assert len(self.rows.tokens) > 1
        self._settle()
        self.step = None
        self.rows.remove(row)
        for layer in self.slot_layers:
            layer.remove_row(row)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        self._settle()
        for layer in filter(has_state, self.layers):
            map_states(layer, lambda state: state.repeat_interleave(repeats, 0))
        for layer in self._attending():
            layer.batch_repeat_interleave(repeats)
        self.rows.select([row for row in range(len(self.rows.tokens)) for _ in range(repeats)])


def fork(cache: Cache) -> Cache:
    """Return a cache that holds the same and goes on by itself: what either reads later, the other does not see."""
    if not isinstance(cache, SlotCache):
        return copy.deepcopy(cache)
    made = copy.copy(cache)
    made.rows, made.step, made.past = copy.deepcopy(cache.rows), None, None
    made.layers = [
        layer.fork(made.rows) if isinstance(layer, SlotLayer) else copy.deepcopy(layer) for layer in cache.layers
    ]
    return made


def taken(cache: SlotCache, rows: Sequence[int]) -> SlotCache:
    """Return a cache of these rows of the batch alone, in this order, that goes on by itself."""
    indices = torch.tensor(list(rows))
    if not cache.holds_slots_alone:
        made = cast(SlotCache, fork(cache))
        made.batch_select_indices(indices)
        return made
    made = copy.copy(cache)
    made.rows, made.step, made.past = copy.deepcopy(cache.rows), None, None
    made.rows.select(rows)
    made.layers = [layer.taken(indices, made.rows) for layer in cache.slot_layers]
    return made


def kv_nbytes(cache: Cache) -> int:
    """Return the bytes of keys and values that a cache of transformers holds."""
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def grows(layer: object, window: int | None) -> bool:
    """Tell whether a layer of transformers' DynamicCache keeps every token, so that slots can take its place.

    Args:
        layer: Of that cache.
        window: Positions the model was trained for; a sliding window that is no smaller never slides within them.
    """
    if type(layer) is DynamicSlidingWindowLayer:
        return window is not None and layer.sliding_window >= window
    return type(layer) in (DynamicLayer, LinearAttentionAndFullAttentionLayer)
