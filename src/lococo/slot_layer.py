"""One layer's buffer of slots and fresh entries, written in place."""

import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from lococo import kernels
from lococo.compressors.base import Compressor
from lococo.entries import Entries, attention_mass
from lococo.errors import LococoError
from lococo.rope import LayerRotary, lasting
from lococo.rows import Chunk, Rows


class SlotLayer(CacheLayerMixin):
    """One layer's buffer: (b h num_slots + chunk_size d) keys and values, and what belongs to each entry."""

    is_sliding = False
    # Tensors with one row per sequence of the batch; None before the first token or where nothing observes them.
    row_tensors: ClassVar = ("keys", "values", "positions", "log_mass", "token_index", "mass", "remembered", "queries")

    keys: Tensor  # None before the first token, when nothing asks for it
    values: Tensor
    positions: Tensor
    log_mass: Tensor
    token_index: Tensor
    mass: Tensor | None
    remembered: Tensor | None
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
        self.pending_mass: Tensor | None = None
        # Queries of a recorded chunk and the mass before it, to observe its beginning again, see `past`.
        self.latest: tuple[Tensor, Tensor] | None = None
        # Buffers that the graph of a gradient has saved views of, though they need none themselves.
        self.lent: set[str] = set()
        self.scaling = 1.0
        self.softcap: float | None = None
        self.sinks: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything that was read."""
        self.is_initialized = False
        self.carries_mass = False
        self.latest = None
        self.lent.clear()
        self.held: list[int] = []
        for name in self.row_tensors:
            setattr(self, name, None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffer for keys and values shaped like these, (b h q d)."""
        b, h, _, d = key_states.shape
        width = self.num_slots + self.chunk_size
        with lasting():
            self.keys = key_states.new_zeros(b, h, width, d)
            self.values = value_states.new_zeros(b, h, width, value_states.shape[-1])
            self.positions = key_states.new_zeros(b, h, width, dtype=torch.float32)
            self.log_mass = torch.zeros_like(self.positions)
            self.token_index = torch.zeros_like(self.positions, dtype=torch.int64)
            for name in ("mass", "remembered"):
                if name in self.compressor.observes:
                    setattr(self, name, torch.zeros_like(self.positions))
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
        for name in ("log_mass", "mass", "remembered"):
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
        buffer = self._writable(name, new)
        if self.chunk.real is None and len(set(filled)) == 1:
            buffer[:, :, filled[0] : filled[0] + self.chunk.length] = new
            return
        row, column = self._real_columns()
        target = torch.tensor(filled, device=new.device)[row] + self.chunk.ordinal.expand(len(filled), -1)[row, column]
        buffer[row, :, target - 1] = new[row, :, column]

    def _writable(self, name: str, new: Tensor) -> Tensor:
        """Return a buffer that `new` may be written to: a copy where a gradient still needs what it held."""
        buffer: Tensor = getattr(self, name)
        if buffer.requires_grad or new.requires_grad or name in self.lent:
            # Earlier steps of the graph have saved views of the buffer: leave them as they are.
            buffer = buffer.clone()
            setattr(self, name, buffer)
            self.lent.discard(name)
        return buffer

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
        bias = self.shared_bias(query)
        if bias is None or bias.shape[1] == 1:
            return bias
        return bias.repeat_interleave(query.shape[1] // bias.shape[1], 1)

    def shared_bias(self, query: Tensor) -> Tensor | None:
        """Return `attention_bias` once for all query heads that share a key/value head, (b|1 h|1 q s)."""
        assert self.chunk is not None
        filled = self.filled
        width = self._width(filled)
        uniform = self.chunk.real is None and len(set(filled)) == 1
        if uniform and self.chunk.length == 1 and not self.carries_mass:
            return None
        # Layers whose rows hold n entries more see n columns more, on the left.
        key = tuple(held - filled[0] for held in filled)
        bias = self.chunk.biases.get(key)
        if bias is None or bias.shape[-1] < width:
            hidden = torch.arange(width, device=query.device) >= self.visible()[..., None]
            bias = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
            bias = bias.masked_fill_(hidden, torch.finfo(query.dtype).min)[:, None]
            self.chunk.biases[key] = bias
        bias = bias[..., bias.shape[-1] - width :]
        if not self.carries_mass:
            return bias.contiguous()  # kernels on a GPU want a mask to begin where a vector begins
        return bias + self.log_mass[:, :, None, :width].to(query.dtype)

    def seen_by(self, module: nn.Module, query: Tensor) -> Tensor:
        """Return a module's queries, (b h*g q d), as those of the keys that `keys_seen` returns."""
        return query

    def keys_seen(self) -> Tensor:
        """Return the buffer's keys as compressors see them, (b h s d)."""
        return self.keys

    def attend_with_mass(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return a chunk's attention, (b q h*g d), and the mass that it gives each entry, (b h s), of one kernel.

        Args:
            query: After RoPE, (b h*g q d).
            key: What `update` returned, (b h s d).
            value: Likewise.
            scaling: Factor of the attention logits.
            softcap: Their cap.
            sinks: A logit per head, see `observe`.
        """
        return kernels.attention_with_mass(
            query,
            key,
            value,
            self.log_mass[:, :, : key.shape[2]],
            self.visible(),
            scaling=scaling,
            softcap=softcap,
            sinks=None if sinks is None else sinks.view(key.shape[1], -1),
            weight=self._weight(),
        )

    def _weight(self) -> Tensor | None:
        """Return how much each query of the chunk counts, 0 for padding, (b q); None: all the same."""
        assert self.chunk is not None
        return None if self.chunk.real is None else self.chunk.real.float()

    @torch.no_grad()
    def observe(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> None:
        """Take down what the compressor asked for from a chunk's queries.

        Args:
            query: After RoPE, (b h*g q d), as `seen_by` returns it.
            scaling: Factor of the attention logits.
            softcap: Their cap.
            sinks: A logit per head, beside those of the entries, that takes attention away from them, (h*g).
            mass: What these queries give each entry, (b h s), where attention has told; None: to be computed.
        """
        assert self.chunk is not None
        b, heads, q, d = query.shape
        h = self.keys.shape[1]
        self.scaling, self.softcap = scaling, softcap
        self.sinks = None if sinks is None else sinks.detach().float().view(h, heads // h)
        queries = query.view(b, h, heads // h, q, d)
        if "queries" in self.compressor.observes:
            if self.queries is None:
                with lasting():
                    self.queries = queries.new_zeros(b, h, heads // h, self.chunk_size, d)
            # A ring: the query of a row's n-th token lies at n modulo chunk_size.
            if self.chunk.real is None and len(set(self.rows.tokens)) == 1:
                start = self.rows.tokens[0] % self.chunk_size
                before, after = queries.split([min(q, self.chunk_size - start), max(0, start + q - self.chunk_size)], 3)
                self.queries[:, :, :, start : start + before.shape[3]] = before
                self.queries[:, :, :, : after.shape[3]] = after
            else:
                place = self.chunk.token_index % self.chunk_size
                row, column = self._real_columns()
                self.queries[row, :, :, place.expand(b, -1)[row, column]] = queries[row, :, :, column]
        if self.mass is not None:
            width = self._width(self.filled)
            self.latest = (query, self.mass.clone()) if self.chunk.recorded else None
            # Added once the whole chunk is read: one that is interrupted must leave no trace.
            self.pending_mass = mass
            if mass is None:
                self.pending_mass = attention_mass(
                    self.keys_seen()[:, :, :width],
                    self.log_mass[:, :, :width],
                    queries,
                    scaling=scaling,
                    softcap=softcap,
                    sinks=self.sinks,
                    visible=self.visible(),
                    weight=self._weight(),
                )

    def chunk_read(self) -> None:
        """Keep what was observed of a chunk, now that every layer has read it."""
        if self.mass is not None and self.pending_mass is not None:
            self.mass[:, :, : self.pending_mass.shape[2]] += self.pending_mass

    def read_again(self, beginning: Chunk) -> None:
        """Count only the beginning of the chunk that was read last; its entries and queries are in place already."""
        if self.latest is None:
            return
        query, self.mass = self.latest
        self.chunk = beginning
        sinks = None if self.sinks is None else self.sinks.flatten()
        self.observe(query[:, :, : beginning.length], self.scaling, self.softcap, sinks)
        self.chunk_read()
        self.chunk = self.pending_mass = None

    def compress(self, rows: list[int], shift: dict[int, int]) -> None:
        """Make slots of the entries of these rows.

        Args:
            rows: Rows whose buffer is full.
            shift: Per row how many positions its entries move towards 0, where they line up.
        """
        filled = self.filled
        groups: dict[int, list[int]] = defaultdict(list)
        for row in rows:
            groups[filled[row]].append(row)
        for count, group in groups.items():
            entries = self.entries(group, count)
            if count > self.num_slots:
                entries = self.compressor.compress(entries, self.num_slots, self.layer_idx)
                # A GPU is not asked, which would make the CPU wait for it: a bias of zeros costs less.
                log_mass = entries.log_mass
                self.carries_mass = self.carries_mass or log_mass.device.type != "cpu" or bool(log_mass.any())
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
            # The oldest query of a row lies where its next one goes.
            oldest = [self.rows.tokens[row] % self.chunk_size for row in rows]
            turned = [self.queries[row, None].roll(-place, 3) for row, place in zip(rows, oldest, strict=True)]
            queries = turned[0] if len(turned) == 1 else torch.cat(turned)
        return Entries(
            keys=self.keys[index][:, :, :count],
            values=self.values[index][:, :, :count],
            positions=self.positions[index][:, :, :count],
            log_mass=self.log_mass[index][:, :, :count],
            token_index=self.token_index[index][:, :, :count],
            mass=None if self.mass is None else self.mass[index][:, :, :count],
            remembered=None if self.remembered is None else self.remembered[index][:, :, :count],
            queries=queries,
            rotary=self.rotary,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
        )

    def _store(self, rows: list[int], entries: Entries) -> None:
        index = self._row_index(rows)
        for name in ("keys", "values", "positions", "log_mass", "token_index", "mass", "remembered"):
            new = getattr(entries, name)
            if new is None:
                continue
            self._writable(name, new)[index, :, : len(entries)] = new

    def _row_index(self, rows: list[int]) -> Tensor | slice:
        return slice(None) if len(rows) == len(self.held) else torch.tensor(rows, device=self.keys.device)

    def fork(self, rows: Rows) -> "SlotLayer":
        """Return a layer that holds the same and goes on by itself, with rows of its own."""
        made = copy.copy(self)
        made.rows, made.held, made.lent = rows, list(self.held), set()
        for name in self.row_tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(made, name, tensor.clone())
        return made

    def append_rows(self, other: "SlotLayer") -> None:
        """Hold the rows of another layer as well, behind these."""
        for name in self.row_tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, _appended(tensor, getattr(other, name)))
        self.held = self.held + other.held
        self.carries_mass = self.carries_mass or other.carries_mass

    def remove_row(self, row: int) -> None:
        """Let a row go; the last one takes its place, and no other is moved."""
        for name in self.row_tensors:
            if (tensor := getattr(self, name)) is not None:
                if row < len(tensor) - 1:
                    tensor[row] = tensor[-1]
                setattr(self, name, tensor[:-1])
        self.held[row] = self.held[-1]
        self.held.pop()

    def taken(self, indices: Tensor, rows: Rows) -> "SlotLayer":
        """Return a layer of these rows alone that goes on by itself, with rows of its own."""
        made = copy.copy(self)
        made.rows, made.lent = rows, set()
        made.select_rows(indices)
        return made

    def detach(self) -> None:
        """Cut the gradient off."""
        for name in self.row_tensors:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, tensor.detach())

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

    @property
    def nbytes(self) -> int:
        """Bytes of everything the layer holds."""
        tensors = (getattr(self, name) for name in self.row_tensors)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _appended(held: Tensor, new: Tensor) -> Tensor:
    """Return the rows of both, those held where they are as long as their storage has room, which it grows twofold."""
    rows, row_nbytes = len(held) + len(new), held[0].numel() * held.element_size()
    if held.untyped_storage().nbytes() < rows * row_nbytes or held.storage_offset():
        grown = held.new_empty(2 * rows, *held.shape[1:])
        grown[: len(held)] = held
        held = grown[: len(held)]
    whole = held.as_strided((rows, *held.shape[1:]), held.stride())
    whole[len(held) :] = new
    return whole


def _moved_back(entries: Entries, shift: list[int]) -> Entries:
    """Rotate entries by `shift` positions (one per row) towards 0, where they line up in their order."""
    distance = torch.tensor(shift, dtype=torch.float32, device=entries.keys.device)[:, None, None]
    # Tokens that stood beside each other still do, so that what they spell can be read off them.
    ranks = torch.arange(len(entries), device=distance.device).to(entries.positions)
    positions = (entries.positions - distance).maximum(ranks)
    return replace(
        entries, keys=entries.rotary.rotate(entries.keys, positions - entries.positions), positions=positions
    )
