"""Layers with a recurrent state, which is left as it is: alone, or beside attention that holds slots."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin, LinearAttentionLayer

from lococo.compressors.base import Compressor
from lococo.rope import LayerRotary
from lococo.rows import Rows
from lococo.slot_layer import SlotLayer

# What transformers keeps in such a layer, by number of the state.
STATES = ("conv_states", "recurrent_states")


class StateLayer(LinearAttentionLayer):
    """A recurrent state that gradients may flow through from call to call."""

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Take a new state in the place of the old one, which earlier steps of the graph may still need."""
        if recurrent_states.requires_grad:
            self.is_recurrent_states_initialized[state_idx] = True
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)


class StateSlotLayer(StateLayer, SlotLayer):  # type: ignore[override]
    """A slot layer that also carries a recurrent state, as those of Falcon-H1 do."""

    is_compileable = False

    def __init__(
        self,
        layer_idx: int,
        num_slots: int,
        chunk_size: int,
        compressor: Compressor,
        rows: Rows,
        rotary: LayerRotary,
        number_of_states: int = 1,
    ) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        SlotLayer.__init__(self, layer_idx, num_slots, chunk_size, compressor, rows, rotary)

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        """Allocate the buffer for keys and values, which come by place, or a state, which comes by name."""
        if args:
            SlotLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget everything that was read."""
        LinearAttentionLayer.reset(self)
        SlotLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams of a beam search."""
        map_states(self, lambda state: state.index_select(0, beam_idx.to(state.device)))
        SlotLayer.reorder_cache(self, beam_idx)

    def fork(self, rows: Rows) -> "StateSlotLayer":
        """Return a layer that holds the same and goes on by itself, with rows of its own."""
        made = super().fork(rows)
        assert isinstance(made, StateSlotLayer)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                setattr(made, name, dict(value))
        map_states(made, Tensor.clone)
        return made


def has_state(layer: object) -> bool:
    """Tell whether a layer carries a recurrent state."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def is_state(layer: object) -> bool:
    """Tell whether a layer is a recurrent state and nothing else."""
    return has_state(layer) and not isinstance(layer, CacheLayerMixin)


def map_states(layer: Any, function: Callable[[Tensor], Tensor]) -> None:
    """Put what a function makes of each state of a layer in its place."""
    for name in STATES:
        states = getattr(layer, name)
        states.update({number: function(state) for number, state in states.items() if state is not None})


def states_of(layer: object) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the states of a layer, if it has any: the name of their kind, their number, and the state."""
    for name in STATES:
        for number, state in getattr(layer, name, {}).items():
            if state is not None:
                yield name, number, state


def restore_states(layer: Any, states: dict[tuple[str, ...], Tensor]) -> None:
    """Put states into an empty layer, by the name of their kind and their number."""
    for (name, number), state in states.items():
        layer.lazy_initialization(**{name: state, "state_idx": int(number)})
        getattr(layer, name)[int(number)].copy_(state)
        layer.has_previous_state[int(number)] = True


@contextmanager
def states_of_readers(layers: Sequence[Any], counts: Sequence[int]) -> Iterator[None]:
    """Let layers change the states of rows that read something in the block, and of no others.

    Args:
        layers: With a state.
        counts: Tokens that each row of the batch reads; transformers takes a single column for a token in every row.
    """
    idle = [row for row, count in enumerate(counts) if not count]
    before = {}
    for place, layer in enumerate(layers):
        map_states(layer, _apart)
        if idle:
            before[place] = {name: dict(getattr(layer, name)) for name in STATES}
            map_states(layer, Tensor.clone)
    yield
    for place, states in before.items():
        for name, numbered in states.items():
            now = getattr(layers[place], name)
            for number, state in numbered.items():
                if now[number] is not None:
                    now[number][idle] = 0.0
                    if state is not None:  # a convolution that may have to forget holds more columns than before
                        now[number][idle, ..., -state.shape[-1] :] = state[idle]


def _apart(state: Tensor) -> Tensor:
    """Return a state that may be written to: earlier steps of the graph need it as it is."""
    return state.clone() if state.requires_grad else state
