"""Small learned changes of a model's norms, which hold only while it reads slots.

A model was trained on entries that stand for one token each. Its norms are a few ten thousand numbers that steer every
layer's inputs, and scaling them a little makes up for part of what compression takes away. A row that holds no slots
yet is read as the model would read it alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from lococo.graphs import marked

# Number of slots at which the changes hold in full; with more slots less has to be made up for.
REFERENCE_SLOTS = 64


class NormDeltas(nn.Module):
    """Relative changes of what each norm of a decoder puts out, (norms hidden)."""

    def __init__(self, names: list[str], hidden_size: int, *, exponent: float = 0.5) -> None:
        """Start without a change.

        Args:
            names: Of the norms within the decoder, see `norm_names`.
            hidden_size: What they put out.
            exponent: The changes shrink by (REFERENCE_SLOTS / num_slots) to this power.
        """
        super().__init__()
        self.names = list(names)
        self.exponent = exponent
        self.delta = nn.Parameter(torch.zeros(len(names), hidden_size))
        # What each norm's output is multiplied by, (norms rows 1 hidden), while the changes hold.
        self._factors: Tensor | None = None

    @contextmanager
    def holding(self, rows: list[bool], num_slots: float, *, always: bool = False) -> Iterator[None]:
        """Let the changes hold for these rows of the batch until the block ends; see `SlotCache.norms_holding`."""
        if always or any(rows):
            strength = (REFERENCE_SLOTS / num_slots) ** self.exponent
            holding = torch.tensor(rows)[:, None, None].to(self.delta)
            self._factors = 1 + self.delta[:, None, None] * (strength * holding)
        try:
            yield
        finally:
            self._factors = None

    def install(self, decoder: PreTrainedModel) -> list[RemovableHandle]:
        """Put the changes behind the decoder's norms; the handles take them away again."""
        return [
            decoder.get_submodule(name).register_forward_hook(self._hook(number))
            for number, name in enumerate(self.names)
        ]

    def _hook(self, number: int):  # type: ignore[no-untyped-def]
        def scaled(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            if self._factors is None:
                return output
            factors = self._factors[number].to(output.dtype)
            # The output is the norm's own and new: without a gradient nobody needs it as it was.
            return output * factors if output.requires_grad or factors.requires_grad else output.mul_(factors)

        return marked(scaled)


def norm_names(decoder: PreTrainedModel) -> list[str]:
    """Return the names of the norms whose weights span the hidden size, in order."""
    hidden = decoder.config.get_text_config(decoder=True).hidden_size
    return [
        name
        for name, module in decoder.named_modules()
        if "norm" in type(module).__name__.lower()
        and isinstance(getattr(module, "weight", None), nn.Parameter)
        and tuple(module.weight.shape) == (hidden,)
    ]


def norms_of(compressor: object) -> NormDeltas | None:
    """Return the changes of norms that a compressor brings along, if any."""
    norms = getattr(compressor, "norms", None)
    return norms if isinstance(norms, NormDeltas) else None
