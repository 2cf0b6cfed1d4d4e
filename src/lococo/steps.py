"""Decoding as one compiled graph.

A decoding step reads one token per row. What takes its time is not arithmetic but some thousand calls around it. Slots
live in buffers that never change their shape, so the whole decoder can be compiled, once for the life of a cache: what
changes from step to step, such as where a row's next entry goes, comes in tensors. A `StepCache` shows a SlotCache in
that form to the model's own forward; it holds nothing itself. `SlotLayer` does the same call by call, and is what tests
compare with.
"""

import functools
from collections.abc import Callable
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import MoeModelOutputWithPast

from lococo import loops
from lococo.cache import SlotCache
from lococo.cache_name import CACHE_NAMES, cache_name
from lococo.fast import fast
from lococo.graphs import Graphs, kind_of
from lococo.norms import norms_of
from lococo.slot_layer import SlotLayer

# What a decoder reads: one of them.
INPUTS = ("input_ids", "inputs_embeds")

# What a step may be asked for; a call with more is read the plain way.
KNOWN = {*INPUTS, "position_ids", "attention_mask", "use_cache", "slot_cache", *CACHE_NAMES}


class StepLayer(CacheLayerMixin):
    """One slot layer's buffers, which a step reads whole and writes at `place`."""

    is_sliding = False
    is_compileable = True

    keys: Tensor
    values: Tensor
    positions: Tensor
    log_mass: Tensor
    token_index: Tensor
    mass: Tensor | None
    remembered: Tensor | None
    queries: Tensor | None

    def __init__(self, step: "StepCache", layer_idx: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer_idx = layer_idx
        self.is_initialized = True
        self.step = step
        self.buffers: list[Tensor | None] = []
        self.kind = 0
        # Whether there is a loop for the attention of one query, see `loops`.
        self.looped = False
        # Attention mass of the step's queries, until the step is counted, (b h s); None: nobody asks for it.
        self.pending: Tensor | None = None

    def show(self, layer: SlotLayer, place: Tensor) -> None:
        """Take a layer's buffers, and where each row's next entry goes, (b)."""
        buffers = [getattr(layer, name) for name in SlotLayer.row_tensors]
        if [*map(id, buffers)] != [*map(id, self.buffers)]:
            self.buffers = buffers
            for name, buffer in zip(SlotLayer.row_tensors, buffers, strict=True):
                setattr(self, name, buffer)
            self.looped = loops.attends(self.keys, self.values)
            self.kind = _number(tuple(None if buffer is None else kind_of(buffer) for buffer in buffers))
        self.place = place
        if layer.mass is not None and (self.pending is None or self.pending.shape != layer.mass.shape):
            self.pending = torch.zeros_like(layer.mass)
        layer.pending_mass = self.pending

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one key and value per row, (b h 1 d); return the whole buffers, (b h s d)."""
        step, rows, place = self.step, self.step.rows, self.place
        heads = key_states.shape[1]
        self.keys[rows, :, place] = key_states[:, :, 0]
        self.values[rows, :, place] = value_states[:, :, 0]
        self.positions[rows, :, place] = step.positions[:, None].expand(-1, heads)
        self.token_index[rows, :, place] = step.tokens[:, None].expand(-1, heads)
        self.log_mass[rows, :, place] = 0.0
        for zero in (self.mass, self.remembered):
            if zero is not None:
                zero[rows, :, place] = 0.0
        return self.keys, self.values

    def attention_bias(self, query: Tensor) -> Tensor:
        """Return log_mass, and what hides the part of the buffer that is not filled, (b h*g 1 s)."""
        bias = self.shared_bias(query)
        return bias.repeat_interleave(query.shape[1] // bias.shape[1], 1)

    def shared_bias(self, query: Tensor) -> Tensor:
        """Return `attention_bias` once for all query heads that share a key/value head, (b h 1 s)."""
        return self._bias().to(query.dtype)

    def seen_by(self, module: nn.Module, query: Tensor) -> Tensor:
        """Return a module's queries, (b h*g q d), as they are."""
        return query

    def observe(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None = None,
        mass: Tensor | None = None,
    ) -> None:
        """Take down what the compressor asked for of a step's queries, (b h*g 1 d); see `SlotLayer.observe`."""
        b, heads, _, d = query.shape
        h = self.log_mass.shape[1]
        queries = query.view(b, h, heads // h, d)
        if self.queries is not None:
            self.queries[self.step.rows, :, :, self.step.ring] = queries
        if self.pending is not None:
            logits = (queries.float() * scaling) @ self.keys.float().transpose(2, 3)
            if softcap is not None:
                logits = (logits / softcap).tanh() * softcap
            logits = logits + self._bias()
            if sinks is not None:
                beside = sinks.float().view(1, h, heads // h, 1).expand(b, -1, -1, -1)
                logits = torch.cat([logits, beside], -1)
            self.pending.copy_(logits.softmax(-1)[..., : self.pending.shape[-1]].sum(2))

    def entry_bias(self) -> Tensor:
        """Return log_mass, and -inf for entries that are not filled, (b h s) in float32."""
        width = self.log_mass.shape[-1]
        hidden = torch.arange(width, device=self.place.device) > self.place[:, None]
        return self.log_mass.masked_fill(hidden[:, None], -torch.inf)

    def _bias(self) -> Tensor:
        return self.entry_bias()[:, :, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: buffers are those of the slot layer."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of transformers' mask, which slots do not use."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Return 0: positions are given with every step."""
        return 0

    def get_max_length(self) -> int:
        """Return -1: any number of tokens can be read."""
        return -1


class StepCache(Cache):
    """A SlotCache as a graph wants it; of fixed shape, with all that changes in tensors.

    Attributes:
        kind: What else a graph depends on: of each layer which buffers there are, and of what shapes.
    """

    def __init__(self, number: int) -> None:
        super().__init__(layers=[StepLayer(self, layer_idx) for layer_idx in range(number)])

    def attended(self, layer_idx: int, key: Tensor) -> StepLayer:
        """Return the layer that an attention module looks into: its own."""
        return cast(StepLayer, self.layers[layer_idx])

    def show(self, cache: SlotCache, positions: Tensor) -> None:
        """Take a cache's buffers, and what its next step needs to know; positions are (b 1) or (1 1)."""
        tokens, device = cache.rows.tokens, positions.device
        self.rows = torch.arange(len(tokens), device=device)
        self.tokens = torch.tensor(tokens, device=device)
        self.ring = self.tokens % cache.chunk_size
        self.positions = positions[:, 0].float().expand(len(tokens)).contiguous()
        layers = cache.slot_layers
        places = torch.tensor([layer.filled for layer in layers], device=device).unbind()
        for mine, layer, place in zip(self.layers, layers, places, strict=True):
            cast(StepLayer, mine).show(layer, place)
        self.kind = tuple(cast(StepLayer, mine).kind for mine in self.layers)


class Steps:
    """Reads one token per row by a compiled forward of a decoder; made anew with every attachment, compiled once."""

    def __init__(self, forward: Callable[..., Any], decoder: PreTrainedModel) -> None:
        self.forward = forward
        self.decoder = decoder
        self.name = cache_name(decoder)
        self.graphs = Graphs(_decoder_step, decoder)

    def takes(self, cache: SlotCache, arguments: dict[str, Any]) -> bool:
        """Tell whether a call can be such a step: one token in every row of a cache that has read something."""
        inputs = next((arguments[name] for name in INPUTS if arguments.get(name) is not None), None)
        asked = {name for name, value in arguments.items() if value is not None and value is not False}
        config = self.decoder.config.get_text_config(decoder=True)
        return (
            fast()
            and not (getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False))
            and arguments.get("return_dict") is not False
            and inputs is not None
            and inputs.shape[1] == 1
            and cache.rows.seen > 0
            and asked <= KNOWN
            and all(type(layer) is SlotLayer for layer in cache.layers)
            and not torch.is_grad_enabled()
        )

    def __call__(self, cache: SlotCache, position_ids: Tensor, **inputs: Any) -> MoeModelOutputWithPast:
        """Read the step, inside the cache's chunk; inputs are input_ids or inputs_embeds."""
        if cache.step is None:
            cache.step = StepCache(len(cache.layers))
        position_ids = position_ids.contiguous()  # slices of whatever strides are one kind
        cache.step.show(cache, position_ids)
        inputs = {name: None if value is None else value.detach().contiguous() for name, value in inputs.items()}
        given = {"position_ids": position_ids} | {name: value for name, value in inputs.items() if value is not None}
        # The cache's own changes of norms hold, whichever compressor the model is attached with.
        kind = (
            cache.step.kind,
            norms_of(cache.compressor),
            tuple((name, kind_of(value)) for name, value in given.items()),
        )
        with cache.norms_holding(always=True):
            hidden = self.graphs(kind, self.forward, self.name, cache.step, position_ids, **inputs)
        output: dict[str, Any] = {"last_hidden_state": hidden, self.name: cache}
        return MoeModelOutputWithPast(**output)


@functools.cache
def _number(kind: Any) -> int:
    """Return the number of a kind of buffers, which is hashed sooner with every step than all that it stands for."""
    return next(_numbers)


_numbers = count(1)


def _decoder_step(
    forward: Callable[..., Any], name: str, cache: StepCache, position_ids: Tensor, **inputs: Any
) -> Tensor:
    output = forward(position_ids=position_ids, **{name: cache}, slot_cache=cache, use_cache=True, **inputs)
    return cast(Tensor, output.last_hidden_state)
